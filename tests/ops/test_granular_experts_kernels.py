"""Granular experts as Triton kernels: against naive.py, forward and gradients, every activation, both ways to sum."""

import pytest
import torch
from torch.nn.functional import gelu, relu, silu

from air_moe_megatron.ops.granular_experts import KERNEL_ACTIVATIONS, granular_experts, kernels
from air_moe_megatron.ops.granular_experts.naive import naive_granular_experts
from air_moe_megatron.ops.pair_products import make_pairs
from tests.ops.conftest import relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Root mean square of the difference over that of naive.py in fp64 on the same inputs. Between the projections
# everything is fp32; what is written in 16 bits is rounded once, by Triton's interpreter towards zero.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}

ACTIVATIONS = {
    "gelu": gelu,
    "silu": silu,
    "relu": relu,
    "squared_relu": lambda x: relu(x).square(),
}

# R, E, experts per row at most, F, H
SHAPES = {
    "one-row-each": (7, 5, 3, 1, 33),
    "several-rows-each": (5, 3, 3, 3, 16),
    "sums-in-expert-order": (5, 4, 3, 9, 130),
    "long-segments": (90, 1, 1, 8, 5),
    "one-everything": (1, 1, 1, 1, 1),
    "no-rows": (0, 3, 1, 2, 8),
    "no-pairs": (3, 4, 0, 8, 8),
}


def make(shape, dtype, device, gated=False):
    """Pairs in rows of unequal lengths, some without any; leaves hidden, weight1, weight2, probs."""
    num_rows, num_experts, per_row, ffn_hidden_size, hidden_size = shape
    generator = torch.Generator().manual_seed(sum(shape))
    ids = torch.rand(num_rows, num_experts, generator=generator).argsort(dim=1)[:, :per_row].reshape(-1)
    rows = torch.arange(num_rows).repeat_interleave(per_row)
    if rows.numel() > 2:
        keep = torch.rand(rows.shape, generator=generator) < 0.8
        rows, ids = rows[keep], ids[keep]
    num_inputs = 2 * ffn_hidden_size if gated else ffn_hidden_size
    sizes = ((num_rows, hidden_size), (num_experts, num_inputs, hidden_size))
    sizes += ((num_experts, ffn_hidden_size, hidden_size), (rows.numel(),))
    leaves = [torch.randn(*size, generator=generator) for size in sizes]
    leaves[1] /= hidden_size**0.5  # inputs of the activation of the order of one
    leaves = [leaf.to(dtype).to(device).requires_grad_() for leaf in leaves]
    rows, ids = rows.to(device), ids.to(device)
    return leaves, rows, ids, make_pairs(rows, ids, num_rows, num_experts)


def assert_equals_naive(shape, activation, gated, dtype, device, **options):
    leaves, rows, ids, pairs = make(shape, dtype, device, gated)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = naive_granular_experts(*wide, rows, ids, ACTIVATIONS[activation], gated)
    found = kernels.granular_experts(*leaves, pairs, activation, **options)
    assert found.dtype == dtype and found.shape == expected.shape
    assert relative_error(found, expected) <= TOLERANCES[dtype]
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    found = torch.autograd.grad(found, leaves, grad)
    expected = torch.autograd.grad(expected, wide, grad.double())
    for name, got, wanted, leaf in zip(("hidden", "weight1", "weight2", "probs"), found, expected, leaves, strict=True):
        assert got.dtype == leaf.dtype and got.shape == leaf.shape, name
        assert relative_error(got, wanted) <= TOLERANCES[dtype], name
    return found


@pytest.mark.parametrize("gated", (False, True), ids=("plain", "gated"))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_experts_and_gradients_equal_naive(shape, gated, kernel_device):
    assert_equals_naive(shape, "silu", gated, torch.float32, kernel_device)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", ("several-rows-each", "sums-in-expert-order"))
def test_narrow_dtypes_round_once(shape, dtype, kernel_device):
    assert_equals_naive(SHAPES[shape], "gelu", True, dtype, kernel_device)


