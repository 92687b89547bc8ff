"""Router alone: AIRRouter against Megatron's TopKRouter, forward and backward, in one process."""

import argparse
import logging
from functools import partial

import torch

from air_moe_megatron.index import list_every_expert, rank_experts
from air_moe_megatron.ops.fine_scores.naive import naive_fine_scores
from benchmarks.measure import (
    Timing,
    accumulate_gradient,
    clock,
    environment,
    give_main_grad,
    interleave,
    take_gradients,
    world_of_one,
)

logger = logging.getLogger(__name__)


def add_arguments(parser) -> None:
    parser.add_argument("--experts", type=int, default=65_536, help="number of experts E")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size H")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens T")
    parser.add_argument("--topk", type=int, default=64, help="experts per token K")
    parser.add_argument("--clusters", type=int, default=0, help="codewords C; 0 is automatic")
    parser.add_argument("--shortlist", type=int, default=0, help="shortlist size L; 0 is automatic")


def run(args) -> list[dict]:
    """Check that AIR with full lists equals top-k, then time both with the sizes asked for.

    Three contenders: ``TopKRouter.forward``; ``AIRRouter.route``, whose result is compact; ``AIRRouter.forward``,
    which makes Megatron's dense maps of it for the stock dispatchers. Two more rows are what AIR pays beside its steps:
    the codebook's update, once per global batch, and the rebuild of the shortlists, once per refresh interval.
    """
    device, pg_collection = world_of_one()
    gate(pg_collection, device)

    torch.manual_seed(0)
    topk = make_router("topk", args, pg_collection, device)
    air = make_router("air", args, pg_collection, device)
    with torch.no_grad():
        air.weight.copy_(topk.weight)
    hidden = torch.randn(args.tokens, 1, args.hidden, device=device)
    settle(air, hidden)
    gate_at_size(air, hidden)
    twin = make_router("air", args, pg_collection, device)  # learns, while the timed one keeps its lists
    settle(twin, hidden)
    twin.route(hidden)
    statistics = twin.codebook.statistics.clone()
    sparse_grad = torch.randn(args.tokens, args.topk, device=device)
    dense_grad = torch.randn(args.tokens, args.experts, device=device)
    timings = interleave(
        {
            "TopKRouter.forward": lambda: step(lambda x: topk(x)[0], topk, hidden, dense_grad),
            "AIRRouter.route": lambda: step(lambda x: air.route(x).probs, air, hidden, sparse_grad),
            "AIRRouter.forward": lambda: step(lambda x: air(x)[0], air, hidden, dense_grad),
            "codebook update": lambda: _update(twin, statistics),
            "shortlist rebuild": lambda: _timed(device, lambda: _rebuild(twin)),
        },
        args.repetitions,
        args.warmup,
    )
    reference = timings["TopKRouter.forward"]["total"].median
    shared = {
        "experts": args.experts,
        "hidden": args.hidden,
        "tokens": args.tokens,
        "topk": args.topk,
        "clusters": air.sizes.num_clusters,
        "shortlist": air.sizes.shortlist_size,
    }
    rows = []
    for name, phases in timings.items():
        row = {"contender": name, **shared}
        for phase in ("forward", "backward", "total"):
            row |= phases[phase].columns(phase) if phase in phases else dict.fromkeys(Timing([0.0]).columns(phase), "")
        is_router = "forward" in phases
        ratio = round(reference / phases["total"].median, 2) if is_router else ""
        row |= {"times_faster": ratio, "repetitions": args.repetitions, **environment(device)}
        rows.append(row)
    torch.distributed.destroy_process_group()
    return rows


def make_router(kind, args, pg_collection, device):
    from megatron.core.transformer.moe.router import TopKRouter

    from air_moe_megatron import AIRMoEConfig, AIRRouter

    config = AIRMoEConfig(
        num_layers=1,
        hidden_size=args.hidden,
        num_attention_heads=4,
        num_moe_experts=args.experts,
        moe_router_topk=args.topk,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        add_bias_linear=False,
        moe_router_type=kind,
        moe_air_num_clusters=args.clusters,
        moe_air_shortlist_size=args.shortlist,
    )
    router = (AIRRouter if kind == "air" else TopKRouter)(config, pg_collection).to(device)
    router.set_layer_number(1)
    give_main_grad(router)
    return router


