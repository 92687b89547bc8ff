"""Time one benchmark on two commits in turn: `python -m benchmarks.compare BASE [--bench NAME] [flags of NAME]`.

BASE is checked out beside this tree and removed again at the end. Each round runs the benchmark once on either tree, so
that a drift of the machine's speed meets both alike. Uncommitted changes of this tree are timed as they are.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas

from benchmarks import ROOT
from benchmarks.arguments import BENCHMARKS, positive, refused

_KEYS = ["case", "experts"]
_TIMED = tuple(name for name in BENCHMARKS if name != "recall")
_OLD_COLUMNS = {"contender": "case"}  # column names of older commits


def check_commit(commit: str) -> None:
    """Raise ValueError if the repository has no such commit."""
    words = ["git", "-C", ROOT, "rev-parse", "--quiet", "--verify", f"{commit}^{{commit}}"]
    if subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        raise ValueError(f"{commit!r} must be a commit of this repository")


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A folder that holds the commit while the context lasts."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        git = ["git", "-C", ROOT, "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", tree, commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)


def time_tree(tree: Path, bench: str, flags: Sequence[str]) -> pandas.DataFrame:
    """Run the benchmark once on the sources of the tree, in a process of its own, and return its rows.

    Raises:
        SystemExit: with the status of the benchmark, if it fails. It has said why.
        ValueError: if several rows have the same case and experts.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.csv"
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.run", bench, "--out", rows, *flags]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        status = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL).returncode
        if status:
            sys.exit(status)
        table = pandas.read_csv(rows).rename(columns=_OLD_COLUMNS)
    check_rows(table, bench)
    return table


def check_rows(rows: pandas.DataFrame, bench: str) -> None:
    """Raise ValueError if rows of a benchmark cannot be told apart by case and experts."""
    repeated = rows[rows.duplicated(_KEYS)]
    if len(repeated):
        case, experts = repeated[_KEYS].iloc[0]
        raise ValueError(f"{bench}: rows must differ in case and experts, but {case!r} with E = {experts} occurs twice")


def summarize(base: list[pandas.DataFrame], this: list[pandas.DataFrame]) -> pandas.DataFrame:
    """A row per case: medians of both trees, and this tree's time over the base's, with its spread over the rounds.

    Args:
        base: rows of each round, of BASE.
        this: rows of each round, of this tree.

    Example: rounds of 10 and 20 ms on BASE, and of 5 and 12 ms here, give ratios 0.5 and 0.6, median 0.55.
    """
    of_base, of_this = (
        pandas.concat([rows.set_index(_KEYS)["total_ms"] for rows in rounds], axis=1) for rounds in (base, this)
    )
    of_base.columns = of_this.columns = range(len(base))
    ratios = of_this / of_base  # NaN for a case that one tree lacks
    table = {
        "base ms": of_base.median(axis=1),
        "this ms": of_this.median(axis=1),
        "ratio": ratios.median(axis=1),
        "min": ratios.min(axis=1),
        "max": ratios.max(axis=1),
    }
    return pandas.DataFrame(table).reset_index()


def main(argv: Sequence[str] | None = None) -> pandas.DataFrame:
    """Parse the command line, time both trees and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("--bench", choices=_TIMED, default="router", help="name of the benchmark (default: router)")
    parser.add_argument("--rounds", type=positive, default=3, help="runs on either tree (default: 3)")
    args, flags = parser.parse_known_args(argv)
    with refused(parser):
        check_commit(args.base)
    base, this = [], []
    with refused(parser), checkout(args.base) as tree:
        for number in range(args.rounds):
            base.append(time_tree(tree, args.bench, flags))
            this.append(time_tree(ROOT, args.bench, flags))
            sys.stderr.write(f"round {number + 1} of {args.rounds} done\n")
    table = summarize(base, this)
    sys.stdout.write(table.to_string(index=False, float_format="{:.3f}".format) + "\n")
    sys.stdout.write(f"ratio: time of this tree over that of {args.base}; median, least and largest of the rounds\n")
    return table


if __name__ == "__main__":
    main()
