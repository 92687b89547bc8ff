"""Ground truth of the selected scores: gather every selected center, then one product each."""

import torch


def naive_selected_scores(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """[T, K] scores of the experts ``ids``, differentiable by plain autograd; -inf for id -1."""
    rows = ids.clamp(min=0)
    scores = torch.einsum("th,tkh->tk", hidden.to(dtype), weight[rows].to(dtype))
    if bias is not None:
        scores = scores + bias[rows].to(dtype)
    return torch.where(ids < 0, float("-inf"), scores)
