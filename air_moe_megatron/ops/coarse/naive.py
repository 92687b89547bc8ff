"""Ground truth of the coarse stage: all similarities in memory, a stable sort, sums by ``index_add_``."""

import torch

from air_moe_megatron.ops.unit_vectors import LONGEST


def naive_assign(
    hidden: torch.Tensor, codewords: torch.Tensor, num_probes: int, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.coarse.assign`, in the codewords' dtype, with [T, C] in memory."""
    similarity = hidden.to(codewords.dtype) @ codewords.t()
    if allowed is not None:
        similarity = similarity.masked_fill(~allowed, float("-inf"))
    return similarity.sort(dim=1, descending=True, stable=True).indices[:, :num_probes]


def naive_token_statistics(
    hidden: torch.Tensor, codewords: torch.Tensor, nearest: torch.Tensor, padding_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """[C, H + 3] sums of unit tokens, counts, sums of cosines and of lengths, in the codewords' dtype.

    Tokens of zeros are not counted. Use fp64 codewords: only there are the squares of all fp32 numbers in range.
    """
    if padding_mask is not None:
        is_counted = ~padding_mask
        hidden, nearest = hidden[is_counted], nearest[is_counted]
    hidden = hidden.to(codewords.dtype)
    lengths = hidden.norm(dim=1, keepdim=True)
    counts = (lengths != 0.0).to(hidden.dtype)
    unit = torch.where(lengths == 0.0, 0.0, hidden / lengths)
    cosines = (unit * codewords[nearest]).sum(dim=1, keepdim=True)
    rows = torch.cat((unit, counts, cosines, lengths.clamp(max=LONGEST)), dim=1)
    return rows.new_zeros(codewords.shape[0], rows.shape[1]).index_add_(0, nearest, rows)


def naive_assign_with_statistics(
    hidden: torch.Tensor,
    codewords: torch.Tensor,
    num_probes: int,
    allowed: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`air_moe_megatron.ops.coarse.assign_with_statistics`."""
    probes = naive_assign(hidden, codewords, num_probes, allowed)
    return probes, naive_token_statistics(hidden, codewords, probes[:, 0], padding_mask)
