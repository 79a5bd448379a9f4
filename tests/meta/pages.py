"""The pages of the documentation and the README: their tables, links and blocks of code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SITE_PAGES = sorted(DOCS.rglob("*.md"))
PAGES = [
    *SITE_PAGES,
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")),
    ROOT / "tq_fast" / "models" / "tiny" / "README.md",
]

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*$")


class Block(NamedTuple):
    """A fenced block of code: `note` is the comment on the line above it, or empty."""

    language: str
    text: str
    line: int
    note: str


def page_id(path: Path) -> str:
    """Name a page in the report of the tests."""
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page, without the indent of the list that holds them."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start: int | None = None
    opened: re.Match[str] | None = None
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        if opened is None and fence:
            start, opened = number, fence
        elif opened is not None and start is not None and line.strip() == "```":
            indent = len(opened["indent"])
            text = "\n".join(inner[indent:] for inner in lines[start + 1 : number])
            above = lines[start - 1].strip() if start else ""
            note = above.removeprefix("<!--").removesuffix("-->").strip()
            yield Block(opened["language"], text, start + 1, note if above != note else "")
            start, opened = None, None
    assert opened is None, f"{page_id(page)}: the block of line {start} has no end"


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    kept, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if _FENCE.match(line) or (inside and line.strip() == "```"):
            inside = not inside
            kept.append("")
        else:
            kept.append("" if inside else line)
    return "\n".join(kept)


def rows(page: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and cells of every row of a table, the line below its head left out."""
    for number, line in enumerate(prose(page).splitlines(), start=1):
        row = line.strip()
        if row.startswith("|") and not re.fullmatch(r"[|:\s-]+", row):
            cells = re.split(r"(?<!\\)\|", row.removeprefix("|").removesuffix("|"))
            yield number, [cell.strip() for cell in cells]


def shown(cell: str) -> str:
    """Return what a reader sees of a cell: no targets of links, no marks of footnotes or code."""
    cell = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", cell)
    cell = re.sub(r"\[\^[\w-]+\]", "", cell)
    return re.sub(r"[`*\\]", "", cell)


def anchors(page: Path) -> set[str]:
    """Return the anchors that the headings of a page get, and the names that it documents."""
    found = set(re.findall(r"(?m)^::: ([\w.]+)$", page.read_text(encoding="utf-8")))
    for heading in re.findall(r"(?m)^#+ +(.*)$", prose(page)):
        named = re.search(r"\{ *#([\w.-]+) *\}$", heading)
        plain = re.sub(r"[^\w\s-]", "", shown(heading)).strip().lower()
        found.add(named[1] if named else re.sub(r"[-\s]+", "-", plain))
    return found
