"""Lengths and directions of rows, right for every finite length: rows are scaled before they are squared.

Squares of fp32 numbers below 1e-23 or above 1e19 leave fp32's range. The scale is a power of two, and 1 for ordinary
rows: multiplying by it rounds nothing, and ordinary rows give the same bits as without it.
"""

import torch

LONGEST = 2.0**96
"""What a longer row counts as in a sum of lengths: about 8e28, so that the sum of 2^31 rows stays finite."""

# A row whose largest entry is outside of (SMALL, LARGE) is multiplied by GROW or SHRINK: then squares of its entries,
# and sums of 2^24 of them, are normal fp32 numbers.
SMALL, LARGE = 2.0**-60, 2.0**50
GROW, SHRINK = 2.0**100, 2.0**-100


def scale_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply rows by powers of two such that the squares of their entries can be summed in fp32.

    Args:
        rows: [..., H], any float dtype.
    Returns:
        [..., H] fp32 rows times their scale; [..., 1] fp32 scales: 1, 2^100 or 2^-100.

    Example: [[1e-30, 0]] gives [[1.27, 0]] and [[2^100]].
    """
    rows = rows.float()
    largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=-1, keepdim=True)
    scale = torch.where(largest < SMALL, GROW, torch.where(largest > LARGE, SHRINK, 1.0)).to(rows.dtype)
    return rows * scale, scale


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """Divide rows by their lengths.

    Args:
        rows: [..., H], any float dtype.
    Returns:
        [..., H] fp32: zero for a row of zeros, NaN somewhere in a row that is not finite.

    Example: [[3e-30, 4e-30], [0, 0]] gives [[0.6, 0.8], [0, 0]].
    """
    rows, _ = scale_rows(rows)
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return torch.where(norms == 0.0, 0.0, rows / norms)
