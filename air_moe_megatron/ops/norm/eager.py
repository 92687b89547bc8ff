"""The norm in torch operations."""

import torch

from air_moe_megatron.ops.dtypes import at_least_fp32

# Numbers above LARGE are multiplied by SCALE before they are squared, and summed separately: so no square overflows.
LARGE, SCALE = 2.0**40, 2.0**-80


def normalize(hidden: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.norm.normalize`."""
    wide = at_least_fp32(hidden.dtype)
    return ((hidden.to(wide) - mean.to(wide)) * scale.to(wide)).to(hidden.dtype)


def batch_sums(hidden: torch.Tensor, mean: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.norm.batch_sums`."""
    centered = hidden.to(at_least_fp32(hidden.dtype)) - mean
    if padding_mask is not None:
        centered = centered.masked_fill(padding_mask.unsqueeze(1), 0.0)
    is_large = centered.abs() > LARGE
    small = torch.where(is_large, 0.0, centered).square().sum(dim=0)
    large = torch.where(is_large, centered * SCALE, 0.0).square().sum(dim=0)
    return torch.cat((centered.sum(dim=0), small, large, count_of(centered, padding_mask)))


def count_of(hidden: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """[1] number of tokens that are not padding, in fp32 or wider."""
    wide = at_least_fp32(hidden.dtype)
    if padding_mask is None:
        return hidden.new_full((1,), hidden.shape[0], dtype=wide)
    return (~padding_mask).sum().to(wide).view(1)
