"""Layer specs: put our routers and granular experts into any spec that Megatron makes, according to the config.

Specs are rewritten, not built, so norms, attention and everything else stay Megatron's choice. Megatron shares base
specs as constants, so every part that leads to an MoE layer is copied before it is changed.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.compat import require_supported_megatron
from air_moe_megatron.config import hash_layer_numbers, is_plain_topk, num_hash_layers, raise_first, unused, validate
from air_moe_megatron.layer import AIRMoELayer
from air_moe_megatron.layer.dispatcher import CompactTokenDispatcher
from air_moe_megatron.layer.experts import GranularExperts
from air_moe_megatron.routers import router_class

if TYPE_CHECKING:
    from megatron.training.models.gpt import GPTModelConfig

# Attributes of the submodules of blocks, stacks and layers that lead to an MoE layer.
_NESTED = ("layer_specs", "mlp", "moe_layer", "mtp_model_layer", "transformer_layer")


def with_air_layers[S](spec: S, config: TransformerConfig, moe_layers: Sequence[int] | None = None) -> S:
    """Return the spec with our routing in its MoE layers, or the same object if the config selects Megatron's routing.

    Each MoE layer becomes an :class:`AIRMoELayer` with the router of ``moe_router_type``, and with
    :class:`GranularExperts` if the config selects them. A subclass of MoELayer that is not ours is kept.

    With ``moe_num_hash_layers`` layers have different parameters. So this sets ``hetereogenous_dist_checkpoint`` in the
    config: otherwise Megatron would save the layers stacked, as one tensor.

    Args:
        spec: a ModuleSpec, a ``partial`` of MoELayer, the submodules of a block or stack, or a list of these.
        config: the transformer config; its ``moe_router_type`` decides, and its fields are validated.
        moe_layers: numbers of the layers with experts, from 1; None derives them from ``moe_layer_freq``.
    Raises:
        ValueError: if the config is not valid, sets a field of ours that has no effect, or asks for compact dispatch
            or first layers by hash in a layer class that is not ours.
    """
    if hasattr(config, "moe_router_type"):
        raise_first(unused(config))
    if spec is None or is_plain_topk(config):
        return spec
    require_supported_megatron()
    validate(config)
    hash_layers = None
    if num_hash_layers(config):
        config.hetereogenous_dist_checkpoint = True
        hash_layers = hash_layer_numbers(config, moe_layers)
    return _rewrite(spec, config, hash_layers)


def _rewrite[S](spec: S, config: TransformerConfig, hash_layers: list[int] | None) -> S:
    if isinstance(spec, list):
        return [_rewrite(item, config, hash_layers) for item in spec]
    if isinstance(spec, functools.partial):
        submodules = spec.keywords.get("submodules")
        if not isinstance(submodules, MoESubmodules):
            return spec
        keywords = {**spec.keywords, "submodules": _air_submodules(submodules, config)}
        if hash_layers is not None:
            keywords["hash_layers"] = hash_layers
        return functools.partial(_air_layer(spec.func, config), *spec.args, **keywords)
    if isinstance(spec, ModuleSpec):
        if isinstance(spec.submodules, MoESubmodules) and issubclass(get_module(spec), MoELayer):
            module = _air_layer(get_module(spec), config)
            params = spec.params if hash_layers is None else {**spec.params, "hash_layers": hash_layers}
            return _replace(spec, module=module, submodules=_air_submodules(spec.submodules, config), params=params)
        return _replace(spec, submodules=_rewrite(spec.submodules, config, hash_layers))
    nested = {name: getattr(spec, name) for name in _NESTED if getattr(spec, name, None) is not None}
    return (
        _replace(spec, **{name: _rewrite(part, config, hash_layers) for name, part in nested.items()})
        if nested
        else spec
    )


def _air_layer(layer: type[MoELayer], config: TransformerConfig) -> type[MoELayer]:
    if layer is MoELayer:
        return AIRMoELayer
    hashed = num_hash_layers(config)
    asked = "moe_dispatch ('compact')" if config.moe_dispatch == "compact" else f"moe_num_hash_layers ({hashed})"
    if (config.moe_dispatch == "compact" or hashed) and layer is not AIRMoELayer:
        raise ValueError(
            f"{asked} is not supported by the layer class {layer.__name__}: it needs Megatron's MoELayer or an "
            "AIRMoELayer"
        )
    return layer


def _air_submodules(submodules: MoESubmodules, config: TransformerConfig) -> MoESubmodules:
    changes = {"experts": GranularExperts} if config.moe_granular_experts else {}
    return _replace(submodules, router=router_class(config), **changes)


def _replace[S](part: S, **changes: object) -> S:
    part = copy.copy(part)
    for name, value in changes.items():
        setattr(part, name, value)
    return part


def air_layer_spec(
    model_config: "GPTModelConfig",
    vp_stage: int | None = None,
    given: ModuleSpec | Callable[..., ModuleSpec] | None = None,
) -> ModuleSpec:
    """The decoder spec of a GPT model with our routing; pass it as ``GPTModelConfig.transformer_layer_spec``.

    Args:
        model_config: Megatron's GPTModelConfig; its transformer config decides everything else, as in Megatron.
        vp_stage: virtual pipeline stage, or None.
        given: a spec, or a callable that makes one, to start from instead of Megatron's default.
    Raises:
        ValueError: as :func:`with_air_layers`.
    """
    from megatron.training.models.gpt import default_layer_spec

    if given is None:
        spec = default_layer_spec(model_config, vp_stage)
    elif isinstance(given, ModuleSpec) or not callable(given):
        spec = given
    elif "vp_stage" in inspect.signature(given).parameters:
        spec = given(model_config, vp_stage=vp_stage)
    else:
        spec = given(model_config)
    return with_air_layers(spec, model_config.transformer)


def air_hybrid_stack_spec(
    config: TransformerConfig, given: ModuleSpec | None = None, moe_layers: Sequence[int] | None = None
) -> ModuleSpec:
    """The stack spec of a hybrid model with our routing, for ``HybridModelConfig.hybrid_stack_spec``.

    Args:
        config: the transformer config.
        given: a stack spec to start from instead of Megatron's default, which needs Transformer Engine.
        moe_layers: numbers of the layers with experts in the hybrid pattern, from 1; required with
            ``moe_num_hash_layers``.
    Raises:
        ValueError: as :func:`with_air_layers`, and if ``moe_layers`` is missing although it is required.
    """
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    if moe_layers is None and num_hash_layers(config):
        raise ValueError(
            f"moe_num_hash_layers ({config.moe_num_hash_layers}) needs moe_layers in a hybrid model: the numbers of "
            "the layers with experts, which only the hybrid pattern tells"
        )
    return with_air_layers(given or hybrid_stack_spec, config, moe_layers)


def require_routers(model: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Check that a model was built from our specs, and return it, as Megatron requires of its hooks.

    Each router must have the class that its config selects. Compact routes need a layer with the compact dispatcher.

    Raises:
        ValueError: if a module kept Megatron's router, or a layer Megatron's dispatcher; the message names it.
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
                if not isinstance(module, router_class(module.config)):
                    raise ValueError(
                        f"moe_router_type {module.config.moe_router_type!r} did not reach {name}, a "
                        f"{type(module).__name__}: its layer spec must build MoE layers with MoESubmodules, whose "
                        "router can be replaced; of multi-token-prediction layers, specs.mtp_specs_with_air_layers() "
                        "does it while the model is built"
                    )
    return model


@contextlib.contextmanager
def mtp_specs_with_air_layers() -> Iterator[None]:
    """Give our routing also to the multi-token-prediction layers of GPT models that are built within this context.

    It wraps ``megatron.training.models.gpt.mtp_block_spec`` and restores it on exit, because Megatron does not derive
    these layers from the decoder spec that it was given. It changes nothing if the config selects Megatron's routing.
    """
    from megatron.training.models import gpt

    original = gpt.mtp_block_spec

    @functools.wraps(original)
    def mtp_block_spec(config: "GPTModelConfig", *args: Any, **kwargs: Any) -> ModuleSpec | None:
        return with_air_layers(original(config, *args, **kwargs), config.transformer)

    gpt.mtp_block_spec = mtp_block_spec
    try:
        yield
    finally:
        gpt.mtp_block_spec = original