def settle(air, hidden):
    """Let the codebook see the tokens a few times, as in training, so that its clusters are real."""
    from air_moe_megatron.sync import update_codebooks

    for _ in range(3):
        air.route(hidden)
        update_codebooks(air)


def step(forward, router, hidden, grad):
    hidden = hidden.detach().requires_grad_()
    start = clock(hidden.device)
    probs = forward(hidden)
    middle = clock(hidden.device)
    probs.backward(grad)
    accumulate_gradient(router)
    end = clock(hidden.device)
    return {"forward": middle - start, "backward": end - middle, "total": end - start}


def _timed(device, work):
    start = clock(device)
    work()
    return {"total": clock(device) - start}


def _update(air, statistics):
    from air_moe_megatron.sync import update_codebooks

    air.codebook.statistics.copy_(statistics)  # an update uses them up
    return _timed(statistics.device, lambda: update_codebooks(air))


def _rebuild(air):
    ranking = rank_experts(
        air.codebook.codewords, air.codebook.typical_projections(), air.weight, None, air.sizes.shortlist_size
    )
    air.index.shortlist.copy_(list_every_expert(ranking, air.index.num_reserved))


def gate_at_size(air, hidden, num_checked=64):
    """At the sizes to be timed: experts, probabilities and gradients of some tokens against a direct computation."""
    tokens = hidden[:, 0].clone().requires_grad_()
    routes = air.route(tokens)
    every = max(1, tokens.shape[0] // num_checked)
    grad = torch.zeros_like(routes.probs)
    grad[::every] = torch.randn_like(grad[::every])
    routes.probs.backward(grad)
    found = [routes.probs[::every], tokens.grad[::every], *take_gradients(air)]

    exact = hidden[::every, 0].clone().requires_grad_()
    candidates = air.index.shortlist[routes.codewords[::every, 0]].long()
    scores = naive_fine_scores(
        exact, air.weight, None, air.index.shortlist, routes.codewords[::every], torch.float32
    ).squeeze(1)
    top, places = scores.topk(air.topk, dim=1)
    if not torch.equal(candidates.gather(1, places), routes.topk_ids[::every].long()):
        raise AssertionError("the experts of some tokens are not the best of their shortlists")
    probs = top.softmax(dim=1)
    probs.backward(grad[::every])
    expected_values = (probs, exact.grad, *take_gradients(air))
    for name, expected, got in zip(("probs", "input grad", "weight grad"), expected_values, found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=partial("{}: {}".format, name))
    logger.info("gate passed: %d tokens at the timed sizes equal a direct computation", grad[::every].shape[0])


def gate(pg_collection, device):
    """No time is reported by a router that is wrong: with full lists it must equal TopKRouter."""
    sizes = argparse.Namespace(experts=96, hidden=32, tokens=200, topk=8, clusters=6, shortlist=96)
    torch.manual_seed(1)
    topk, air = (make_router(kind, sizes, pg_collection, device) for kind in ("topk", "air"))
    with torch.no_grad():
        air.weight.copy_(topk.weight)
    hidden = torch.randn(sizes.tokens, 1, sizes.hidden, device=device)
    settle(air, hidden)
    grad = torch.randn(sizes.tokens, sizes.experts, device=device)
    results = []
    for router in (topk, air):
        tokens = hidden.clone().requires_grad_()
        probs, routing_map = router(tokens)
        probs.backward(grad)
        results.append((routing_map.float(), probs, tokens.grad, *take_gradients(router)))
    for name, expected, found in zip(("routing map", "probs", "input grad", "weight grad"), *results, strict=True):
        explain = partial("{}: {}".format, name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=explain)
    logger.info("gate passed: with full lists AIRRouter equals TopKRouter")
