"""The experts that score highest at each codeword, and the codeword at which each expert scores highest."""

from dataclasses import dataclass

import torch

from air_moe_megatron.ops.backend import use_kernels
from air_moe_megatron.ops.ranking import eager
from air_moe_megatron.ops.score_functions import validate_expert_bias

__all__ = ["CandidateRanking", "Ranking", "kernel_bytes", "rank_candidates", "rank_experts"]

GROUP_SIZE = 32  # experts with consecutive ids whose best score the kernels keep
MAX_CANDIDATE_KEYS = 2**26  # of the candidates of several codewords: 512 MiB


def kernel_bytes(num_clusters: int, num_experts: int, shortlist_size: int) -> int:
    """Bytes of the keys that the kernels of :func:`rank_experts` hold, beside its arguments and results.

    Example: C = 4, E = 64 and L = 8 have the keys of 4 * 2 groups and of 4 * 2 * 32 candidates: 8 * 264 = 2112 bytes.
    """
    num_groups = -(-num_experts // GROUP_SIZE)
    per_codeword = min(shortlist_size, num_groups) * GROUP_SIZE
    num_codewords = min(num_clusters, max(MAX_CANDIDATE_KEYS // per_codeword, 1))
    return torch.int64.itemsize * (num_clusters * num_groups + num_codewords * per_codeword)


@dataclass(frozen=True)
class Ranking:
    """Result of one pass over all experts."""

    lists: torch.Tensor  # [C, L] int64, the experts that score highest at each codeword, best first
    nearest: torch.Tensor  # [E] int64, the codeword at which each expert scores highest
    score: torch.Tensor  # [E] fp32, that score


@dataclass(frozen=True)
class CandidateRanking:
    """Result of ranking some candidates at each codeword."""

    lists: torch.Tensor  # [n, L] int64, the candidates that score highest at each codeword, best first
    candidates: torch.Tensor  # [n, m] int64, the candidates of each codeword, sorted by id
    scores: torch.Tensor  # [n, m] fp32, scores of ``candidates``; -inf for a repeated candidate


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
    """Rank the experts at each codeword by ``scale_c * <w_e, c> + b_e``, and find each expert's best codeword.

    With a score function the experts are ranked by ``function(score) + expert_bias_e``, like the top-k of a router
    with an expert bias. The experts are streamed, so that no [C, E] tensor is held for large E. The torch version waits
    for the device. In the kernels the lower id wins a tie, and NaN scores count as infinite.

    Args:
        codewords: [C, H] fp32, unit rows.
        scale: [C] fp32, typical ``<h, c>`` of a codeword's tokens; used only with a bias or a score function.
        weight: [E, H] expert centers, any float dtype.
        bias: [E] or None.
        shortlist_size: L, experts per list, from 1 to E.
        score_function: None, "sigmoid" or "sqrtsoftplus".
        expert_bias: [E]; with a score function only.
    Raises:
        ValueError: if shapes, dtypes or arguments do not fit.

    Example: codewords [[1, 0], [0, 1]], weight [[1, 0], [0, 3], [2, 2]], L = 2 gives the lists [[2, 0], [1, 2]], the
    nearest codewords [0, 1, 0] and the scores [1, 3, 2].
    """
    _validate(codewords, scale, weight, bias, shortlist_size, score_function, expert_bias)
    if use_kernels("ranking", codewords, weight):
        from air_moe_megatron.ops.ranking import kernels

        return Ranking(
            *kernels.rank_experts(codewords, scale, weight, bias, shortlist_size, score_function, expert_bias)
        )
    return Ranking(*eager.rank_experts(codewords, scale, weight, bias, shortlist_size, score_function, expert_bias))


@torch.compiler.disable
@torch.no_grad()
def rank_candidates(
    codewords: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    candidates: torch.Tensor,
    shortlist_size: int,
    score_function: str | None = None,
    expert_bias: torch.Tensor | None = None,
) -> CandidateRanking:
    """Rank each codeword's own candidates, as :func:`rank_experts` ranks all experts.

    Costs ``2 n H m`` FLOPs for n codewords with m candidates each. There are no kernels: on a GPU it gathers centers
    for batched products and ``topk``. Does not wait for the device.

    Args:
        codewords: [n, H] fp32, unit rows.
        scale: [n] fp32.
        weight: [E, H] expert centers, any float dtype.
        bias: [E] or None.
        candidates: [n, m] int64 expert ids, which may repeat; at least L distinct ones per row.
        shortlist_size: L.
        score_function, expert_bias: as :func:`rank_experts` takes them.
    Raises:
        ValueError: if shapes, dtypes or arguments do not fit.

    Example: codewords [[1, 0], [0, 1]], weight [[1, 0], [0, 3], [2, 2]], candidates [[0, 2], [0, 0]] and L = 1 give the
    lists [[2], [0]].
    """
    _validate(codewords, scale, weight, bias, shortlist_size, score_function, expert_bias)
    if candidates.dim() != 2 or candidates.shape[0] != codewords.shape[0] or candidates.shape[1] < shortlist_size:
        raise ValueError(
            f"candidates {tuple(candidates.shape)} must be [n, m] with n = {codewords.shape[0]} codewords and m at "
            f"least shortlist_size ({shortlist_size})"
        )
    return CandidateRanking(
        *eager.rank_candidates(codewords, scale, weight, bias, candidates, shortlist_size, score_function, expert_bias)
    )


def _validate(
    codewords: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist_size: int,
    score_function: str | None,
    expert_bias: torch.Tensor | None,
) -> None:
    if codewords.dim() != 2 or weight.dim() != 2 or codewords.shape[1] != weight.shape[1]:
        raise ValueError(
            f"codewords {tuple(codewords.shape)} and weight {tuple(weight.shape)} must be [C, H] and [E, H] "
            "with the same H"
        )
    if codewords.dtype != torch.float32:
        raise ValueError(f"codewords ({codewords.dtype}) must be fp32")
    if scale.shape != codewords.shape[:1]:
        raise ValueError(f"scale {tuple(scale.shape)} must be [C] with C = {codewords.shape[0]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [E] with E = {weight.shape[0]}")
    validate_expert_bias(score_function, expert_bias, weight.shape[0])
    if not 1 <= shortlist_size <= weight.shape[0]:
        raise ValueError(f"shortlist_size ({shortlist_size}) must be from 1 to E = {weight.shape[0]}")
