"""The table of fields that cannot be combined, checked when a config is made. docs/limits.md is generated from it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config.fields import balancing_losses, is_plain_topk, is_sharded, num_hash_layers
from air_moe_megatron.config.problems import Problems


@dataclass(frozen=True)
class Cause:
    """A setting that excludes values of other fields."""

    title: str
    """Heading in docs/limits.md."""
    applies: Callable[[TransformerConfig], bool]
    name: Callable[[TransformerConfig], str]
    """Its name in an error."""


@dataclass(frozen=True)
class Values:
    """Values of a field that are refused."""

    hold: Callable[[TransformerConfig, Any], bool]
    """Whether the value that a config gives the field is one of them."""
    shown: str = ""
    """The values in the words of docs/limits.md; empty if the field's name is enough."""


@dataclass(frozen=True)
class Refusal:
    """A row of the table: a cause excludes some values of a field."""

    cause: Cause
    field: str
    values: Values
    reason: str


def refused(config: TransformerConfig) -> Problems[None]:
    """Yield a ValueError for each row that applies to a config, with the field, its value, the cause and the reason.

    Fields that this Megatron lacks cannot be set, so their rows are skipped.

    Args:
        config: with all our fields.
    """
    for row in REFUSALS:
        if not hasattr(config, row.field):
            continue
        value = getattr(config, row.field)
        if row.cause.applies(config) and row.values.hold(config, value):
            yield ValueError(f"{row.field} ({value!r}) is not supported with {row.cause.name(config)}: {row.reason}")


_on = Values(lambda config, value: bool(value))
_given = Values(lambda config, value: value is not None)
_above_one = Values(lambda config, value: value is not None and value > 1, "above 1")
_balancing = Values(lambda config, value: bool(balancing_losses(config)))


def _not(default: str) -> Values:
    return Values(lambda config, value: value != default, f"but {default!r}")


def _is(excluded: str) -> Values:
    return Values(lambda config, value: value == excluded, repr(excluded))


def _has(kind: str) -> Values:
    return Values(lambda config, value: kind in ([value] if isinstance(value, str) else value), repr(kind))


def _captures_router(config: TransformerConfig, implementation: str) -> bool:
    if implementation in ("none", "full_iteration"):
        return implementation == "full_iteration"
    modules = getattr(config, "cuda_graph_modules" if hasattr(config, "cuda_graph_modules") else "cuda_graph_scope")
    names = {getattr(module, "name", module) for module in ([modules] if isinstance(modules, str) else modules)}
    # In Megatron an empty list captures the whole layer.
    return not names or bool(names & {"full", "moe", "moe_router", "moe_preprocess"})


def _type_is(*router_types: str) -> Callable[[TransformerConfig], bool]:
    return lambda config: config.moe_router_type in router_types


def _by_type(config: TransformerConfig) -> str:
    return f"moe_router_type {config.moe_router_type!r}"


def _by_ours(config: TransformerConfig) -> str:
    if config.moe_router_type != "topk":
        return _by_type(config)
    return "moe_granular_experts (True)" if config.moe_granular_experts else _by_hash_layers(config)


def _by_hash_layers(config: TransformerConfig) -> str:
    return f"moe_num_hash_layers ({config.moe_num_hash_layers})"


# Causes.

