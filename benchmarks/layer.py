"""The whole layer: router, dispatch (one rank) and experts of AIR-MoE against a PEER layer and against Megatron's."""

import logging

from benchmarks import checks, roofline
from benchmarks.arguments import not_negative
from benchmarks.measure import world
from benchmarks.models import (
    Sizes,
    add_sizes,
    air_work,
    check_square,
    expert_work,
    hierarchical_work,
    prepare_step,
    product_key_work,
    topk_work,
    usage,
)
from benchmarks.peaks import COLUMNS, peak_columns
from benchmarks.timing import Case, time_interleaved

logger = logging.getLogger(__name__)

_OURS, _BESIDE_STOCK = "AIRMoELayer", "AIRMoELayer, beside MoELayer"


def add_arguments(parser) -> None:
    add_sizes(parser, experts=65_536, hidden=512, tokens=4096, topk=64, ffn=1)
    parser.add_argument(
        "--stock-experts", type=not_negative, default=16_384, help="E for Megatron's layer; 0 leaves it out"
    )
    parser.add_argument("--no-baseline", action="store_true", help="time and measure AIR-MoE alone")
    parser.add_argument("--no-memory", action="store_true", help="do not measure the peak memory")


def check_arguments(args) -> None:
    """Raise ValueError if PEER cannot have the sizes."""
    if args.no_baseline:
        return
    if args.ffn != 1:
        raise ValueError(f"--ffn ({args.ffn}) must be 1 for PEER, or add --no-baseline")
    check_square(args.experts)


def run(args) -> list[dict]:
    """Check the layers, time each group of equal sizes in turn, and measure the peak memory of each.

    PEER and hierarchical routing have the requested number of experts. Megatron's layer has fewer, so that its dense
    maps are feasible; our layer is timed beside it at the same number. A step is forward and backward. All weights have
    a ``main_grad`` as in Megatron. Peak memory is what a step needs beside weights and these buffers; another column
    has that of a step that also rebuilds the shortlists. On a CPU each peak is measured in a process of its own.
    """
    groups = _groups(args)
    peaks = {}
    with world() as (device, pg_collection):
        for sizes, kinds in groups:
            for kind in () if args.no_memory else kinds.values():
                if (sizes, kind) not in peaks:
                    peaks[sizes, kind] = peak_columns(kind, sizes, device, pg_collection)
                    logger.info("%s: %s MiB beside weights and gradients", kind, peaks[sizes, kind]["peak_mib"])
        for kind in dict.fromkeys(kind for _, kinds in groups for kind in kinds.values()):
            if kind == "PEERLayer":
                checks.check_peer(pg_collection, device)
            else:
                checks.check_layer(kind, pg_collection, device)
        return [row for sizes, kinds in groups for row in _rows(args, sizes, kinds, peaks, pg_collection, device)]


def _groups(args) -> list[tuple[Sizes, dict[str, str]]]:
    """The sizes of each group, with the kind of layer of each of its cases; ours is the first."""
    if args.no_baseline:
        return [(Sizes.of(args), {_OURS: _OURS})]
    groups = [(Sizes.of(args), {kind: kind for kind in (_OURS, "HierarchicalMoELayer", "PEERLayer")})]
    if args.stock_experts:
        groups.append((Sizes.of(args, experts=args.stock_experts), {_BESIDE_STOCK: _OURS, "MoELayer": "MoELayer"}))
    return groups


def _rows(args, sizes, kinds, peaks, pg_collection, device):
    cases = {name: _case(kind, sizes, pg_collection, device) for name, kind in kinds.items()}
    outcome = time_interleaved(cases, args, device)
    ours = outcome.median(next(iter(cases)))
    rows = []
    for name, kind in kinds.items():
        figures = {"times_ours": round(outcome.median(name) / ours, 2)}
        figures |= peaks.get((sizes, kind), dict.fromkeys(COLUMNS, ""))
        rows.append(outcome.row(name, sizes.columns() | {"ffn": sizes.ffn}, figures))
    return rows


def _case(kind, sizes, pg_collection, device):
    prepared = prepare_step(kind, sizes, pg_collection, device)
    layer, hidden = prepared.module, prepared.hidden
    if kind == _OURS:
        checks.check_at_size(layer.router, hidden)
        work = layer_work(layer, hidden, sizes)
    elif kind == "HierarchicalMoELayer":
        _, used = usage(layer.router, hidden)
        work = roofline.together(hierarchical_work(layer.router, sizes), expert_work(sizes, used))
    elif kind == "PEERLayer":
        used = layer.route(hidden.view(-1, sizes.hidden))[0].unique().numel()
        work = roofline.together(product_key_work(layer, sizes), expert_work(sizes, used))
    else:
        used = int(layer.router(hidden)[1].any(dim=0).sum())
        work = roofline.together(topk_work(sizes), expert_work(sizes, used))
    return Case(prepared.run, work, sizes.tokens, kind == "MoELayer")


def layer_work(layer, hidden, sizes: Sizes) -> dict[str, roofline.Work]:
    """The least work of a step of AIRMoELayer."""
    _, num_used = usage(layer.router, hidden)
    return roofline.together(air_work(layer.router, hidden, sizes), expert_work(sizes, num_used))
