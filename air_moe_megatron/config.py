"""AIRMoEConfig: every field of the plugin, what it does, and all validation that needs no data.

The fields stand in :class:`AIRFields`, a plain dataclass, so that they can be turned into command-line flags
(``arguments.py``) and mixed into any of Megatron's config classes. This file imports nothing else of the package.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from megatron.core.transformer.transformer_config import TransformerConfig

# The automatic sizes go no lower: so few experts are cheap to score exactly.
_MIN_AUTO_SIZE = 16
# Mean candidates of a token per slot of its routes, for the automatic sizes of source 'experts'. With clustered centres
# of 512 to 16,384 experts, at most 0.7% of the slots then stayed empty; with two candidates per slot up to 15%.
_CANDIDATES_PER_SLOT = 4

ROUTER_TYPES = ("topk", "air", "product_key", "hierarchical", "hash", "vq")


@dataclass
class AIRFields:
    """AIR-MoE: two-stage inverted-index routing for granular mixtures of experts."""

    moe_router_type: Literal["topk", "air", "product_key", "hierarchical", "hash", "vq"] = "topk"
    """Router of the MoE layers: 'topk' is Megatron's own, untouched; 'air' scores only a shortlist of the experts,
    looked up by the token's codeword; 'product_key' (PEER), 'hierarchical' (groups of experts), 'hash' (fixed, by token
    id) and 'vq' (VQMoE) are rivals from the literature."""

    moe_router_input_norm: Literal["none", "running"] = "none"
    """Normalise the tokens per feature before they are scored, by the 'running' mean and variance of earlier global
    batches; for 'topk', 'air', 'hierarchical' and 'vq'."""

    moe_air_num_clusters: int = 0
    """Number of codewords C in the codebook of one router; 0 chooses 4*sqrt(experts), up to a multiple of 8. For source
    'experts' it chooses fewer where the probed lists would hold less than four times the top-k on average."""

    moe_air_shortlist_size: int = 0
    """Number of experts L in the shortlist of one codeword, for source 'tokens'; the capacity of one inverted list for
    source 'experts'. 0 chooses sqrt(experts) for 'tokens', twice the mean list for 'experts', and never fewer than
    two times the top-k."""

    moe_air_num_probes: int = 1
    """Number of codewords P whose shortlists are searched for a token."""

    moe_air_num_candidates: int = 0
    """Number of candidates M of a token, the best of those that its shortlists hold, which probabilities and losses are
    computed over where they take more than the top-k; only these get gradients. 0 takes them all."""

    moe_air_codebook_source: Literal["tokens", "experts"] = "tokens"
    """What the codebook is learned from: the directions of the 'tokens' (a shortlist holds the experts that score
    highest at the codeword), or of the 'experts' (an inverted file: each expert stands in one list)."""

    moe_air_codebook_ema: float = 0.99
    """Decay, per global batch, of the running statistics from which the codewords are computed."""

    moe_air_refresh_interval: int = 20
    """Rebuild the shortlists every this many codebook updates; while the codebook is young, more often."""

    moe_dispatch: Literal["stock", "compact"] = "stock"
    """How tokens reach their experts: 'stock' is the dispatcher that moe_token_dispatcher_type names, 'compact' sends a
    token once to each expert-parallel rank that holds any of its experts, without dense maps (needs
    moe_granular_experts)."""

    moe_granular_experts: bool = False
    """Keep the experts of a rank in one tensor per projection, for very many tiny experts, instead of one module each;
    moe_ffn_hidden_size may be as small as 1."""

    moe_product_key_heads: int = 0
    """Heads of the product keys, which find top-k / heads experts each; 0 chooses the largest divisor of the top-k up
    to 8 that leaves each head at least two."""

    moe_product_key_dim: int = 0
    """Size of a sub-key, and of each half of a head's query; 0 chooses 128, at most half of the hidden size."""

    moe_product_key_query_norm: Literal["auto", "batchnorm", "layernorm", "none"] = "auto"
    """Normalisation of the queries, by gain and bias of their own; 'auto' is 'batchnorm', over the tokens of all ranks,
    as in PEER. With moe_product_key_on_tokens 'batchnorm' is one of the sub-keys' scores instead, without gain and
    bias, as in OmniMoE."""

    moe_product_key_on_tokens: bool = False
    """Compare sub-keys of the hidden size with the token itself, without a query projection: OmniMoE's router, with one
    head and moe_router_pre_softmax."""

    moe_hierarchical_num_groups: int = 0
    """Number of groups of consecutive experts, a divisor of the experts; 0 chooses the smallest one from
    sqrt(experts)."""

    moe_hierarchical_topk_groups: int = 0
    """Groups whose experts are scored for a token; 0 chooses 2, or as many as hold twice the top-k."""

    moe_hash_vocab_size: int = 0
    """Token ids that the 'hash' router has experts for; 0 takes the padded vocabulary size of the arguments."""

    moe_hash_seed: int = 0
    """Seed of the tables of the 'hash' router; each layer draws its own from it."""

    moe_vq_loss_coeff: float = 0.1
    """Coefficient of the codebook and commitment losses of the 'vq' router."""

    moe_vq_commitment: float = 0.25
    """Weight of the commitment loss of the 'vq' router relative to its codebook loss."""


