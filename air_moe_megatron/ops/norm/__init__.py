"""Normalization of tokens by a mean and a scale per feature, and the sums from which these are learned."""

import torch

from air_moe_megatron.ops.backend import use_kernels
from air_moe_megatron.ops.norm import eager


@torch.compiler.disable
def normalize(hidden: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Compute ``(h - mean) * scale`` in fp32 or wider; differentiable in hidden alone.

    Args:
        hidden: [T, H], any float dtype.
        mean, scale: [H] fp32 or wider.
    Returns:
        [T, H] in the dtype of hidden.
    Raises:
        ValueError: if the shapes do not fit together.

    Example: hidden [[1, 8]], mean [0, 2] and scale [3, 0.5] give [[3, 3]].
    """
    _check(hidden, mean=mean, scale=scale)
    if use_kernels("norm", hidden, mean, scale):
        from air_moe_megatron.ops.norm import kernels

        return kernels.normalize(hidden, mean, scale)
    return eager.normalize(hidden, mean, scale)


@torch.compiler.disable
@torch.no_grad()
def batch_sums(hidden: torch.Tensor, mean: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """Make the sums from which mean and variance of a batch follow.

    Args:
        hidden: [T, H], any float dtype.
        mean: [H], subtracted before the sums are made, so that the variance loses no digits.
        padding_mask: [T] bool, True for padding, or None if there is none.
    Returns:
        [3H + 1] fp32 or wider: [H] sums of ``h - mean``; [H] sums of its squares up to 2^80; [H] sums of larger
        squares, times ``SCALE^2`` = 2^-160; and the number of tokens.
    Raises:
        ValueError: if the shapes do not fit together.

    Example: hidden [[1], [4]] around the mean [1] gives [3, 9, 0, 2].
    """
    _check(hidden, mean=mean)
    if padding_mask is not None and padding_mask.shape != hidden.shape[:1]:
        raise ValueError(f"padding_mask {tuple(padding_mask.shape)} must be [T] with T = {hidden.shape[0]}")
    if use_kernels("norm", hidden, mean):
        from air_moe_megatron.ops.norm import kernels

        return kernels.batch_sums(hidden, mean, padding_mask)
    return eager.batch_sums(hidden, mean, padding_mask)


def moments(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shift of the mean [..., H], variance [..., H] and count [...], in fp64, from :func:`batch_sums` [..., 3H + 1].

    Example: [3, 9, 0, 2] gives the shift 1.5, the variance 4.5 - 2.25 = 2.25 and the count 2.
    """
    sums = sums.double()
    count = sums[..., -1]
    shift, small, large = (sums[..., :-1] / count.clamp_min(1.0).unsqueeze(-1)).chunk(3, dim=-1)
    return shift, (small + large / eager.SCALE**2 - shift.square()).clamp_min(0.0), count


def _check(hidden: torch.Tensor, **vectors: torch.Tensor) -> None:
    for name, vector in vectors.items():
        if hidden.dim() != 2 or vector.shape != hidden.shape[1:]:
            raise ValueError(f"hidden {tuple(hidden.shape)} and {name} {tuple(vector.shape)} must be [T, H] and [H]")
