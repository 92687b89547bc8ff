"""The valid values of our fields: each by itself, and against each other and Megatron's sizes."""

import math
from dataclasses import fields
from typing import get_args, get_type_hints

from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config.fields import (
    AIRFields,
    is_plain_topk,
    megatron_has_hash_layers,
    num_hash_layers,
    router_type_of,
    uses_hash,
)
from air_moe_megatron.config.hash_layers import hash_layer_numbers, moe_layer_numbers, num_layers_of_first_chunk
from air_moe_megatron.config.problems import Problems, passed_on, raise_first
from air_moe_megatron.config.refusals import refused
from air_moe_megatron.config.sizes import least_of_part, resolve_groups, resolve_product_keys, resolve_sizes

_HINTS = get_type_hints(AIRFields)
_NEED_OURS = ("moe_dispatch", "moe_router_input_norm", "moe_air_diagnostics_interval")
"""Fields that every router of ours uses and Megatron's own router ignores."""


def unused(values: object) -> Problems[None]:
    """Yield a ValueError for each field of ours without effect, with the flag, its value and what it needs.

    Args:
        values: a config or arguments that have all our fields.
    """
    for field in fields(AIRFields):
        value, owner = getattr(values, field.name), router_type_of(field.name)
        if value == field.default or owner == values.moe_router_type or (owner == "hash" and uses_hash(values)):
            continue
        if owner is not None or (field.name in _NEED_OURS and value and is_plain_topk(values)):
            remedy = f"--moe-router-type {owner}" if owner else "--moe-granular-experts"
            yield ValueError(
                f"--{field.name.replace('_', '-')} ({value!r}) has no effect with --moe-router-type "
                f"{values.moe_router_type}; add {remedy} or leave it out"
            )
    if values.moe_router_type == "hash" and values.moe_num_hash_layers:
        yield ValueError(
            f"--moe-num-hash-layers ({values.moe_num_hash_layers}) has no effect with --moe-router-type hash, which "
            "hashes every layer; leave it out"
        )


def validate(config: TransformerConfig) -> None:
    """Check our fields against each other and against Megatron's, before anything is built.

    Raises:
        ValueError: the first of :func:`invalid`.
    """
    raise_first(invalid(config))


def invalid(config: TransformerConfig) -> Problems[None]:
    """Yield a ValueError for each rule that our fields break, with the field, its value, the rule and the other value.

    Rules that depend on a broken one are skipped.
    """
    is_type_invalid = yield from passed_on(_invalid_choice(config, "moe_router_type"))
    of_megatron = ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_topk_scaling_factor")
    for name in (*(field.name for field in fields(AIRFields)), *of_megatron):
        value = getattr(config, name)
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            yield ValueError(f"{name} ({value}) must be a finite number")
    yield from _invalid_choice(config, "moe_router_input_norm")
    yield from _invalid_choice(config, "moe_dispatch")
    if config.moe_air_diagnostics_interval < 0:
        yield ValueError(
            f"moe_air_diagnostics_interval ({config.moe_air_diagnostics_interval}) must be a number of steps, or 0 to "
            "turn diagnostics off"
        )
    if is_type_invalid:
        return
    if megatron_has_hash_layers() and config.moe_num_hash_layers and not is_plain_topk(config):
        yield ValueError(
            f"moe_num_hash_layers ({config.moe_num_hash_layers}) is Megatron's own here, for its own router: it must "
            f"be 0 with moe_router_type ({config.moe_router_type!r}) and moe_granular_experts "
            f"({config.moe_granular_experts})"
        )
        return
    if not is_plain_topk(config):
        if config.num_moe_experts is None:
            yield ValueError(
                f"moe_router_type ({config.moe_router_type!r}) needs num_moe_experts (--num-experts), which is not set"
            )
            return
        has_no_layers = yield from passed_on(_invalid_layers(config))
        if not (yield from passed_on(_invalid_expert_numbers(config))):
            yield from _INVALID[config.moe_router_type](config)
        # The config of a hash layer's own router has the type 'hash'.
        if num_hash_layers(config) and config.moe_router_type != "hash" and not has_no_layers:
            yield from _invalid_hash_layers(config)
    if config.moe_granular_experts:
        yield from _invalid_experts(config)
    yield from refused(config)


