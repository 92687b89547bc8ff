"""Time of a routing step against the number of experts, for ours and the baselines, with a plot."""

import gc
import logging
from pathlib import Path

import torch

from benchmarks import checks
from benchmarks.arguments import positive
from benchmarks.measure import world
from benchmarks.models import (
    ROUTE,
    Sizes,
    add_sizes,
    air_columns,
    air_work,
    check_square,
    inputs,
    make_router,
    product_key_work,
    step,
    topk_work,
    warm_up_codebook,
)
from benchmarks.peaks import COLUMNS, peak_columns
from benchmarks.timing import Case, time_interleaved

logger = logging.getLogger(__name__)

_EXPERTS = [4096, 16_384, 65_536, 262_144, 1_048_576]
_GIB = 2**30


def add_arguments(parser) -> None:
    parser.add_argument("--experts", type=positive, nargs="+", default=_EXPERTS, help="numbers of experts E, squares")
    add_sizes(parser, hidden=128, tokens=4096, topk=64)
    parser.add_argument("--dense-gib", type=float, default=1.5, help="largest [T, E] fp32 map that TopKRouter may make")
    parser.add_argument("--plot", type=Path, help="PNG file of time against experts")


def check_arguments(args) -> None:
    """Raise ValueError if product keys cannot have one of the sizes."""
    for num_experts in args.experts:
        check_square(num_experts)


def run(args) -> list[dict]:
    """Time the routers at each number of experts, forward and backward; TopKRouter only while its dense maps fit."""
    with world() as (device, pg_collection):
        checks.check_router(pg_collection, device)
        checks.check_product_keys(pg_collection, device)
        rows = []
        for num_experts in args.experts:
            rows += _rows(args, num_experts, pg_collection, device)
            gc.collect()
    if args.plot is not None:
        plot(rows, args.plot)
    return rows


def _rows(args, num_experts, pg_collection, device):
    sizes = Sizes.of(args, experts=num_experts)
    logger.info("%d experts: building the shortlists", num_experts)
    air, keys = (make_router(kind, sizes, pg_collection, device) for kind in ("air", "product_key"))
    hidden, grad = inputs(sizes, device, (args.tokens, 1, args.hidden), (args.tokens, args.topk))
    warm_up_codebook(air, hidden)
    checks.check_lists(air)
    checks.check_at_size(air, hidden, num_checked=16)
    key_grad = grad.view(args.tokens, keys.num_heads, keys.topk).to(sizes.dtype)
    cases = {
        ROUTE: Case(
            lambda: step(lambda x: air.route(x).probs, air, hidden, grad), air_work(air, hidden, sizes), args.tokens
        ),
        "ProductKeyRouter": Case(
            lambda: step(lambda x: keys(x)[1], keys, hidden, key_grad), product_key_work(keys, sizes), args.tokens
        ),
    }
    map_gib = 4 * args.tokens * num_experts / _GIB
    if map_gib > args.dense_gib:
        logger.info("TopKRouter left out: one map of [%d, %d] takes %.1f GiB", args.tokens, num_experts, map_gib)
    else:
        topk = make_router("topk", sizes, pg_collection, device)
        dense_grad = torch.randn(args.tokens, num_experts, device=device).to(sizes.routing_dtype)
        cases["TopKRouter.forward"] = Case(
            lambda: step(lambda x: topk(x)[0], topk, hidden, dense_grad), topk_work(sizes), args.tokens, True
        )
    peaks = {ROUTE: peak_columns(ROUTE, sizes, device, pg_collection)}
    outcome = time_interleaved(cases, args, device)
    ours = outcome.median(ROUTE)
    columns = sizes.columns() | air_columns(air)
    rows = []
    for name in cases:
        figures = {"times_ours": round(outcome.median(name) / ours, 2)}
        figures |= peaks.get(name, dict.fromkeys(COLUMNS, ""))
        rows.append(outcome.row(name, columns, figures))
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Plot time against experts on logarithmic axes: a line per case, and our roofline bound dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    lines = {}
    for row in rows:
        lines.setdefault(row["case"], []).append((row["experts"], row["total_ms"]))
    for name, points in lines.items():
        axes.loglog(*zip(*points, strict=True), marker="o", label=name)
    bound = [(row["experts"], row["bound_ms"]) for row in rows if row["case"] == ROUTE]
    axes.loglog(*zip(*bound, strict=True), linestyle="--", color="gray", label=f"roofline bound of {ROUTE}")
    first = rows[0]
    sizes = ", ".join(f"{letter} = {first[name]}" for letter, name in (("T", "tokens"), ("H", "hidden"), ("K", "topk")))
    axes.set(xlabel="experts", ylabel="forward and backward, ms", title=f"Routing step on {first['device']}: {sizes}")
    axes.set_xticks([row["experts"] for row in rows], [f"{row['experts']:,}" for row in rows], minor=False)
    axes.grid(which="major", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)  # below, where it covers no point
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    logger.info("plot written to %s", path)
