"""What a launch of kernels needs: sizes of blocks, and contiguous tensors."""

import torch


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
