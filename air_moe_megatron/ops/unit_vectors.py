"""Lengths and directions of rows, correct for every finite length: rows are scaled before they are squared.

Squares of fp32 numbers below 1e-23 or above 1e19 leave fp32's range. The scale is a power of two, so multiplying by it
does not round. It is 1 for ordinary rows, whose bits therefore do not change.
"""

import torch

LONGEST = 2.0**96
"""Cap on a row's length in a sum of lengths, about 8e28, so that the sum over 2^31 rows stays finite."""

# A row whose largest entry is below SMALL or above LARGE is multiplied by GROW or SHRINK. Then the square of its
# largest entry, and sums of 2^24 squares, are normal fp32 numbers.
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
        [..., H] fp32; zero for a row of zeros, and with a NaN in it for a row that is not finite.

    Example: [[3e-30, 4e-30], [0, 0]] gives [[0.6, 0.8], [0, 0]].
    """
    rows, _ = scale_rows(rows)
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return torch.where(norms == 0.0, 0.0, rows / norms)
