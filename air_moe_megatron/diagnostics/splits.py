"""A token that is split at a codeword, and bounds on what its residual adds to scores. Proofs are in docs/theory.md.

A token h is split at a codeword c: ``h = s*c + r`` with r orthogonal to c. The scores at the *anchor* ``s*c`` follow
from those at c, and what the *residual* r adds to them is bounded.

Legend: as in ``ops/__init__.py``.
"""

import math
from typing import NamedTuple

import torch

from air_moe_megatron.process_groups import group_size, sum_over_ranks

_UNIT_ROUNDOFF = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}  # by torch's float32 matmul precision
CHUNK = 4096  # experts whose exact scores are held at a time
BOUND_SLACK = 1e-9  # margin of fp64 log masses: far above their rounding, far below that of fp32 scores


class Split(NamedTuple):
    """Tokens, each split along one direction: ``h = s*c + r``."""

    along: torch.Tensor  # [T, 1] fp64, s
    residual: torch.Tensor  # [T, H] fp64, r
    distance: torch.Tensor  # [T, 1] fp64, |r|


def split(hidden: torch.Tensor, directions: torch.Tensor) -> Split:
    """Split tokens [T, H] into their parts along directions [T, H] of any length and orthogonal to them.

    Example: the token [3, 4] and the direction [2, 0]: s = 3, r = [0, 4].
    """
    unit = torch.nn.functional.normalize(directions.double(), dim=1, eps=1e-300)
    hidden = hidden.double()
    along = (hidden * unit).sum(dim=1, keepdim=True)
    residual = hidden - along * unit
    return Split(along, residual, residual.norm(dim=1, keepdim=True))


def relative_rounding(hidden_size: int) -> float:
    """Bound on the rounding error of a computed dot product <h, w> of fp32 vectors, relative to |h|*|w|.

    This is the classical bound gamma_n = n*u / (1 - n*u), valid for any order of summation. n = H + 16 leaves room for
    a bias, a scale and the rounding of a direction. u is the unit roundoff of torch's float32 matmul precision.
    Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.

    Example: H = 128 in full fp32 precision gives 8.6e-6.
    """
    total = (hidden_size + 16) * _UNIT_ROUNDOFF[torch.get_float32_matmul_precision()]
    return total / (1.0 - total) if total < 0.5 else math.inf


def orthogonal_lengths(squares: torch.Tensor, projections: torch.Tensor, error: torch.Tensor | float) -> torch.Tensor:
    """Upper bounds on the lengths of vectors' parts orthogonal to a unit vector, ``sqrt(|x|^2 - <x, c>^2)``.

    Args:
        squares: upper bounds on |x|^2.
        projections: <x, c>, each off by no more than ``error``.

    Example: x = [3, 4] and c = [1, 0]: 4.
    """
    certain = (projections.abs() - error).clamp(min=0)
    return (squares - certain.square()).clamp(min=0).sqrt()


def bennett(limit: torch.Tensor) -> torch.Tensor:
    """``phi(X) = (exp(X) - 1 - X) / X^2`` in fp64 for X >= 0: ``exp(v) <= 1 + v + v^2 * phi(X)`` for all v <= X.

    Example: phi(0) = 0.5, phi(1) = e - 2.
    """
    small = limit < 1e-3
    safe = torch.where(small, 1.0, limit)
    exact = (torch.expm1(safe) - safe) / safe.square()
    return torch.where(small, 0.5 + limit / 6.0 + limit.square() / 20.0, exact)


def log_growth(value: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """``log(1 + v + v^2 * phi(X))``, which is at least v for v <= X; X itself where phi(X) is out of range."""
    in_range = limit < 300.0
    safe = torch.where(in_range, limit, 0.0)
    value = torch.where(in_range, value, 0.0)
    growth = torch.log(1.0 + value + value.square() * bennett(safe))
    return torch.where(in_range, growth, limit)


class Spread(NamedTuple):
    """Location and extent of a router's expert centers."""

    origin: torch.Tensor  # [H] fp32, a point near their mean
    longest: torch.Tensor  # [] fp32, the largest length of a center
    radius: torch.Tensor  # [] fp32, at least the largest distance of a center from ``origin``
    rounding: float  # twice the relative rounding of a product
    largest_bias: torch.Tensor  # [] fp32, the largest absolute value of a bias

    def score_error(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, 1] fp64: bounds on the rounding of any score of tokens [T, H]."""
        return self.rounding * (hidden.double().norm(dim=1, keepdim=True) * self.longest + self.largest_bias)


def spread(
    weight: torch.Tensor, bias: torch.Tensor | None, group: torch.distributed.ProcessGroup | None = None
) -> Spread:
    """Measure centers and their biases, a chunk at a time.

    Communicates over ``group``: an all-reduce of H fp32 numbers and one (maximum) of three.

    Args:
        weight: [E, H]; with a group [E / D, H], of this rank's experts.
        bias: [E] or [E / D], of the same experts, or None.
        group: the D ranks that hold the other centers; None means that ``weight`` has all of them.
    """
    rounding = 2.0 * relative_rounding(weight.shape[1])
    origin = sum_over_ranks(weight.mean(dim=0, dtype=torch.float32), group) / group_size(group)
    longest = radius = origin.new_zeros(())
    for chunk in weight.split(CHUNK):
        longest = torch.maximum(longest, chunk.float().norm(dim=1).amax())
        radius = torch.maximum(radius, (chunk.float() - origin).norm(dim=1).amax())
    largest_bias = origin.new_zeros(()) if bias is None else bias.abs().amax().float()
    if group_size(group) > 1:
        largest = torch.stack((longest, radius, largest_bias))
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
        longest, radius, largest_bias = largest.unbind()
    return Spread(origin, longest * (1.0 + rounding), radius * (1.0 + rounding), rounding, largest_bias)
