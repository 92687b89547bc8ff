"""The coarse stage with torch operations: similarities of a block of tokens at a time, sums by ``embedding_bag``."""

import torch
from torch.nn.functional import embedding_bag

from air_moe_megatron.ops.segments import sort_into_segments
from air_moe_megatron.ops.unit_vectors import LONGEST, scale_rows

_BLOCK_SIZE = 1 << 22  # similarities in memory at once; at C = 4,096 a quarter faster than all of 16,384 tokens


def assign(
    hidden: torch.Tensor, codewords: torch.Tensor, num_probes: int, allowed: torch.Tensor | None
) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.coarse.assign`."""
    blocks = hidden.split(max(1, _BLOCK_SIZE // codewords.shape[0]))
    return torch.cat([_assign_block(block, codewords, num_probes, allowed) for block in blocks])


def _assign_block(
    hidden: torch.Tensor, codewords: torch.Tensor, num_probes: int, allowed: torch.Tensor | None
) -> torch.Tensor:
    similarity = scale_rows(hidden)[0] @ codewords.t()
    if allowed is not None:
        similarity = similarity.masked_fill(~allowed, float("-inf"))
    if num_probes == 1:
        return similarity.argmax(dim=1, keepdim=True)
    return similarity.topk(num_probes, dim=1).indices


def token_statistics(
    hidden: torch.Tensor, codewords: torch.Tensor, nearest: torch.Tensor, padding_mask: torch.Tensor | None
) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.coarse.token_statistics`. Waits for the device if ``padding_mask`` is given."""
    if padding_mask is not None:
        is_counted = ~padding_mask
        hidden, nearest = hidden[is_counted], nearest[is_counted]
    scaled, scale = scale_rows(hidden)
    norms = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    counts = (norms != 0.0).float()  # a token of zeros has no direction and is not counted
    weights = torch.where(norms == 0.0, 0.0, 1.0 / norms)
    scalars = torch.cat((counts, (norms / scale).clamp(max=LONGEST)), dim=1)
    order, first = sort_into_segments(nearest, codewords.shape[0])
    first = first[:-1]
    sums = embedding_bag(order, scaled, first, per_sample_weights=weights[order, 0], mode="sum")
    cosines = (sums * codewords).sum(dim=1)  # <sum of unit tokens, c> is the sum of their cosines
    counts, lengths = embedding_bag(order, scalars, first, mode="sum").unbind(dim=1)
    return torch.cat((sums, torch.stack((counts, cosines, lengths), dim=1)), dim=1)


def assign_with_statistics(
    hidden: torch.Tensor,
    codewords: torch.Tensor,
    num_probes: int,
    allowed: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`air_moe_megatron.ops.coarse.assign_with_statistics`."""
    probes = assign(hidden, codewords, num_probes, allowed)
    return probes, token_statistics(hidden, codewords, probes[:, 0], padding_mask)
