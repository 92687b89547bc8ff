"""The top-k recall of AIR, on tokens whose covariance has a power-law spectrum."""

import logging
from dataclasses import replace

import torch

from benchmarks import checks
from benchmarks.arguments import positive
from benchmarks.measure import environment, world
from benchmarks.models import Sizes, add_sizes, air_columns, learn_codebook, make_router

logger = logging.getLogger(__name__)

_DECAY = 1.5  # the i-th eigenvalue of the tokens' covariance is i^-1.5
_SAMPLES = 16  # whose tokens are all measured; each has as many as the router keeps of a forward


def add_arguments(parser) -> None:
    add_sizes(parser, experts=65_536, hidden=512, tokens=4096, topk=64, clusters=0, shortlist=0, probes=0)
    parser.add_argument("--updates", type=positive, default=20, help="updates of the codebook, one for each batch")


def check_arguments(args) -> None:
    """Raise ValueError if there are no even axes for the hidden size."""
    if args.hidden & (args.hidden - 1):
        raise ValueError(f"--hidden ({args.hidden}) must be a power of two")


def run(args) -> list[dict]:
    """Learn norm and codebook from random tokens, build the lists of random centers, and compare with all scores.

    The spectrum is meant for the tokens as they are scored. So its axes are such that all features contribute equally,
    and the norm does not change it. There is a row for the given sizes, one for one probe, and one for tokens along
    random axes, whose spectrum the norm flattens. Mass recall is the softmax mass that the lists hold.
    """
    with world() as (device, pg_collection):
        checks.check_router(pg_collection, device)
        sizes = Sizes.of(args)
        one_probe = replace(sizes, probes=1, shortlist=0)
        generator = torch.Generator().manual_seed(1)
        even, random = _even_axes(args.hidden), _random_axes(args.hidden, generator)
        cases = {
            "AIRRouter": (sizes, even),
            "AIRRouter, one probe": (one_probe, even),
            "AIRRouter, random axes": (sizes, random),
        }
        rows = []
        for name, (case, axes) in cases.items():
            router = make_router("air", case, pg_collection, device)
            mass, topk = _recall(router, case, axes, args.updates, device)
            logger.info("%s: %.3f of the exact top-k, %.3f of the mass", name, topk, mass)
            figures = {"topk_recall": round(topk, 4), "mass_recall": round(mass, 4), "updates": args.updates}
            rows.append({"case": name, **case.columns(), **air_columns(router), **figures, **environment(device)})
        return rows


def _even_axes(size: int) -> torch.Tensor:
    """[H, H] orthogonal matrix with entries of 1 or -1 over sqrt(H): a Hadamard matrix."""
    axes = torch.ones(1, 1)
    while axes.shape[0] < size:
        axes = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), axes)
    return axes / size**0.5


def _random_axes(size: int, generator: torch.Generator) -> torch.Tensor:
    """[H, H] random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(size, size, generator=generator)).Q


def _recall(router, sizes: Sizes, axes: torch.Tensor, num_updates: int, device) -> tuple[float, float]:
    from air_moe_megatron.diagnostics.recall import recall
    from air_moe_megatron.routers.air import SAMPLE_SIZE

    generator = torch.Generator().manual_seed(2)
    deviations = torch.arange(1, sizes.hidden + 1, device=device) ** (-_DECAY / 2)
    axes = axes.to(device)

    def draw(num_tokens):
        tokens = torch.randn(num_tokens, sizes.hidden, generator=generator).to(device)  # the same on every device
        return (tokens * deviations @ axes).to(sizes.dtype)

    learn_codebook(router, [draw(sizes.tokens) for _ in range(num_updates)])
    found = []
    for _ in range(_SAMPLES):
        router.route(draw(SAMPLE_SIZE))  # a training forward, which keeps a sample of its tokens: here all of them
        found.append(recall(router))
    checks.check_lists(router)
    mass, topk = (sum(figures) / _SAMPLES for figures in zip(*found, strict=True))
    return mass, topk
