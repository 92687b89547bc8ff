"""Every field of the plugin and what it does; ``command/arguments.py`` makes the flags from this class."""

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass
class AIRFields:
    """AIR-MoE: two-stage inverted-index routing for granular mixtures of experts."""

    moe_router_type: Literal["topk", "air", "product_key", "hierarchical", "hash", "vq"] = "topk"
    """Router of the MoE layers. 'topk' is exact top-k: Megatron's own router, or ours with granular experts or first
    layers by hash. 'air' scores only the experts on the shortlists of the token's nearest codewords. 'product_key'
    (PEER), 'hierarchical' (groups of experts), 'hash' (fixed experts per token id) and 'vq' (VQMoE) are baselines from
    the literature."""

    moe_router_input_norm: Literal["none", "running", "low_rank_whitening", "whitening"] = "none"
    """Normalize the tokens before they are scored, with statistics of earlier global batches: 'running' centers and
    scales each feature, 'whitening' also decorrelates the features, and 'low_rank_whitening' does so along the 32
    directions of largest variance only, at a small part of the cost. For 'air', 'hierarchical', 'vq', and 'topk' with
    granular experts or first layers by hash."""

    moe_num_hash_layers: int = 0
    """Number of first MoE layers of the model that take the 'hash' router. The other layers, and those of multi-token
    prediction, take moe_router_type."""

    moe_air_num_clusters: int = 0
    """Number of codewords C in the codebook of one router. 0 chooses 4*sqrt(experts), rounded up to a multiple of 8.
    With source 'experts' 0 chooses fewer if the probed lists would hold less than four times the top-k on average."""

    moe_air_shortlist_size: int = 0
    """Number of experts L in the shortlist of one codeword; with source 'experts' the capacity of a list. 0 chooses
    9/16*sqrt(experts) (sqrt(experts) with one probe), with source 'experts' twice the mean length of a list, and always
    at least twice the top-k."""

    moe_air_list_parts: int = 1
    """Number of parts S of every shortlist, for source 'tokens'. Each part holds the best L/S of its own E/S
    consecutive experts, so ranks can make parts of the lists independently."""

    moe_air_shard_experts: bool = False
    """Shard centers, lists and their rebuild over the expert-parallel ranks, with the experts, instead of replicating
    them. moe_air_list_parts must be a multiple of the expert-parallel size. Needs moe_granular_experts and moe_dispatch
    'compact'."""

    moe_air_num_probes: int = 0
    """Number of codewords P whose shortlists are searched for a token. 0 chooses 8, or fewer if fewer lists could hold
    every expert; with source 'experts' 1."""

    moe_air_num_candidates: int = 0
    """Number of candidates M of a token, the best on its shortlists. Losses, and a softmax before the top-k, see only
    these, and only these get gradients. 0 chooses sqrt(experts), at least twice the top-k; with source 'experts' or an
    expert bias all experts on the shortlists."""

    moe_air_num_explored: int = 0
    """Number of further candidates X of a token, drawn from its shortlists whatever their scores. The balancing losses
    alone see them, so these losses reach every listed expert. At most P*L - M. None are drawn without a balancing
    loss."""

    moe_air_codebook_source: Literal["tokens", "experts"] = "tokens"
    """Vectors that the codebook is fitted to: the 'tokens' (a shortlist holds the experts that score highest at the
    codeword), or the centers of the 'experts' (an inverted file: each expert is in one list)."""

    moe_air_codebook_ema: float = 0.99
    """Decay of the codebook's statistics per global batch; lower while the codebook is young."""

    moe_air_refresh_interval: int = 20
    """Codebook updates between two rebuilds of the shortlists; fewer while the codebook is young."""

    moe_air_diagnostics_interval: int = 100
    """Steps between two measurements of every layer's router, for the log, TensorBoard, W&B and the file
    air_diagnostics.jsonl; 0 turns them off. For every router type."""

    moe_dispatch: Literal["stock", "compact"] = "stock"
    """Dispatch of tokens to their experts: 'stock' is the dispatcher that moe_token_dispatcher_type names. 'compact'
    sends a token once to each expert-parallel rank that holds any of its experts, without a dense routing map; it needs
    moe_granular_experts."""

    moe_granular_experts: bool = False
    """Keep the experts of a rank in one tensor per projection instead of one module each, for very many tiny experts;
    moe_ffn_hidden_size may be as small as 1."""

    moe_product_key_heads: int = 0
    """Number of heads of the product keys; each finds top-k / heads experts. 0 chooses the largest divisor of the top-k
    up to 8 that leaves each head at least two experts."""

    moe_product_key_dim: int = 0
    """Size of a sub-key, and of each half of a head's query; 0 chooses 128, at most half of the hidden size."""

    moe_product_key_query_norm: Literal["auto", "batchnorm", "layernorm", "none"] = "auto"
    """Normalization of the queries, with gain and bias. 'auto' is 'batchnorm' over the tokens of all ranks, as in PEER.
    With moe_product_key_on_tokens 'batchnorm' normalizes the scores of the sub-keys instead, without gain and bias, as
    in OmniMoE."""

    moe_product_key_on_tokens: bool = False
    """Score the token itself against sub-keys of the hidden size, without a query projection. With one head and
    moe_router_pre_softmax this is OmniMoE's router."""

    moe_hierarchical_num_groups: int = 0
    """Number of groups of consecutive experts, a divisor of the number of experts. 0 chooses the smallest divisor that
    is at least sqrt(experts)."""

    moe_hierarchical_topk_groups: int = 0
    """Number of groups whose experts are scored for a token. 0 chooses 2, or as many as hold twice the top-k if that is
    more."""

    moe_hash_vocab_size: int = 0
    """Number of token ids in the tables of the 'hash' router; 0 chooses the padded vocabulary size."""

    moe_hash_seed: int = 0
    """Seed of the tables of the 'hash' router; each layer derives its own table from it."""

    moe_hash_balance: Literal["ids", "frequency"] = "ids"
    """Balance of the tables of the 'hash' router: 'ids' gives experts equal numbers of token ids, 'frequency' gives
    them numbers of tokens as equal as the data allow. Frequencies are counted in the training data, unless
    moe_hash_counts names a file. The tables are saved with the model."""

    moe_hash_counts: str | None = None
    """File with the frequency of each token id, one number per line from id 0 on, for moe_hash_balance 'frequency'."""

    moe_vq_loss_coeff: float = 0.1
    """Coefficient of the codebook and commitment losses of the 'vq' router."""

    moe_vq_commitment: float = 0.25
    """Weight of the commitment loss of the 'vq' router relative to its codebook loss."""


_OF_EVERY_ROUTER = ("moe_air_diagnostics_interval",)
"""Fields whose names begin like those of one router type, although every router of ours uses them."""

LAYOUT_FIELDS = ("moe_air_shard_experts",)
"""Fields that only set the layout of a model over ranks. A checkpoint loads with any value of them."""

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
