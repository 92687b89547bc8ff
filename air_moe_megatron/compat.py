"""Version checks of Megatron, and workarounds for differences between its versions."""

import dataclasses
import functools
import types
from typing import Any

import torch
from packaging.version import Version

SUPPORTED_MEGATRON = ("0.17", "0.20")
"""megatron-core versions on which our layers, specs and step boundary work: at least the first, below the second.

docs/versions.md says what was tested on each.
"""

ENTRY_MEGATRON = ("0.19", "0.20")
"""Versions on which our commands run. These build the model by ``GPTModelConfig``, which exists from 0.19 on."""


WRAPPED = {
    "megatron.training.training.train_step": (
        (
            *("forward_step_func", "data_iterator", "model", "optimizer", "opt_param_scheduler", "config"),
            *("forward_backward_func", "iteration"),
        ),
        "step_hooks.py",
    ),
}
"""Megatron's functions that we wrap: name -> the parameters that they must take, and our file that wraps them."""

VERSIONED = {
    "precomputed_indices": ("0.19", "1"),  # before, probs_of_selected works without it
    "moe_logging": ("0.18", "1"),  # before, get_moe_metrics_tracker returns a stand-in
    "moe_utils.save_to_aux_losses_tracker": ("0.17", "0.18"),  # used by the stand-in
    "moe_utils.get_moe_layer_wise_logging_tracker": ("0.17", "0.18"),
    "megatron.training.models.gpt": ("0.19", "1"),  # used by specs.air_layer_spec, which only our commands call
    "hybrid_layer_specs.hybrid_stack_spec": ("0.18", "1"),  # used by specs.air_hybrid_stack_spec, likewise
}
"""Text in the description of a mismatch with Megatron -> the versions on which the mismatch matters, from the first to
below the second. On other versions our code does not need what is missing."""


def version_range(versions: tuple[str, str]) -> str:
    """Versions in words. Example: ``("0.17", "0.20")`` gives ">= 0.17, < 0.20"."""
    first, end = versions
    return f">= {first}, < {end}"


@functools.cache
def megatron_version() -> Version:
    """Version of the installed megatron-core: its three numbers, without any suffix.

    Raises:
        ImportError: if megatron-core is not installed.
    """
    try:
        from megatron.core.package_info import __version__ as version
    except ImportError as error:
        raise ImportError(
            f"air_moe_megatron needs megatron-core {version_range(SUPPORTED_MEGATRON)}; install air_moe_megatron[train]"
        ) from error
    return Version(Version(version).base_version)


def require_supported_megatron() -> None:
    """Check that the installed Megatron has a supported version.

    Raises:
        ImportError: if not; the message names the installed and the supported versions.
    """
    _require(SUPPORTED_MEGATRON, "air_moe_megatron needs")


def require_entry_megatron() -> None:
    """Check the version as :func:`require_supported_megatron` does, for commands that build the model themselves.

    Raises:
        ImportError: if not supported; the message also says what to do on 0.17 and 0.18.
    """
    require_supported_megatron()
    _require(
        ENTRY_MEGATRON,
        "this command builds models by megatron.training's GPTModelConfig, which only these have:",
        "; for a checkout of 0.17 or 0.18 run `python -m air_moe_megatron.patch apply` and its own pretrain_gpt.py",
    )


def _require(versions: tuple[str, str], why: str, remedy: str = "") -> None:
    version = megatron_version()
    first, end = (Version(bound) for bound in versions)
    if not first <= version < end:
        raise ImportError(f"megatron-core {version} is not supported: {why} {version_range(versions)}{remedy}")


def megatron_has_our_fields() -> bool:
    """Whether this Megatron is a checkout with ``patches/`` applied, which honors the flags itself."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return "moe_router_type" in {field.name for field in dataclasses.fields(TransformerConfig)}


def probs_of_selected(scores: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Megatron's probabilities of experts that have already been selected.

    Args:
        scores: [T, K] logits of the selected experts.
        settings: keyword arguments of ``topk_routing_with_score_function`` about scores.
    Returns:
        [T, K] probs, in the order of ``scores``.
    """
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    topk = scores.shape[1]
    if megatron_version() < Version("0.19"):  # without precomputed_indices: let it select all K, and undo its order
        probs, columns = topk_routing_with_score_function(scores, topk, dense_output=True, **settings)
        return probs.gather(1, columns.argsort(dim=1))
    columns = torch.arange(topk, device=scores.device).expand_as(scores)
    return topk_routing_with_score_function(scores, topk, precomputed_indices=columns, dense_output=True, **settings)[0]


class _LossesOf017:
    """Megatron 0.17's record of auxiliary losses, with the two methods of later versions' tracker that we use."""

    @staticmethod
    def record(
        name: str,
        value: torch.Tensor,
        layer_number: int,
        num_layers: int,
        reduce_group: torch.distributed.ProcessGroup | None = None,
        needs_dp_avg: bool = True,
    ) -> None:
        """Add the value of a layer's loss in this step."""
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        save_to_aux_losses_tracker(
            name, value, layer_number, num_layers, reduce_group=reduce_group, reduce_group_has_dp=not needs_dp_avg
        )

    @property
    def metrics(self) -> dict[str, types.SimpleNamespace]:
        """Name of a loss -> an object whose ``values`` has one value per layer."""
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        return {
            name: types.SimpleNamespace(values=entry["values"])
            for name, entry in get_moe_layer_wise_logging_tracker().items()
        }


def get_moe_metrics_tracker() -> Any:
    """Megatron's tracker of auxiliary losses; on 0.17, which has none, a stand-in with ``record`` and ``metrics``."""
    if megatron_version() < Version("0.18"):
        return _LossesOf017()
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker as tracker

    return tracker()


def destroy_moe_metrics_tracker() -> None:
    """Forget all recorded auxiliary losses."""
    if megatron_version() < Version("0.18"):
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        get_moe_layer_wise_logging_tracker().clear()
        return
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker as destroy

    destroy()
