"""Sharded routing against the replicated router: a layer's training step over expert-parallel processes.

A step is forward, backward, the all-reduce of replicated gradients, and Adam. On a CPU the processes communicate
through gloo and share the cores; seconds are CPU seconds, a mean over the ranks. The rebuild of the lists is
timed separately: once as a run spreads it over steps and ranks, and once in full.
"""

import copy
import logging

import torch

from benchmarks import roofline
from benchmarks.arguments import positive
from benchmarks.checks import same
from benchmarks.measure import (
    MIB,
    accumulate_gradient,
    cpu_clock,
    give_main_grad,
    is_by_clock,
    over_ranks,
    run_on_ranks,
)
from benchmarks.models import Sizes, add_sizes, air_work, expert_work, make_config, usage
from benchmarks.timing import Case, time_interleaved

logger = logging.getLogger(__name__)

_REPLICATED, _SHARDED = "replicated", "sharded"


def add_arguments(parser) -> None:
    add_sizes(parser, experts=16_384, hidden=256, tokens=2048, topk=16, ffn=2)
    parser.add_argument("--ranks", type=positive, default=2, help="expert-parallel processes; at most one for each GPU")


def check_arguments(args) -> None:
    """Raise ValueError if the ranks cannot have equally many experts."""
    if args.experts % args.ranks:
        raise ValueError(f"--experts ({args.experts}) must be divisible by --ranks ({args.ranks})")


def run(args) -> list[dict]:
    """Time both layers on the same tokens, ``--tokens`` of them on each rank, with as many parts of lists as ranks.

    ``state_mib`` is the layer's state on a rank: weights, gradients and Adam's moments. ``forward_remote_mib`` is what
    rank 0 sends to other ranks in a forward, ``reduced_mib`` the gradients that are all-reduced in a step.
    """
    return run_on_ranks(_measure, args)


def _layers(sizes, ranks, pg_collection, device):
    """Both layers with the same weights, codebooks and lists."""
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    from air_moe_megatron import AIRMoELayer
    from air_moe_megatron.layer.experts import GranularExperts
    from air_moe_megatron.routers import router_class

    layers = {}
    for name in (_REPLICATED, _SHARDED):
        parts = {"moe_air_list_parts": ranks, "moe_air_shard_experts": name == _SHARDED}
        config = make_config(sizes, "air", compact=True, expert_model_parallel_size=ranks, **parts)
        torch.manual_seed(0)
        submodules = MoESubmodules(experts=GranularExperts, router=router_class(config))
        layer = AIRMoELayer(config, submodules, 1, pg_collection)
        layer.set_layer_number(1)
        layers[name] = layer.to(device)
        give_main_grad(layer)
        _warm_up(layer.router, _tokens(sizes, pg_collection.ep.rank(), device), pg_collection.tp_dp_cp)
    return layers


def _warm_up(router, hidden, group):
    """Make a few updates of the codebook, and set its age so that its lists stay."""
    from air_moe_megatron.sync import update_codebooks

    for _ in range(3):
        router.route(hidden)
        update_codebooks(router, group)
    old = torch.full((1,), router.index.refresh_interval**2 + 1)
    router.codebook.load_state_dict({**router.codebook.state_dict(), "num_updates": old})
    router.index.built_at.copy_(old)
    router.index.load_state_dict(router.index.state_dict())


def _tokens(sizes, rank, device):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(sizes.tokens, 1, sizes.hidden, generator=generator).to(device, sizes.dtype)


def _reduced(layer, ranks):
    """The gradients that ranks must sum because the weights are replicated on all of them."""
    is_copied = [getattr(parameter, "allreduce", True) and ranks > 1 for parameter in layer.parameters()]
    return [parameter.main_grad for parameter, copied in zip(layer.parameters(), is_copied, strict=True) if copied]


def _step(layer, optimizer, hidden, ranks):
    """Seconds of this rank per phase."""
    device = hidden.device
    hidden = hidden.detach().requires_grad_()
    for parameter in layer.parameters():
        parameter.main_grad.zero_()
    start = cpu_clock(device)
    out = layer(hidden)[0]
    middle = cpu_clock(device)
    out.backward(torch.ones_like(out))
    accumulate_gradient(layer)
    end = cpu_clock(device)
    for gradient in _reduced(layer, ranks):
        torch.distributed.all_reduce(gradient)
    for parameter in layer.parameters():
        parameter.grad = parameter.main_grad.to(parameter.dtype)
    optimizer.step()
    for parameter in layer.parameters():
        parameter.grad = None
    last = cpu_clock(device)
    phases = {"forward": middle - start, "backward": end - middle, "optimizer": last - end}
    return phases | {"total": last - start}


