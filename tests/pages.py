"""The pages of the documentation, and the code blocks in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
)
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^`\n]*)\n(?P<text>.*?)^(?P=indent)```\s*?$", re.M | re.S)
NOT_RUN = re.compile(r"<!-- not run:(?P<reason>.*?)-->\s*\Z", re.S)


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        page: file that it stands in.
        line: of its first line of code, from 1.
        language: what the fence says, "" for none.
        text: its code, without the indentation of the fence.
        not_run: why it isn't run, from the comment `<!-- not run: … -->` before it; None: it is.
    """

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def code(self) -> str:
        """The code, as far down as it stands in its page: what it raises names the page's lines."""
        return "\n" * (self.line - 1) + self.text


def blocks(page: Path) -> list[Block]:
    """Return the code blocks of a page, from top to bottom."""
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        why = NOT_RUN.search(text, 0, match.start())
        indent = match["indent"]
        code = "".join(line.removeprefix(indent) for line in match["text"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(page, line, match["language"].strip(), code, why and why["reason"].strip()))
    return found


def tables(page: Path, heading: str) -> list[list[list[str]]]:
    """Return the tables below a heading, up to the next heading, as rows of cells; without the rows of dashes."""
    text = page.read_text()
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.M | re.S)
    assert section, f"{page.name} has no heading {heading!r}"
    found: list[list[list[str]]] = []
    inside = False
    for line in section[1].splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            found.append([])
        inside = True
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
            found[-1].append(cells)
    return found
