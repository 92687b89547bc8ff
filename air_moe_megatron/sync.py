"""The step boundary, at which codebooks learn and lists change, and its collectives.

Communication per optimizer step and pipeline stage: one all-reduce of fp32 numbers over ``tp_dp_cp``, the ranks of the
stage that hold different tokens. A codebook adds ``C * (H + 3)`` numbers, a running norm ``3 * features + 1``, a
whitening norm ``(H + 1)^2``, and an AIR router two. In steps that rank codewords for new lists there is one more
all-reduce per AIR router, in ``ShortlistIndex.commit``.

A step that Megatron repeats must not count twice, so every attempt starts with ``discard_statistics``. Forwards
accumulate statistics. ``update_codebooks`` runs once, after the optimizer has stepped. So nothing is learned from a
skipped step.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.compat import megatron_has_our_fields
from air_moe_megatron.diagnostics import Diagnostics
from air_moe_megatron.diagnostics.health import expert_loads, is_due, log_health
from air_moe_megatron.layer import find_compact_layers
from air_moe_megatron.layer.dispatcher import CompactTokenDispatcher
from air_moe_megatron.learned.learner import Learner, apply_updates, batches_of
from air_moe_megatron.learned.module_state import reread
from air_moe_megatron.process_groups import group_size, sum_over_ranks
from air_moe_megatron.routers import find_routers
from air_moe_megatron.routers.base import CompactRouter
from air_moe_megatron.specs import require_routers

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
    rank stays as it is. Waits for the device once for all statistics, once for each batch of codebooks
    (``learned/learner.py``), once for each round in which codewords are revived, and when lists change.

    Args:
        modules: a module or several (all model chunks of the pipeline stage).
        group: ranks whose statistics are summed; None means this rank alone.
    Returns:
        the number of routers of which an update was dropped because a token was NaN or infinite.
    Raises:
        ValueError: on every rank, if an AIR router had a training forward on some ranks only; or if other code has
            written to a router's buffers since the step began.
        RuntimeError: on every rank, if a rank failed to rank its share of the codewords.
    """
    chunks = _chunks(modules)
    num_dropped = _update(find_routers(chunks), group)
    for part in _with_counts(chunks):
        part.end_step()
    return num_dropped


def _update(routers: list[CompactRouter], group: torch.distributed.ProcessGroup | None) -> int:
    learning = [(router, learner) for router in routers for learner in router.learners()]
    listing = [router for router in routers if router.has_lists]
    dropped = []
    if learning or listing:
        batches = batches_of([learner for _, learner in learning])
        sums, states, num_ran, num_failed = _sum_over_ranks(batches, listing, routers, group)
        if sum(num_failed):
            _raise_failures(listing, group)
        _require_every_rank(listing, num_ran, group)
        for router, count in zip(listing, num_ran, strict=True):
            if count:
                router.commit_lists(group)
        lost = set()
        for batch, sums_of_batch, states_of_batch in zip(batches, sums, states, strict=True):
            lost.update(apply_updates(batch, sums_of_batch, states_of_batch))
        dropped = [(router, learner) for router, learner in learning if learner in lost]
        for _, learner in learning:
            learner.discard()
    for router, learner in dropped:
        logger.warning(
            "layer %s: a token of this global batch was NaN or infinite; its %s stays as it was%s",
            router.layer_number,
            learner.title,
            learner.drop_note(),
        )
    return len({router for router, _ in dropped})


def _sum_over_ranks(
    batches: list[list[Learner]],
    listing: list[CompactRouter],
    routers: list[CompactRouter],
    group: torch.distributed.ProcessGroup | None,
) -> tuple[list[torch.Tensor], list[list[tuple[bool, bool]]], list[int], list[int]]:
    """Sum all statistics over the ranks in one all-reduce; waits for the device once.

    Returns:
        - for each batch of N learners, the summed statistics [N, ...]
        - for each learner, whether its statistics are finite, and whether they have a token
        - for each router of ``listing``, the number of ranks that ran it
        - for each router of ``listing``, the number of ranks that failed to rank its codewords
    Raises:
        ValueError: if other code has written to a router of ``routers`` in the step, so that forwards missed it.
    """
    device = batches[0][0].statistics.device if batches else listing[0].expert_load.device
    ran = [router.has_learned for router in listing] + [router.index.failure is not None for router in listing]
    ran = torch.tensor(ran, dtype=torch.float32, device=device)
    flat = torch.cat([*(learner.statistics.flatten() for batch in batches for learner in batch), ran])
    sizes = [len(batch) * batch[0].statistics.numel() for batch in batches]
    *sums, ran = sum_over_ranks(flat, group).split([*sizes, ran.numel()])
    sums = [part.view(len(batch), *batch[0].statistics.shape) for batch, part in zip(batches, sums, strict=True)]
    states = [
        torch.stack((part.isfinite().flatten(1).all(dim=1), batch[0].num_tokens(part) > 0), dim=1).flatten()
        for batch, part in zip(batches, sums, strict=True)
    ]
    copies = [(router, one) for router in routers for one in router.host_copies() if not one.is_on_host()]
    written = [buffer.flatten() for _, one in copies for buffer in one.buffers]
    numbers = iter(torch.cat([part.long() for part in (*states, ran, *written)]).tolist())
    states = [[(bool(next(numbers)), bool(next(numbers))) for _ in batch] for batch in batches]
    num_ran, num_failed = ([next(numbers) for _ in listing] for _ in range(2))
    for router, one in copies:
        if not one.holds([next(numbers) for buffer in one.buffers for _ in range(buffer.numel())]):
            raise ValueError(
                f"layer {router.layer_number}: the router's buffers were written after the step began, which its "
                "forwards did not notice; call discard_statistics(model) after a broadcast or another write"
            )
    return sums, states, num_ran, num_failed


