"""Run a benchmark: `python benchmarks/run.py NAME [--out FILE.csv]`; `--help` lists names and sizes."""

import argparse
import importlib
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

NAMES = {
    "router": "AIRRouter against TopKRouter, forward and backward",
    "growth": "AIRRouter at growing numbers of experts",
    "layer": "the whole layer against PEER: time and peak memory",
}


def main() -> None:
    """Parse the command line, run the benchmark, print its rows and write them as CSV."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    benchmarks = parser.add_subparsers(dest="name", required=True)
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in NAMES}
    for name, module in modules.items():
        sub = benchmarks.add_parser(name, help=NAMES[name], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        module.add_arguments(sub)
        sub.add_argument("--repetitions", type=int, default=5, help="counted runs of each contender")
        sub.add_argument("--warmup", type=int, default=1, help="uncounted runs of each, first")
        sub.add_argument("--out", type=Path, help="CSV file to write the rows to")
    args = parser.parse_args()

    from benchmarks.measure import write_rows

    rows = modules[args.name].run(args)
    phases = ("forward_ms", "backward_ms", "total_ms", "total_min_ms", "total_max_ms")
    figures = ("times_faster", "times_slower", "peak_mib", "peak_with_rebuild_mib")
    shown = ("contender", *phases, *(name for name in figures if name in rows[0]))
    widths = [max(len(name), *(len(str(row[name])) for row in rows)) for name in shown]
    for cells in (shown, *([str(row[name]) for name in shown] for row in rows)):
        sys.stdout.write("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) + "\n")
    if args.out is not None:
        write_rows(rows, args.out)
        sys.stdout.write(f"rows written to {args.out}\n")


if __name__ == "__main__":
    main()
