"""FLOPs of a router per layer and token, from its config alone; each router class has its own formula.

Vector products are counted, forward and backward; a multiplication and an addition are two FLOPs. Work that is linear
in the scores is not counted: softmax, top-k, sorting, norms, statistics of the codebook.
``tests/unit/test_router_flops.py`` compares the formulas with the FLOPs that torch counts while the routers run.
"""

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config import is_sharded, resolve_sizes
from air_moe_megatron.learned.codebook import FIRST_LLOYD_STEPS
from air_moe_megatron.learned.low_rank_whitening_norm import rank_of_whitening
from air_moe_megatron.learned.rebuild_schedule import NUM_FULL_REBUILDS, num_rebuilds, rebuild_products


@dataclass(frozen=True)
class Rebuilds:
    """The parameters, beside the config, that decide the cost of rebuilding AIR's shortlists.

    Attributes:
        tokens_per_batch: tokens per global batch; the cost of rebuilds is divided by them.
        num_steps: steps of a training that starts with a new codebook, whose lists are rebuilt more often at first.
            None assumes an old codebook.
        on_gpu: whether rebuilds run on a GPU, where each scores all experts.
        num_ranks: number of ranks with tokens of their own. Each of them repeats work that the ranks do not share.
    """

    tokens_per_batch: int
    num_steps: int | None = None
    on_gpu: bool = False
    num_ranks: int = 1


@dataclass(frozen=True)
class RouterFlops:
    """FLOPs of one router per token."""

    forward: float
    backward: float
    refresh: float = 0.0  # rebuilds of AIR's shortlists, divided by the number of tokens
    norm: float = 0.0  # whitening of the tokens, forward and backward, and its statistics

    @property
    def total(self) -> float:
        """Sum of forward, backward, refresh and norm."""
        return self.forward + self.backward + self.refresh + self.norm


@dataclass(frozen=True)
class RebuildFlops:
    """FLOPs of one rebuild of AIR's shortlists, summed over the ranks."""

    num_first: int  # rebuilds at the start of a training that cost more than the others
    first: float  # each of these
    later: float  # each of the others; the mean, where they differ


def rebuild_flops(config: TransformerConfig, on_gpu: bool = False, num_ranks: int = 1) -> RebuildFlops:
    """FLOPs of one rebuild of AIR's shortlists; arguments as in :class:`Rebuilds`.

    Source 'tokens': the ranks share a rebuild of the lists. It takes ``2CEH`` on a GPU, and on a CPU at most
    ``2CH(E/B + C/B + 13L)``, where one block of codewords in B has its turn (``learned/rebuild_schedule.py``). The
    first two rebuilds of a training are full, ``2CEH``, and every rank makes them alone.

    Source 'experts': every rank makes all rebuilds alone. One takes ``2CEH`` for the lists, and as much for each step
    of k-means: ten steps in the first rebuild, one in each later one.
    """
    sizes = resolve_sizes(config)
    in_full = 2 * config.hidden_size * sizes.num_clusters * config.num_moe_experts
    if config.moe_air_codebook_source == "experts":
        return RebuildFlops(1, num_ranks * (1 + FIRST_LLOYD_STEPS) * in_full, num_ranks * 2 * in_full)
    products = rebuild_products(config.num_moe_experts, sizes.num_clusters, sizes.shortlist_size, on_gpu)
    return RebuildFlops(NUM_FULL_REBUILDS, num_ranks * in_full, 2 * config.hidden_size * products)


def of_rebuilds(config: TransformerConfig, rebuilds: Rebuilds | None) -> float:
    """FLOPs per token of all rebuilds of AIR's shortlists; 0 for None."""
    if rebuilds is None:
        return 0.0
    interval = config.moe_air_refresh_interval
    one = rebuild_flops(config, rebuilds.on_gpu, rebuilds.num_ranks)
    per_step = one.later / interval
    if rebuilds.num_steps is not None:
        num_first = min(rebuilds.num_steps, one.num_first)
        num_later = num_rebuilds(rebuilds.num_steps, interval) - num_first
        per_step = (num_first * one.first + num_later * one.later) / rebuilds.num_steps
    return per_step / rebuilds.tokens_per_batch


def of_norm(config: TransformerConfig) -> float:
    """FLOPs per token of a norm that whitens; 0 for any other norm.

    They are ``6H^2``: ``2H^2`` each for forward, backward and covariance. With sharded routing the rank of a token
    whitens it forward only, and each of D owners forward and backward: ``(4 + 4D)H^2`` with the covariance. Whitening
    of rank r has two products with ``[H, r]`` in each place of one with ``[H, H]``, so 2r takes the place of one H.
    """
    width = {
        "none": 0,
        "running": 0,
        "whitening": config.hidden_size,
        "low_rank_whitening": 2 * rank_of_whitening(config.hidden_size),
    }[config.moe_router_input_norm]
    products = 2 + 2 * config.expert_model_parallel_size if is_sharded(config) else 3
    return 2.0 * products * config.hidden_size * width
