"""How the time of a routing step grows with the number of experts, at automatic sizes."""

import argparse
import logging

import torch

from benchmarks.measure import environment, interleave, world_of_one
from benchmarks.router import gate, gate_at_size, make_router, settle, step

logger = logging.getLogger(__name__)


def add_arguments(parser) -> None:
    parser.add_argument("--experts", type=int, nargs="+", default=[65_536, 1_048_576], help="numbers of experts E")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size H")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens T")
    parser.add_argument("--topk", type=int, default=64, help="experts per token K")


def run(args) -> list[dict]:
    """Time ``AIRRouter.route`` forward and backward for each number of experts, after the gates."""
    device, pg_collection = world_of_one()
    gate(pg_collection, device)
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, 1, args.hidden, device=device)
    grad = torch.randn(args.tokens, args.topk, device=device)
    contenders, routers = {}, {}
    for num_experts in args.experts:
        sizes = argparse.Namespace(**{**vars(args), "experts": num_experts, "clusters": 0, "shortlist": 0})
        router = make_router("air", sizes, pg_collection, device)
        logger.info("%d experts: building the shortlists", num_experts)
        settle(router, hidden)
        gate_at_size(router, hidden, num_checked=16)
        name = f"AIRRouter.route, E = {num_experts}"
        routers[name] = router
        contenders[name] = lambda router=router: step(lambda x: router.route(x).probs, router, hidden, grad)
    timings = interleave(contenders, args.repetitions, args.warmup)
    first = next(iter(timings.values()))["total"].median
    rows = []
    for name, phases in timings.items():
        sizes = routers[name].sizes
        row = {"contender": name, "experts": sizes.num_experts, "hidden": args.hidden, "tokens": args.tokens}
        row |= {"topk": args.topk, "clusters": sizes.num_clusters, "shortlist": sizes.shortlist_size}
        for phase in ("forward", "backward", "total"):
            row |= phases[phase].columns(phase)
        row |= {"times_slower": round(phases["total"].median / first, 2), "repetitions": args.repetitions}
        rows.append(row | environment(device))
    torch.distributed.destroy_process_group()
    return rows
