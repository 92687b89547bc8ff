"""Segments: items sorted by what they belong to, cut into the blocks that one program or product takes.

Legend: N items, Z segments; others as in ``ops/__init__.py``.
"""

import torch


def sort_into_segments(ids: torch.Tensor, num_segments: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort items by segment, those of one segment in their order. Does not wait for the device.

    Args:
        ids: [N] int64, segment of each item; an item of a segment beyond the last is in none.
        num_segments: Z.
    Returns:
        [N] int64 items, sorted; [Z + 1] int64 slot of each segment's first; the last is where the last segment ends.

    Example: ids [1, 0, 1] of 2 segments give [1, 0, 2] and [0, 1, 3].
    """
    sorted_ids, order = ids.sort(stable=True)
    return order, torch.searchsorted(sorted_ids, torch.arange(num_segments + 1, device=ids.device))


def segment_blocks(first: torch.Tensor, num_items: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut segments of consecutive items into blocks, without waiting for the device.

    There are as many blocks as ``num_items`` items in Z segments can need at most: with n segments in use, each but for
    its last block full, that is ``(num_items + (block_size - 1) * n) / block_size``.

    Args:
        first: [Z + 1] int64, first item of each segment; the last is where the last segment ends. Z is at least 1.
        num_items: items at most; with ``block_size`` at least as many, each segment in use is one block.
        block_size: items of a block.
    Returns:
        [B] int64 segment of each block, Z where there is no block; [B] int64 first item of each block.

    Example: first [0, 3, 3, 4], 4 items, blocks of 2: segments [0, 0, 2], starts [0, 2, 3].
    """
    num_segments = first.numel() - 1
    num_used = min(num_segments, num_items)
    num_blocks = (num_items + (block_size - 1) * num_used) // block_size
    blocks = (first.diff() + block_size - 1) // block_size
    ends = blocks.cumsum(0)
    indices = torch.arange(num_blocks, device=first.device)
    segments = torch.searchsorted(ends, indices, right=True)
    near = segments.clamp(max=num_segments - 1)
    return segments, first[near] + (indices - (ends - blocks)[near]) * block_size


def block_of(size: int, largest: int) -> int:
    """Power of two for a matrix product over ``size`` elements: 16, the least of one, to ``largest``."""
    return min(largest, max(16, next_power_of_2(size)))


def block_rows_of(num_items: int, num_segments: int) -> int:
    """Items of a block for a matrix product: about those of a segment, from 16 to 64."""
    return block_of(num_items // max(1, min(num_items, num_segments)), 64)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(0, size - 1).bit_length()


def contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as kernels address them, None left alone."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
