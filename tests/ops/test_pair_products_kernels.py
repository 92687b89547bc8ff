"""Pair products as Triton kernels: against naive.py, forward and gradients; blocks of segments; outputs poisoned."""

import pytest
import torch

from air_moe_megatron.ops.pair_products import kernels, make_pairs
from air_moe_megatron.ops.pair_products.naive import naive_pair_dots, naive_pair_sums
from tests.ops.conftest import relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Root mean square of the difference over that of naive.py in fp64 on the same inputs. Sums are made in fp32; what is
# written in 16 bits is rounded once, by Triton's interpreter towards zero.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}

# R, M, pairs per row at most, H
SHAPES = {
    "odd-sizes": (7, 5, 5, 33),
    "several-blocks-of-columns": (3, 4, 2, 1030),
    "long-segments": (23, 1, 1, 5),
    "many-pairs-per-row": (2, 12, 11, 17),
    "mostly-unused-weight": (3, 90, 3, 16),
    "one-everything": (1, 1, 1, 1),
    "no-rows": (0, 3, 1, 8),
    "no-pairs": (3, 4, 0, 8),
}


def make(shape, dtype, device, seed=0):
    """Pairs in rows of unequal lengths, some without any; hidden, weight, values."""
    num_rows, num_ids, per_row, hidden_size = shape
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(num_rows, num_ids, generator=generator).argsort(dim=1)[:, :per_row].reshape(-1)
    rows = torch.arange(num_rows).repeat_interleave(per_row)
    if rows.numel() > 2:
        keep = torch.rand(rows.shape, generator=generator) < 0.8
        rows, ids = rows[keep], ids[keep]
    floats = [
        torch.randn(*size, generator=generator).to(dtype).to(device).requires_grad_()
        for size in ((num_rows, hidden_size), (num_ids, hidden_size), (rows.numel(),))
    ]
    return rows.to(device), ids.to(device), make_pairs(rows.to(device), ids.to(device), num_rows, num_ids), *floats


def assert_equal_with_gradients(function, naive, leaves, dtype):
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found, expected = function(*leaves), naive(*wide)
    assert found.shape == expected.shape
    assert relative_error(found, expected) <= TOLERANCES[found.dtype]
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype).to(found.device)
    gradients = torch.autograd.grad(found, leaves, grad)
    for got, wanted, leaf in zip(gradients, torch.autograd.grad(expected, wide, grad.double()), leaves, strict=True):
        assert got.dtype == leaf.dtype and got.shape == leaf.shape
        assert relative_error(got, wanted) <= TOLERANCES[dtype]
    return found


def assert_products_equal_naive(shape, dtype, kernel_device):
    rows, ids, pairs, hidden, weight, values = make(shape, dtype, kernel_device)
    dots = assert_equal_with_gradients(
        lambda h, w: kernels.pair_dots(h, w, pairs),
        lambda h, w: naive_pair_dots(h, w, rows, ids),
        (hidden, weight),
        dtype,
    )
    assert dots.dtype == torch.float32
    sums = assert_equal_with_gradients(
        lambda v, w: kernels.pair_sums(v, w, pairs),
        lambda v, w: naive_pair_sums(v, w, rows, ids, pairs.num_rows),
        (values, weight),
        dtype,
    )
    assert sums.dtype == dtype


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_products_and_gradients_equal_naive(shape, kernel_device):
    assert_products_equal_naive(shape, torch.float32, kernel_device)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", ("odd-sizes", "many-pairs-per-row"))
def test_narrow_dtypes_round_once(shape, dtype, kernel_device):
    assert_products_equal_naive(SHAPES[shape], dtype, kernel_device)


