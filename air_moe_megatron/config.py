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


@dataclass
class AIRFields:
    """AIR-MoE: two-stage inverted-index routing for granular mixtures of experts."""

    moe_router_type: Literal["topk", "air"] = "topk"
    """Router of the MoE layers: 'topk' is Megatron's own, untouched; 'air' scores only a shortlist of the experts,
    looked up by the token's codeword."""

    moe_air_num_clusters: int = 0
    """Number of codewords C in the codebook of one router; 0 chooses 2*sqrt(experts), up to a multiple of 8."""

    moe_air_shortlist_size: int = 0
    """Number of experts L in the shortlist of one codeword, for source 'tokens'; the capacity of one inverted list for
    source 'experts'. 0 chooses 2*sqrt(experts) for 'tokens', twice the mean list for 'experts', and never fewer than
    two times the top-k."""

    moe_air_num_probes: int = 1
    """Number of codewords P whose shortlists are searched for a token."""

    moe_air_codebook_source: Literal["tokens", "experts"] = "tokens"
    """What the codebook is learned from: the directions of the 'tokens' (a shortlist holds the experts that score
    highest at the codeword), or of the 'experts' (an inverted file: each expert stands in one list)."""

    moe_air_codebook_ema: float = 0.9
    """Decay, per global batch, of the running statistics from which the codewords are computed."""

    moe_air_refresh_interval: int = 10
    """Rebuild the shortlists every this many codebook updates (and after each of the first this many)."""

    moe_dispatch: Literal["stock", "compact"] = "stock"
    """How tokens reach their experts: 'stock' is the dispatcher that moe_token_dispatcher_type names, 'compact' sends a
    token once to each expert-parallel rank that holds any of its experts, without dense maps (needs
    moe_granular_experts)."""

    moe_granular_experts: bool = False
    """Keep the experts of a rank in one tensor per projection, for very many tiny experts, instead of one module each;
    moe_ffn_hidden_size may be as small as 1."""


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


def resolve_sizes(config: TransformerConfig) -> AIRSizes:
    """Choose the automatic sizes of a config.

    With C = L = 2*sqrt(E) every expert has about four places in the lists and the cost of a token,
    ``2*H*(C + P*L)`` FLOPs, grows as sqrt(E). Source: docs/design-choices.md.

    Example: E = 16384, K = 32, source 'tokens' gives C = L = 256.
    """
    num_experts, topk = config.num_moe_experts, config.moe_router_topk
    root = _round_up(max(_MIN_AUTO_SIZE, math.ceil(2 * math.sqrt(num_experts))), 8)
    num_clusters = config.moe_air_num_clusters or min(root, num_experts)
    shortlist_size = config.moe_air_shortlist_size
    if shortlist_size == 0:
        wanted = root if config.moe_air_codebook_source == "tokens" else math.ceil(2 * num_experts / num_clusters)
        shortlist_size = min(max(wanted, 2 * topk), num_experts)
    return AIRSizes(num_experts, topk, num_clusters, shortlist_size, config.moe_air_num_probes)


def validate(config: TransformerConfig) -> None:
    """Check the fields of AIR-MoE against each other and against Megatron's, before anything is built.

    Raises:
        ValueError: naming the field, its value, the rule and the other value.
    """
    if config.moe_router_type == "topk":
        refuse = _refusal(config, "moe_router_type 'topk'")
        if config.moe_granular_experts:
            refuse("moe_granular_experts", "they are built for the routes of 'air'")
        if config.moe_dispatch != "stock":
            refuse("moe_dispatch", "Megatron's router makes dense maps; use 'stock'")
        return
    if config.moe_router_type != "air":
        raise ValueError(f"moe_router_type ({config.moe_router_type!r}) must be 'topk' or 'air'")
    if config.num_moe_experts is None:
        raise ValueError("moe_router_type ('air') needs num_moe_experts (--num-experts), which is not set")
    _validate_codebook(config)
    _validate_sizes(config)
    _refuse_unsupported(config)
    if config.moe_granular_experts:
        validate_experts(config)
    _validate_dispatch(config)


