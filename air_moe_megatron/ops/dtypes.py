"""The dtype of sums and other arithmetic that would lose digits in the dtype of its input."""

import functools

import torch


def at_least_fp32(*dtypes: torch.dtype) -> torch.dtype:
    """fp32, or the widest of the dtypes if that is wider.

    Example: of bf16 it is fp32, of bf16 and fp64 it is fp64.
    """
    return functools.reduce(torch.promote_types, dtypes, torch.float32)
