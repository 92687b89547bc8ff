"""The automatic sizes of each router. Source: docs/design-choices.md."""

import math
from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

# Smallest automatic size: with so few experts, exact scores are cheap.
_MIN_AUTO_SIZE = 16
# Automatic number of probes of source 'tokens', and the length of their lists over sqrt(E). Measured:
# docs/design-choices.md.
_PROBES = 8
_SHORT = 9 / 16
# Automatic sizes of source 'experts': mean number of candidates per slot of a token's top-k. With clustered centers of
# 512 to 16,384 experts, at most 0.7% of the slots then stayed empty; with two candidates per slot up to 15%.
_CANDIDATES_PER_SLOT = 4


@dataclass(frozen=True)
class AIRSizes:
    """The sizes of one router after the automatic ones are chosen."""

    num_experts: int
    topk: int
    num_clusters: int
    shortlist_size: int
    num_probes: int
    num_candidates: int
    num_explored: int = 0


def resolve_sizes(config: TransformerConfig) -> AIRSizes:
    """Choose the automatic sizes of a config.

    With C = 4*sqrt(E) and lists of 9/16*sqrt(E) every expert has more than two slots in the lists, and the cost of a
    token, ``2*H*(C + P*L)`` FLOPs, grows as sqrt(E). Source: docs/design-choices.md.

    Example: E = 16384, K = 32, source 'tokens' gives C = 512, L = 72, P = 8, M = 128; source 'experts' C = 128,
    L = 256, P = 1, M = 256.
    """
    num_experts, topk = config.num_moe_experts, config.moe_router_topk
    from_tokens = config.moe_air_codebook_source == "tokens"
    num_clusters = config.moe_air_num_clusters or _automatic_clusters(config)
    shortlist_size = config.moe_air_shortlist_size
    if shortlist_size == 0:
        if not from_tokens:
            wanted = math.ceil(2 * num_experts / num_clusters)
        elif config.moe_air_num_probes == 1:
            wanted = _automatic(math.sqrt(num_experts))
        else:
            wanted = _automatic(_SHORT * math.sqrt(num_experts))
        parts = config.moe_air_list_parts
        wanted = max(wanted, 2 * topk, parts * least_of_part(topk, parts) if parts > 1 else 0)
        shortlist_size = min(_round_up(wanted, parts), num_experts)
    most_probes = min(_automatic_probes(config), num_clusters, -(-num_experts // shortlist_size))
    num_probes = config.moe_air_num_probes or most_probes
    searched = num_probes * shortlist_size
    num_candidates = config.moe_air_num_candidates
    if num_candidates == 0:
        wanted = max(_automatic(math.sqrt(num_experts)), 2 * topk)
        # Balancing losses select by scores without the expert bias, so perhaps beyond the best M by biased scores.
        takes_best = from_tokens and not config.moe_router_enable_expert_bias
        num_candidates = min(wanted, searched) if takes_best else searched
    num_parts = config.moe_air_list_parts
    num_explored = num_parts * -(-config.moe_air_num_explored // num_parts)  # equally many of each part
    if num_explored > searched - num_candidates:
        num_explored = (searched - num_candidates) // num_parts * num_parts
    return AIRSizes(num_experts, topk, num_clusters, shortlist_size, num_probes, num_candidates, num_explored)


def least_of_part(topk: int, num_parts: int) -> int:
    """Fewest slots of a part of a list: its share of the top-k, and one for orphans (experts that no list would hold).

    Example: K = 4 in 8 parts gives 2 slots.
    """
    return -(-topk // num_parts) + 1


def _automatic_probes(config: TransformerConfig) -> int:
    return _PROBES if config.moe_air_codebook_source == "tokens" else 1


def _automatic_clusters(config: TransformerConfig) -> int:
    num_experts, num_probes = config.num_moe_experts, config.moe_air_num_probes or _automatic_probes(config)
    num_clusters = min(_automatic(4 * math.sqrt(num_experts)), num_experts)
    if config.moe_air_codebook_source == "tokens":
        return num_clusters
    # Each expert is in one list, and lists differ in length: a token needs spare candidates to find K experts.
    most = num_probes * num_experts // (_CANDIDATES_PER_SLOT * config.moe_router_topk)
    most = most // 8 * 8 if most > 8 else most
    least = math.ceil(num_experts / (config.moe_air_shortlist_size or num_experts))  # fewest that hold all
    return min(num_clusters, max(num_probes, most, least))


def _automatic(size: float) -> int:
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
    """Choose the automatic sizes of groups. With sqrt(E) groups, scoring all groups costs as much as scoring one group.

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
    """The largest divisor that does not exceed the square root."""
    return next(n for n in range(math.isqrt(number), 0, -1) if number % n == 0)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