def validate_experts(config: TransformerConfig) -> None:
    """Refuse what granular experts cannot do; each refusal says why.

    Raises:
        ValueError: naming the field, its value and the reason.
    """
    refuse = _refusal(config, "moe_granular_experts (True)")
    if config.expert_tensor_parallel_size is not None and config.expert_tensor_parallel_size > 1:
        refuse("expert_tensor_parallel_size", "an expert of a few rows is not split; use expert_model_parallel_size")
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
    for field in ("moe_single_grouped_weight", "use_te_activation_func", "moe_paged_stash", "use_kitchen"):
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
            refuse(field, "tokens are not permuted by expert")


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


def _validate_sizes(config):
    num_experts, topk = config.num_moe_experts, config.moe_router_topk
    ep_size = config.expert_model_parallel_size
    if num_experts % ep_size:
        raise ValueError(f"num_moe_experts ({num_experts}) must be divisible by expert_model_parallel_size ({ep_size})")
    if not 1 <= topk <= num_experts:
        raise ValueError(f"moe_router_topk ({topk}) must be between 1 and num_moe_experts ({num_experts})")
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
    if config.moe_air_codebook_source == "tokens":
        if topk > sizes.shortlist_size:
            raise ValueError(
                f"moe_router_topk ({topk}) must not exceed moe_air_shortlist_size ({sizes.shortlist_size})"
            )
        return
    if sizes.num_clusters * sizes.shortlist_size < num_experts:
        raise ValueError(
            f"moe_air_num_clusters ({sizes.num_clusters}) times moe_air_shortlist_size ({sizes.shortlist_size}) must "
            f"be at least num_moe_experts ({num_experts}) with moe_air_codebook_source 'experts': every expert stands "
            "in one list"
        )
    if topk > sizes.num_probes * sizes.shortlist_size:
        raise ValueError(
            f"moe_router_topk ({topk}) must not exceed moe_air_num_probes ({sizes.num_probes}) times "
            f"moe_air_shortlist_size ({sizes.shortlist_size})"
        )


def _refuse_unsupported(config):
    """Refuse what cannot keep Megatron's meaning with a shortlist; each refusal says why."""

    refuse = _refusal(config, "moe_router_type 'air'")
    balancing = config.moe_router_load_balancing_type
    for kind in [balancing] if isinstance(balancing, str) else balancing:
        if kind == "sinkhorn":
            refuse("moe_router_load_balancing_type", "it normalises over all experts, most of which are unscored")
        if kind == "quantile_balancing":
            refuse("moe_router_load_balancing_type", "the quantile of an expert needs its score for every token")
    if config.moe_router_num_groups is not None or config.moe_router_group_topk is not None:
        field = "moe_router_num_groups" if config.moe_router_num_groups is not None else "moe_router_group_topk"
        refuse(field, "group scores need every expert of a group; a shortlist holds only some")
    if config.moe_enable_routing_replay:
        refuse("moe_enable_routing_replay", "a replay records expert ids of exact routing, not places in a shortlist")
    if config.moe_router_force_biased is not None:
        refuse("moe_router_force_biased", "its bias is drawn over the columns of dense logits")
    if config.moe_router_fusion:
        refuse("moe_router_fusion", "Transformer Engine's fused router takes dense logits")
    if config.transformer_impl == "inference_optimized":
        refuse("transformer_impl", "it builds its own router and dispatcher")
    if config.moe_pad_experts_for_cuda_graph_inference:
        refuse("moe_pad_experts_for_cuda_graph_inference", "it switches the router to dropping while decoding")
    if config.cuda_graph_impl == "full_iteration" or (
        config.cuda_graph_impl != "none" and _captures_router(config.cuda_graph_modules)
    ):
        refuse("cuda_graph_impl", "grouping tokens by codeword waits for counts on the host, which capture forbids")
    if config.moe_router_score_function == "sqrtsoftplus" and (
        config.moe_air_num_probes > 1 or config.moe_air_codebook_source == "experts"
    ):
        refuse(
            "moe_router_score_function",
            "its gradient is undefined at the masked candidates of several probes or of inverted lists; "
            "use one probe and source 'tokens'",
        )


def _captures_router(modules) -> bool:
    names = {getattr(module, "name", module) for module in ([modules] if isinstance(modules, str) else modules)}
    # Megatron: an empty list captures the whole layer.
    return not names or bool(names & {"full", "moe", "moe_router", "moe_preprocess"})


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
