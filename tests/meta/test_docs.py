"""The pages: their tables are narrow, their links lead somewhere, their tests exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import tq_fast
from tests.meta.pages import (
    DOCS,
    PAGES,
    ROOT,
    SITE_PAGES,
    anchors,
    blocks,
    page_id,
    prose,
    rows,
    shown,
)
from tq_fast import presets
from tq_fast.ops import _dispatch, describe_backends

# A cell of more characters is a paragraph, which a table makes hard to read.
MAX_CELL = 80
# Code of longer lines is cut off at the edge of a page of the site.
MAX_CODE = 84


def _tests_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_no_cell_of_a_table_is_a_paragraph(page: Path) -> None:
    long = [
        f"{page_id(page)}:{line}: {len(shown(cell))} characters: {shown(cell)}"
        for line, cells in rows(page)
        for cell in cells
        if len(shown(cell)) > MAX_CELL
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("page", [ROOT / "README.md", *SITE_PAGES], ids=page_id)
def test_no_line_of_code_is_wider_than_a_page(page: Path) -> None:
    lines = [line for block in blocks(page) for line in block.text.splitlines()]
    assert [line for line in lines if len(line) > MAX_CODE] == []


@pytest.mark.parametrize(
    ("name", "fewest"), [("loading-models", 28), ("rewards", 12), ("prompts", 6)]
)
def test_every_row_about_models_rewards_and_prompts_names_its_test(name: str, fewest: int) -> None:
    page = DOCS / "guide" / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    notes = dict(re.findall(r"(?m)^\[\^([\w-]+)\]: (`tests/[\w/]+\.py::\w+`)$", text))
    head, *tested = [cells[0] for _, cells in rows(page)]
    assert head.endswith("(tested)") and len(tested) >= fewest
    marks = [re.search(r"\[\^([\w-]+)\]", cell) for cell in tested]
    assert [cell for cell, mark in zip(tested, marks, strict=True) if mark is None] == []
    assert {mark[1] for mark in marks if mark} <= set(notes)
    # Every note is referred to, in a table or in the prose.
    assert [mark for mark in notes if text.count(f"[^{mark}]") < 2] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text(encoding="utf-8")):
        path = ROOT / file
        assert path.is_file() and name in _tests_of(path), f"{page.name}: {file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)", prose(page)):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        path = page.parent / file if file else page
        assert path.exists(), f"{page_id(page)} links to {target}"
        if anchor:
            assert anchor in anchors(path), f"{page_id(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_of_the_repository_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:tq_fast|tests|bench|docs|csrc|scripts)/[\w./-]+?\.\w+)(?:::\w+)?`", prose(page)
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_page_stands_in_the_navigation_of_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = re.findall(r"[\w/-]+\.md", navigation)
    # A notebook stands there under the name of the page that it becomes.
    pages = [*SITE_PAGES, *(notebook.with_suffix(".md") for notebook in DOCS.rglob("*.ipynb"))]
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in pages)


def test_the_ticks_of_the_ops_are_the_backends_that_they_have() -> None:
    head, *body = [cells for _, cells in rows(DOCS / "reference" / "ops.md") if len(cells) == 5]
    assert [cell.lower() for cell in head[2:]] == ["cpu", "triton", "cuda"]
    ticked = {
        shown(op): {name.lower() for name, cell in zip(head[2:], cells, strict=True) if cell}
        for op, _, *cells in body
    }
    assert all(reference == "✓" for _, reference, *_ in body)
    declared = {
        name: {backend.name for backend in op._backends} for name, op in _dispatch._OPS.items()
    }
    assert ticked == {name: declared[name] for name in describe_backends()}


def test_the_reference_has_every_public_name_every_method_and_every_op() -> None:
    text = {
        name: (DOCS / "reference" / f"{name}.md").read_text(encoding="utf-8")
        for name in ("api", "methods", "ops")
    }
    errors = re.findall(r"members: \[(\w+Error.*)\]", text["api"])[0].split(", ")
    shown_names = {*re.findall(r"(?m)^::: tq_fast\.(\w+)$", text["api"]), *errors}
    modules = {"__version__", "ops", "presets", "DecodeOptions"}
    assert set(tq_fast.__all__) - modules - shown_names == set()
    assert re.findall(r"(?m)^        - (\w+)$", text["methods"]) == list(presets.METHODS)
    ops = re.findall(r"(?m)^::: tq_fast\.ops(?:\.\w+)?\.(\w+)$", text["ops"])
    references = {name for name in tq_fast.ops.__all__ if name.endswith("_ref")}
    assert set(tq_fast.ops.__all__) - references - set(ops) == set()
