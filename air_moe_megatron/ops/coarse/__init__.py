"""The coarse stage: the nearest codewords of each token, and the sums that the codebook learns from.

Legend: T tokens, H hidden, C clusters, P probes.
"""

import torch

from air_moe_megatron.ops.backend import use_kernels
from air_moe_megatron.ops.coarse.dense import dense_assign, dense_token_statistics

__all__ = ["NUM_SCALARS", "assign", "assign_with_statistics", "token_statistics"]

NUM_SCALARS = 3
"""Columns of the statistics beside the H of the summed unit vectors: count, sum of cosines, sum of lengths."""


@torch.compiler.disable
@torch.no_grad()
def assign(hidden: torch.Tensor, codewords: torch.Tensor, num_probes: int, allowed: torch.Tensor | None = None):
    """Find the codewords nearest in angle to each token.

    The token's length does not change the order of ``<h, c>`` over codewords, so tokens are not normalised.

    Args:
        hidden: [T, H], any float dtype.
        codewords: [C, H] fp32, unit rows.
        num_probes: codewords per token.
        allowed: [C] bool or None; a codeword that is not allowed is never chosen.
    Returns:
        [T, P] int64, nearest first.

    Example: hidden [[0, 3]], codewords [[1, 0], [0, 1]], one probe gives [[1]].
    """
    if use_kernels("coarse", hidden, codewords, num_probes=num_probes):
        from air_moe_megatron.ops.coarse.kernels import assign_tokens

        return assign_tokens(hidden, codewords, num_probes, allowed)
    return dense_assign(hidden, codewords, num_probes, allowed)


@torch.compiler.disable
@torch.no_grad()
def token_statistics(hidden, codewords, assignments, keep=None):
    """Sum what the update needs over the tokens of each codeword, in the order of the tokens: equal bits in every run,
    and on ranks that do not communicate.

    Args:
        hidden: [T, H], any float dtype.
        codewords: [C, H] fp32, unit rows.
        assignments: [T] int64, nearest codeword.
        keep: [T] bool or None; tokens that count (padding does not).
    Returns:
        [C, H + 3] fp32: sum of unit tokens, count, sum of cosines to the codeword, sum of lengths ``|h|``. Right for
        every finite length; one above 2^96 is summed as 2^96, and a token of zeros counts nothing. A token that is not
        finite makes its codeword's row not finite, which is how the update finds out.

    Example: hidden [[0, 2]], codewords [[1, 0], [0, 1]], assignments [1] gives [[0, 0, 0, 0, 0], [0, 1, 1, 1, 2]].
    """
    if use_kernels("coarse", hidden, codewords):
        from air_moe_megatron.ops.coarse.kernels import token_statistics_sorted

        return token_statistics_sorted(hidden, codewords, assignments, keep)
    return dense_token_statistics(hidden, codewords, assignments, keep)


@torch.compiler.disable
@torch.no_grad()
def assign_with_statistics(hidden, codewords, num_probes, allowed=None, keep=None):
    """Find the codewords of each token, and sum what the update needs over the tokens of the nearest.

    One pass over the tokens on a GPU; there the sums are atomic additions, unless torch's deterministic algorithms
    are on.

    Args:
        hidden, codewords, num_probes, allowed: as :func:`assign`.
        keep: [T] bool or None; tokens that count (padding does not).
    Returns:
        [T, P] int64 as :func:`assign`; [C, H + 3] fp32 as :func:`token_statistics`.

    Example: hidden [[0, 2]], codewords [[1, 0], [0, 1]], one probe gives [[1]] and [[0, 0, 0, 0, 0], [0, 1, 1, 1, 2]].
    """
    if use_kernels("coarse", hidden, codewords, num_probes=num_probes):
        from air_moe_megatron.ops.coarse import kernels

        deterministic = torch.are_deterministic_algorithms_enabled()
        return kernels.assign_with_statistics(hidden, codewords, num_probes, allowed, keep, deterministic)
    assignments = dense_assign(hidden, codewords, num_probes, allowed)
    return assignments, dense_token_statistics(hidden, codewords, assignments[:, 0], keep)
