"""Every field of the plugin and what it does; ``training/arguments.py`` makes the flags from this class."""

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass
class AIRFields:
    """AIR-MoE: two-stage inverted-index routing for granular mixtures of experts."""

    moe_router_type: Literal["topk", "air", "product_key", "hierarchical", "hash", "vq"] = "topk"
    """Router of the MoE layers: 'topk' is Megatron's own, untouched; 'air' scores only a shortlist of the experts,
    looked up by the token's codeword; 'product_key' (PEER), 'hierarchical' (groups of experts), 'hash' (fixed, by token
    id) and 'vq' (VQMoE) are baselines from the literature."""

    moe_router_input_norm: Literal["none", "running", "whitening"] = "none"
    """Normalize the tokens before they are scored, by statistics of earlier global batches: per feature by the
    'running' mean and variance, or 'whitening' with the covariance too, which decorrelates the features; for 'topk',
    'air', 'hierarchical' and 'vq'."""

    moe_num_hash_layers: int = 0
    """Number of MoE layers, the first of the model, whose experts are fixed by the token id, as those of
    moe_router_type 'hash'; the other layers, and those of multi-token prediction, take moe_router_type."""

    moe_air_num_clusters: int = 0
    """Number of codewords C in the codebook of one router; 0 chooses 4*sqrt(experts), up to a multiple of 8. For source
    'experts' it chooses fewer where the probed lists would hold less than four times the top-k on average."""

    moe_air_shortlist_size: int = 0
    """Number of experts L in the shortlist of one codeword, for source 'tokens'; the capacity of one inverted list for
    source 'experts'. 0 chooses 9/16*sqrt(experts) for 'tokens' (sqrt(experts) with one probe), twice the mean list for
    'experts', and never fewer than two times the top-k."""

    moe_air_list_parts: int = 1
    """Number of parts S of every shortlist, for source 'tokens'. Each holds the best L/S experts of its own range of
    E/S consecutive experts, so that ranks can make parts of the lists by themselves."""

    moe_air_shard_experts: bool = False
    """Shard centers, lists and their rebuild over the expert-parallel ranks with the experts, instead of replicating
    them. moe_air_list_parts must be a multiple of the expert-parallel size (needs moe_granular_experts and moe_dispatch
    'compact')."""

    moe_air_num_probes: int = 0
    """Number of codewords P whose shortlists are searched for a token. 0 chooses 8 for source 'tokens', fewer where
    that many lists could hold every expert, and 1 for 'experts'."""

    moe_air_num_candidates: int = 0
    """Number of candidates M of a token, the best of those that its shortlists hold, which probabilities and losses are
    computed over where they take more than the top-k; only these get gradients. 0 chooses sqrt(experts), never fewer
    than two times the top-k, for source 'tokens', and all of them for 'experts'."""

    moe_air_num_explored: int = 0
    """Number of candidates R of a token beside the best M, drawn from its shortlists whatever their scores. Only the
    balancing losses see them, in place of all candidates behind the best M: so these losses reach every listed expert.
    At most as many as the slots of those. Without a balancing loss none are drawn."""

    moe_air_codebook_source: Literal["tokens", "experts"] = "tokens"
    """What the codebook is learned from: the directions of the 'tokens' (a shortlist holds the experts that score
    highest at the codeword), or of the 'experts' (an inverted file: each expert stands in one list)."""

    moe_air_codebook_ema: float = 0.99
    """Decay, per global batch, of the running statistics from which the codewords are computed."""

    moe_air_refresh_interval: int = 20
    """Rebuild the shortlists every this many codebook updates; while the codebook is young, more often."""

    moe_air_diagnostics_interval: int = 100
    """Measure the routers of every layer every this many steps, for the log, TensorBoard, W&B and the file
    air_diagnostics.jsonl; 0 turns it off. It is for every router type, not for 'air' alone."""

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
    """Normalization of the queries, by gain and bias of their own; 'auto' is 'batchnorm', over the tokens of all ranks,
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

    moe_hash_balance: Literal["ids", "frequency"] = "ids"
    """What the tables of the 'hash' router are balanced by: the number of token 'ids' of each expert, or the
    'frequency' of the ids, so that frequent ones share their experts with fewer others. Frequencies are counted in the
    training data, unless moe_hash_counts names a file; the tables are saved with the model."""

    moe_hash_counts: str | None = None
    """File with the frequency of each token id, one number per line from id 0 on, for moe_hash_balance 'frequency'."""

    moe_vq_loss_coeff: float = 0.1
    """Coefficient of the codebook and commitment losses of the 'vq' router."""

    moe_vq_commitment: float = 0.25
    """Weight of the commitment loss of the 'vq' router relative to its codebook loss."""


_OF_EVERY_ROUTER = ("moe_air_diagnostics_interval",)
"""Fields that are named like those of one router type, but that every router of ours uses."""

LAYOUT_FIELDS = ("moe_air_shard_experts",)
"""Fields that only say where parts of a model are kept. A checkpoint loads with any value of them."""

ROUTER_TYPES: tuple[str, ...] = get_args(get_type_hints(AIRFields)["moe_router_type"])


def is_plain_topk(values: object) -> bool:
    """Whether config or arguments select Megatron's router with Megatron's experts, so that nothing of ours is used."""
    is_topk = getattr(values, "moe_router_type", "topk") == "topk"
    return is_topk and not getattr(values, "moe_granular_experts", False) and not num_hash_layers(values)


def num_hash_layers(values: object) -> int:
    """Number of first MoE layers that config or arguments give to our hash router.

    It is 0 if Megatron has the flag itself, as its main branch does: then Megatron makes these layers.
    """
    return 0 if megatron_has_hash_layers() else getattr(values, "moe_num_hash_layers", 0)


def megatron_has_hash_layers() -> bool:
    """Whether this Megatron has its own ``moe_num_hash_layers``, rather than that of our patch."""
    names = {field.name for field in fields(TransformerConfig)}
    return "moe_num_hash_layers" in names and "moe_router_type" not in names


def uses_hash(values: object) -> bool:
    """Whether config or arguments ask for a hash router in any layer."""
    return values.moe_router_type == "hash" or num_hash_layers(values) > 0


def is_sharded(values: object) -> bool:
    """Whether config or arguments ask for AIR routers whose centers are sharded over the expert-parallel ranks."""
    return values.moe_router_type == "air" and values.moe_air_shard_experts


def balancing_losses(values: object) -> list[str]:
    """The kinds of balancing loss that config or arguments turn on, named as in ``moe_router_load_balancing_type``."""
    kinds, coeffs = values.moe_router_load_balancing_type, values.moe_aux_loss_coeff
    kinds = kinds if isinstance(kinds, list) else [kinds]
    coeffs = coeffs if isinstance(coeffs, list) else [coeffs]
    return [kind for kind, coeff in zip(kinds, coeffs, strict=True) if kind.endswith("aux_loss") and coeff > 0]


def router_type_of(field_name: str) -> str | None:
    """The router type that a field belongs to; None if every router uses the field.

    Example: ``moe_product_key_dim`` belongs to 'product_key', ``moe_dispatch`` to none.
    """
    if field_name in _OF_EVERY_ROUTER:
        return None
    return next((name for name in ROUTER_TYPES if field_name.startswith(f"moe_{name}_")), None)
