"""Dtypes of arithmetic: of sums that would lose digits in the dtype of their input, and of a router's scores."""

import functools

import torch

_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def at_least_fp32(*dtypes: torch.dtype) -> torch.dtype:
    """fp32, or the widest of the dtypes if that is wider.

    Example: of bf16 it is fp32, of bf16 and fp64 it is fp64.
    """
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def router_dtype_of(name: str | None, default: torch.dtype) -> torch.dtype:
    """The dtype that ``moe_router_dtype`` names; the default, that of the tokens, if it names none.

    Example: "fp64" is fp64 whatever the default; None with bf16 tokens is bf16.
    """
    return _ROUTER_DTYPES.get(name, default)
