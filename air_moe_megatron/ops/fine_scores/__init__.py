"""Exact scores of the experts in each token's shortlists, all of them or the best."""

import torch

from air_moe_megatron.ops.backend import use_kernels
from air_moe_megatron.ops.fine_scores import eager
from air_moe_megatron.ops.selected_scores import selected_scores

__all__ = ["fine_scores", "fine_topk"]


@torch.compiler.disable
def fine_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    assignments: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Score every token against the experts of its codewords' shortlists: ``z_e = <w_e, h> + b_e``.

    Tokens are grouped by codeword, so that each shortlist is one dense tile. Differentiable in hidden, weight and
    bias. With torch operations it waits for the device, for the sizes of the groups.

    Args:
        hidden: [T, H], tokens.
        weight: [E, H], expert centers.
        bias: [E] or None.
        shortlist: [C, L] integer expert ids, distinct in a row; -1 fills the end of a shorter list.
        assignments: [T, P] int64, codewords of each token.
        dtype: of the arithmetic and of the result.
    Returns:
        [T, P, L] scores in ``dtype``; -inf where the shortlist holds -1.
    Raises:
        ValueError: if the shapes do not fit together.

    Example: hidden [[1, 2]], weight [[1, 0], [0, 1], [1, 1]], shortlist [[0, 2]], assignments [[0]] gives [[[1, 3]]].
    """
    _validate(hidden, weight, bias, shortlist, assignments)
    if use_kernels("fine_scores", hidden, weight, dtype=dtype):
        from air_moe_megatron.ops.fine_scores import kernels

        deterministic = torch.are_deterministic_algorithms_enabled()
        return kernels.fine_scores(hidden, weight, bias, shortlist, assignments, dtype, deterministic)
    return eager.fine_scores(hidden, weight, bias, shortlist, assignments, dtype)


@torch.compiler.disable
def fine_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    assignments: torch.Tensor,
    topk: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the experts that score highest in each token's shortlist, without writing the other scores down.

    Differentiable in hidden, weight and bias, for K rows per token (``ops/selected_scores``). With torch operations it
    waits for the device, for the sizes of the groups.

    Args:
        hidden, weight, bias, shortlist, dtype: as :func:`fine_scores`.
        assignments: [T, 1] int64, the codeword of each token.
        topk: K, at least 1; may be more than L.
    Returns:
        [T, K] scores in ``dtype``, in no order, and their [T, K] int32 expert ids; -inf and -1 where a list has fewer.
    Raises:
        ValueError: if the shapes do not fit together.

    Example: hidden [[1, 2]], weight [[1, 0], [0, 1], [1, 1]], shortlist [[0, 2]], assignments [[0]] and K = 1 gives the
    score [[3]] and the id [[2]].
    """
    _validate(hidden, weight, bias, shortlist, assignments)
    if assignments.shape[1] != 1:
        raise ValueError(f"assignments {tuple(assignments.shape)} must be [T, 1]: experts may be in several lists")
    if topk < 1:
        raise ValueError(f"topk ({topk}) must be at least 1")
    if use_kernels("fine_scores", hidden, weight, dtype=dtype, topk=topk):
        from air_moe_megatron.ops.fine_scores import topk_kernels

        scores, ids = topk_kernels.fine_topk(hidden, weight, bias, shortlist, assignments, topk, dtype)
        return scores.to(dtype), ids
    scores, ids = eager.fine_topk(hidden, weight, bias, shortlist, assignments, topk, dtype)
    return selected_scores(hidden, weight, bias, ids, scores), ids


def _validate(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    assignments: torch.Tensor,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [T, H] and [E, H] with the same H"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [E] with E = {weight.shape[0]}")
    if assignments.dim() != 2 or assignments.shape[0] != hidden.shape[0]:
        raise ValueError(f"assignments {tuple(assignments.shape)} must be [T, P] with T = {hidden.shape[0]}")
    if shortlist.dim() != 2:
        raise ValueError(f"shortlist {tuple(shortlist.shape)} must be [C, L]")
