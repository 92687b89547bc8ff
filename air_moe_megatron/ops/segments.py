"""Segments: items sorted by group, so that each group is one contiguous run.

Legend: N items, Z segments; others as in ``ops/__init__.py``.
"""

import torch


def sort_into_segments(ids: torch.Tensor, num_segments: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort items by segment; items of one segment keep their order. Does not wait for the device.

    Args:
        ids: [N] int64, segment of each item. An item with a negative id, or one of Z or more, is in no segment; it
            comes first or last.
        num_segments: Z.
    Returns:
        [N] int64 items, sorted; [Z + 1] int64 position of each segment's first item, and the end of the last segment.

    Example: ids [1, 0, 1] of 2 segments give [1, 0, 2] and [0, 1, 3].
    """
    sorted_ids, order = ids.sort(stable=True)
    return order, torch.searchsorted(sorted_ids, torch.arange(num_segments + 1, device=ids.device))
