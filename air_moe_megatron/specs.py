"""Layer specs: put the AIR router into any spec that Megatron makes.

Specs are rewritten, not built, so that norms, attention, experts and dispatchers stay Megatron's choice. Base specs
are shared constants: every part on the way to a router is copied.
"""

import contextlib
import copy
import functools
import inspect

from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, get_module

from air_moe_megatron.compat import require_supported_megatron
from air_moe_megatron.config import validate
from air_moe_megatron.router import AIRRouter

# Attributes of submodule dataclasses that lead to a layer or to its mlp.
_NESTED = ("mlp", "moe_layer", "mtp_model_layer", "transformer_layer")


def with_air_router(spec, config):
    """Return the spec with :class:`AIRRouter` in its MoE layers; the same object where the config asks for top-k.

    Args:
        spec: a ModuleSpec, a ``partial`` of MoELayer, the submodules of a block, or a list of these.
        config: the transformer config; its ``moe_router_type`` decides, and its fields are validated.
    """
    if spec is None or getattr(config, "moe_router_type", "topk") == "topk":
        return spec
    require_supported_megatron()
    validate(config)
    return _rewrite(spec)


def _rewrite(spec):
    if isinstance(spec, list):
        return [_rewrite(item) for item in spec]
    if getattr(spec, "layer_specs", None) is not None:  # the submodules of a decoder or multi-token-prediction block
        return _replace(spec, layer_specs=_rewrite(spec.layer_specs))
    if isinstance(spec, functools.partial):
        submodules = spec.keywords.get("submodules")
        if not isinstance(submodules, MoESubmodules):
            return spec
        keywords = {**spec.keywords, "submodules": _replace(submodules, router=AIRRouter)}
        return functools.partial(spec.func, *spec.args, **keywords)
    if isinstance(spec, ModuleSpec):
        if isinstance(spec.submodules, MoESubmodules) and issubclass(get_module(spec), MoELayer):
            return _replace(spec, submodules=_replace(spec.submodules, router=AIRRouter))
        return _replace(spec, submodules=_rewrite_submodules(spec.submodules))
    return spec


def _rewrite_submodules(submodules):
    if submodules is None:
        return None
    changes = {}
    for name in (*_NESTED, "layer_specs"):
        if getattr(submodules, name, None) is not None:
            changes[name] = _rewrite(getattr(submodules, name))
    return _replace(submodules, **changes) if changes else submodules


def _replace(part, **changes):
    part = copy.copy(part)
    for name, value in changes.items():
        setattr(part, name, value)
    return part


def air_layer_spec(model_config, vp_stage=None, given=None):
    """The decoder spec of a GPT model with AIR routers; give it to ``GPTModelConfig.transformer_layer_spec``.

    Args:
        model_config: Megatron's GPTModelConfig; its transformer config chooses everything else as without us.
        vp_stage: virtual pipeline stage, or None.
        given: a spec, or a callable that makes one, to start from instead of Megatron's default.
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
    return with_air_router(spec, model_config.transformer)


@contextlib.contextmanager
def mtp_specs_with_air_router():
    """Within this context, the multi-token-prediction layers of a GPT model get the AIR router too.

    Adapts one name, ``megatron.training.models.gpt.mtp_block_spec``, because Megatron derives those layers anew
    instead of from the decoder spec it was given; restored on leaving. A no-op for configs with the top-k router.
    """
    from megatron.training.models import gpt

    original = gpt.mtp_block_spec

    @functools.wraps(original)
    def mtp_block_spec(config, *args, **kwargs):
        return with_air_router(original(config, *args, **kwargs), config.transformer)

    gpt.mtp_block_spec = mtp_block_spec
    try:
        yield
    finally:
        gpt.mtp_block_spec = original