def test_equals_naive_in_parts(kernel_device):
    """Pairs that were split, as the experts of several rows have them, and a weight of three dimensions."""
    rows, ids, pairs, hidden, _, _ = make(SHAPES["odd-sizes"], torch.float32, kernel_device)
    weight = torch.randn(5, 3, 33, generator=torch.Generator().manual_seed(2)).to(kernel_device).requires_grad_()
    split = pairs.split(3)
    assert_equal_with_gradients(
        lambda h, w: kernels.pair_dots(h, w, split),
        lambda h, w: naive_pair_dots(h, w.flatten(0, 1), split.rows, split.ids),
        (hidden, weight),
        torch.float32,
    )
    values = torch.randn(3 * rows.numel(), generator=torch.Generator().manual_seed(3)).to(kernel_device)
    with torch.no_grad():
        found = kernels.launch_pair_sums(values, weight, pairs, torch.float32, parts=3)
    expected = naive_pair_sums(values.double(), weight.detach().double().flatten(0, 1), split.rows, split.ids, 7)
    assert relative_error(found, expected) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_main_grad_is_added_to_and_only_in_used_rows(dtype, kernel_device):
    _, ids, pairs, hidden, weight, values = make(SHAPES["mostly-unused-weight"], torch.float32, kernel_device)
    unused = torch.ones(90, dtype=torch.bool, device=kernel_device)
    unused[ids] = False
    for function in (lambda w: kernels.pair_dots(hidden, w, pairs), lambda w: kernels.pair_sums(values, w, pairs)):
        (expected,) = torch.autograd.grad(function(weight).sum(), weight)
        fused = torch.nn.Parameter(weight.detach().clone())
        fused.main_grad = torch.full_like(fused, 3.0, dtype=dtype)
        for _ in range(2):
            function(fused).sum().backward()
        assert fused.grad_added_to_main_grad
        assert (fused.main_grad[unused] == 3.0).all()
        assert relative_error(fused.main_grad.detach(), 3.0 + 2 * expected.double()) <= 2 * TOLERANCES[dtype]


def test_a_pair_without_an_id_is_left_out(kernel_device):
    ids = torch.tensor([2, -1, -1, 0], device=kernel_device)
    pairs = make_pairs(torch.tensor([0, 0, 1, 1], device=kernel_device), ids, 3, 4)
    values = torch.tensor([2.0, float("nan"), 5.0, 7.0], device=kernel_device)
    weight = torch.eye(4, device=kernel_device)
    sums = kernels.launch_pair_sums(values, weight, pairs, torch.float32)
    assert sums.tolist() == [[0, 0, 2, 0], [7, 0, 0, 0], [0, 0, 0, 0]]
    grad = torch.zeros(4, 4, device=kernel_device)
    kernels.launch_pair_weight_gradient(torch.ones(3, 4, device=kernel_device), values, pairs, grad)
    assert grad[:, 0].tolist() == [7, 0, 2, 0]
    dots = kernels.launch_pair_dots(torch.ones(3, 4, device=kernel_device), weight, pairs)
    assert dots.tolist() == [1, 0, 0, 1]


def test_worked_examples(kernel_device):
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], device=kernel_device)
    ids = torch.tensor([2, 0], device=kernel_device)
    pairs = make_pairs(torch.zeros_like(ids), ids, 1, 3)
    assert kernels.pair_dots(torch.tensor([[1.0, 2.0]], device=kernel_device), weight, pairs).tolist() == [3.0, 1.0]
    assert kernels.pair_sums(torch.tensor([2.0, 1.0], device=kernel_device), weight, pairs).tolist() == [[3.0, 2.0]]


@pytest.mark.gpu
def test_a_weight_beyond_2_31_elements(cuda):
    num_ids, hidden_size = 2**20 + 5, 2048
    weight = torch.zeros(num_ids, hidden_size, dtype=torch.bfloat16, device=cuda)
    ids = torch.tensor([num_ids - 1, 3, num_ids - 1, 2**20], device=cuda)
    weight[ids] = torch.randn(4, hidden_size, device=cuda).bfloat16()[[0, 1, 0, 3]]
    rows = torch.tensor([0, 0, 1, 1], device=cuda)
    pairs = make_pairs(rows, ids, 2, num_ids)
    hidden = torch.randn(2, hidden_size, device=cuda).bfloat16()
    values = torch.randn(4, device=cuda)
    wide = weight[ids].double()
    dots = (hidden.double()[rows] * wide).sum(dim=1)
    assert relative_error(kernels.pair_dots(hidden, weight, pairs), dots) <= 1e-5
    sums = torch.zeros(2, hidden_size, dtype=torch.float64, device=cuda)
    sums.index_add_(0, rows, values.double().unsqueeze(1) * wide)
    assert relative_error(kernels.pair_sums(values, weight, pairs), sums) <= TOLERANCES[torch.bfloat16]
    grad = torch.zeros_like(weight)
    kernels.launch_pair_weight_gradient(hidden, values, pairs, grad)
    last = values[0].double() * hidden[0].double() + values[2].double() * hidden[1].double()
    assert relative_error(grad[-1], last) <= TOLERANCES[torch.bfloat16]
    assert grad[4 : 2**20].count_nonzero() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_large_shapes_equal_naive(dtype, cuda):
    assert_products_equal_naive((2000, 3000, 64, 513), dtype, cuda)
