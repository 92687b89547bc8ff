"""The step boundary, at which codebooks learn and lists change, and its collectives.

Communication per optimizer step and pipeline stage: one all-reduce of fp32 numbers over ``tp_dp_cp``, the ranks of the
stage that hold different tokens. A codebook adds ``C * (H + 3)`` numbers, a running norm ``3 * features + 1``, a
low-rank whitening norm ``H * r`` more, a whitening norm ``(H + 1)^2``, and an AIR router two. In steps that select
experts for new lists there is one more all-reduce per AIR router, in ``ShortlistIndex.commit``.

A step that Megatron repeats must not count twice, so every attempt starts with ``discard_statistics``. Forwards
accumulate statistics. ``update_codebooks`` runs once, after the optimizer has stepped. A skipped step ends with
``end_skipped_step`` instead, so nothing is learned from it. ``step_hooks.py`` makes these calls in Megatron's loop.
"""

import logging
from collections.abc import Iterable

import torch

from air_moe_megatron.layer import find_compact_layers
from air_moe_megatron.layer.dispatcher import CompactTokenDispatcher
from air_moe_megatron.learned.learner import Learner, apply_updates, batches_of
from air_moe_megatron.learned.module_state import HostCopy, reread
from air_moe_megatron.process_groups import group_size, sum_over_ranks
from air_moe_megatron.routers import find_routers
from air_moe_megatron.routers.base import CompactRouter
from air_moe_megatron.routers.losses import layer_of

logger = logging.getLogger(__name__)


def discard_statistics(modules: torch.nn.Module | Iterable[torch.nn.Module]) -> None:
    """Begin an attempt at a step: forget what routers and dispatchers have counted since the last step.

    What other code has written to the routers' buffers takes effect. Waits for the device once.
    """
    parts = _with_counts(_chunks(modules))
    for part in parts:
        part.discard()
    reread(one for part in parts if isinstance(part, CompactRouter) for one in part.host_copies())


