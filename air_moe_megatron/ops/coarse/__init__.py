"""The coarse stage: the nearest codewords of each token, and the sums that the codebook learns from."""

import torch

from air_moe_megatron.ops.backend import use_kernels
from air_moe_megatron.ops.coarse import eager

__all__ = ["NUM_SCALARS", "assign", "assign_with_statistics", "token_statistics"]

NUM_SCALARS = 3
"""Columns of the statistics after the H of the summed unit vectors: count, sum of cosines, sum of lengths."""


@torch.compiler.disable
@torch.no_grad()
def assign(
    hidden: torch.Tensor, codewords: torch.Tensor, num_probes: int, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """Find the codewords nearest in angle to each token, without [T, C] in memory.

    A token's length does not change the order of ``<h, c>`` over codewords, so tokens are not normalized. A token that
    is not finite gets some of the C codewords; which ones is undefined. Does not wait for the device.

    Args:
        hidden: [T, H], any float dtype.
        codewords: [C, H] fp32, unit rows.
        num_probes: P, codewords per token, from 1 to C.
        allowed: [C] bool or None; others are chosen only if fewer than P codewords are allowed.
    Returns:
        [T, P] int64, nearest first. If two codewords are equally near, the kernels take the lower id.
    Raises:
        ValueError: if shapes or dtypes do not fit.

    Example: hidden [[0, 3]], codewords [[1, 0], [0, 1]], one probe gives [[1]].
    """
    _validate(hidden, codewords, num_probes, allowed, None)
    if use_kernels("coarse", hidden, codewords, num_probes=num_probes):
        from air_moe_megatron.ops.coarse import kernels

        return kernels.assign(hidden, codewords, num_probes, allowed)
    return eager.assign(hidden, codewords, num_probes, allowed)


@torch.compiler.disable
@torch.no_grad()
def token_statistics(
    hidden: torch.Tensor, codewords: torch.Tensor, nearest: torch.Tensor, padding_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum the statistics of the codebook update over the tokens of each codeword, in a deterministic order.

    The order depends only on the tokens. So the bits are equal in every run, and on ranks that do not communicate. The
    torch version waits for the device if ``padding_mask`` is given.

    Args:
        hidden: [T, H], any float dtype.
        codewords: [C, H] fp32, unit rows.
        nearest: [T] int64, nearest codeword of each token.
        padding_mask: [T] bool, True for padding, which does not count; None if there is none.
    Returns:
        [C, H + 3] fp32: sum of unit tokens, count, sum of cosines to the codeword, sum of lengths ``|h|``. Correct for
        every finite length, except that one above 2^96 is summed as 2^96. A token of zeros is not counted. A token that
        is not finite makes its codeword's row not finite, so that the update can detect it.
    Raises:
        ValueError: if shapes or dtypes do not fit.

    Example: hidden [[0, 2]], codewords [[1, 0], [0, 1]], nearest [1] gives [[0, 0, 0, 0, 0], [0, 1, 1, 1, 2]].
    """
    _validate(hidden, codewords, 1, None, padding_mask)
    if nearest.shape != hidden.shape[:1]:
        raise ValueError(f"nearest {tuple(nearest.shape)} must be [T] with T = {hidden.shape[0]}")
    if use_kernels("coarse", hidden, codewords):
        from air_moe_megatron.ops.coarse import kernels

        return kernels.token_statistics(hidden, codewords, nearest, padding_mask)
    return eager.token_statistics(hidden, codewords, nearest, padding_mask)


@torch.compiler.disable
@torch.no_grad()
def assign_with_statistics(
    hidden: torch.Tensor,
    codewords: torch.Tensor,
    num_probes: int,
    allowed: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the codewords of each token, and sum the statistics of the tokens nearest to each codeword.

    On a GPU this is one pass over the tokens, with atomic additions, unless torch's deterministic algorithms are on.

    Args:
        hidden, codewords, num_probes, allowed: as :func:`assign`.
        padding_mask: [T] bool, True for padding, which the statistics leave out; None if there is none. All tokens are
            assigned.
    Returns:
        [T, P] int64 as :func:`assign`; [C, H + 3] fp32 as :func:`token_statistics`.
    Raises:
        ValueError: if shapes or dtypes do not fit.

    Example: hidden [[0, 2]], codewords [[1, 0], [0, 1]], one probe gives [[1]] and [[0, 0, 0, 0, 0], [0, 1, 1, 1, 2]].
    """
    _validate(hidden, codewords, num_probes, allowed, padding_mask)
    if use_kernels("coarse", hidden, codewords, num_probes=num_probes):
        from air_moe_megatron.ops.coarse import kernels

        deterministic = torch.are_deterministic_algorithms_enabled()
        return kernels.assign_with_statistics(hidden, codewords, num_probes, allowed, padding_mask, deterministic)
    return eager.assign_with_statistics(hidden, codewords, num_probes, allowed, padding_mask)


def _validate(
    hidden: torch.Tensor,
    codewords: torch.Tensor,
    num_probes: int,
    allowed: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
) -> None:
    if hidden.dim() != 2 or codewords.dim() != 2 or hidden.shape[1] != codewords.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and codewords {tuple(codewords.shape)} must be [T, H] and [C, H] "
            "with the same H"
        )
    if codewords.dtype != torch.float32:
        raise ValueError(f"codewords ({codewords.dtype}) must be fp32")
    if not 1 <= num_probes <= codewords.shape[0]:
        raise ValueError(f"num_probes ({num_probes}) must be from 1 to C = {codewords.shape[0]}")
    for name, mask, size in (("allowed", allowed, codewords.shape[0]), ("padding_mask", padding_mask, hidden.shape[0])):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (size,)):
            raise ValueError(f"{name} {tuple(mask.shape)} ({mask.dtype}) must be [{size}] bool")