MEGATRONS_OWN = Cause(
    "Megatron's own router with Megatron's own experts",
    is_plain_topk,
    lambda config: "moe_router_type 'topk' and Megatron's own experts",
)
OURS = Cause(
    "Every router of this package, and `topk` with granular experts or first layers by hash",
    lambda config: not is_plain_topk(config),
    _by_ours,
)
NOT_TOPK = Cause("Every router but `topk`", lambda config: config.moe_router_type != "topk", _by_type)
SEARCHES = Cause("`product_key`, `hierarchical` and `vq`", _type_is("product_key", "hierarchical", "vq"), _by_type)
AIR_WITH_BIAS = Cause(
    "`air` with an expert bias",
    lambda config: config.moe_router_type == "air" and config.moe_router_enable_expert_bias,
    lambda config: "moe_router_enable_expert_bias (True)",
)
AIR_OF_EXPERTS = Cause(
    "`air` with codebooks of source `experts`",
    lambda config: config.moe_router_type == "air" and config.moe_air_codebook_source == "experts",
    lambda config: "moe_air_codebook_source 'experts'",
)
SHARDED = Cause("`air` with sharded experts", is_sharded, lambda config: "moe_air_shard_experts (True)")
PRODUCT_KEY = Cause("`product_key`", _type_is("product_key"), _by_type)
PRODUCT_KEY_ON_TOKENS = Cause(
    "`product_key` on tokens",
    lambda config: config.moe_router_type == "product_key" and config.moe_product_key_on_tokens,
    lambda config: "moe_product_key_on_tokens (True)",
)
HIERARCHICAL = Cause("`hierarchical`", _type_is("hierarchical"), _by_type)
HASH = Cause("`hash`", _type_is("hash"), _by_type)
# The config of a hash layer's own router has the type 'hash' and the number of such layers.
HASH_EVERYWHERE = Cause(
    "`hash` in every layer",
    lambda config: config.moe_router_type == "hash" and not config.moe_num_hash_layers,
    _by_type,
)
HASH_LAYERS = Cause("First layers by hash", lambda config: num_hash_layers(config) > 0, _by_hash_layers)
VQ = Cause("`vq`", _type_is("vq"), _by_type)
GRANULAR = Cause(
    "Granular experts", lambda config: config.moe_granular_experts, lambda config: "moe_granular_experts (True)"
)
COMPACT = Cause(
    "Compact dispatch", lambda config: config.moe_dispatch == "compact", lambda config: "moe_dispatch 'compact'"
)

CAUSES = (
    OURS, NOT_TOPK, GRANULAR, COMPACT, AIR_WITH_BIAS, AIR_OF_EXPERTS, SHARDED, SEARCHES, PRODUCT_KEY,
    PRODUCT_KEY_ON_TOKENS, HIERARCHICAL, HASH, HASH_EVERYWHERE, HASH_LAYERS, VQ, MEGATRONS_OWN,
)  # fmt: skip
"""In the order of docs/limits.md."""

