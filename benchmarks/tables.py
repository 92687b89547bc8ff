"""Rewrite the tables of docs/results/README.md from the CSV files beside it: `python -m benchmarks.tables [FOLDER]`.

A table follows a line `<!-- rows of FILE.csv ... -->`. Its layout has the name of the first file, unless the line names
another one: `<!-- rows of FILE.csv: LAYOUT -->`. The targets follow `<!-- targets -->`.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import targets
from benchmarks.arguments import refused

Row = dict[str, str]
_MARK = re.compile(
    r"<!-- (?:targets|rows of (?P<files>[\w. ]+\.csv)(?:: (?P<layout>\w+))?) -->\n\n"  # the mark and an empty line
    r"(?P<table>(?:\|.*\n)+)"
)


def _case(row: Row) -> str:
    return f"`{row['case']}`"


def _number(column: str, decimals: int = 0) -> Callable[[Row], str]:
    """A cell with a column's number; empty if the row has none."""
    return lambda row: f"{float(row[column]):,.{decimals}f}" if row[column] else ""


def _spread(phase: str) -> Callable[[Row], str]:
    """A cell with the median of a phase and its extremes."""

    def cell(row: Row) -> str:
        median, low, high = (float(row[f"{phase}{which}_ms"]) for which in ("", "_min", "_max"))
        return f"{median:,.0f} ({low:,.0f} - {high:,.0f})"

    return cell


def _sizes(row: Row) -> str:
    """AIR's sizes; empty for a router that has none."""
    if row["case"].startswith(("TopKRouter", "ProductKeyRouter")):
        return ""
    return ", ".join(f"{int(row[name]):,}" for name in ("clusters", "shortlist", "probes", "candidates"))


def _experts(row: Row) -> str:
    return f"{int(row['experts']):,}"


def _ranks(row: Row) -> str:
    return f"{row['topk']}, {row['ranks']}"


_PHASES = {"forward ms": _number("forward_ms"), "backward ms": _number("backward_ms")}
_TOTAL = {"total ms (min - max)": _spread("total")}
_BOUND = {"bound ms": _number("bound_ms", 1), "times its bound": _number("times_bound", 2)}
_AIR = {"C, L, P, M": _sizes}
_PEAKS = {"peak MiB": _number("peak_mib"), "with a rebuild": _number("peak_with_rebuild_mib")}
LAYOUTS: dict[str, dict[str, Callable[[Row], str]]] = {
    "router": {
        "": _case, **_PHASES, **_TOTAL, "times faster": _number("times_faster", 2),
        "time / one probe's": _number("times_one_probe", 2), **_AIR, **_BOUND,
    },
    "recall": {
        "": _case, "E": _experts, "K": lambda row: row["topk"], **_AIR,
        "top-k recall": _number("topk_recall", 3), "mass recall": _number("mass_recall", 3),
    },
    "growth": {"": _case, **_PHASES, **_TOTAL, "times slower": _number("times_slower", 2), **_AIR, **_BOUND},
    "scaling": {"E": _experts, "": _case, **_TOTAL, "times ours": _number("times_ours", 2), **_PEAKS},
    "layer": {
        "": _case, "E": _experts, **_PHASES, **_TOTAL, "times ours": _number("times_ours", 2), **_PEAKS, **_BOUND,
    },
    "dispatch": {
        "": _case, **_PHASES, **_TOTAL, "times faster": _number("times_faster", 2),
        "MiB to the other rank": _number("forward_remote_mib", 1), **_BOUND,
    },
    "sharding": {
        "K, ranks": _ranks, "": _case, **_PHASES, "reduce and Adam ms": _number("optimizer_ms"), **_TOTAL,
        "times faster": _number("times_faster", 2), "MiB of weights, gradients, moments": _number("state_mib"),
        "MiB reduced": _number("reduced_mib"), "MiB to other ranks in a forward": _number("forward_remote_mib", 2),
    },
    "sharding_rebuild": {
        "K, ranks": _ranks, "": _case, "milliseconds spread over ranks (min - max)": _spread("rebuild"),
        "milliseconds in full (min - max)": _spread("rebuild_in_full"),
    },
    "refresh": {"": _case, **_PHASES, **_TOTAL, "percent of a layer's step": _number("percent_of_step", 2), **_BOUND},
    "diagnostics": {
        "": _case, **_TOTAL, "percent of a layer's step, one step in 100 measured": _number("percent_of_step", 3),
    },
    "train": {"": _case, **_PHASES, **_TOTAL, "times faster": _number("times_faster", 2), **_BOUND},
}  # fmt: skip
"""Name of a layout -> heading of each column -> function that makes its cell."""


def table(rows: list[Row], layout: str) -> str:
    """The rows as a table in Markdown."""
    columns = LAYOUTS[layout]
    lines = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    heading, *body = ("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|\n" for line in lines)
    return "".join((heading, "|---" * len(columns) + "|\n", *body))


def filled(text: str, folder: Path) -> str:
    """A document's text with all of its marked tables rewritten from the files in ``folder``.

    Raises:
        ValueError: naming a file that a mark refers to and that has no rows.
    """

    def replaced(match: re.Match) -> str:
        mark = match[0].removesuffix(match["table"])
        if match["files"] is None:
            lines = targets.table(folder).splitlines()
            return mark + "".join(f"{line}\n" for line in lines if line.startswith("|"))
        rows = []
        for file in match["files"].split():
            rows_of_file = targets.read(folder, file)
            if not rows_of_file:
                raise ValueError(f"{file} has no rows in {folder}")
            rows += rows_of_file
        return mark + table(rows, match["layout"] or match["files"].partition(".")[0])

    return _MARK.sub(replaced, text)


def main(argv: Sequence[str] | None = None) -> None:
    """Rewrite the tables of a folder's README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/results"), help="of README.md and CSV files")
    args = parser.parse_args(argv)
    document = args.folder / "README.md"
    with refused(parser):
        document.write_text(filled(document.read_text(), args.folder))


if __name__ == "__main__":
    main()
