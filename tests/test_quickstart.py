"""The notebook of the documentation: its code runs, and what it shows is what the code gives."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

NOTEBOOK = Path(__file__).parents[1] / "docs" / "start" / "quickstart.ipynb"


def run_cell(source: str, names: dict[str, Any]) -> tuple[str, Any]:
    """Run the code of a cell; return what it printed and what its last expression gave."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "<cell>", "exec"), names)
        value = None
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    return printed.getvalue(), value


def stored(cell: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Return what a stored cell printed, and what it shows, by the type of the data."""
    printed, shown = "", {}
    for output in cell["outputs"]:
        assert output["output_type"] != "error"
        if output["output_type"] == "stream":
            assert output["name"] == "stdout", "".join(output["text"])
            printed += "".join(output["text"])
        else:
            shown = {kind: "".join(data) for kind, data in output["data"].items()}
    return printed, shown


@pytest.fixture
def quiet_transformers() -> Any:
    yield
    # A cell switches the progress bars of transformers off.
    logging.enable_progress_bar()


def test_the_notebook_shows_what_its_code_gives(quiet_transformers: Any) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    codes = [cell for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    kinds = []
    for number, cell in enumerate(codes, start=1):
        assert cell["execution_count"] == number, "the cells were run in their order, once"
        printed, value = run_cell("".join(cell["source"]), names)
        was_printed, shown = stored(cell)
        assert was_printed == printed
        if hasattr(value, "_repr_png_"):
            # The bytes of a picture depend on the release of matplotlib.
            assert value._repr_png_().startswith(b"\x89PNG")
            assert shown["image/png"].startswith("iVBORw0KGgo")
        elif hasattr(value, "_repr_html_"):
            assert shown["text/html"] == value._repr_html_()
            assert shown["text/plain"] == f"DecodeResult of {len(value.sequences)} responses"
        elif value is not None:
            assert shown["text/plain"] == repr(value)
        kinds += shown
    assert "image/png" in kinds and "text/html" in kinds


def test_the_notebook_names_no_folder_of_the_machine_that_ran_it() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(tmp|home|root|work)/|site-packages", text)
    assert len(text) < 300_000
