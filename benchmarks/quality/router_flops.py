"""Floating-point operations of routers and experts, from the config alone: one formula per router, to compare fairly.

Products of vectors are counted, forward and backward, of one layer and token, as each router is built here. A
multiplication and an addition are two operations. What is linear in the scores is not counted: softmax, top-k, sorting,
norms, statistics of the codebook. ``tests/unit/test_router_flops.py`` compares the formulas with the operations that
torch counts while the routers run.

Legend: H hidden, E experts, C clusters, L shortlist, P probes, M candidates with gradients, K top-k.
"""

from dataclasses import dataclass

from air_moe_megatron.config import resolve_groups, resolve_product_keys, resolve_sizes
from air_moe_megatron.index import NUM_FULL_REBUILDS, num_rebuilds, rebuild_products

DISPATCH_CONSTANT = 14
"""Operations per scored row and hidden unit that Krajewski et al. 2024 (arXiv 2402.07871) charge an exact router with
its dispatch, forward and backward, in place of the 6 of the scores alone."""


@dataclass(frozen=True)
class RouterFlops:
    """Operations per token of one router."""

    forward: float
    backward: float
    refresh: float = 0.0  # AIR's rebuilding of the shortlists, spread over all tokens

    @property
    def total(self) -> float:
        """Forward, backward and refresh."""
        return self.forward + self.backward + self.refresh

    @property
    def with_dispatch(self) -> float:
        """Refresh, and 14 operations for each 2 of the forward (Krajewski et al.), which stand for both directions and
        the dispatch. It charges the dispatch by what is scored, so nothing to the hash, whatever the dispatch costs."""
        return DISPATCH_CONSTANT / 2 * self.forward + self.refresh


def router_flops(config, tokens_per_batch: int | None = None, num_steps: int | None = None) -> RouterFlops:
    """Operations per token of the router that the config asks for.

    | router | forward | backward |
    |---|---|---|
    | topk | 2HE | 4HE |
    | air | 2H(C + PL) | 4HK; 4HM where losses or probabilities take more scores than the top-k |
    | product_key, R heads, sub-keys of D, n1*n2 = E | 4HRD + 2RD(n1 + n2) | twice that |
    | hierarchical, G groups, g searched | 2H(G + gE/G) | twice that |
    | hash | 0 | 0 |
    | vq | 4HE + 4H | 4HE + 8H |

    Args:
        config: a valid transformer config with our fields.
        tokens_per_batch: tokens of a global batch, for AIR's refresh, which the ranks share:
            ``2CH(C + nL + E/R) / (tokens * moe_air_refresh_interval)``, of n lists and R slices (``index.py``). With
            source 'experts' every rank does it all, for its own tokens: ``2CEH`` for the lists, and as much for the
            k-means step that assigns the experts anew. None leaves it out.
        num_steps: of a training that starts with a new codebook, whose lists are rebuilt more often
            (``index.num_rebuilds``), the first two times in full and by every rank, ``2CEH``; None counts those
            of an old one.

    Example: H = 8, E = 100, K = 2 and topk: forward 1600, backward 3200.
    """
    hidden, num_experts, topk = config.hidden_size, config.num_moe_experts, config.moe_router_topk
    router_type = config.moe_router_type
    if router_type == "topk":
        return RouterFlops(2 * hidden * num_experts, 4 * hidden * num_experts)
    if router_type == "air":
        sizes = resolve_sizes(config)
        searched = sizes.num_probes * sizes.shortlist_size
        refresh = 0.0
        if tokens_per_batch is not None:
            interval, in_full = config.moe_air_refresh_interval, sizes.num_clusters * num_experts
            if config.moe_air_codebook_source == "experts":
                in_full = rebuild = 2 * in_full
            else:
                rebuild = rebuild_products(num_experts, sizes.num_clusters, sizes.shortlist_size)
            products_per_step = rebuild / interval
            if num_steps is not None:
                num_full = min(num_steps, NUM_FULL_REBUILDS)
                num_others = num_rebuilds(num_steps, interval) - num_full
                products_per_step = (num_full * in_full + num_others * rebuild) / num_steps
            refresh = 2 * hidden * products_per_step / tokens_per_batch
        with_gradient = sizes.num_candidates if _all_scores_matter(config) else topk
        return RouterFlops(2 * hidden * (sizes.num_clusters + searched), 4 * hidden * with_gradient, refresh)
    if router_type == "product_key":
        sizes = resolve_product_keys(config)
        width = sizes.num_heads * sizes.key_dim
        queries = 0 if config.moe_product_key_on_tokens else 4 * hidden * width
        forward = queries + 2 * width * sum(sizes.num_keys)
        return RouterFlops(forward, 2 * forward)
    if router_type == "hierarchical":
        sizes = resolve_groups(config)
        forward = 2 * hidden * (sizes.num_groups + sizes.topk_groups * sizes.group_size)
        return RouterFlops(forward, 2 * forward)
    if router_type == "hash":
        return RouterFlops(0, 0)
    return RouterFlops(4 * hidden * num_experts + 4 * hidden, 4 * hidden * num_experts + 8 * hidden)


def expert_flops(config) -> int:
    """Operations per token of the K experts of a layer, forward and backward: ``6 * K * H * F`` per projection."""
    projections = 3 if config.gated_linear_unit else 2
    return 6 * config.moe_router_topk * config.hidden_size * config.moe_ffn_hidden_size * projections


def _all_scores_matter(config) -> bool:
    """Whether gradients reach the scores of all candidates, as in ``AIRRouter``."""
    coeffs = config.moe_aux_loss_coeff
    has_aux_loss = any(coeff > 0 for coeff in (coeffs if isinstance(coeffs, list) else [coeffs]))
    return (
        (config.moe_router_load_balancing_type != "none" and has_aux_loss)
        or config.moe_z_loss_coeff is not None
        or (config.moe_router_score_function == "softmax" and config.moe_router_pre_softmax)
        or config.moe_router_force_load_balancing
    )
