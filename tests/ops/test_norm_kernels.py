"""The norm: torch and Triton kernels against naive.py, its gradient, padding, and numbers at the ends of fp32."""

import pytest
import torch

from air_moe_megatron.ops.norm import batch_sums, kernels, normalize
from air_moe_megatron.ops.norm.eager import LARGE
from air_moe_megatron.ops.norm.naive import naive_batch_sums, naive_normalize
from tests.ops.conftest import relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Root mean square of the difference over that of naive.py. What is written in 16 bits is rounded once, by Triton's
# interpreter towards zero.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
SHAPES = {  # T, H
    "odd-sizes": (7, 5),
    "several-blocks-of-rows": (300, 33),
    "several-blocks-of-columns": (5, 600),
    "one-token": (1, 1),
    "no-tokens": (0, 8),
}


def make(shape, dtype, device):
    """Tokens far from zero, a mean near them, a scale, and a mask that leaves about two in three."""
    num_tokens, hidden_size = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator) * 3.0 + 10.0
    mean = torch.randn(hidden_size, generator=generator) + 10.0
    scale = torch.rand(hidden_size, generator=generator) + 0.5
    padding = torch.rand(num_tokens, generator=generator) < 0.3
    return hidden.to(device, dtype).requires_grad_(), mean.to(device), scale.to(device), padding.to(device)


def assert_normalized(function, hidden, mean, scale):
    found, expected = function(hidden, mean, scale), naive_normalize(hidden, mean, scale)
    assert found.dtype == hidden.dtype
    assert relative_error(found, expected) <= TOLERANCES[hidden.dtype]
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found)
    (got,), (wanted,) = torch.autograd.grad(found, hidden, grad), torch.autograd.grad(expected, hidden, grad.double())
    assert got.dtype == hidden.dtype and relative_error(got, wanted) <= TOLERANCES[hidden.dtype]


def assert_summed(function, hidden, mean, padding):
    for mask in (None, padding):
        found, expected = function(hidden, mean, mask), naive_batch_sums(hidden, mean, mask)
        assert found.dtype == torch.float32 and not found.requires_grad
        assert found[-1] == expected[-1]
        for got, wanted in zip(found[:-1].chunk(3), expected[:-1].chunk(3), strict=True):
            assert relative_error(got, wanted) <= 1e-6


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_equal_naive(shape, dtype, kernel_device):
    hidden, mean, scale, padding = make(shape, dtype, kernel_device)
    assert_normalized(kernels.normalize, hidden, mean, scale)
    assert_summed(kernels.batch_sums, hidden, mean, padding)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_torch_equals_naive(shape):
    hidden, mean, scale, padding = make(shape, torch.float32, "cpu")
    assert_normalized(normalize, hidden, mean, scale)
    assert_summed(batch_sums, hidden, mean, padding)


def test_kernels_take_strided_tokens(kernel_device):
    hidden, mean, scale, padding = make((40, 24), torch.float32, kernel_device)
    columns = hidden.detach().repeat(1, 2)[:, :24].requires_grad_()
    mask = padding.repeat_interleave(2)[::2]
    assert not columns.is_contiguous() and not mask.is_contiguous()
    assert_normalized(kernels.normalize, columns, mean, scale)
    assert_summed(kernels.batch_sums, columns, mean, mask)


@pytest.mark.usefixtures("backend")
def test_sums_hold_all_finite_numbers_and_show_the_others():
    hidden = torch.tensor([[3e38, 1.0, 1e-30], [2.0 * LARGE, 2.0, 0.0]])
    sums = batch_sums(hidden, torch.zeros(3), None)
    torch.testing.assert_close(sums.double(), naive_batch_sums(hidden, torch.zeros(3), None), rtol=1e-6, atol=1e-38)
    for bad in (float("nan"), float("inf")):
        assert not batch_sums(torch.tensor([[bad]]), torch.zeros(1), None).isfinite().all()
    padded = batch_sums(torch.tensor([[float("nan")], [1.0]]), torch.zeros(1), torch.tensor([True, False]))
    assert padded.tolist() == [1.0, 1.0, 0.0, 1.0]


@pytest.mark.usefixtures("backend")
def test_examples():
    hidden, mean, scale = torch.tensor([[1.0, 8.0]]), torch.tensor([0.0, 2.0]), torch.tensor([3.0, 0.5])
    assert normalize(hidden, mean, scale).tolist() == [[3, 3]]
    assert batch_sums(torch.tensor([[1.0], [4.0]]), torch.ones(1), None).tolist() == [3, 9, 0, 2]


@pytest.mark.parametrize(
    "call",
    [
        lambda: normalize(torch.ones(2, 3), torch.ones(2), torch.ones(3)),
        lambda: normalize(torch.ones(2, 3), torch.ones(3), torch.ones(3, 1)),
        lambda: batch_sums(torch.ones(2, 3), torch.ones(3), torch.zeros(3, dtype=torch.bool)),
        lambda: batch_sums(torch.ones(3), torch.ones(3), None),
    ],
)
def test_shapes_that_do_not_fit_are_named(call):
    with pytest.raises(ValueError, match=r"must be \[T"):
        call()