@dataclass
class AIRMoEConfig(TransformerConfig, AIRFields):
    """A TransformerConfig with the fields of :class:`AIRFields`, validated on construction."""

    def __post_init__(self):
        super().__post_init__()
        validate(self)


def attach(config: TransformerConfig, values: object) -> None:
    """Set our fields on a config whose class lacks them (MLA, heterogeneous layers), and validate.

    Args:
        config: any Megatron transformer config.
        values: the parsed arguments, or anything with the fields as attributes.
    Raises:
        ValueError: as :func:`validate`.
    """
    for field in fields(AIRFields):
        setattr(config, field.name, getattr(values, field.name))
    validate(config)


@dataclass(frozen=True)
class AIRSizes:
    """The sizes of one router after the automatic ones are chosen."""

    num_experts: int
    topk: int
    num_clusters: int
    shortlist_size: int
    num_probes: int
    num_candidates: int


def resolve_sizes(config: TransformerConfig) -> AIRSizes:
    """Choose the automatic sizes of a config.

    With C = 4*sqrt(E) and L = sqrt(E) every expert has about four places in the lists and the cost of a token,
    ``2*H*(C + P*L)`` FLOPs, grows as sqrt(E). Source: docs/design-choices.md.

    Example: E = 16384, K = 32, source 'tokens' gives C = 512, L = 128; source 'experts' C = 128, L = 256.
    """
    num_experts, topk = config.num_moe_experts, config.moe_router_topk
    num_clusters = config.moe_air_num_clusters or _automatic_clusters(config)
    shortlist_size = config.moe_air_shortlist_size
    if shortlist_size == 0:
        root = _automatic(math.sqrt(num_experts))
        wanted = root if config.moe_air_codebook_source == "tokens" else math.ceil(2 * num_experts / num_clusters)
        shortlist_size = min(max(wanted, 2 * topk), num_experts)
    num_probes = config.moe_air_num_probes
    num_candidates = config.moe_air_num_candidates or num_probes * shortlist_size
    return AIRSizes(num_experts, topk, num_clusters, shortlist_size, num_probes, num_candidates)


def _automatic_clusters(config):
    num_experts, num_probes = config.num_moe_experts, config.moe_air_num_probes
    num_clusters = min(_automatic(4 * math.sqrt(num_experts)), num_experts)
    if config.moe_air_codebook_source == "tokens":
        return num_clusters
    # Each expert stands in one list, and lists are of unequal length: a token needs room to find K experts.
    most = num_probes * num_experts // (_CANDIDATES_PER_SLOT * config.moe_router_topk)
    most = most // 8 * 8 if most > 8 else most
    least = math.ceil(num_experts / (config.moe_air_shortlist_size or num_experts))  # lists that hold every expert
    return min(num_clusters, max(num_probes, most, least))


def _automatic(size):
    return _round_up(max(_MIN_AUTO_SIZE, math.ceil(size)), 8)


