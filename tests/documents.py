"""How tests read the README and the pages of docs: their blocks, sections and tables."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FENCE = re.compile(r" *(```+)(.*)")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> Iterator[tuple[str, int, str]]:
    """Language, line number and text of each fenced block."""
    language, first, lines = None, 0, []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fence = FENCE.fullmatch(line)
        if fence and language is None:
            language, first, lines = fence[2].strip(), number, []
        elif fence:
            yield language, first, "".join(f"{line}\n" for line in lines)
            language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{name_of(path)}:{first}: the block is not closed"


def prose(path: Path) -> str:
    """The text of a document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def sections(path: Path) -> dict[str, str]:
    """The text under each heading, up to the next one of any level."""
    parts = re.split(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def section(path: Path, heading: str) -> str:
    """The text under a heading, up to the next one of any level."""
    return sections(path)[heading]


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    """The anchors of the headings of a document."""
    return set(map(anchor_of, re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)))


def cells(text: str) -> Iterator[tuple[str, str, str]]:
    """First cell of the row, head of the column and text of each cell that is in neither, in all tables of a text."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        (_, *heads), _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        for first, *values in rows:
            for head, value in zip(heads, values, strict=True):
                yield first, head, value