def _invalid_choice(config: TransformerConfig, name: str) -> Problems[None]:
    """Yield an error if the value is not among those that the field's type lists."""
    choices = get_args(_HINTS[name])
    value = getattr(config, name)
    if value not in choices:
        *others, last = map(repr, choices)
        yield ValueError(f"{name} ({value!r}) must be {', '.join(others)} or {last}")


def _invalid_layers(config: TransformerConfig) -> Problems[None]:
    frequency = config.moe_layer_freq
    if isinstance(frequency, int) and frequency < 1:
        yield ValueError(f"moe_layer_freq ({frequency}) must be at least 1")
    if isinstance(frequency, list) and len(frequency) != config.num_layers:
        yield ValueError(
            f"moe_layer_freq ({frequency}) must have an entry for each layer, by num_layers ({config.num_layers}); it "
            f"has {len(frequency)}"
        )
    elif isinstance(frequency, list) and not any(frequency):
        yield ValueError(
            f"moe_layer_freq ({frequency}) must have a 1: without an MoE layer moe_router_type "
            f"({config.moe_router_type!r}) has no effect"
        )


def _invalid_experts(config: TransformerConfig) -> Problems[None]:
    size = config.moe_ffn_hidden_size
    if size is None or size < 1:
        yield ValueError(f"moe_ffn_hidden_size ({size}) must be at least 1 with moe_granular_experts (True)")
        return
    rows = size * (2 if config.gated_linear_unit else 1)
    local_experts = config.num_moe_experts // config.expert_model_parallel_size
    if local_experts * rows >= 2**31:
        yield ValueError(
            f"num_moe_experts ({config.num_moe_experts}) over expert_model_parallel_size "
            f"({config.expert_model_parallel_size}) with {rows} rows each makes {local_experts * rows} rows on a rank: "
            "they must be fewer than 2^31"
        )


def _invalid_air_fields(config: TransformerConfig) -> Problems[None]:
    yield from _invalid_choice(config, "moe_air_codebook_source")
    if not 0.0 < config.moe_air_codebook_ema < 1.0:
        yield ValueError(f"moe_air_codebook_ema ({config.moe_air_codebook_ema}) must lie strictly between 0 and 1")
    if config.moe_air_refresh_interval < 1:
        yield ValueError(f"moe_air_refresh_interval ({config.moe_air_refresh_interval}) must be at least 1")
    for name in ("moe_air_num_clusters", "moe_air_shortlist_size", "moe_air_num_probes"):
        if getattr(config, name) < 0:
            yield ValueError(f"{name} ({getattr(config, name)}) must be positive, or 0 for the automatic one")
    if config.moe_air_list_parts < 1:
        yield ValueError(f"moe_air_list_parts ({config.moe_air_list_parts}) must be at least 1")


def _invalid_expert_numbers(config: TransformerConfig) -> Problems[None]:
    num_experts, topk = config.num_moe_experts, config.moe_router_topk
    ep_size = config.expert_model_parallel_size
    if num_experts % ep_size:
        yield ValueError(f"num_moe_experts ({num_experts}) must be divisible by expert_model_parallel_size ({ep_size})")
    if not 1 <= topk <= num_experts:
        yield ValueError(f"moe_router_topk ({topk}) must be between 1 and num_moe_experts ({num_experts})")


