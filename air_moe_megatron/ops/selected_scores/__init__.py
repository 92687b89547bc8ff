"""Scores of the experts that a token has selected, with their gradients."""

import torch

from air_moe_megatron.ops.backend import use_kernels
from air_moe_megatron.ops.score_functions import validate_shapes
from air_moe_megatron.ops.selected_scores import eager

__all__ = ["selected_scores"]


@torch.compiler.disable
def selected_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    scores: torch.Tensor,
) -> torch.Tensor:
    """Make scores that are already computed differentiable, with the gradients of ``<w_e, h> + b_e``.

    If only the selected scores reach the loss, the gradients need K rows per token instead of a whole shortlist:
    ``grad_h = sum_k g_k w_k`` and ``grad_w_e = sum over the tokens that selected e of g h``. Differentiable in hidden,
    weight and bias. The weight's gradient is added to ``weight.main_grad`` if it exists (``ops/weight_gradient.py``).
    Does not wait for the device.

    Args:
        hidden: [T, H], tokens.
        weight: [E, H], expert centers.
        bias: [E] or None.
        ids: [T, K] integer expert ids, distinct in a row; -1 in an empty slot, which gets no gradient.
        scores: [T, K] scores of these experts; their dtype is that of the arithmetic and of the result.
    Returns:
        [T, K] the same scores, differentiable.
    Raises:
        ValueError: if the shapes do not fit together.

    Example: hidden [[1, 2]], ids [[5]], a loss whose gradient at the score is 3 gives hidden the gradient 3 w_5 and
    row 5 of weight the gradient [3, 6].
    """
    validate_shapes(hidden, weight, bias)
    if ids.shape != scores.shape or ids.dim() != 2 or ids.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"ids {tuple(ids.shape)} and scores {tuple(scores.shape)} must both be [T, K] with T = {hidden.shape[0]}"
        )
    if use_kernels("selected_scores", hidden, weight, dtype=scores.dtype):
        from air_moe_megatron.ops.selected_scores import kernels

        return kernels.selected_scores(hidden, weight, bias, ids, scores)
    return eager.selected_scores(hidden, weight, bias, ids, scores)
