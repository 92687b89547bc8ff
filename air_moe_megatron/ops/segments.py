"""Segments: items sorted by group, so that each group is one contiguous run; and sizes of blocks.

Legend: N items, Z segments; others as in ``ops/__init__.py``.
"""

import torch


def sort_into_segments(ids: torch.Tensor, num_segments: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort items by segment; items of one segment keep their order. Does not wait for the device.

    Args:
        ids: [N] int64, segment of each item; an item with an id of Z or more is in no segment and comes last.
        num_segments: Z.
    Returns:
        [N] int64 items, sorted; [Z + 1] int64 position of each segment's first item, and the end of the last segment.

    Example: ids [1, 0, 1] of 2 segments give [1, 0, 2] and [0, 1, 3].
    """
    sorted_ids, order = ids.sort(stable=True)
    return order, torch.searchsorted(sorted_ids, torch.arange(num_segments + 1, device=ids.device))


def block_of(size: int, largest: int) -> int:
    """Block size for a matrix product over ``size`` elements: a power of two from 16 to ``largest``."""
    return min(largest, max(16, next_power_of_2(size)))


def block_rows_of(num_items: int, num_segments: int) -> int:
    """Number of items per block for a matrix product: about the mean length of a segment, from 16 to 64."""
    return block_of(num_items // max(1, min(num_items, num_segments)), 64)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(0, size - 1).bit_length()


def contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors, made contiguous, as the kernels require; None stays None."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