def _invalid_air(config: TransformerConfig) -> Problems[None]:
    if (yield from passed_on(_invalid_air_fields(config))):
        return
    num_experts, topk = config.num_moe_experts, config.moe_router_topk
    if config.moe_air_shortlist_size > num_experts:
        yield ValueError(
            f"moe_air_shortlist_size ({config.moe_air_shortlist_size}) must not exceed num_moe_experts ({num_experts})"
        )
    if config.moe_air_num_clusters > num_experts:
        yield ValueError(
            f"moe_air_num_clusters ({config.moe_air_num_clusters}) must not exceed num_moe_experts ({num_experts}): "
            "searching such a codebook costs more than scoring every expert"
        )
    if config.moe_air_num_explored < 0:
        yield ValueError(f"moe_air_num_explored ({config.moe_air_num_explored}) must be at least 0")
        return
    sizes = resolve_sizes(config)
    if sizes.num_probes > sizes.num_clusters:
        yield ValueError(
            f"moe_air_num_probes ({sizes.num_probes}) must not exceed moe_air_num_clusters ({sizes.num_clusters})"
        )
    searched = sizes.num_probes * sizes.shortlist_size
    if config.moe_air_num_candidates and not topk <= config.moe_air_num_candidates <= searched:
        yield ValueError(
            f"moe_air_num_candidates ({config.moe_air_num_candidates}) must be between moe_router_topk ({topk}) and "
            f"moe_air_num_probes ({sizes.num_probes}) times moe_air_shortlist_size ({sizes.shortlist_size}), or 0 for "
            "the automatic number"
        )
    if config.moe_air_codebook_source == "tokens":
        if topk >= sizes.shortlist_size and sizes.shortlist_size < num_experts:
            yield ValueError(
                f"moe_air_shortlist_size ({sizes.shortlist_size}) must exceed moe_router_topk ({topk}), unless it is "
                f"num_moe_experts ({num_experts}): slots beyond the top-k are reserved for experts on no other "
                f"list, which are lost for good without them; use {min(2 * topk, num_experts)} or more, or 0 for the "
                "automatic size"
            )
        yield from _invalid_parts(config, sizes.shortlist_size)
        return
    if sizes.num_clusters * sizes.shortlist_size < num_experts:
        yield ValueError(
            f"moe_air_num_clusters ({sizes.num_clusters}) times moe_air_shortlist_size ({sizes.shortlist_size}) must "
            f"be at least num_moe_experts ({num_experts}) with moe_air_codebook_source 'experts': every expert stands "
            "in one list"
        )
    if sizes.num_probes * num_experts < topk * sizes.num_clusters:
        most_clusters = sizes.num_probes * num_experts // topk
        least_probes = -(-topk * sizes.num_clusters // num_experts)
        yield ValueError(
            f"moe_air_num_probes ({sizes.num_probes}) times the mean list, num_moe_experts ({num_experts}) over "
            f"moe_air_num_clusters ({sizes.num_clusters}), must be at least moe_router_topk ({topk}) with "
            "moe_air_codebook_source 'experts': a token would not find its top-k; use at most "
            f"{most_clusters} clusters, at least {least_probes} probes, or 0 for the automatic number of clusters"
        )


def _invalid_parts(config: TransformerConfig, shortlist_size: int) -> Problems[None]:
    parts, num_experts, topk = config.moe_air_list_parts, config.num_moe_experts, config.moe_router_topk
    ep_size = config.expert_model_parallel_size
    if config.moe_air_shard_experts and parts % ep_size:
        yield ValueError(
            f"moe_air_list_parts ({parts}) must be a multiple of expert_model_parallel_size ({ep_size}) with "
            "moe_air_shard_experts (True): each rank makes the parts of its own experts"
        )
    if parts == 1:
        return
    if num_experts % parts:
        yield ValueError(f"moe_air_list_parts ({parts}) must divide num_moe_experts ({num_experts})")
    elif shortlist_size % parts:
        yield ValueError(
            f"moe_air_list_parts ({parts}) must divide moe_air_shortlist_size ({shortlist_size}): the parts of a list "
            "are of equal size"
        )
    elif shortlist_size < num_experts and shortlist_size // parts < least_of_part(topk, parts):
        yield ValueError(
            f"moe_air_shortlist_size ({shortlist_size}) must be at least {parts * least_of_part(topk, parts)} with "
            f"moe_air_list_parts ({parts}) and moe_router_topk ({topk}): each part needs a slot beyond its share of "
            "the top-k, for the experts that no list would hold"
        )


def _invalid_key_fields(config: TransformerConfig) -> Problems[None]:
    for name in ("moe_product_key_heads", "moe_product_key_dim"):
        if getattr(config, name) < 0:
            yield ValueError(f"{name} ({getattr(config, name)}) must be positive, or 0 for the automatic one")
    yield from _invalid_choice(config, "moe_product_key_query_norm")


def _invalid_product_keys(config: TransformerConfig) -> Problems[None]:
    if (yield from passed_on(_invalid_key_fields(config))):
        return
    num_experts, topk = config.num_moe_experts, config.moe_router_topk
    sizes = resolve_product_keys(config)
    if topk % sizes.num_heads:
        yield ValueError(f"moe_product_key_heads ({sizes.num_heads}) must divide moe_router_topk ({topk})")
    if sizes.num_keys[0] == 1:
        yield ValueError(f"num_moe_experts ({num_experts}) must be a product of two numbers above 1, the sub-keys")
    if sizes.topk_per_head == 1 and config.moe_router_score_function == "softmax":
        yield ValueError(
            f"moe_product_key_heads ({sizes.num_heads}) must leave each head two experts of moe_router_topk ({topk}): "
            "the softmax over one is constant, and the keys would get no gradient (or use the score function 'sigmoid')"
        )


def _invalid_groups(config: TransformerConfig) -> Problems[None]:
    num_experts, topk = config.num_moe_experts, config.moe_router_topk
    groups, searched = config.moe_hierarchical_num_groups, config.moe_hierarchical_topk_groups
    if groups < 0 or (groups and num_experts % groups):
        yield ValueError(
            f"moe_hierarchical_num_groups ({groups}) must divide num_moe_experts ({num_experts}), or be 0 for the "
            "automatic size"
        )
        return
    sizes = resolve_groups(config)
    if not 0 <= searched <= sizes.num_groups:
        yield ValueError(
            f"moe_hierarchical_topk_groups ({searched}) must be between 1 and moe_hierarchical_num_groups "
            f"({sizes.num_groups}), or 0 for the automatic size"
        )
    if sizes.topk_groups * sizes.group_size < topk:
        yield ValueError(
            f"moe_router_topk ({topk}) must not exceed moe_hierarchical_topk_groups ({sizes.topk_groups}) times the "
            f"{sizes.group_size} experts of a group"
        )


def _invalid_hash(config: TransformerConfig) -> Problems[None]:
    if config.moe_hash_vocab_size < 1:
        yield ValueError(
            f"moe_hash_vocab_size ({config.moe_hash_vocab_size}) must be the number of token ids, padding included; "
            "give --moe-hash-vocab-size, or with air_moe_megatron.pretrain --vocab-size"
        )
    if not 0 <= config.moe_hash_seed < 2**46:
        yield ValueError(
            f"moe_hash_seed ({config.moe_hash_seed}) must be from 0 to below 2^46: 65,537 times it must fit 64 bits"
        )
    yield from _invalid_choice(config, "moe_hash_balance")
    if config.moe_hash_counts is not None and config.moe_hash_balance == "ids":
        yield ValueError(
            f"moe_hash_counts ({config.moe_hash_counts!r}) has no effect with moe_hash_balance 'ids'; add "
            "--moe-hash-balance frequency"
        )


def _invalid_hash_layers(config: TransformerConfig) -> Problems[None]:
    number, present = config.moe_num_hash_layers, len(moe_layer_numbers(config))
    if not 0 <= number < present:
        yield ValueError(
            f"moe_num_hash_layers ({number}) must be from 0 to below the number of MoE layers ({present}), by "
            f"num_layers ({config.num_layers}) and moe_layer_freq ({config.moe_layer_freq}); to hash all of them "
            "there is moe_router_type 'hash'"
        )
        return
    last, beside = hash_layer_numbers(config)[-1], num_layers_of_first_chunk(config)
    if last > beside:
        chunks = config.virtual_pipeline_model_parallel_size
        yield ValueError(
            f"moe_num_hash_layers ({number}) makes layer {last} a hash layer, which must be among the {beside} layers "
            f"of the first pipeline stage{' and its first virtual stage' if chunks else ''}, with "
            f"pipeline_model_parallel_size ({config.pipeline_model_parallel_size}): only there the token ids are known"
        )
    yield from _invalid_hash(config)


def _invalid_vq(config: TransformerConfig) -> Problems[None]:
    topk = config.moe_router_topk
    if topk % 2:
        yield ValueError(f"moe_router_topk ({topk}) must be even: half are found by code, half by score")
    if topk == 2 and config.moe_router_score_function == "softmax" and not config.moe_router_pre_softmax:
        yield ValueError(
            f"moe_router_topk ({topk}) leaves the continuous branch one expert, and the softmax over one is constant: "
            "add --moe-router-pre-softmax, or use more experts"
        )
    if not config.moe_vq_loss_coeff > 0.0:
        yield ValueError(
            f"moe_vq_loss_coeff ({config.moe_vq_loss_coeff}) must be positive: this loss is the only thing that trains "
            "the codes"
        )
    if not config.moe_vq_commitment >= 0.0:
        yield ValueError(f"moe_vq_commitment ({config.moe_vq_commitment}) must not be negative")


_INVALID = {
    "topk": lambda config: iter(()),
    "air": _invalid_air,
    "product_key": _invalid_product_keys,
    "hierarchical": _invalid_groups,
    "hash": _invalid_hash,
    "vq": _invalid_vq,
}