class _Rebuild:
    """Rebuilds lists on copies of a router's codebook and lists, and returns this rank's seconds; all ranks call it."""

    def __init__(self, router):
        self.router, self.codebook, self.index = router, copy.deepcopy(router.codebook), copy.deepcopy(router.index)
        self.index.refresh_interval = 2**62  # every update makes a rebuild due, as in a young codebook
        self.run()

    def run(self, in_full=False):
        router, index, group = self.router, self.index, self.router._list_group()
        self.codebook.count_update()
        if in_full:
            index.load_state_dict({**index.state_dict(), "built_at": torch.full_like(index.built_at, -1)})
        start = cpu_clock(router.weight.device)
        index.refresh(self.codebook, router.centers, group=group)
        index.commit(group)
        seconds = cpu_clock(router.weight.device) - start
        if int(index.built_at) != self.codebook.updates_on_host:
            raise AssertionError("the lists were not rebuilt")
        return seconds

    def __call__(self):
        """Seconds of a rebuild as spread over ranks, and of one in full."""
        return {"rebuild": self.run(), "rebuild_in_full": self.run(in_full=True)}


def _measure(args, rank, ranks, pg_collection, device):
    _check(ranks, pg_collection, device)
    sizes = Sizes.of(args)
    layers, hidden = _layers(sizes, ranks, pg_collection, device), _tokens(sizes, rank, device)
    of_rank = hidden.flatten(0, 1)
    num_used = usage(layers[_REPLICATED].router, of_rank)[1]
    work = roofline.together(
        air_work(layers[_REPLICATED].router, of_rank, sizes), expert_work(sizes, max(1, num_used // ranks))
    )
    cases, figures = {}, {}
    for name, layer in layers.items():
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-5)
        num_parameters = sum(parameter.numel() for parameter in layer.parameters())
        reduced = sum(gradient.numel() for gradient in _reduced(layer, ranks))
        layer.token_dispatcher.traffic = type(layer.token_dispatcher.traffic)()
        layer(hidden)
        traffic = layer.token_dispatcher.traffic
        figures[name] = {
            "state_mib": round(num_parameters * (sizes.dtype.itemsize + 12) / MIB, 1),
            "reduced_mib": round(4 * reduced / MIB, 1),
            "forward_remote_mib": round((2 * traffic.remote_row_bytes + traffic.remote_pair_bytes) / MIB, 2),
        }
        run = _runner(layer, optimizer, hidden, ranks, _Rebuild(layer.router))
        needed = roofline.together(work, roofline.adam(num_parameters))
        cases[name] = Case(lambda run=run: over_ranks(run, device, ranks, "mean"), needed, sizes.tokens)
    outcome = time_interleaved(cases, args, device, extra_phases=("optimizer", "rebuild", "rebuild_in_full"))
    rows = []
    for name in cases:
        times_faster = round(outcome.median(_REPLICATED) / outcome.median(name), 2)
        columns = sizes.columns() | {"ffn": sizes.ffn, "ranks": ranks}
        own = {"times_faster": times_faster} | figures[name]
        rows.append(outcome.row(name, columns, own, by_clock=is_by_clock(device, ranks)))
    return rows


def _runner(layer, optimizer, hidden, ranks, rebuild):
    return lambda: _step(layer, optimizer, hidden, ranks) | rebuild()


def _check(ranks, pg_collection, device):
    """Both layers give equal outputs and gradients."""
    sizes = Sizes(experts=64 * ranks, hidden=12, tokens=40, topk=4, ffn=2)
    layers, results = _layers(sizes, ranks, pg_collection, device), {}
    for name, layer in layers.items():
        hidden = _tokens(sizes, pg_collection.ep.rank(), device).requires_grad_()
        out = layer(hidden)[0]
        out.backward(hidden.detach().flip(0))
        accumulate_gradient(layer)
        for gradient in _reduced(layer, ranks):
            torch.distributed.all_reduce(gradient)
        centers = layer.router.weight.main_grad
        if name == _REPLICATED:
            centers = centers.chunk(ranks)[pg_collection.ep.rank()]
        experts = (layer.experts.weight1.main_grad, layer.experts.weight2.main_grad)
        results[name] = (out.detach(), hidden.grad, centers, *experts)
    names = ("output", "input grad", "centers' grad", "weight1 grad", "weight2 grad")
    for name, found, expected in zip(names, results[_SHARDED], results[_REPLICATED], strict=True):
        same(name, found, expected)
    logger.info("check passed: sharded and replicated routing give equal outputs and gradients")
