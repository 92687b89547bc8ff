"""Exact scores of the experts in each token's shortlists: of all experts, or of the best."""

import torch

from air_moe_megatron.ops.backend import use_kernels
from air_moe_megatron.ops.fine_scores import eager
from air_moe_megatron.ops.score_functions import validate_expert_bias, validate_shapes
from air_moe_megatron.ops.selected_scores import selected_scores

__all__ = ["fine_scores", "fine_topk"]


@torch.compiler.disable
def fine_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    probes: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Score every token against the experts of its codewords' shortlists: ``z_e = <w_e, h> + b_e``.

    Tokens are grouped by codeword, so that each shortlist is one dense product. Differentiable in hidden, weight and
    bias. The torch version waits for the device, to read the sizes of the groups.

    Args:
        hidden: [T, H], tokens.
        weight: [E, H], expert centers.
        bias: [E] or None.
        shortlist: [C, L] integer expert ids, distinct in a row; -1 fills the end of a shorter list.
        probes: [T, P] int64, codewords of each token.
        dtype: dtype of the arithmetic and of the result.
    Returns:
        [T, P, L] scores in ``dtype``; -inf where the shortlist holds -1.
    Raises:
        ValueError: if the shapes do not fit together.

    Example: hidden [[1, 2]], weight [[1, 0], [0, 1], [1, 1]], shortlist [[0, 2]], probes [[0]] gives [[[1, 3]]].
    """
    _validate(hidden, weight, bias, shortlist, probes)
    if use_kernels("fine_scores", hidden, weight, dtype=dtype):
        from air_moe_megatron.ops.fine_scores import kernels

        deterministic = torch.are_deterministic_algorithms_enabled()
        return kernels.fine_scores(hidden, weight, bias, shortlist, probes, dtype, deterministic)
    return eager.fine_scores(hidden, weight, bias, shortlist, probes, dtype)


@torch.compiler.disable
def fine_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    probes: torch.Tensor,
    num_candidates: int,
    dtype: torch.dtype,
    score_function: str | None = None,
    expert_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the distinct experts that score highest in each token's shortlists.

    With an expert bias, experts are chosen by ``function(score_e) + expert_bias_e``, like Megatron's top-k, but their
    plain scores are returned. With one list per token and no expert bias, only the best scores are written to memory
    (by the kernels up to M = 512); otherwise all scores of a block of tokens are. Differentiable in hidden, weight and
    bias. The backward takes M rows per token (``ops/selected_scores``). If M is a large part of the lists, the kernels'
    backward takes whole lists instead, unless torch's deterministic algorithms are on. The torch version waits for the
    device, to read the sizes of groups.

    Args:
        hidden, weight, bias, shortlist, dtype: as :func:`fine_scores`.
        probes: [T, P] int64, the codewords of each token, distinct in a row. An expert in several of their lists
            is one candidate.
        num_candidates: M, at least 1; may exceed P * L.
        score_function, expert_bias: as for :func:`air_moe_megatron.ops.ranking.rank_experts`.
    Returns:
        [T, M] scores in ``dtype``, in no order, and [T, M] int32 expert ids; -inf and -1 if a token has fewer.
    Raises:
        ValueError: if the shapes or arguments do not fit together.

    Example: hidden [[1, 2]], weight [[1, 0], [0, 1], [1, 1]], shortlist [[0, 2], [1, 2]], probes [[0, 1]] and
    M = 2 gives the scores [[3, 2]] and the ids [[2, 1]].
    """
    _validate(hidden, weight, bias, shortlist, probes)
    validate_expert_bias(score_function, expert_bias, weight.shape[0])
    if num_candidates < 1:
        raise ValueError(f"num_candidates ({num_candidates}) must be at least 1")
    inputs = (hidden, weight, bias, shortlist, probes, num_candidates, dtype, score_function, expert_bias)
    if use_kernels("fine_scores", hidden, weight, dtype=dtype, topk=num_candidates, probes=probes.shape[1]):
        from air_moe_megatron.ops.fine_scores import topk_kernels

        return topk_kernels.fine_topk(*inputs, deterministic=torch.are_deterministic_algorithms_enabled())
    scores, ids = eager.fine_topk(*inputs)
    return selected_scores(hidden, weight, bias, ids, scores), ids


def _validate(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    probes: torch.Tensor,
) -> None:
    validate_shapes(hidden, weight, bias)
    if probes.dim() != 2 or probes.shape[0] != hidden.shape[0]:
        raise ValueError(f"probes {tuple(probes.shape)} must be [T, P] with T = {hidden.shape[0]}")
    if shortlist.dim() != 2:
        raise ValueError(f"shortlist {tuple(shortlist.shape)} must be [C, L]")
