"""Ground truth of the pair products: gather a weight row for every pair."""

import torch


def naive_pair_dots(hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[N] dot products of row ``rows[n]`` of hidden [R, H] and row ``ids[n]`` of weight [V, H]."""
    return (hidden[rows] * weight[ids]).sum(dim=1)


def naive_pair_sums(
    values: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """[R, H]: row r sums ``values[n] * weight[ids[n]]`` over the pairs n of r."""
    out = torch.zeros(num_rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    return out.index_add(0, rows, values.unsqueeze(1) * weight[ids])
