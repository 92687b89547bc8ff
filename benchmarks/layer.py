"""The whole layer: router, dispatch (one rank) and experts of AIR-MoE against a PEER layer and against Megatron's."""

import logging

from benchmarks import checks, roofline
from benchmarks.measure import measure_memory, peak_of_step, world
from benchmarks.models import (
    Sizes,
    add_sizes,
    air_work,
    expert_work,
    hierarchical_work,
    inputs,
    make_layer,
    make_lists,
    product_key_work,
    step,
    topk_work,
    usage,
    warm_up_codebook,
)
from benchmarks.timing import Case, time_interleaved

logger = logging.getLogger(__name__)

_MIB = 2**20


def add_arguments(parser) -> None:
    add_sizes(parser, experts=65_536, hidden=512, tokens=4096, topk=64, ffn=1)
    parser.add_argument("--stock-experts", type=int, default=16_384, help="E for Megatron's layer; 0 leaves it out")
    parser.add_argument("--no-baseline", action="store_true", help="time and measure AIR-MoE alone")
    parser.add_argument("--no-memory", action="store_true", help="do not measure the peak memory")


def run(args) -> list[dict]:
    """Check the layers, time each group of equal sizes in turn, and measure the peak memory of each.

    PEER and hierarchical routing have the requested number of experts. Megatron's layer has fewer, so that its dense
    maps are feasible; our layer is timed beside it at the same number. A step is forward and backward. All weights have
    a ``main_grad`` as in Megatron. Peak memory is what a step needs beside weights and these buffers; another column
    has that of a step that also rebuilds the shortlists. On a CPU each peak is measured in a process of its own.
    """
    groups = [
        (Sizes.of(args), ["AIRMoELayer"] if args.no_baseline else ["AIRMoELayer", "HierarchicalMoELayer", "PEERLayer"])
    ]
    if not args.no_baseline and args.ffn != 1:
        raise ValueError(f"--ffn ({args.ffn}) must be 1 for PEER, or add --no-baseline")
    if args.stock_experts and not args.no_baseline:
        groups.append((Sizes.of(args, experts=args.stock_experts), ["AIRMoELayer", "MoELayer"]))
    peaks = {}
    with world() as (device, pg_collection):
        for sizes, kinds in groups:
            for kind in () if args.no_memory else kinds:
                if (sizes, kind) not in peaks:
                    peaks[sizes, kind] = _peaks(kind, sizes, device, pg_collection)
                    logger.info("%s: %.0f MiB beside weights and gradients", kind, peaks[sizes, kind][0] / _MIB)
        for kind in dict.fromkeys(kind for _, kinds in groups for kind in kinds):
            if kind == "PEERLayer":
                checks.check_peer(pg_collection, device)
            else:
                checks.check_layer(kind, pg_collection, device)
        return [
            row
            for sizes, kinds in groups
            for row in _rows(args, sizes, {kind: peaks.get((sizes, kind)) for kind in kinds}, pg_collection, device)
        ]


def _rows(args, sizes, peaks, pg_collection, device):
    ours = "AIRMoELayer, beside MoELayer" if "MoELayer" in peaks else "AIRMoELayer"
    names = {ours if kind == "AIRMoELayer" else kind: kind for kind in peaks}
    cases = {name: _case(kind, sizes, pg_collection, device) for name, kind in names.items()}
    outcome = time_interleaved(cases, args, device)
    rows = []
    for name, kind in names.items():
        figures = {"times_ours": round(outcome.median(name) / outcome.median(ours), 2)}
        step_peak, rebuild_peak = peaks[kind] or (None, None)
        figures["peak_mib"] = "" if step_peak is None else round(step_peak / _MIB)
        figures["peak_with_rebuild_mib"] = "" if rebuild_peak is None else round(rebuild_peak / _MIB)
        rows.append(outcome.row(name, sizes.columns() | {"ffn": sizes.ffn}, figures))
    return rows


def _case(kind, sizes, pg_collection, device):
    layer = make_layer(kind, sizes, pg_collection, device)
    hidden, grad = layer_inputs(sizes, device)
    if kind == "AIRMoELayer":
        warm_up_codebook(layer.router, hidden)
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
    return Case(lambda: layer_step(layer, hidden, grad), work, sizes.tokens, kind == "MoELayer")


def layer_inputs(sizes: Sizes, device):
    """Hidden states and a gradient for the output, both [T, 1, H]."""
    hidden, grad = inputs(sizes, device, *[(sizes.tokens, 1, sizes.hidden)] * 2)
    return hidden, grad.to(sizes.dtype)


def layer_work(layer, hidden, sizes: Sizes) -> dict[str, roofline.Work]:
    """The least work of a step of AIRMoELayer."""
    _, num_used = usage(layer.router, hidden)
    return roofline.together(air_work(layer.router, hidden, sizes), expert_work(sizes, num_used))


def layer_step(layer, hidden, grad) -> dict[str, float]:
    """Seconds of a layer's forward and backward."""

    def forward(hidden):
        out = layer(hidden)
        return out[0] if isinstance(out, tuple) else out

    return step(forward, layer, hidden, grad)


def _peaks(kind, sizes, device, pg_collection):
    """Peaks of a step without and with a rebuild of the lists; the latter is None if there are none."""
    rebuilds = (False, True) if kind == "AIRMoELayer" else (False,)
    peaks = [measure_memory(_measure_peak, (kind, sizes, one), device, pg_collection) for one in rebuilds]
    return peaks[0], peaks[1] if len(peaks) > 1 else None


def _measure_peak(kind, sizes, with_rebuild, device, pg_collection):
    """Bytes that a step needs beside weights and gradients."""
    layer = make_layer(kind, sizes, pg_collection, device)
    hidden, grad = layer_inputs(sizes, device)
    if kind == "AIRMoELayer":
        warm_up_codebook(layer.router, hidden)
        make_lists(layer.router, hidden, with_rebuild)
    return peak_of_step(layer, lambda: layer_step(layer, hidden, grad), device)
