"""Dispatch and combine alone: the compact dispatcher against Megatron's all-to-all, over expert-parallel processes.

On a CPU the processes communicate through gloo and share the cores. On GPUs each process has its own GPU, because NCCL
does not allow two ranks on one. So with a single GPU there is one rank: permutation and combination, no communication.
"""

import functools
import logging
from dataclasses import dataclass

import torch

from benchmarks import roofline
from benchmarks.arguments import positive
from benchmarks.checks import same
from benchmarks.measure import MIB, clock, over_ranks, run_on_ranks
from benchmarks.models import Sizes, add_sizes, inputs, make_config
from benchmarks.timing import Case, time_interleaved

logger = logging.getLogger(__name__)

_OURS, _STOCK = "CompactTokenDispatcher", "MoEAlltoAllTokenDispatcher"


def add_arguments(parser) -> None:
    add_sizes(parser, experts=16_384, hidden=512, tokens=2048, topk=64)
    parser.add_argument("--ranks", type=positive, default=2, help="expert-parallel processes; at most one for each GPU")


def check_arguments(args) -> None:
    """Raise ValueError if the ranks cannot have equally many experts."""
    if args.experts % args.ranks:
        raise ValueError(f"--experts ({args.experts}) must be divisible by --ranks ({args.ranks})")


def run(args) -> list[dict]:
    """Time both dispatchers on the same routes without experts: received rows are sent back unchanged.

    ``--tokens`` is per rank. Every token has K distinct random experts, so that nearly every token goes to every rank:
    the worst case for ours. A step is dispatch and combine, forward and backward, probs and their gradients included.
    Its seconds are those of the slowest rank. Bytes are what rank 0 passes to the all-to-alls in a forward, including
    those to itself.
    """
    return run_on_ranks(_measure, args)


@dataclass(frozen=True)
class _Routes:
    """The routes of this rank's tokens, compact and dense."""

    hidden: torch.Tensor  # [T, 1, H]
    grad: torch.Tensor  # [T, 1, H]
    ids: torch.Tensor  # [T, K] int32
    probs: torch.Tensor  # [T, K]
    dense_probs: torch.Tensor  # [T, E]
    routing_map: torch.Tensor  # [T, E] bool


def _measure(args, rank, ranks, pg_collection, device):
    _check(rank, ranks, pg_collection, device)
    sizes = Sizes.of(args)
    routes = _routes(sizes, rank, device)
    dispatchers = {name: _dispatcher(name, sizes, ranks, pg_collection) for name in (_OURS, _STOCK)}
    cases, figures = {}, {}
    for name, dispatcher in dispatchers.items():
        step = functools.partial(_step, name, dispatcher, routes, None)
        _, results = step()
        received = _check_at_size(name, results, routes, sizes, ranks)
        figures[name] = _bytes(name, dispatcher, sizes, rank, ranks)
        work = roofline.dispatch(sizes.tokens, received, sizes.hidden, sizes.dtype.itemsize)
        run = functools.partial(over_ranks, lambda step=step: step()[0], device, ranks, "max")
        cases[name] = Case(run, work, sizes.tokens, name == _STOCK)
    outcome = time_interleaved(cases, args, device)
    rows = []
    for name in cases:
        times_faster = round(outcome.median(_STOCK) / outcome.median(name), 2)
        columns = sizes.columns() | {"ranks": ranks}
        rows.append(outcome.row(name, columns, {"times_faster": times_faster} | figures[name]))
    return rows


def _routes(sizes, rank, device):
    generator = torch.Generator().manual_seed(rank)
    ids = torch.rand(sizes.tokens, sizes.experts, generator=generator).topk(sizes.topk, dim=1).indices.to(device)
    hidden, probs = inputs(sizes, device, (sizes.tokens, 1, sizes.hidden), (sizes.tokens, sizes.topk))
    probs = probs.softmax(dim=1)
    dense_probs = torch.zeros(sizes.tokens, sizes.experts, dtype=probs.dtype, device=device).scatter_(1, ids, probs)
    routing_map = torch.zeros_like(dense_probs, dtype=torch.bool).scatter_(1, ids, True)
    grad = hidden.flip(0)
    return _Routes(hidden, grad, ids.int(), probs, dense_probs, routing_map)


def _dispatcher(name, sizes, ranks, pg_collection):
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from air_moe_megatron.layer.dispatcher import CompactTokenDispatcher

    is_ours = name == _OURS
    config = make_config(sizes, "air" if is_ours else "topk", compact=is_ours, expert_model_parallel_size=ranks)
    local = sizes.experts // ranks
    if is_ours:
        return CompactTokenDispatcher(local, config, pg_collection)
    first = local * pg_collection.ep.rank()
    return MoEAlltoAllTokenDispatcher(local, list(range(first, first + local)), config, pg_collection)


