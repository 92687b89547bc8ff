"""The share of the exact top-k that AIR finds, on tokens whose covariance has a power-law spectrum."""

import logging
from dataclasses import replace

import torch

from benchmarks import checks
from benchmarks.measure import environment, world
from benchmarks.models import Sizes, add_sizes, air_columns, make_router

logger = logging.getLogger(__name__)

_DECAY = 1.5  # the i-th eigenvalue of the tokens' covariance is i^-1.5


def add_arguments(parser) -> None:
    add_sizes(parser, experts=65_536, hidden=512, tokens=4096, topk=64, clusters=0, shortlist=0, probes=0)
    parser.add_argument("--updates", type=int, default=20, help="updates of the codebook, one for each batch")


def run(args) -> list[dict]:
    """Learn a codebook from random tokens, build the lists of random centers, and compare with all scores.

    A row for the sizes asked for, and one for one probe. Mass recall is the softmax mass that the lists hold.
    """
    with world() as (device, pg_collection):
        checks.check_router(pg_collection, device)
        sizes = Sizes.of(args)
        cases = {"AIRRouter": sizes, "AIRRouter, one probe": replace(sizes, probes=1, shortlist=0)}
        rows = []
        for name, case in cases.items():
            router = make_router("air", case, pg_collection, device)
            mass, topk = _recall(router, case, args.updates, device)
            logger.info("%s: %.3f of the exact top-k, %.3f of the mass", name, topk, mass)
            figures = {"topk_recall": round(topk, 4), "mass_recall": round(mass, 4), "updates": args.updates}
            rows.append({"case": name, **case.columns(), **air_columns(router), **figures, **environment(device)})
        return rows


def _recall(router, sizes: Sizes, num_updates: int, device) -> tuple[float, float]:
    from air_moe_megatron.diagnostics.recall import recall
    from air_moe_megatron.ops.coarse import assign_with_statistics

    generator = torch.Generator().manual_seed(1)
    deviations = torch.arange(1, sizes.hidden + 1) ** (-_DECAY / 2)
    for _ in range(num_updates):
        tokens = (torch.randn(sizes.tokens, sizes.hidden, generator=generator) * deviations).to(device, sizes.dtype)
        _, statistics = assign_with_statistics(tokens, router.codebook.codewords, 1)
        router.codebook.apply_update(statistics, True)
    tokens = (torch.randn(sizes.tokens, sizes.hidden, generator=generator) * deviations).to(device, sizes.dtype)
    router.route(tokens)  # a training forward, which keeps a sample of its tokens
    checks.check_lists(router)
    return recall(router)
