"""Which layers use the hash router with ``moe_num_hash_layers``, and the config of their routers."""

import copy
from collections.abc import Sequence

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config.fields import num_hash_layers
from air_moe_megatron.config.sizes import resolve_product_keys

_WITHOUT_SCORES = {
    "moe_router_input_norm": "none",
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": None,
    "moe_input_jitter_eps": None,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_enable_expert_bias": False,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
}
"""Values that turn off what routers do with scores: a hash router has none."""


def layers_with_experts(frequency: int | Sequence[int], num_layers: int) -> list[bool]:
    """Say for each decoder layer whether it has experts, by ``moe_layer_freq``.

    Example: of four layers, a frequency of 2 gives the first and the third.
    """
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(num_layers)]
    return [bool(has_experts) for has_experts in frequency]


def moe_layer_numbers(config: TransformerConfig) -> list[int]:
    """Numbers, from 1, of the decoder's layers with experts, by ``moe_layer_freq``.

    Example: of four layers, a frequency of 2 gives [1, 3], and [0, 1, 1, 0] gives [2, 3].
    """
    layers = layers_with_experts(config.moe_layer_freq, config.num_layers)
    return [number for number, has_experts in enumerate(layers, 1) if has_experts]


def hash_layer_numbers(config: TransformerConfig, moe_layers: Sequence[int] | None = None) -> list[int]:
    """Numbers, from 1, of the layers that use the hash router: the first ones with experts.

    Args:
        config: with our fields.
        moe_layers: numbers of the layers with experts; None takes them from ``moe_layer_freq``.

    Example: moe_num_hash_layers 1 and moe_layer_freq [0, 1, 1, 0] give [2].
    """
    numbers = moe_layer_numbers(config) if moe_layers is None else moe_layers
    return list(numbers[: num_hash_layers(config)])


def num_layers_of_first_chunk(config: TransformerConfig) -> int:
    """Number of decoder layers in the chunk with the embedding: the first virtual stage of the first pipeline stage."""
    layout = config.pipeline_model_parallel_layout
    if config.pipeline_model_parallel_size == 1:
        return config.num_layers
    if layout is not None:
        return layout.layout[0][0].count(LayerType.decoder)
    return get_num_layers_to_build(config, vp_stage=0, pp_rank=0)


def hash_layer_config(config: TransformerConfig) -> TransformerConfig:
    """Make the config of a hash router among other routers: a copy of theirs, without what they do with scores.

    Its K weights have the same sum as the probs of the other layers: the scaling factor, with product keys times the
    number of heads.
    """
    changed = copy.copy(config)
    for name, value in {"moe_router_type": "hash", **_WITHOUT_SCORES}.items():
        setattr(changed, name, value)
    if config.moe_router_type == "product_key":
        scale = config.moe_router_topk_scaling_factor or 1.0
        changed.moe_router_topk_scaling_factor = scale * resolve_product_keys(config).num_heads
    return changed