def _step(name, dispatcher, routes, experts):
    """One forward and backward. Without experts, rows return unchanged, and the gradient of the probs is one.

    Returns:
        seconds per phase; output, gradients of tokens and probs, rows and probs received.
    """
    device = routes.hidden.device
    hidden = routes.hidden.detach().requires_grad_()
    probs = (routes.probs if name == _OURS else routes.dense_probs).detach().requires_grad_()
    where = routes.ids if name == _OURS else routes.routing_map
    start = clock(device)
    rows, sent_probs = dispatcher.dispatch_preprocess(hidden, where, probs)
    rows, received_probs = dispatcher.token_dispatch(rows, sent_probs)
    rows, work_list, received_probs = dispatcher.dispatch_postprocess(rows, received_probs)
    outputs = rows if experts is None else experts(rows, work_list, received_probs)[0]
    out = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(outputs)))
    middle = clock(device)
    ends, grads = [out], [routes.grad]
    if experts is None:
        ends, grads = [out, received_probs], [routes.grad, torch.ones_like(received_probs)]
    torch.autograd.backward(ends, grads)
    end = clock(device)
    seconds = {"forward": middle - start, "backward": end - middle, "total": end - start}
    return seconds, (out.detach(), hidden.grad, probs.grad, rows.shape[0], received_probs.detach())


def _bytes(name, dispatcher, sizes, rank, ranks):
    """MiB that this rank passed to the all-to-alls in the last forward, and bytes of rows per token one way."""
    if name == _OURS:
        traffic = dispatcher.traffic
        rows, pairs = traffic.row_bytes, traffic.pair_bytes
        remote_rows, remote_pairs = traffic.remote_row_bytes, traffic.remote_pair_bytes
    else:
        splits = [sizes.tokens * sizes.topk] if ranks == 1 else [int(n) for n in dispatcher.input_splits]
        row_bytes = sizes.hidden * sizes.dtype.itemsize
        rows, pairs = sum(splits) * row_bytes, sum(splits) * sizes.routing_dtype.itemsize
        remote = sum(splits) - splits[rank]
        remote_rows, remote_pairs = remote * row_bytes, remote * sizes.routing_dtype.itemsize
    return {
        "row_bytes_per_token": round(rows / sizes.tokens),
        "forward_mib": round((2 * rows + pairs) / MIB, 2),  # rows go out and come back
        "forward_remote_mib": round((2 * remote_rows + remote_pairs) / MIB, 2),
    }


def _check(rank, ranks, pg_collection, device):
    """Both dispatchers around the same experts: equal outputs and gradients."""
    from air_moe_megatron.layer.experts import GranularExperts

    sizes = Sizes(experts=16 * ranks, hidden=12, tokens=20, topk=4, ffn=2)
    routes = _routes(sizes, rank, device)
    results = []
    config = make_config(sizes, "air", compact=True, expert_model_parallel_size=ranks)
    experts = GranularExperts(16, config, pg_collection=pg_collection).to(device)
    for name in (_OURS, _STOCK):
        experts.zero_grad()
        found = _step(name, _dispatcher(name, sizes, ranks, pg_collection), routes, experts)[1]
        out, hidden_grad, probs_grad = found[:3]
        if name == _STOCK:
            probs_grad = probs_grad.gather(1, routes.ids.long())
        results.append((out, hidden_grad, probs_grad, experts.weight1.grad.clone(), experts.weight2.grad.clone()))
    names = ("output", "input grad", "probs grad", "weight1 grad", "weight2 grad")
    for name, found, expected in zip(names, *results, strict=True):
        same(name, found, expected)
    logger.info("check passed: both dispatchers give equal outputs and gradients")


def _check_at_size(name, results, routes, sizes, ranks):
    """Check that tokens and gradients return once per sent row and that probs arrive; returns the received rows.

    ``results`` are those of :func:`_step`.
    """
    out, hidden_grad, probs_grad, received, received_probs = results
    owners = routes.ids.long() // (sizes.experts // ranks)
    if name == _OURS:
        copies = sum((owners == owner).any(dim=1) for owner in range(ranks)).view(-1, 1, 1)
    else:
        copies = torch.full((sizes.tokens, 1, 1), sizes.topk, device=owners.device)
    narrow_ratio = None
    if out.dtype != torch.float32 and name != _OURS:  # Megatron adds the K copies of a token one by one in its dtype
        narrow_ratio = max(0.02, sizes.topk * torch.finfo(out.dtype).eps / 8)
    expected = [(tokens.float() * copies).to(out.dtype) for tokens in (routes.hidden, routes.grad)]
    same("output", out, expected[0], atol=1e-3, narrow_ratio=narrow_ratio)
    same("input grad", hidden_grad, expected[1], atol=1e-3, narrow_ratio=narrow_ratio)
    expected = torch.ones_like(probs_grad) if name == _OURS else routes.routing_map.to(probs_grad.dtype)
    same("probs grad", probs_grad, expected)
    total = torch.stack((received_probs.double().sum(), routes.probs.double().sum()))
    if ranks > 1:
        torch.distributed.all_reduce(total)
    same("probs", *total.float(), rtol=1e-3)
    return received
