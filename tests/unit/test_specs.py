"""Layer specs: every MoE layer gets the AIR router, whatever spec it stands in, and nothing else changes."""

import copy
import dataclasses
import functools

import pytest

from air_moe_megatron.config import AIRMoEConfig
from air_moe_megatron.routers.air import AIRRouter

pytestmark = pytest.mark.usefixtures("megatron_cpu")


def test_topk_leaves_specs_as_they_are():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from air_moe_megatron.specs import with_air_layers

    spec = get_gpt_layer_local_spec(num_experts=8, moe_grouped_gemm=False)
    assert with_air_layers(spec, make_air_config(moe_router_type="topk")) is spec
    assert with_air_layers(None, make_air_config()) is None


def make_air_config(**settings):
    base = dict(num_layers=2, hidden_size=16, num_attention_heads=4, num_moe_experts=8, moe_ffn_hidden_size=8)
    return AIRMoEConfig(**{**base, "moe_router_type": "air", **settings})


def routers_of(part):
    """The routers of all MoE layers that a spec names, wherever they stand."""
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    if isinstance(part, MoESubmodules):
        return [part.router]
    if isinstance(part, functools.partial):
        parts = part.keywords.values()
    elif isinstance(part, (list, tuple)):
        parts = part
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        parts = vars(part).values()
    else:
        parts = ()
    return [router for item in parts for router in routers_of(item)]


def test_every_moe_layer_gets_the_router_and_the_base_spec_keeps_its_own():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from air_moe_megatron.specs import with_air_layers

    config = make_air_config(num_layers=4, moe_layer_freq=[0, 1, 1, 0], normalization="RMSNorm")
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    before, shape = routers_of(spec), repr(spec)
    assert len(before) == 2 and AIRRouter not in before
    rewritten = with_air_layers(spec, config)
    assert routers_of(rewritten) == [AIRRouter] * len(before)
    assert routers_of(spec) == before and repr(spec) == shape
    # Nothing but the way to the routers is new.
    for old, new in zip(spec.layer_specs, rewritten.layer_specs, strict=True):
        assert new.submodules.self_attention is old.submodules.self_attention
        assert new.module is old.module
    assert rewritten.layer_norm is spec.layer_norm
    assert repr(with_air_layers(rewritten, config)) == repr(rewritten)  # twice is once


def test_a_spec_of_modulespecs_is_rewritten_too():
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from air_moe_megatron.specs import with_air_layers

    moe = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts="experts"))
    original = copy.copy(vars(moe.submodules))
    rewritten = with_air_layers([moe], make_air_config())
    assert rewritten[0].submodules.router is AIRRouter
    assert rewritten[0].submodules.experts == "experts"
    assert vars(moe.submodules) == original


def test_specs_validate_the_config():
    from air_moe_megatron.specs import with_air_layers

    config = make_air_config()
    config.moe_air_num_probes = -1
    with pytest.raises(ValueError, match=r"moe_air_num_probes \(-1\)"):
        with_air_layers([], config)