def _raise_failures(listing: list[CompactRouter], group: torch.distributed.ProcessGroup | None) -> None:
    """Raise, on every rank, an error that names the failures of all ranks; gathers them over the group."""
    failures = [(router.layer_number, router.index.failure) for router in listing if router.index.failure is not None]
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
                f"layer {router.layer_number}: every rank must run an AIR router in every step, and "
                f"{num_ranks - count} of {num_ranks} ranks had no training forward of it; give a rank that has no "
                "tokens an empty batch"
            )


def begin_step(model: list[torch.nn.Module], iteration: int) -> None:
    """Begin a training step in Megatron's loop; every rank must call it, before the first attempt at the step.

    Args:
        model: Megatron's list of model chunks.
        iteration: the step's number, counted from 1 as in Megatron's log.
    """
    diagnostics = Diagnostics.of(model, iteration)
    if diagnostics is not None:
        diagnostics.begin_step(iteration)


def finish_step(
    model: list[torch.nn.Module],
    iteration: int,
    successful: bool,
    losses: dict[str, torch.Tensor] | None = None,
    grad_norm: float | None = None,
) -> None:
    """End a training step in Megatron's loop: update the codebooks if it succeeded, and log what is due.

    A patched Megatron-LM checkout calls it. Such a checkout has no hook after the model is built, so this function also
    checks that the model was built from our specs.

    Args:
        model: Megatron's list of model chunks.
        iteration: the step's number, counted from 1 as in Megatron's log.
        successful: whether the optimizer has stepped.
        losses: losses by name, as ``train_step`` returns them on the last pipeline stage.
        grad_norm: norm of the gradients of all parameters, before clipping.
    Raises:
        ValueError: as :func:`require_routers`.
    """
    _finish_step(require_routers(model), iteration, successful, losses, grad_norm)


def _finish_step(
    model: list[torch.nn.Module],
    iteration: int,
    successful: bool,
    losses: dict[str, torch.Tensor] | None,
    grad_norm: float | None,
) -> None:
    routers = find_routers(model)
    if routers and successful:
        _update(routers, routers[0].tp_dp_cp_group)
    for part in _with_counts(model):
        part.end_step()
    is_health_due = is_due(iteration)
    counts = expert_loads(routers) if is_health_due and routers else None
    diagnostics = Diagnostics.of(model, iteration)
    if diagnostics is not None:
        loads = None if counts is None else counts[0]
        diagnostics.finish_step(iteration, losses if successful else None, grad_norm, loads)
    if is_health_due:
        measured = {} if diagnostics is None else diagnostics.take_unlogged()
        log_health(model, routers, iteration, counts, measured)


@contextlib.contextmanager
def codebook_updates() -> Iterator[None]:
    """Make Megatron's training loop update the codebooks within this context.

    It wraps ``megatron.training.training.train_step`` and restores it on exit, because Megatron has no extension point
    that knows whether a step succeeded. The first step checks that the model was built from our specs. ``patches/`` has
    the same calls for a Megatron-LM checkout, and with these this context does nothing.
    """
    from megatron.training import training

    if megatron_has_our_fields():  # a patched checkout calls begin_step, finish_step and discard_statistics itself
        yield
        return
    original = training.train_step
    is_checked = False

    @functools.wraps(original)
    def train_step(
        forward_step_func: Callable,
        data_iterator: Any,
        model: list[torch.nn.Module],
        optimizer: Any,
        scheduler: Any,
        config: TransformerConfig,
        forward_backward_func: Callable,
        **kwargs: Any,
    ) -> tuple:
        nonlocal is_checked
        if not is_checked:
            require_routers(model)
            is_checked = True

        @functools.wraps(forward_backward_func)
        def attempt(*args: Any, **attempt_kwargs: Any) -> list:
            discard_statistics(model)
            return forward_backward_func(*args, **attempt_kwargs)

        begin_step(model, kwargs["iteration"] + 1)
        results = original(forward_step_func, data_iterator, model, optimizer, scheduler, config, attempt, **kwargs)
        losses, skipped, *_, grad_norm, _, _ = results
        _finish_step(model, kwargs["iteration"] + 1, not skipped, losses, grad_norm)
        return results

    training.train_step = train_step
    try:
        yield
    finally:
        training.train_step = original
