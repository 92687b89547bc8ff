"""What the operations on scores ``z_e = <w_e, h> + b_e`` share: the checks of their arguments, and score functions.

Megatron combines a score function with an expert bias: experts rank by ``function(score_e) + expert_bias_e``.
"""

from collections.abc import Callable

import torch

SCORE_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda scores: torch.nn.functional.softplus(scores).sqrt(),
}


def selection_scores(
    scores: torch.Tensor, score_function: str | None, expert_bias: torch.Tensor | None
) -> torch.Tensor:
    """The values that experts are selected by: scores, or ``function(score) + expert_bias`` (biases broadcast)."""
    return scores if score_function is None else SCORE_FUNCTIONS[score_function](scores) + expert_bias


def validate_expert_bias(score_function: str | None, expert_bias: torch.Tensor | None, num_experts: int) -> None:
    """Check that a score function and an expert bias are given together or not at all.

    Raises:
        ValueError: if only one is given, the function is unknown, or the bias is not [E].
    """
    if score_function is not None and score_function not in SCORE_FUNCTIONS:
        raise ValueError(f"score_function ({score_function!r}) must be None or one of {tuple(SCORE_FUNCTIONS)}")
    if (score_function is None) != (expert_bias is None):
        raise ValueError(
            f"score_function ({score_function!r}) and expert_bias "
            f"({None if expert_bias is None else tuple(expert_bias.shape)}) must be given together or not at all"
        )
    if expert_bias is not None and expert_bias.shape != (num_experts,):
        raise ValueError(f"expert_bias {tuple(expert_bias.shape)} must be [E] with E = {num_experts}")


def validate_shapes(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Check that tokens can be scored against expert centers.

    Raises:
        ValueError: if hidden is not [T, H], weight is not [E, H], or the bias is neither [E] nor None.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [T, H] and [E, H] with the same H"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [E] with E = {weight.shape[0]}")