@dataclass(frozen=True)
class ProductKeySizes:
    """The sizes of one product-key router after the automatic ones are chosen."""

    num_keys: tuple[int, int]  # of the two halves; their product is the number of experts
    num_heads: int
    topk_per_head: int
    key_dim: int  # of a half
    query_norm: str


def resolve_product_keys(config: TransformerConfig) -> ProductKeySizes:
    """Choose the automatic sizes of product keys; the halves are as equal as the number of experts allows.

    Example: E = 65536, K = 64, H = 512 gives 256 and 256 keys, 8 heads of 8 experts, sub-keys of 128.
    """
    num_experts, topk = config.num_moe_experts, config.moe_router_topk
    first = _balanced_divisor(num_experts)
    heads = config.moe_product_key_heads
    if heads == 0:
        heads = max([n for n in range(1, 9) if topk % n == 0 and topk // n >= 2], default=1)
    if config.moe_product_key_on_tokens:
        key_dim = config.hidden_size
    else:
        key_dim = config.moe_product_key_dim or max(1, min(config.hidden_size // 2, 128))
    norm = "batchnorm" if config.moe_product_key_query_norm == "auto" else config.moe_product_key_query_norm
    return ProductKeySizes((first, num_experts // first), heads, topk // heads, key_dim, norm)


@dataclass(frozen=True)
class GroupSizes:
    """The sizes of one hierarchical router after the automatic ones are chosen."""

    num_groups: int
    group_size: int
    topk_groups: int


def resolve_groups(config: TransformerConfig) -> GroupSizes:
    """Choose the automatic sizes of groups: with sqrt(E) groups, group scores cost as much as those of one group.

    Example: E = 65536, K = 64 gives 256 groups of 256, of which 2 are searched.
    """
    num_experts = config.num_moe_experts
    num_groups = config.moe_hierarchical_num_groups
    if num_groups == 0:
        num_groups = num_experts // _balanced_divisor(num_experts)
    group_size = num_experts // num_groups
    wanted = max(2, -(-2 * config.moe_router_topk // group_size))
    return GroupSizes(num_groups, group_size, config.moe_hierarchical_topk_groups or min(wanted, num_groups))


def _balanced_divisor(number: int) -> int:
    """The largest divisor up to the root."""
    return next(n for n in range(math.isqrt(number), 0, -1) if number % n == 0)


def is_plain_topk(values: object) -> bool:
    """Whether config or arguments ask for Megatron's router with Megatron's experts, and so for nothing of ours."""
    return getattr(values, "moe_router_type", "topk") == "topk" and not getattr(values, "moe_granular_experts", False)


def balancing_losses(values: object) -> list[str]:
    """The kinds of balancing loss that config or arguments turn on, named as in ``moe_router_load_balancing_type``."""
    kinds, coeffs = values.moe_router_load_balancing_type, values.moe_aux_loss_coeff
    kinds = kinds if isinstance(kinds, list) else [kinds]
    coeffs = coeffs if isinstance(coeffs, list) else [coeffs]
    return [kind for kind, coeff in zip(kinds, coeffs, strict=True) if kind.endswith("aux_loss") and coeff > 0]


def router_type_of(field_name: str) -> str | None:
    """The router type that a field belongs to; None for those that every router heeds.

    Example: ``moe_product_key_dim`` belongs to 'product_key', ``moe_dispatch`` to none.
    """
    return next((name for name in ROUTER_TYPES if field_name.startswith(f"moe_{name}_")), None)


def refuse_unused(values: object) -> None:
    """Refuse a field of ours that nothing would heed.

    Args:
        values: a config or arguments that have all our fields.
    Raises:
        ValueError: naming the flag, its value and what would heed it.
    """
    for field in fields(AIRFields):
        value, owner = getattr(values, field.name), router_type_of(field.name)
        if value == field.default or owner == values.moe_router_type:
            continue
        if owner is not None or (field.name in ("moe_dispatch", "moe_router_input_norm") and is_plain_topk(values)):
            remedy = f"--moe-router-type {owner}" if owner else "--moe-granular-experts"
            raise ValueError(
                f"--{field.name.replace('_', '-')} ({value!r}) has no effect with --moe-router-type "
                f"{values.moe_router_type}; add {remedy} or leave it out"
            )


def validate(config: TransformerConfig) -> None:
    """Check our fields against each other and against Megatron's, before anything is built.

    Raises:
        ValueError: naming the field, its value, the rule and the other value.
    """
    router_type = config.moe_router_type
    if router_type not in ROUTER_TYPES:
        *others, last = map(repr, ROUTER_TYPES)
        raise ValueError(f"moe_router_type ({router_type!r}) must be {', '.join(others)} or {last}")
    for field in fields(AIRFields):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name} ({value}) must be a finite number")
    _validate_input_norm(config)
    if is_plain_topk(config):
        if config.moe_dispatch != "stock":
            _refusal(config, "moe_router_type 'topk' and Megatron's own experts")(
                "moe_dispatch", "they take dense maps; use 'stock', or add --moe-granular-experts"
            )
        if config.moe_router_input_norm != "none":
            _refusal(config, "moe_router_type 'topk' and Megatron's own experts")(
                "moe_router_input_norm", "that is Megatron's own router; add --moe-granular-experts"
            )
        return
    if config.num_moe_experts is None:
        raise ValueError(f"moe_router_type ({router_type!r}) needs num_moe_experts (--num-experts), which is not set")
    _validate_layers(config)
    if router_type == "air":
        _validate_codebook(config)
    _validate_counts(config)
    _VALIDATE_SIZES[router_type](config)
    _refuse_unsupported(config)
    if config.moe_granular_experts:
        validate_experts(config)
    _validate_dispatch(config)


def _validate_layers(config):
    frequency = config.moe_layer_freq
    if isinstance(frequency, int) and frequency < 1:
        raise ValueError(f"moe_layer_freq ({frequency}) must be at least 1")
    if isinstance(frequency, list) and not any(frequency):
        raise ValueError(
            f"moe_layer_freq ({frequency}) must have a 1: without an MoE layer moe_router_type "
            f"({config.moe_router_type!r}) has no effect"
        )


def _validate_input_norm(config):
    if config.moe_router_input_norm not in ("none", "running"):
        raise ValueError(f"moe_router_input_norm ({config.moe_router_input_norm!r}) must be 'none' or 'running'")
    if config.moe_router_input_norm != "none":
        refuse = _refusal(config, f"moe_router_type {config.moe_router_type!r}")
        if config.moe_router_type == "product_key":
            refuse("moe_router_input_norm", "it has moe_product_key_query_norm")
        if config.moe_router_type == "hash":
            refuse("moe_router_input_norm", "it does not look at the tokens")


def validate_experts(config: TransformerConfig) -> None:
    """Refuse what granular experts cannot do; each refusal says why.

    Raises:
        ValueError: naming the field, its value and the reason.
    """
    refuse = _refusal(config, "moe_granular_experts (True)")
    if config.expert_tensor_parallel_size is not None and config.expert_tensor_parallel_size > 1:
        reason = "an expert of a few rows is not split; add --expert-tensor-parallel-size 1, which is otherwise that of"
        refuse("expert_tensor_parallel_size", f"{reason} --tensor-model-parallel-size")
    if config.expert_gtp_weight_remat_size > 1:
        refuse("expert_gtp_weight_remat_size", "their weights are not sharded further than over expert-parallel ranks")
    if config.add_bias_linear:
        refuse("add_bias_linear", "tiny experts have no biases; add --disable-bias-linear")
    if config.moe_ffn_hidden_size is None or config.moe_ffn_hidden_size < 1:
        refuse("moe_ffn_hidden_size", "it must be at least 1")
    rows = config.moe_ffn_hidden_size * (2 if config.gated_linear_unit else 1)
    local_experts = config.num_moe_experts // config.expert_model_parallel_size
    if local_experts * rows >= 2**31:
        raise ValueError(
            f"num_moe_experts ({config.num_moe_experts}) over expert_model_parallel_size "
            f"({config.expert_model_parallel_size}) with {rows} rows each makes {local_experts * rows} rows on a rank: "
            "they must be fewer than 2^31"
        )
    for field in ("fp8", "fp4", "moe_latent_size", "moe_mlp_glu_interleave_size"):
        if getattr(config, field) is not None:
            refuse(field, "it belongs to Transformer Engine's experts")
    for field in ("moe_single_grouped_weight", "use_te_activation_func", "use_kitchen"):
        if getattr(config, field):
            refuse(field, "it belongs to Transformer Engine's experts")
    if config.moe_grouped_gemm:
        refuse("moe_grouped_gemm", "these experts are one tensor already; leave out --moe-grouped-gemm")
    if config.moe_apply_probs_on_input:
        refuse("moe_apply_probs_on_input", "the probs weigh the activations of each expert")
    if "moe_act" in (config.recompute_modules or []) and config.recompute_granularity == "selective":
        refuse("recompute_modules", "'moe_act' recomputes Megatron's own experts; recompute 'moe' instead")
    if config.fine_grained_activation_offloading and {"expert_fc1", "moe_act"} & set(config.offload_modules):
        refuse("offload_modules", "'expert_fc1' and 'moe_act' offload Megatron's own experts")
    for field in ("delay_wgrad_compute", "overlap_dispatch_backward_with_experts_wgrad"):
        if getattr(config, field):
            refuse(field, "the gradients of these experts are made in one pass")


def _validate_dispatch(config):
    if config.moe_dispatch not in ("stock", "compact"):
        raise ValueError(f"moe_dispatch ({config.moe_dispatch!r}) must be 'stock' or 'compact'")
    if config.moe_dispatch == "stock":
        return
    refuse = _refusal(config, "moe_dispatch 'compact'")
    if not config.moe_granular_experts:
        refuse("moe_granular_experts", "the other experts want K copies of each token; add --moe-granular-experts")
    if config.num_moe_experts >= 2**31:
        refuse("num_moe_experts", "expert ids are int32")
    if config.moe_expert_capacity_factor is not None:
        refuse("moe_expert_capacity_factor", "tokens are dropped on Megatron's dense maps")
    if config.moe_expert_rank_capacity_factor is not None:
        refuse("moe_expert_rank_capacity_factor", "no token is dropped")
    if config.moe_shared_expert_overlap:
        refuse("moe_shared_expert_overlap", "only Megatron's own dispatchers run the shared expert between their steps")
    if config.moe_token_dispatcher_type == "flex":
        refuse("moe_token_dispatcher_type", "DeepEP's buffers would be made and not used; leave it at 'allgather'")
    if config.overlap_moe_expert_parallel_comm:
        refuse("overlap_moe_expert_parallel_comm", "its schedule has not been tested with this dispatcher")
    for field in ("moe_permute_fusion", "moe_router_padding_for_quantization", "moe_router_padding_for_fp8"):
        if getattr(config, field):
            refuse(field, "tokens are not permuted by expert; leave it out")


def _refusal(config, cause):
    """A function (field, reason) that raises the ValueError which says that the cause excludes the field's value."""

    def refuse(field, reason):
        raise ValueError(f"{field} ({getattr(config, field)!r}) is not supported with {cause}: {reason}")

    return refuse


def _validate_codebook(config):
    if config.moe_air_codebook_source not in ("tokens", "experts"):
        raise ValueError(f"moe_air_codebook_source ({config.moe_air_codebook_source!r}) must be 'tokens' or 'experts'")
    if not 0.0 < config.moe_air_codebook_ema < 1.0:
        raise ValueError(f"moe_air_codebook_ema ({config.moe_air_codebook_ema}) must lie strictly between 0 and 1")
    if config.moe_air_refresh_interval < 1:
        raise ValueError(f"moe_air_refresh_interval ({config.moe_air_refresh_interval}) must be at least 1")
    for name in ("moe_air_num_clusters", "moe_air_shortlist_size"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} ({getattr(config, name)}) must be positive, or 0 for the automatic size")
    if config.moe_air_num_probes < 1:
        raise ValueError(f"moe_air_num_probes ({config.moe_air_num_probes}) must be at least 1")
    if config.moe_air_num_candidates and config.moe_router_enable_expert_bias:
        refuse = _refusal(config, "moe_router_enable_expert_bias (True)")
        refuse("moe_air_num_candidates", "a biased expert may win from behind the best candidates; leave it at 0")


def _validate_counts(config):
    num_experts, topk = config.num_moe_experts, config.moe_router_topk
    ep_size = config.expert_model_parallel_size
    if num_experts % ep_size:
        raise ValueError(f"num_moe_experts ({num_experts}) must be divisible by expert_model_parallel_size ({ep_size})")
    if not 1 <= topk <= num_experts:
        raise ValueError(f"moe_router_topk ({topk}) must be between 1 and num_moe_experts ({num_experts})")


def _validate_shortlists(config):
    num_experts, topk = config.num_moe_experts, config.moe_router_topk
    if config.moe_air_shortlist_size > num_experts:
        raise ValueError(
            f"moe_air_shortlist_size ({config.moe_air_shortlist_size}) must not exceed num_moe_experts ({num_experts})"
        )
    if config.moe_air_num_clusters > num_experts:
        raise ValueError(
            f"moe_air_num_clusters ({config.moe_air_num_clusters}) must not exceed num_moe_experts ({num_experts}): "
            "searching such a codebook costs more than scoring every expert"
        )
    sizes = resolve_sizes(config)
    if sizes.num_probes > sizes.num_clusters:
        raise ValueError(
            f"moe_air_num_probes ({sizes.num_probes}) must not exceed moe_air_num_clusters ({sizes.num_clusters})"
        )
    searched = sizes.num_probes * sizes.shortlist_size
    if config.moe_air_num_candidates and not topk <= config.moe_air_num_candidates <= searched:
        raise ValueError(
            f"moe_air_num_candidates ({config.moe_air_num_candidates}) must be between moe_router_topk ({topk}) and "
            f"moe_air_num_probes ({sizes.num_probes}) times moe_air_shortlist_size ({sizes.shortlist_size}), or 0 for "
            "all of them"
        )
    if config.moe_air_codebook_source == "tokens":
        if topk >= sizes.shortlist_size and sizes.shortlist_size < num_experts:
            raise ValueError(
                f"moe_air_shortlist_size ({sizes.shortlist_size}) must exceed moe_router_topk ({topk}), unless it is "
                f"num_moe_experts ({num_experts}): slots beyond the top-k hold the experts that no list would hold, "
                f"which are lost for good without them; use {min(2 * topk, num_experts)} or more, or 0 for the "
                "automatic size"
            )
        return
    if sizes.num_clusters * sizes.shortlist_size < num_experts:
        raise ValueError(
            f"moe_air_num_clusters ({sizes.num_clusters}) times moe_air_shortlist_size ({sizes.shortlist_size}) must "
            f"be at least num_moe_experts ({num_experts}) with moe_air_codebook_source 'experts': every expert stands "
            "in one list"
        )
    if sizes.num_probes * num_experts < topk * sizes.num_clusters:
        most_clusters, least_probes = (
            sizes.num_probes * num_experts // topk,
            -(-topk * sizes.num_clusters // num_experts),
        )
        raise ValueError(
            f"moe_air_num_probes ({sizes.num_probes}) times the mean list, num_moe_experts ({num_experts}) over "
            f"moe_air_num_clusters ({sizes.num_clusters}), must be at least moe_router_topk ({topk}) with "
            "moe_air_codebook_source 'experts': a token would not find its top-k; use at most "
            f"{most_clusters} clusters, at least {least_probes} probes, or 0 for the automatic number of clusters"
        )


def _validate_product_keys(config):
    num_experts, topk = config.num_moe_experts, config.moe_router_topk
    for name in ("moe_product_key_heads", "moe_product_key_dim"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} ({getattr(config, name)}) must be positive, or 0 for the automatic size")
    norms = ("auto", "batchnorm", "layernorm", "none")
    if config.moe_product_key_query_norm not in norms:
        raise ValueError(f"moe_product_key_query_norm ({config.moe_product_key_query_norm!r}) must be one of {norms}")
    if config.moe_product_key_on_tokens and config.moe_product_key_dim:
        refuse = _refusal(config, "moe_product_key_on_tokens (True)")
        refuse("moe_product_key_dim", "the sub-keys are then of hidden_size; leave it at 0")
    sizes = resolve_product_keys(config)
    if topk % sizes.num_heads:
        raise ValueError(f"moe_product_key_heads ({sizes.num_heads}) must divide moe_router_topk ({topk})")
    if sizes.num_keys[0] == 1:
        raise ValueError(f"num_moe_experts ({num_experts}) must be a product of two numbers above 1, the sub-keys")
    if sizes.topk_per_head == 1 and config.moe_router_score_function == "softmax":
        raise ValueError(
            f"moe_product_key_heads ({sizes.num_heads}) must leave each head two experts of moe_router_topk ({topk}): "
            "the softmax over one is constant, and the keys would get no gradient (or use the score function 'sigmoid')"
        )


def _validate_groups(config):
    num_experts, topk = config.num_moe_experts, config.moe_router_topk
    groups, searched = config.moe_hierarchical_num_groups, config.moe_hierarchical_topk_groups
    if groups < 0 or (groups and num_experts % groups):
        raise ValueError(
            f"moe_hierarchical_num_groups ({groups}) must divide num_moe_experts ({num_experts}), or be 0 for the "
            "automatic size"
        )
    sizes = resolve_groups(config)
    if not 0 <= searched <= sizes.num_groups:
        raise ValueError(
            f"moe_hierarchical_topk_groups ({searched}) must be between 1 and moe_hierarchical_num_groups "
            f"({sizes.num_groups}), or 0 for the automatic size"
        )
    if sizes.topk_groups * sizes.group_size < topk:
        raise ValueError(
            f"moe_router_topk ({topk}) must not exceed moe_hierarchical_topk_groups ({sizes.topk_groups}) times the "
            f"{sizes.group_size} experts of a group"
        )


def _validate_hash(config):
    if config.moe_hash_vocab_size < 1:
        raise ValueError(
            f"moe_hash_vocab_size ({config.moe_hash_vocab_size}) must be the number of token ids, padding included; "
            "give --moe-hash-vocab-size, or with air_moe_megatron.pretrain --vocab-size"
        )
    if config.moe_hash_seed < 0:
        raise ValueError(f"moe_hash_seed ({config.moe_hash_seed}) must not be negative")


def _validate_vq(config):
    topk = config.moe_router_topk
    if topk % 2:
        raise ValueError(f"moe_router_topk ({topk}) must be even: half are found by code, half by score")
    if topk == 2 and config.moe_router_score_function == "softmax" and not config.moe_router_pre_softmax:
        raise ValueError(
            f"moe_router_topk ({topk}) leaves the continuous branch one expert, and the softmax over one is constant: "
            "add --moe-router-pre-softmax, or use more experts"
        )
    if not config.moe_vq_loss_coeff > 0.0:
        raise ValueError(
            f"moe_vq_loss_coeff ({config.moe_vq_loss_coeff}) must be positive: the codes learn by no other"
        )
    if not config.moe_vq_commitment >= 0.0:
        raise ValueError(f"moe_vq_commitment ({config.moe_vq_commitment}) must not be negative")


_VALIDATE_SIZES = {
    "topk": lambda config: None,
    "air": _validate_shortlists,
    "product_key": _validate_product_keys,
    "hierarchical": _validate_groups,
    "hash": _validate_hash,
    "vq": _validate_vq,
}


def _refuse_unsupported(config):
    """Refuse what cannot keep Megatron's meaning with the router; each refusal says why."""

    router_type = config.moe_router_type
    cause = "moe_granular_experts (True)" if router_type == "topk" else f"moe_router_type {router_type!r}"
    refuse = _refusal(config, cause)
    balancing = config.moe_router_load_balancing_type
    for kind in [balancing] if isinstance(balancing, str) else balancing:
        if kind == "sinkhorn":
            refuse("moe_router_load_balancing_type", "it assigns by dense [tokens, experts] scores, which are not made")
        if kind == "quantile_balancing":
            refuse("moe_router_load_balancing_type", "it takes dense [tokens, experts] scores, which are not made")
    if router_type != "topk":
        if config.moe_router_num_groups is not None or config.moe_router_group_topk is not None:
            field = "moe_router_num_groups" if config.moe_router_num_groups is not None else "moe_router_group_topk"
            refuse(field, "Megatron picks groups by dense scores of all experts, which are not made")
        if config.moe_router_force_biased is not None:
            refuse("moe_router_force_biased", "its bias is drawn over the columns of dense logits")
    if config.moe_paged_stash:
        refuse("moe_paged_stash", "it repeats forwards within a step, and their tokens would count twice")
    if config.moe_enable_routing_replay:
        refuse("moe_enable_routing_replay", "a replay is recorded and given inside Megatron's own router")
    if config.moe_router_fusion:
        refuse("moe_router_fusion", "Transformer Engine's fused router takes dense logits")
    if config.init_model_with_meta_device:
        refuse("init_model_with_meta_device", "codebooks and lists would come from memory that nothing has written")
    if config.transformer_impl == "inference_optimized":
        refuse("transformer_impl", "it builds its own router and dispatcher")
    if config.moe_pad_experts_for_cuda_graph_inference:
        refuse("moe_pad_experts_for_cuda_graph_inference", "it switches the router to dropping while decoding")
    if config.cuda_graph_impl == "full_iteration" or (
        config.cuda_graph_impl != "none" and _captures_router(config.cuda_graph_modules)
    ):
        refuse("cuda_graph_impl", "grouping tokens by codeword waits for counts on the host, which capture forbids")
    if router_type == "air":
        if config.moe_router_score_function == "sqrtsoftplus" and (
            config.moe_air_num_probes > 1 or config.moe_air_codebook_source == "experts"
        ):
            refuse(
                "moe_router_score_function",
                "its gradient is undefined at the masked candidates of several probes or of inverted lists; "
                "use one probe and source 'tokens'",
            )
    elif router_type != "topk":
        _refuse_with_rivals(config, refuse)


def _refuse_with_rivals(config, refuse):
    router_type = config.moe_router_type
    if config.moe_router_enable_expert_bias:
        refuse("moe_router_enable_expert_bias", "the search finds experts by its own scores, without a bias of each")
    if config.moe_router_force_load_balancing:
        refuse("moe_router_force_load_balancing", "random scores of the candidates would not balance the experts")
    if router_type == "hierarchical" and config.moe_router_score_function != "softmax":
        refuse("moe_router_score_function", "the gates of groups and experts are probabilities; use 'softmax'")
    if router_type in ("hash", "vq") and balancing_losses(config):
        reason = {"hash": "there is nothing to learn", "vq": "half of the experts are chosen by code, without scores"}
        refuse("moe_aux_loss_coeff", reason[router_type])
    if router_type != "hash":
        return
    if config.moe_z_loss_coeff is not None:
        refuse("moe_z_loss_coeff", "there are no scores")
    if config.moe_input_jitter_eps is not None:
        refuse("moe_input_jitter_eps", "the hidden states are not looked at")
    if config.moe_router_score_function != "softmax":
        refuse("moe_router_score_function", "there are no scores")
    if config.moe_router_pre_softmax:
        refuse("moe_router_pre_softmax", "there are no scores")
    if config.pipeline_model_parallel_size > 1:
        refuse("pipeline_model_parallel_size", "only the first stage knows the token ids")
    if config.mtp_num_layers is not None:
        refuse("mtp_num_layers", "these layers see other tokens than the embedding was given last")
    if config.overlap_moe_expert_parallel_comm:
        refuse("overlap_moe_expert_parallel_comm", "its schedule mixes the token ids of two microbatches")


def _captures_router(modules) -> bool:
    names = {getattr(module, "name", module) for module in ([modules] if isinstance(modules, str) else modules)}
    # Megatron: an empty list captures the whole layer.
    return not names or bool(names & {"full", "moe", "moe_router", "moe_preprocess"})


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