_ENGINE = "it belongs to Transformer Engine's experts"
_ROUNDED = "these experts have no products in 8 or 4 bits"
_ONE_PASS = "the gradients of these experts are made in one pass"
_NOT_PERMUTED = "tokens are not permuted by expert; leave it out"
_MIXED_IDS = "its schedule mixes the token ids of two microbatches"
_GROUPS = "Megatron picks groups by dense scores of all experts, which are not made"

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        MEGATRONS_OWN, "moe_dispatch", _is("compact"),
        "they take dense maps; use 'stock', or add --moe-granular-experts",
    ),
    Refusal(
        MEGATRONS_OWN, "moe_router_input_norm", _not("none"),
        "Megatron's own router has no input norm; add --moe-granular-experts",
    ),
    Refusal(PRODUCT_KEY, "moe_router_input_norm", _not("none"), "product keys have moe_product_key_query_norm instead"),
    Refusal(HASH, "moe_router_input_norm", _not("none"), "a hash router does not read hidden states"),
    Refusal(
        AIR_WITH_BIAS, "moe_air_num_candidates", _on,
        "balancing losses select by scores without the bias, so from all candidates; leave it at 0",
    ),
    Refusal(
        AIR_WITH_BIAS, "moe_air_num_explored", _on,
        "all candidates get gradients, so none are left to be explored; leave it at 0",
    ),
    Refusal(
        AIR_OF_EXPERTS, "moe_air_num_explored", _on,
        "each expert is in the list of its own codeword, so none needs to be explored; leave it at 0",
    ),
    Refusal(
        AIR_OF_EXPERTS, "moe_air_list_parts", _above_one,
        "each expert is in one list, whatever its id; leave it at 1",
    ),
    Refusal(
        SHARDED, "moe_dispatch", _not("compact"),
        "the experts take the rows that the router gathers; add --moe-dispatch compact and --moe-granular-experts",
    ),
    Refusal(
        SHARDED, "moe_air_codebook_source", _is("experts"),
        "such a codebook is fitted to all centers on every rank; use 'tokens'",
    ),
    Refusal(
        SHARDED, "moe_input_jitter_eps", _given,
        "tokens travel once, and the experts take them without jitter",
    ),
    Refusal(
        SHARDED, "moe_num_hash_layers", _on,
        "the dispatcher of sharded routing takes rows that the router gathers, and a hash router gathers none",
    ),
    Refusal(
        SHARDED, "moe_router_force_load_balancing", _on,
        "random scores would be drawn for all candidates, and a rank returns the best of its own only",
    ),
    Refusal(PRODUCT_KEY_ON_TOKENS, "moe_product_key_dim", _on, "the sub-keys are then of hidden_size; leave it at 0"),
    Refusal(
        OURS, "moe_router_load_balancing_type", _has("sinkhorn"),
        "it assigns by dense [tokens, experts] scores, which are not made",
    ),
    Refusal(
        OURS, "moe_router_load_balancing_type", _has("quantile_balancing"),
        "it takes dense [tokens, experts] scores, which are not made",
    ),
    Refusal(OURS, "num_moe_experts", Values(lambda config, value: value >= 2**31, "from 2^31"), "expert ids are int32"),
    Refusal(NOT_TOPK, "moe_router_num_groups", _given, _GROUPS),
    Refusal(NOT_TOPK, "moe_router_group_topk", _given, _GROUPS),
    Refusal(NOT_TOPK, "moe_router_force_biased", _given, "its bias is drawn over the columns of dense logits"),
    Refusal(OURS, "moe_paged_stash", _on, "it repeats forwards within a step, and their tokens would count twice"),
    Refusal(OURS, "moe_enable_routing_replay", _on, "a replay is recorded and given inside Megatron's own router"),
    Refusal(OURS, "moe_router_fusion", _on, "Transformer Engine's fused router takes dense logits"),
    Refusal(
        OURS, "init_model_with_meta_device", _on, "codebooks and lists would be uninitialized memory"
    ),
    Refusal(OURS, "transformer_impl", _is("inference_optimized"), "it builds its own router and dispatcher"),
    Refusal(OURS, "moe_pad_experts_for_cuda_graph_inference", _on, "it switches the router to dropping while decoding"),
    Refusal(
        OURS, "cuda_graph_impl", Values(_captures_router, "where cuda_graph_modules hold the router"),
        "with torch operations the router waits for counts on the host, which capture forbids; capture of the "
        "kernels is untried",
    ),
    Refusal(
        SEARCHES, "moe_router_enable_expert_bias", _on,
        "the search finds experts by scores without a bias per expert",
    ),
    Refusal(
        SEARCHES, "moe_router_force_load_balancing", _on,
        "random scores of the candidates would not balance the experts",
    ),
    Refusal(
        HIERARCHICAL, "moe_router_score_function", _not("softmax"),
        "the gates of groups and experts are probabilities; use 'softmax'",
    ),
    Refusal(HASH, "moe_aux_loss_coeff", _balancing, "there is nothing to learn"),
    Refusal(VQ, "moe_aux_loss_coeff", _balancing, "half of the experts are chosen by code, without scores"),
    Refusal(HASH, "moe_router_enable_expert_bias", _on, "there are no scores"),
    Refusal(HASH, "moe_router_force_load_balancing", _on, "the experts of a token are fixed by its id"),
    Refusal(HASH, "moe_z_loss_coeff", _given, "there are no scores"),
    Refusal(HASH, "moe_input_jitter_eps", _given, "a hash router does not read hidden states"),
    Refusal(HASH, "moe_router_score_function", _not("softmax"), "there are no scores"),
    Refusal(HASH, "moe_router_pre_softmax", _on, "there are no scores"),
    Refusal(HASH_EVERYWHERE, "pipeline_model_parallel_size", _above_one, "only the first stage knows the token ids"),
    Refusal(
        HASH_EVERYWHERE, "mtp_num_layers", _given,
        "multi-token-prediction layers see shifted tokens, but the router keeps the ids of the unshifted ones",
    ),
    Refusal(HASH, "overlap_moe_expert_parallel_comm", _on, _MIXED_IDS),
    Refusal(HASH_LAYERS, "overlap_moe_expert_parallel_comm", _on, _MIXED_IDS),
    Refusal(
        HASH_LAYERS, "moe_router_force_load_balancing", _on, "the experts of a hash layer are fixed by the token ids"
    ),
    Refusal(HASH_LAYERS, "moe_router_force_biased", _given, "the experts of a hash layer are fixed by the token ids"),
    Refusal(
        GRANULAR, "expert_tensor_parallel_size", _above_one,
        "an expert of a few hidden units is not split; add --expert-tensor-parallel-size 1, whose default is "
        "--tensor-model-parallel-size",
    ),
    Refusal(
        GRANULAR, "expert_gtp_weight_remat_size", _above_one,
        "their weights are not sharded further than over expert-parallel ranks",
    ),
    Refusal(GRANULAR, "add_bias_linear", _on, "tiny experts have no biases; add --disable-bias-linear"),
    Refusal(GRANULAR, "fp8", _given, _ROUNDED),
    Refusal(GRANULAR, "fp4", _given, _ROUNDED),
    Refusal(GRANULAR, "moe_latent_size", _given, "these experts read and write hidden_size"),
    Refusal(GRANULAR, "moe_mlp_glu_interleave_size", _given, _ENGINE),
    Refusal(GRANULAR, "moe_single_grouped_weight", _on, _ENGINE),
    Refusal(GRANULAR, "use_te_activation_func", _on, _ENGINE),
    Refusal(GRANULAR, "use_kitchen", _on, "it quantizes linear layers of Megatron, and these experts have none"),
    Refusal(GRANULAR, "moe_grouped_gemm", _on, "these experts are one tensor already; leave out --moe-grouped-gemm"),
    Refusal(GRANULAR, "moe_apply_probs_on_input", _on, "the probs weigh the activations of each expert"),
    Refusal(
        GRANULAR, "recompute_modules",
        Values(
            lambda config, value: "moe_act" in (value or []) and config.recompute_granularity == "selective",
            "with 'moe_act'",
        ),
        "'moe_act' recomputes Megatron's own experts; recompute 'moe' instead",
    ),
    Refusal(
        GRANULAR, "offload_modules",
        Values(
            lambda config, value: (
                config.fine_grained_activation_offloading and not {"expert_fc1", "moe_act"}.isdisjoint(value)
            ),
            "with 'expert_fc1' or 'moe_act'",
        ),
        "'expert_fc1' and 'moe_act' offload Megatron's own experts",
    ),
    Refusal(GRANULAR, "delay_wgrad_compute", _on, _ONE_PASS),
    Refusal(GRANULAR, "overlap_dispatch_backward_with_experts_wgrad", _on, _ONE_PASS),
    Refusal(
        COMPACT, "moe_granular_experts", Values(lambda config, value: not value, "off"),
        "Megatron's own experts take K copies of each token; add --moe-granular-experts",
    ),
    Refusal(COMPACT, "moe_expert_capacity_factor", _given, "tokens are dropped on Megatron's dense maps"),
    Refusal(COMPACT, "moe_expert_rank_capacity_factor", _given, "this dispatcher drops no token"),
    Refusal(
        COMPACT, "moe_shared_expert_overlap", _on,
        "only Megatron's own dispatchers run the shared expert between their steps",
    ),
    Refusal(
        COMPACT, "moe_token_dispatcher_type", _is("flex"),
        "DeepEP's buffers would be made and not used; leave it at 'allgather'",
    ),
    Refusal(COMPACT, "overlap_moe_expert_parallel_comm", _on, "its schedule has not been tested with this dispatcher"),
    Refusal(COMPACT, "moe_permute_fusion", _on, _NOT_PERMUTED),
    Refusal(COMPACT, "moe_router_padding_for_quantization", _on, _NOT_PERMUTED),
    Refusal(COMPACT, "moe_router_padding_for_fp8", _on, _NOT_PERMUTED),
)  # fmt: skip
"""Checked in this order. A start raises the error of the first row that applies."""
