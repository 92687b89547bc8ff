"""Run a benchmark: `python -m benchmarks.run NAME [--out FILE.csv]`; `--help` lists names and sizes."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas

from benchmarks.arguments import BENCHMARKS, not_negative, positive, refused

# All cases use huge pages if the kernel gives them on request. torch reads this variable once, at its first
# allocation, so it is set before anything imports torch.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_TIMES = ("forward_ms", "backward_ms", "optimizer_ms", "total_ms", "total_min_ms", "total_max_ms")
_FIGURES = (
    *("launches", "topk_recall", "mass_recall", "times_faster", "times_one_probe", "times_slower", "times_ours"),
    *("percent_of_step", "peak_mib", "peak_with_rebuild_mib"),
    *("state_mib", "reduced_mib", "forward_remote_mib", "bound_ms", "times_bound", "gflops_per_s", "gbytes_per_s"),
)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Parse the command line, run the benchmark, print its rows and write them as CSV; returns the rows."""
    logging.basicConfig(format="%(message)s")
    for name in ("benchmarks", "air_moe_megatron"):  # not Megatron's loggers, which list every parameter
        logging.getLogger(name).setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__)
    benchmarks = parser.add_subparsers(dest="name", required=True)
    modules = {name: importlib.import_module(f"benchmarks.{name}") for name in BENCHMARKS}
    for name, module in modules.items():
        sub = benchmarks.add_parser(name, help=BENCHMARKS[name], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        module.add_arguments(sub)
        sub.add_argument("--repetitions", type=positive, default=5, help="counted runs of each case")
        sub.add_argument("--slow-repetitions", type=positive, default=3, help="at most, of each slow baseline")
        sub.add_argument("--warmup", type=not_negative, default=1, help="uncounted runs before each counted one")
        sub.add_argument("--dtype", choices=("fp32", "bf16"), help="of tokens and weights; bf16 on a GPU, else fp32")
        sub.add_argument("--router-dtype", choices=("model", "fp32"), default="fp32", help="of scores and probs")
        sub.add_argument("--out", type=Path, help="CSV file to write the rows to")
    args = parser.parse_args(argv)
    module = modules[args.name]
    if hasattr(module, "check_arguments"):
        with refused(parser):
            module.check_arguments(args)

    import torch

    dtype = args.dtype or ("bf16" if torch.cuda.is_available() else "fp32")
    args.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    args.routing_dtype = args.dtype if args.router_dtype == "model" else torch.float32
    rows = module.run(args)
    table = pandas.DataFrame(rows, dtype=object).fillna("")
    shown = [name for name in ("case", "experts", *_TIMES, *_FIGURES) if name in table and (table[name] != "").any()]
    sys.stdout.write(table[shown].to_string(index=False) + "\n")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(args.out, index=False)
        sys.stdout.write(f"rows written to {args.out}\n")
    return rows


if __name__ == "__main__":
    main()