@pytest.mark.parametrize("gated", (False, True), ids=("plain", "gated"))
@pytest.mark.parametrize("activation", KERNEL_ACTIVATIONS)
def test_every_activation_equals_naive(activation, gated, kernel_device):
    assert_equals_naive((3, 2, 2, 3, 16), activation, gated, torch.float32, kernel_device)


def test_the_largest_gated_experts_equal_naive(kernel_device):
    assert_equals_naive((5, 2, 2, 64, 40), "relu", True, torch.float32, kernel_device)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_sums_in_row_order_where_asked(dtype, kernel_device):
    runs = [
        assert_equals_naive(SHAPES["sums-in-expert-order"], "gelu", True, dtype, kernel_device, deterministic=True)
        for _ in range(2)
    ]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_fp32_sums_of_bf16_rows_keep_16_bits(kernel_device):
    """What is added to an fp32 main_grad, and summed in expert order, is not rounded to bf16."""
    leaves, rows, ids, pairs = make(SHAPES["sums-in-expert-order"], torch.bfloat16, kernel_device)
    values = torch.randn(ids.numel(), 9, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    hidden, weight = (leaf.detach() for leaf in leaves[:2])
    with torch.no_grad():
        sums = kernels.launch_granular_sums(values, weight, pairs, torch.float32, False)
    products = torch.einsum("nf,nfh->nh", values.double(), weight[ids].double())
    expected = torch.zeros(hidden.shape, dtype=torch.float64, device=kernel_device).index_add_(0, rows, products)
    assert relative_error(sums, expected) <= 2.0**-16
    grad = torch.zeros(4 * 9, 130, device=kernel_device)
    kernels.launch_granular_weight_gradient(hidden, values, pairs, grad)
    products = values.double().unsqueeze(2) * hidden[rows].double().unsqueeze(1)
    expected = torch.zeros(weight.shape, dtype=torch.float64, device=kernel_device).index_add_(0, ids, products)
    assert relative_error(grad.view_as(weight), expected) <= 2.0**-16


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_main_grad_is_added_to_and_only_in_used_experts(dtype, kernel_device):
    leaves, _, ids, pairs = make((3, 30, 2, 2, 16), torch.float32, kernel_device)
    unused = torch.ones(30, dtype=torch.bool, device=kernel_device)
    unused[ids] = False
    expected = torch.autograd.grad(kernels.granular_experts(*leaves, pairs, "gelu").sum(), leaves[1:3])
    fused = [torch.nn.Parameter(leaf.detach().clone()) for leaf in leaves[1:3]]
    for weight in fused:
        weight.main_grad = torch.full_like(weight, 3.0, dtype=dtype)
    for _ in range(2):
        kernels.granular_experts(leaves[0], *fused, leaves[3], pairs, "gelu").sum().backward()
    for weight, grad in zip(fused, expected, strict=True):
        assert weight.grad_added_to_main_grad
        assert (weight.main_grad[unused] == 3.0).all() and (grad[unused] == 0.0).all()
        assert relative_error(weight.main_grad, 3.0 + 2 * grad.double()) <= 2 * TOLERANCES[dtype]


def test_fp32_probs_of_bf16_experts(kernel_device):
    leaves, rows, ids, pairs = make(SHAPES["several-rows-each"], torch.bfloat16, kernel_device)
    leaves[3] = leaves[3].detach().float().requires_grad_()
    found = kernels.granular_experts(*leaves, pairs, "relu")
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = naive_granular_experts(*wide, rows, ids, relu, False)
    assert relative_error(found, expected) <= TOLERANCES[torch.bfloat16]
    (found,) = torch.autograd.grad(found.float().sum(), leaves[3])
    (expected,) = torch.autograd.grad(expected.sum(), wide[3])
    assert found.dtype == torch.float32
    assert relative_error(found, expected) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("wanted", range(4), ids=("hidden", "weight1", "weight2", "probs"))
def test_only_the_gradient_that_is_asked_for(wanted, kernel_device):
    leaves, _, _, pairs = make(SHAPES["several-rows-each"], torch.float32, kernel_device)
    leaves = [leaf.detach().requires_grad_(place == wanted) for place, leaf in enumerate(leaves)]
    kernels.granular_experts(*leaves, pairs, "gelu").sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [place == wanted for place in range(4)]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, w1, w2, p: (h, w1[:, :2], w2, p, "gelu"), r"weight1 \(3, 2, 16\)"),
        (lambda h, w1, w2, p: (h[:-1], w1, w2, p, "gelu"), "R = 5"),
        (lambda h, w1, w2, p: (h, w1, w2, p[:-1], "gelu"), r"probs \("),
        (lambda h, w1, w2, p: (h, w1, w2, p, "quick_gelu"), "'quick_gelu'"),
    ],
    ids=["weights", "rows", "probs", "activation"],
)
def test_what_does_not_fit_is_refused(change, message, backend):
    leaves, _, _, pairs = make(SHAPES["several-rows-each"], torch.float32, "cpu")
    *tensors, activation = change(*leaves)
    with pytest.raises(ValueError, match=message):
        granular_experts(*tensors, pairs, gelu, activation)


