"""The memory of what an AIR router learns without gradients, counted from its modules without making them."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config import resolve_sizes
from air_moe_megatron.learned.codebook import Codebook
from air_moe_megatron.learned.index import ShortlistIndex
from air_moe_megatron.routers.base import INPUT_NORMS


def learned_bytes(config: TransformerConfig, shards: int = 1) -> tuple[dict[str, int], int]:
    """Bytes per rank of the state that one layer learns without gradients, and of its statistics.

    The state is counted by purpose. Every rank holds codebook and input norm, their statistics, and two counters for
    each of all experts. The statistics are all-reduced.

    Args:
        config: of a model with AIR routers.
        shards: number of ranks over which the lists are sharded.
    Returns:
        bytes by purpose; bytes of the statistics, which are also part of the first.
    """
    sizes, norm = resolve_sizes(config), INPUT_NORMS[config.moe_router_input_norm]
    with torch.device("meta"):
        learners = [Codebook(sizes.num_clusters, config.hidden_size, config.moe_air_codebook_ema)]
        learners += [] if norm is None else [norm(config.hidden_size)]
        index = ShortlistIndex(
            sizes.num_experts // shards,
            sizes.num_clusters,
            sizes.shortlist_size // shards,
            source=config.moe_air_codebook_source,
            refresh_interval=config.moe_air_refresh_interval,
        )
    statistics = sum(learner.statistics.nbytes for learner in learners)
    buffers = sum(buffer.nbytes for learner in learners for buffer in learner.buffers())
    lists = sum(buffer.nbytes for buffer in index.buffers()) + 2 * torch.int64.itemsize * sizes.num_experts
    return {"codebooks and input norms": buffers + statistics, "lists": lists}, statistics
