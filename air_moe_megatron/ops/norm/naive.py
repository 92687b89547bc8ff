"""Ground truth of the norm, in fp64: one feature after another."""

import torch

from air_moe_megatron.ops.norm.eager import LARGE, SCALE


def naive_normalize(hidden: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.norm.normalize`, in fp64 and by plain autograd."""
    columns = [(hidden[:, i].double() - mean[i].double()) * scale[i].double() for i in range(hidden.shape[1])]
    return torch.stack(columns, dim=1)


def naive_batch_sums(hidden: torch.Tensor, mean: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.norm.batch_sums`, in fp64."""
    kept = hidden if padding_mask is None else hidden[~padding_mask]
    sums, squares, large_squares = [], [], []
    for feature in range(hidden.shape[1]):
        centered = kept[:, feature].double() - mean[feature].double()
        is_large = centered.abs() > LARGE
        sums.append(centered.sum())
        squares.append(centered[~is_large].square().sum())
        large_squares.append((centered[is_large] * SCALE).square().sum())
    count = torch.tensor(kept.shape[0], dtype=torch.float64, device=hidden.device)
    return torch.stack([*sums, *squares, *large_squares, count])