def test_larger_experts_than_the_kernels_take_are_not_forced(monkeypatch):
    (hidden, weight1, weight2, probs), _, _, pairs = make(SHAPES["several-rows-each"], torch.float32, "cpu")
    large = (hidden, weight1.repeat(1, 22, 1), weight2.repeat(1, 22, 1), probs, pairs, gelu, "gelu")
    assert granular_experts(*large).shape == hidden.shape
    monkeypatch.setenv("AIR_MOE_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"ffn_hidden_size \(66\) exceeds 64"):
        granular_experts(*large)


def test_worked_example(kernel_device):
    tensors = [torch.tensor(x, device=kernel_device) for x in ([[1.0, 2.0]], [[[1.0, 1.0]]], [[[0.0, 1.0]]], [0.5])]
    place = torch.zeros(1, dtype=torch.int64, device=kernel_device)
    assert kernels.granular_experts(*tensors, make_pairs(place, place, 1, 1), "relu").tolist() == [[0.0, 1.5]]


@pytest.mark.gpu
@pytest.mark.parametrize("ffn_hidden_size", (2, 16))
def test_weights_beyond_2_31_elements(ffn_hidden_size, cuda):
    hidden_size = 1024
    num_experts = 2**31 // (ffn_hidden_size * hidden_size) + 3
    used = torch.tensor([0, num_experts - 2, num_experts - 1], device=cuda)
    rows = torch.tensor([0, 0, 1, 1], device=cuda)
    ids = used[torch.tensor([0, 2, 1, 2], device=cuda)]
    pairs = make_pairs(rows, ids, 2, num_experts)
    hidden = torch.randn(2, hidden_size, device=cuda).bfloat16().requires_grad_()
    probs = torch.rand(4, device=cuda).requires_grad_()
    few = [torch.randn(3, ffn_hidden_size, hidden_size, device=cuda).bfloat16() / 32 for _ in range(2)]
    weights = []
    for rows_in_use in few:
        weight = torch.zeros(num_experts, ffn_hidden_size, hidden_size, dtype=torch.bfloat16, device=cuda)
        weight[used] = rows_in_use
        weights.append(weight.requires_grad_())
    found = kernels.granular_experts(hidden, *weights, probs, pairs, "silu")
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, *few, probs)]
    expected = naive_granular_experts(*wide, rows, torch.searchsorted(used, ids), silu, False)
    assert relative_error(found, expected) <= TOLERANCES[torch.bfloat16]
    found = torch.autograd.grad(found.float().sum(), (hidden, *weights, probs))
    expected = torch.autograd.grad(expected.sum(), wide)
    for place, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        if place in (1, 2):
            assert got[1:-2].count_nonzero() == 0
            got = got[used]
        assert relative_error(got, wanted) <= TOLERANCES[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("ffn_hidden_size", (1, 4, 64))
def test_large_shapes_equal_naive(ffn_hidden_size, dtype, cuda):
    shape = (500, 700, 16, ffn_hidden_size, 513)
    for gated, options in ((False, {}), (True, {}), (True, {"deterministic": True})):
        assert_equals_naive(shape, "gelu", gated, dtype, cuda, **options)
