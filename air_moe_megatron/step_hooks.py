"""Hooks of Megatron's training step: the update of the codebooks, then the health line and the diagnostics.

``codebook_updates`` wraps Megatron's ``train_step``. A checkout with ``patches/`` applied calls ``begin_step`` and
``finish_step`` itself. A loop of another kind needs only ``sync.py``.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.compat import megatron_has_our_fields
from air_moe_megatron.diagnostics import Diagnostics
from air_moe_megatron.diagnostics.health import expert_loads, is_due, log_health
from air_moe_megatron.routers import find_routers
from air_moe_megatron.specs import require_routers
from air_moe_megatron.sync import discard_statistics, end_skipped_step, update_codebooks


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
    if successful:
        update_codebooks(model, routers[0].tp_dp_cp_group if routers else None)
    else:
        end_skipped_step(model)
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
