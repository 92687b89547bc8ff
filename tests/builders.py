"""Small configs, routers and layers of every router type: what all tests build theirs with."""

import io

import torch

from air_moe_megatron import AIRMoEConfig, AIRMoELayer
from air_moe_megatron.layer.experts import GranularExperts
from air_moe_megatron.routers import router_class

HIDDEN, EXPERTS, VOCABULARY = 16, 64, 40
STOCK = dict(moe_granular_experts=False, moe_dispatch="stock", moe_router_dtype=None)
"""Fields of Megatron's own path, around its own experts."""


def make_config(**fields) -> AIRMoEConfig:
    """A config of one layer on the compact path, but for the fields given."""
    base = dict(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, num_moe_experts=EXPERTS, moe_router_topk=4,
        moe_ffn_hidden_size=1, ffn_hidden_size=1, add_bias_linear=False, use_cpu_initialization=True,
        moe_router_load_balancing_type="none", moe_router_dtype="fp32", moe_granular_experts=True,
        moe_dispatch="compact", init_method_std=0.5,
    )  # fmt: skip
    if fields.get("moe_router_type") == "hash" or fields.get("moe_num_hash_layers"):
        base["moe_hash_vocab_size"] = VOCABULARY
    return AIRMoEConfig(**{**base, **fields})


# A small model of two layers with AIR routers, and else as Megatron has it: its own experts and dispatchers.
PLAIN = dict(
    num_layers=2, hidden_size=16, num_attention_heads=4, num_moe_experts=64, moe_router_topk=4, moe_ffn_hidden_size=8,
    moe_router_load_balancing_type="none", add_bias_linear=False, moe_router_type="air",
)  # fmt: skip


def plain_config(**fields) -> AIRMoEConfig:
    """A config of the fields in ``PLAIN``, but for those given."""
    return AIRMoEConfig(**{**PLAIN, **fields})


def make_layer(groups, **fields) -> AIRMoELayer:
    """A layer of granular experts behind the router that the fields ask for; equal weights for equal fields."""
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    config = make_config(**fields)
    torch.manual_seed(0)
    router = router_class(config)
    layer = AIRMoELayer(config, MoESubmodules(experts=GranularExperts, router=router), 1, groups)
    layer.set_layer_number(1)
    return layer


def make_router(groups, seed: int = 0, **fields):
    """The router that the fields ask for; equal weights for equal fields and seed."""
    config = make_config(**fields)
    torch.manual_seed(seed)
    router = router_class(config)(config, groups)
    router.set_layer_number(1)
    return router


def tell_ids(router, token_ids: torch.Tensor) -> None:
    """Give a hash router token ids [B, S]; others need none."""
    router.token_ids = token_ids


def naive_layer(layer, hidden, routes):
    """[T, H] in words: each expert of a token by itself, repeated ones as often as they stand there."""
    out = torch.zeros_like(hidden)
    for token, (ids, probs) in enumerate(zip(routes.topk_ids.tolist(), routes.probs, strict=True)):
        for expert, prob in zip(ids, probs, strict=True):
            if expert >= 0:
                inner = torch.nn.functional.gelu(layer.experts.weight1[expert] @ hidden[token])
                out[token] = out[token] + prob * (inner @ layer.experts.weight2[expert])
    return out


def pickled(module):
    """A copy of a module through ``torch.save`` and ``torch.load``."""
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def assert_says(error, words) -> None:
    """The message of an error that ``pytest.raises`` caught holds every word."""
    message = str(error.value)
    for word in words:
        assert word in message
