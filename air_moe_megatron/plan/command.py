"""Predict a run before it is launched: ``python -m air_moe_megatron.plan --experts 1048576 --hidden 4096 ...``."""

import argparse
import sys
from collections.abc import Sequence

from air_moe_megatron.command.console import flag_of
from air_moe_megatron.plan.prediction import DTYPES
from air_moe_megatron.plan.text import report
from air_moe_megatron.routers.base import INPUT_NORMS


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m air_moe_megatron.plan",
        description=__doc__.partition("\n")[0].replace("``", "`"),
        allow_abbrev=False,
    )
    for flag, default, text in (
        ("--experts", None, "experts of a layer"),
        ("--hidden", None, "hidden size"),
        ("--topk", None, "experts per token"),
        ("--ep", None, "expert-parallel size"),
        ("--nodes", 1, "nodes"),
        ("--gpus-per-node", 8, "ranks per node"),
        ("--layers", 1, "MoE layers per rank"),
        ("--ffn", 1, "hidden size of an expert"),
        ("--tokens", 8192, "tokens per rank and microbatch"),
        ("--microbatches", 1, "microbatches per step"),
        ("--clusters", 0, "codewords; 0 is automatic"),
        ("--shortlist", 0, "experts of a list; 0 is automatic"),
        ("--list-parts", 0, "parts of a list; 0 is --ep in the sharded layout, otherwise 1"),
        ("--probes", 0, "lists searched; 0 is automatic"),
        ("--candidates", 0, "candidates with gradients; 0 is automatic"),
        ("--explored", 0, "explored candidates of the balancing loss"),
        ("--refresh-interval", 20, "steps between rebuilds"),
    ):
        parser.add_argument(
            flag,
            type=int,
            default=default,
            required=default is None,
            help=text if default is None else f"{text}; default {default}",
        )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="dtype of weights and activations; default bf16"
    )
    parser.add_argument(
        "--input-norm", choices=INPUT_NORMS, default="running", help="norm before scoring; default running"
    )
    parser.add_argument("--swiglu", action="store_true", help="experts with a gate")
    parser.add_argument("--bf16-gradients", action="store_true", help="gradients in the weights' dtype, not fp32")
    parser.add_argument("--distributed-optimizer", action="store_true", help="shard optimizer state over replicas")
    parser.add_argument("--recompute", action="store_true", help="keep activations of one layer; forwards send twice")
    parser.add_argument("--memory-gib", type=float, default=80.0, help="memory of a rank; default 80")
    parser.add_argument(
        "--node-gbytes", type=float, default=300.0, help="GB/s that a rank sends within a node; default 300"
    )
    parser.add_argument(
        "--network-gbytes", type=float, default=40.0, help="GB/s that a rank sends to other nodes; default 40"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the prediction.

    Raises:
        SystemExit: always; 2 for invalid values, 1 if neither layout fits, otherwise 0.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    world = args.nodes * args.gpus_per_node
    for name in (
        "experts",
        "hidden",
        "topk",
        "ep",
        "nodes",
        "gpus_per_node",
        "layers",
        "ffn",
        "tokens",
        "microbatches",
    ):
        if getattr(args, name) < 1:
            parser.error(f"{flag_of(name)} ({getattr(args, name)}) must be at least 1")
    for name in ("memory_gib", "node_gbytes", "network_gbytes"):
        if not getattr(args, name) > 0:
            parser.error(f"{flag_of(name)} ({getattr(args, name)}) must be positive")
    if args.topk > args.experts:
        parser.error(f"--topk ({args.topk}) must not exceed --experts ({args.experts})")
    for name, whole in (("--experts", args.experts), ("--nodes times --gpus-per-node", world)):
        if whole % args.ep:
            parser.error(f"{name} ({whole}) must be divisible by --ep ({args.ep})")
    try:
        text, fits = report(args)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(text)
    sys.exit(0 if fits else 1)
