"""The choice between Triton kernels and torch; one function decides for all operations.

The environment variable AIR_MOE_BACKEND forces "torch" or "triton". If it is unset or "auto", the kernels run for
tensors that are on a GPU and within their limits. A module of kernels states its limits in ``LIMITS``. The limits are
what the kernels can do, not where they are fastest.
"""

import functools
import importlib
import importlib.util
import logging
import os

import torch

logger = logging.getLogger(__name__)

VARIABLE = "AIR_MOE_BACKEND"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHARED_MEMORY = 160 * 1024
"""Bytes of shared memory per block that the kernels need. An A100 has 163 KiB, an H100 227, and an L40S only 99."""


def use_kernels(operation: str, *tensors: torch.Tensor, dtype: torch.dtype | None = None, **sizes: int) -> bool:
    """Whether the kernels of an operation take these tensors.

    Args:
        operation: folder under ``ops/``.
        tensors: floating-point inputs, all on one device.
        dtype: dtype of the arithmetic, if it is not that of the tensors.
        sizes: the sizes that the kernels limit, by their names in ``LIMITS``.
    Raises:
        ValueError: if AIR_MOE_BACKEND has an unknown value, or is "triton" and the kernels cannot run.
    """
    forced = _forced()
    if forced == "torch":
        return False
    dtypes = [tensor.dtype for tensor in tensors] + ([] if dtype is None else [dtype])
    reason = _reason_against(operation, tensors[0].device, dtypes, sizes)
    if reason is not None:
        if forced == "triton":
            raise ValueError(f"{VARIABLE} ('triton') cannot be used for {operation}: {reason}")
        _say_once(operation, reason)
    return reason is None and (forced == "triton" or tensors[0].is_cuda)


def explain(operation: str, device: torch.device, dtypes: list[torch.dtype], **sizes: int) -> tuple[str, str]:
    """Explain the choice of :func:`use_kernels` for tensors of these dtypes on a device.

    Returns:
        "Triton" or "torch", and the reason.
    Raises:
        ValueError: as :func:`use_kernels`.
    """
    forced = _forced()
    if forced == "torch":
        return "torch", f"{VARIABLE} is 'torch'"
    reason = _reason_against(operation, device, dtypes, sizes)
    if reason is None and forced == "triton":
        return "Triton", f"{VARIABLE} is 'triton'"
    if reason is None and device.type == "cuda":
        return "Triton", "a CUDA GPU, and all within the limits of the kernels"
    return "torch", reason or "the tensors are not on a CUDA GPU"


def _forced() -> str:
    forced = os.environ.get(VARIABLE, "auto")
    if forced not in ("auto", "torch", "triton"):
        raise ValueError(f"{VARIABLE} ({forced!r}) must be 'auto', 'torch' or 'triton'")
    return forced


def _reason_against(
    operation: str, device: torch.device, dtypes: list[torch.dtype], sizes: dict[str, int]
) -> str | None:
    is_cuda = device.type == "cuda"
    if not is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are not on a CUDA GPU"
    if not _has_triton():
        return "Triton is not installed"
    if is_cuda and (shared_memory := _shared_memory(device)) < _SHARED_MEMORY:
        return (
            f"the GPU has {shared_memory} bytes of shared memory per block, and its kernels may take {_SHARED_MEMORY}"
        )
    for dtype in dtypes:
        if dtype not in _DTYPES:
            return f"its kernels take no {dtype}"
    if sizes:
        limits = importlib.import_module(f"air_moe_megatron.ops.{operation}.kernels").LIMITS
        for name, size in sizes.items():
            if size > limits[name]:
                return f"{name} ({size}) exceeds {limits[name]}"
    return None


@functools.cache
def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _say_once(operation: str, reason: str) -> None:
    logger.info("%s uses torch operations: %s", operation, reason)
