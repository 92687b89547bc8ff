"""Router alone: AIRRouter against Megatron's TopKRouter and PEER's product keys, forward and backward."""

from dataclasses import replace

import torch

from benchmarks import checks, roofline
from benchmarks.measure import clock, world
from benchmarks.models import (
    Sizes,
    add_sizes,
    air_columns,
    air_work,
    check_square,
    inputs,
    make_router,
    product_key_work,
    rebuild_run,
    rebuild_work,
    step,
    topk_work,
    warm_up_codebook,
)
from benchmarks.timing import Case, time_interleaved

ONE_PROBE = "AIRRouter.route, one probe"
_NORMS = {"whitened tokens": "whitening", "low-rank whitening": "low_rank_whitening"}


def add_arguments(parser) -> None:
    add_sizes(parser, experts=65_536, hidden=512, tokens=4096, topk=64, clusters=0, shortlist=0, probes=0)


def check_arguments(args) -> None:
    """Raise ValueError if product keys cannot have the sizes."""
    check_square(args.experts)


def run(args) -> list[dict]:
    """Check that AIR with full lists equals top-k, then time the routers at the given sizes.

    The cases are ``TopKRouter.forward``; ``AIRRouter.route``, whose result is compact, by default, with one probe, and
    with either whitening of the tokens; ``AIRRouter.forward``, which turns it into Megatron's dense maps for the stock
    dispatchers; and the product-key router, the only one without a balancing loss. Two more rows are AIR's cost beside
    its steps: the codebook's update, once per global batch, and the rebuild of the shortlists, once per refresh
    interval.
    """
    with world() as (device, pg_collection):
        checks.check_router(pg_collection, device)
        checks.check_product_keys(pg_collection, device)
        sizes = Sizes.of(args)
        topk, air, keys = (make_router(kind, sizes, pg_collection, device) for kind in ("topk", "air", "product_key"))
        one_probe = make_router("air", replace(sizes, probes=1, shortlist=0), pg_collection, device)
        whitened = {
            f"AIRRouter.route, {words}": make_router("air", sizes, pg_collection, device, moe_router_input_norm=norm)
            for words, norm in _NORMS.items()
        }
        with torch.no_grad():
            for router in (air, one_probe, *whitened.values()):
                router.weight.copy_(topk.weight)
        hidden, grad = inputs(sizes, device, (args.tokens, 1, args.hidden), (args.tokens, args.topk))
        dense_grad = torch.randn(args.tokens, args.experts, device=device).to(sizes.routing_dtype)
        learner = warm_up_codebook(air, hidden)
        warm_up_codebook(one_probe, hidden)
        for router in whitened.values():
            warm_up_codebook(router, hidden)
        for router in (air, one_probe, *whitened.values()):
            checks.check_lists(router)
            checks.check_at_size(router, hidden)
        learner.route(hidden)
        work = air_work(air, hidden, sizes)
        dense_work = roofline.dense_maps(args.tokens, args.experts, sizes.routing_dtype.itemsize)
        key_grad = grad.view(args.tokens, keys.num_heads, keys.topk).to(sizes.dtype)
        cases = {
            "TopKRouter.forward": Case(
                lambda: step(lambda x: topk(x)[0], topk, hidden, dense_grad), topk_work(sizes), args.tokens, True
            ),
            "AIRRouter.route": Case(lambda: step(lambda x: air.route(x).probs, air, hidden, grad), work, args.tokens),
            ONE_PROBE: Case(
                lambda: step(lambda x: one_probe.route(x).probs, one_probe, hidden, grad),
                air_work(one_probe, hidden, sizes),
                args.tokens,
            ),
            **{
                name: Case(
                    lambda router=router: step(lambda x: router.route(x).probs, router, hidden, grad),
                    air_work(router, hidden, sizes),
                    args.tokens,
                )
                for name, router in whitened.items()
            },
            "AIRRouter.forward": Case(
                lambda: step(lambda x: air(x)[0], air, hidden, dense_grad),
                roofline.together(work, dense_work),
                args.tokens,
            ),
            "ProductKeyRouter": Case(
                lambda: step(lambda x: keys(x)[1], keys, hidden, key_grad), product_key_work(keys, sizes), args.tokens
            ),
            "codebook update": Case(
                codebook_update_run(learner), roofline.codebook_update(air.sizes.num_clusters, args.hidden)
            ),
            "shortlist rebuild": Case(rebuild_run(air), rebuild_work(air, sizes)),
        }
        outcome = time_interleaved(cases, args, device)
        reference, fewest = outcome.median("TopKRouter.forward"), outcome.median(ONE_PROBE)
        rows = []
        for name, case in cases.items():
            is_router = case.tokens is not None
            figures = {
                "times_faster": round(reference / outcome.median(name), 2) if is_router else "",
                "times_one_probe": round(outcome.median(name) / fewest, 2) if is_router else "",
            }
            columns = sizes.columns() | air_columns(one_probe if name == ONE_PROBE else air)
            rows.append(outcome.row(name, columns, figures))
        return rows


def codebook_update_run(*routers):
    """A function that updates norms and codebooks with their current statistics, and returns its seconds."""
    from air_moe_megatron.sync import update_codebooks

    learners = [learner for router in routers for learner in router.learners()]
    kept = [(learner.statistics, learner.statistics.clone()) for learner in learners]
    device = routers[0].weight.device

    def run():
        for statistics, values in kept:
            statistics.copy_(values)  # an update uses them up
        start = clock(device)
        update_codebooks(routers)
        return {"total": clock(device) - start}

    return run
