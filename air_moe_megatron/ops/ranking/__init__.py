"""The experts that score highest at each codeword, and the codeword at which each expert scores highest.

Legend: H hidden, E experts, C clusters, L shortlist.
"""

from dataclasses import dataclass

import torch

from air_moe_megatron.ops.backend import use_kernels
from air_moe_megatron.ops.ranking.streamed import streamed_rank_experts

__all__ = ["Ranking", "rank_experts"]


@dataclass(frozen=True)
class Ranking:
    """What one pass over all experts finds out."""

    lists: torch.Tensor  # [C, L] int64, the experts that score highest at each codeword, best first
    nearest: torch.Tensor  # [E] int64, the codeword at which each expert scores highest
    score: torch.Tensor  # [E] fp32, that score


@torch.compiler.disable
@torch.no_grad()
def rank_experts(
    codewords: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist_size: int,
    score_function: str | None = None,
    expert_bias: torch.Tensor | None = None,
) -> Ranking:
    """Rank the experts at each codeword by ``scale_c * <w_e, c> + b_e``, and the codewords at each expert.

    With a score function the experts are ranked by ``function(that score) + expert_bias_e``, as the top-k of a router
    with an expert bias ranks them. The experts are streamed: no [C, E] tensor is held for large E.

    Args:
        codewords: [C, H] fp32, unit rows.
        scale: [C] fp32, typical ``<h, c>`` of a codeword's tokens; matters only beside a bias or a score function.
        weight: [E, H] expert centres, any float dtype.
        bias: [E] or None.
        shortlist_size: experts per list.
        score_function: None, "sigmoid" or "sqrtsoftplus".
        expert_bias: [E]; with a score function only.
    Raises:
        ValueError: if only one of score function and expert bias is given.

    Example: codewords [[1, 0], [0, 1]], weight [[1, 0], [0, 3], [2, 2]], L = 2 gives the lists [[2, 0], [1, 2]], the
    nearest codewords [0, 1, 0] and the scores [1, 3, 2].
    """
    if (score_function is None) != (expert_bias is None):
        raise ValueError(f"score_function ({score_function!r}) and expert_bias must be given together or not at all")
    ranked = (codewords, scale, weight, bias, shortlist_size, score_function, expert_bias)
    if use_kernels("ranking", codewords, weight):
        from air_moe_megatron.ops.ranking.kernels import rank_experts_kernel

        return Ranking(*rank_experts_kernel(*ranked))
    return Ranking(*streamed_rank_experts(*ranked))
