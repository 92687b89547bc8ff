"""The step boundary: when the codebooks learn, and the one collective that it takes.

Communication per optimizer step and pipeline stage: one all-reduce of ``layers * C * (H + 3)`` fp32 numbers over
``tp_dp_cp``, the ranks of the stage that hold different tokens; a running norm of F features adds ``3F + 1``.

The order within a step: every attempt starts with ``discard_statistics`` (a step that Megatron runs again must not
count twice), forwards accumulate, and ``update_codebooks`` runs once after the optimizer has really stepped. A skipped
step therefore leaves no trace, whatever the reason.
"""

import contextlib
import functools
import logging

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter

from air_moe_megatron.codebook import Codebook
from air_moe_megatron.compat import megatron_has_our_fields
from air_moe_megatron.config import is_plain_topk
from air_moe_megatron.diagnostics import log_health
from air_moe_megatron.dispatcher import CompactTokenDispatcher
from air_moe_megatron.router import ROUTERS, air_routers
from air_moe_megatron.routers.base import CompactRouter

logger = logging.getLogger(__name__)


def learners(modules) -> list[tuple[CompactRouter, torch.nn.Module]]:
    """What learns without gradients in the modules, each with its router, in a fixed order."""
    chunks = [modules] if isinstance(modules, torch.nn.Module) else modules
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, CompactRouter)]
    return [(router, learner) for router in routers for learner in router.learners()]


def discard_statistics(modules) -> None:
    """Forget what the routers have accumulated since the last update; call it before each attempt at a step."""
    for _, learner in learners(modules):
        learner.discard()


@torch.no_grad()
def update_codebooks(modules, group: torch.distributed.ProcessGroup | None = None) -> int:
    """All-reduce what the routers in ``modules`` accumulated, for codebooks and running norms, and apply it.

    Every rank of the group must call it with the same routers. Sums are reduced first and divided after, so that N
    ranks equal one rank on all their tokens; all ranks get bitwise the same codebooks. Waits for the device: once for
    all routers, and for each codebook while it looks for starved codewords.

    Args:
        modules: a module or a list of modules (all model chunks of the pipeline stage).
        group: ranks whose statistics are summed; None means this rank alone.
    Returns:
        the number of routers whose update was dropped because a token was NaN or infinite.
    """
    for router in air_routers(modules):
        if router.index.source == "experts":
            router.codebook.count_update()  # learned from the centres, at the next refresh of the lists
    learning = learners(modules)
    if not learning:
        return 0
    flat = torch.cat([learner.statistics.flatten() for _, learner in learning])
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(flat, group=group)
    parts = flat.split([learner.statistics.numel() for _, learner in learning])
    finite = torch.stack([part.isfinite().all() for part in parts]).tolist()
    dropped = {}
    for (router, learner), part, is_finite in zip(learning, parts, finite, strict=True):
        learner.apply_update(part.view_as(learner.statistics), is_finite)
        learner.discard()
        if not is_finite:
            dropped[router] = learner
    for router, learner in dropped.items():
        so_far = f" ({int(learner.num_dropped)} so far)" if isinstance(learner, Codebook) else ""
        logger.warning(
            "layer %s: a token of this global batch was NaN or infinite; its %s as it was%s",
            router.layer_number,
            "codebook stays" if isinstance(learner, Codebook) else "running norm stays",
            so_far,
        )
    return len(dropped)


def require_routers(model) -> list:
    """Check that every router of a model is of the class that its config asks for, whatever spec it was built from, and
    that those which give compact routes are in a layer that dispatches them.

    Args:
        model: Megatron's list of model chunks.
    Returns:
        The same list, as Megatron's hooks must.
    Raises:
        ValueError: naming the module that kept Megatron's router, or the layer that kept Megatron's dispatcher.
    """
    for chunk in model:
        for name, module in chunk.named_modules():
            if isinstance(module, MoELayer) and module.config.moe_dispatch == "compact":
                if not isinstance(module.token_dispatcher, CompactTokenDispatcher):
                    raise ValueError(
                        f"moe_dispatch 'compact' did not reach {name}, a {type(module).__name__}: its layer spec must "
                        "build AIRMoELayer, as air_layer_spec does"
                    )
            if isinstance(module, TopKRouter) and not is_plain_topk(module.config):
                if not isinstance(module, ROUTERS[module.config.moe_router_type]):
                    raise ValueError(
                        f"moe_router_type {module.config.moe_router_type!r} did not reach {name}, a "
                        f"{type(module).__name__}: its layer spec must build MoE layers with MoESubmodules, whose "
                        "router can be replaced; of multi-token-prediction layers, specs.mtp_specs_with_air_layers() "
                        "does it while the model is built"
                    )
    return model


def finish_step(model, iteration: int, successful: bool) -> None:
    """End a training step: update the codebooks if it succeeded, and log the routing health where Megatron logs.

    Args:
        model: Megatron's list of model chunks.
        iteration: the step's number, counted from 1 as in Megatron's log.
        successful: whether the optimizer has stepped.
    Raises:
        ValueError: as :func:`require_routers`.
    """
    routers = [router for router, _ in learners(require_routers(model))] or air_routers(model)
    if successful and routers:
        update_codebooks(model, routers[0].tp_dp_cp_group)
    log_health(model, iteration)


@contextlib.contextmanager
def codebook_updates():
    """Within this context, Megatron's training loop keeps the codebooks.

    Adapts one name, ``megatron.training.training.train_step``, which has no extension point that knows whether a step
    succeeded; restored on leaving. ``patches/`` holds the same two calls for a Megatron-LM checkout.
    """
    from megatron.training import training

    if megatron_has_our_fields():  # patched: it calls us itself
        yield
        return
    original = training.train_step

    @functools.wraps(original)
    def train_step(
        forward_step_func, data_iterator, model, optimizer, scheduler, config, forward_backward_func, **kwargs
    ):
        @functools.wraps(forward_backward_func)
        def attempt(*args, **attempt_kwargs):
            discard_statistics(model)
            return forward_backward_func(*args, **attempt_kwargs)

        results = original(forward_step_func, data_iterator, model, optimizer, scheduler, config, attempt, **kwargs)
        skipped = results[1]
        finish_step(model, kwargs["iteration"] + 1, successful=not skipped)
        return results

    training.train_step = train_step
    try:
        yield
    finally:
        training.train_step = original
