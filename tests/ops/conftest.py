"""What the tests of kernels share."""

import math

import pytest
import torch


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fresh memory is NaN, or very large where it holds integers: an element that no kernel writes is found."""

    def poison(create):
        def poisoned(*args, **kwargs):
            tensor = create(*args, **kwargs)
            return tensor.fill_(math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2)

        return poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture(params=("torch", "triton"))
def backend(request, monkeypatch) -> str:
    """What front doors are made to take: torch, or the kernels."""
    monkeypatch.setenv("AIR_MOE_BACKEND", request.param)
    return request.param


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    if expected.numel() == 0:
        return 0.0
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()