def _chunks(modules: torch.nn.Module | Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    return [modules] if isinstance(modules, torch.nn.Module) else list(modules)


def _with_counts(chunks: list[torch.nn.Module]) -> list[CompactRouter | CompactTokenDispatcher]:
    """All that counts what its forwards do in a step."""
    return [*find_routers(chunks), *(layer.token_dispatcher for layer in find_compact_layers(chunks))]


@torch.no_grad()
def update_codebooks(
    modules: torch.nn.Module | Iterable[torch.nn.Module], group: torch.distributed.ProcessGroup | None = None
) -> int:
    """All-reduce the statistics that the routers have accumulated, and update codebooks, input norms and lists.

    Every rank of the group must call it with the same routers. Sums are reduced before they are divided, so many ranks
    equal one rank on all their tokens. All ranks get bitwise the same codebooks. A learner that had no token on any
    rank stays as it is. Waits for the device once for all statistics, once for each batch of codebooks or low-rank
    whitening norms (``learned/learner.py``), once for each round in which codewords are revived, and when lists change.

    Args:
        modules: a module or several (all model chunks of the pipeline stage).
        group: ranks whose statistics are summed, ``tp_dp_cp`` or a larger group; None means this rank alone.
    Returns:
        the number of routers of which an update was dropped because a token was NaN, infinite or too large.
    Raises:
        ValueError: on every rank, if the group is smaller than ``tp_dp_cp``; if an AIR router had a training forward on
            some ranks only; or if other code has written to a router's buffers since the step began.
        RuntimeError: on every rank, if a rank failed to select its share of the next lists.
    """
    chunks = _chunks(modules)
    num_dropped = _update(find_routers(chunks), group)
    _end_step(chunks)
    return num_dropped


def end_skipped_step(modules: torch.nn.Module | Iterable[torch.nn.Module]) -> None:
    """End a step that was skipped: nothing is learned, and the logs keep what its forwards have counted."""
    _end_step(_chunks(modules))


def _end_step(chunks: list[torch.nn.Module]) -> None:
    for part in _with_counts(chunks):
        part.end_step()


def _update(routers: list[CompactRouter], group: torch.distributed.ProcessGroup | None) -> int:
    learning = [(router, learner) for router in routers for learner in router.learners()]
    listing = [router for router in routers if router.has_lists]
    if not learning and not listing:
        return 0
    _require_all_tokens([*(router for router, _ in learning), *listing], group)
    batches = batches_of([learner for _, learner in learning])
    sums, ran_and_failed = _all_reduce(batches, listing, group)
    copies = [(router, one) for router in routers for one in router.host_copies() if not one.is_on_cpu()]
    states = [_states(batch[0], statistics) for batch, statistics in zip(batches, sums, strict=True)]
    read = _read_at_once([*states, ran_and_failed, *(one.flat() for _, one in copies)])
    states, (num_ran, num_failed), values = read[: len(states)], read[len(states)], read[len(states) + 1 :]
    _require_unwritten(copies, values)
    if sum(num_failed):
        _raise_failures(listing, group)
    _require_every_rank(listing, num_ran, group)
    for router, count in zip(listing, num_ran, strict=True):
        if count:
            router.commit_lists(group)
    lost = set()
    for batch, statistics, states_of_batch in zip(batches, sums, states, strict=True):
        lost.update(apply_updates(batch, statistics, states_of_batch))
    for _, learner in learning:
        learner.discard()
    dropped = [(router, learner) for router, learner in learning if learner in lost]
    for router, learner in dropped:
        logger.warning(
            "layer %s: a token of this global batch was NaN, infinite or too large; its %s stays as it was%s",
            layer_of(router),
            learner.title,
            learner.drop_note(),
        )
    return len({router for router, _ in dropped})


def _require_all_tokens(routers: Iterable[CompactRouter], group: torch.distributed.ProcessGroup | None) -> None:
    """Raise if the group leaves out ranks with other tokens: what the ranks learn would drift apart unnoticed."""
    for router in routers:
        if group_size(group) < group_size(router.tp_dp_cp_group):
            raise ValueError(
                f"layer {layer_of(router)}: group ({group_size(group)} ranks) must hold all "
                f"{group_size(router.tp_dp_cp_group)} ranks with different tokens; give it the process group tp_dp_cp"
            )


def _all_reduce(
    batches: list[list[Learner]], listing: list[CompactRouter], group: torch.distributed.ProcessGroup | None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Sum over the ranks, in one all-reduce, all statistics and the numbers of ranks that ran a router or failed.

    Returns:
        - for each batch of N learners, the summed statistics [N, ...]
        - [2, n] int64, for each of the n routers of ``listing`` how many ranks ran it, and how many ranks failed to
          select their share of its next lists
    """
    device = batches[0][0].statistics.device if batches else listing[0].expert_load.device
    own = [[router.has_learned for router in listing], [router.index.failure is not None for router in listing]]
    own = torch.tensor(own, dtype=torch.float32, device=device)
    flat = torch.cat([*(learner.statistics.flatten() for batch in batches for learner in batch), own.flatten()])
    sizes = [len(batch) * batch[0].statistics.numel() for batch in batches]
    *sums, ran_and_failed = sum_over_ranks(flat, group).split([*sizes, own.numel()])
    sums = [part.view(len(batch), *batch[0].statistics.shape) for batch, part in zip(batches, sums, strict=True)]
    return sums, ran_and_failed.view_as(own).long()


def _states(learner: Learner, statistics: torch.Tensor) -> torch.Tensor:
    """[N, 2] bool, whether the statistics [N, ...] of N learners like this one are finite, and have a token."""
    return torch.stack((statistics.isfinite().flatten(1).all(dim=1), learner.num_tokens(statistics) > 0), dim=1)


def _read_at_once(tensors: list[torch.Tensor]) -> list[list]:
    """Read bool and integer tensors of one device as (nested) lists; waits for the device once."""
    numbers = torch.cat([tensor.flatten().long() for tensor in tensors]).cpu().split([one.numel() for one in tensors])
    return [part.view(one.shape).to(one.dtype).tolist() for part, one in zip(numbers, tensors, strict=True)]


def _require_unwritten(copies: list[tuple[CompactRouter, HostCopy]], values: list[list[int]]) -> None:
    """Raise if other code has written to a router in the step, so that its forwards missed it.

    Args:
        copies: copies on the host, each with its router.
        values: for each copy, the values that its buffers have now.
    """
    for (router, one), numbers in zip(copies, values, strict=True):
        if not one.holds(numbers):
            raise ValueError(
                f"layer {layer_of(router)}: the router's buffers were written after the step began, which its "
                "forwards did not notice; call discard_statistics(model) after a broadcast or another write"
            )


def _raise_failures(listing: list[CompactRouter], group: torch.distributed.ProcessGroup | None) -> None:
    """Raise, on every rank, an error that names the failures of all ranks; gathers them over the group."""
    failures = [(layer_of(router), router.index.failure) for router in listing if router.index.failure is not None]
    own = [f"layer {layer}: {type(error).__name__}: {error}" for layer, error in failures]
    every_rank = [None] * group_size(group)
    torch.distributed.all_gather_object(every_rank, own, group=group)
    named = [f"rank {rank} of the group, {failure}" for rank, found in enumerate(every_rank) for failure in found]
    raise RuntimeError("codewords could not be ranked for the next shortlists: " + "; ".join(named)) from (
        failures[0][1] if failures else None
    )


def _require_every_rank(
    listing: list[CompactRouter], num_ran: list[int], group: torch.distributed.ProcessGroup | None
) -> None:
    """Raise if only some ranks ran a router.

    Lists are made in the first forward after an update. A rank without a forward would make its lists from later
    centers than the other ranks.
    """
    num_ranks = group_size(group)
    for router, count in zip(listing, num_ran, strict=True):
        if count not in (0, num_ranks):
            raise ValueError(
                f"layer {layer_of(router)}: every rank must run an AIR router in every step, and "
                f"{num_ranks - count} of {num_ranks} ranks had no training forward of it; give a rank that has no "
                "tokens an empty batch"
            )
