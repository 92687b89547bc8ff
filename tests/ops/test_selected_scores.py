"""Scores of the selected experts: gradients against the naive reference, absent slots, shapes."""

import pytest
import torch

from air_moe_megatron.ops.selected_scores import selected_scores
from air_moe_megatron.ops.selected_scores.naive import naive_selected_scores

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Relative to the largest entry. Sums over K or over the tokens of an expert in another order; bf16 rounds each of them.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}


def make(num_tokens=37, hidden_size=13, num_experts=29, num_selected=5, dtype=torch.float32, absent=True):
    generator = torch.Generator().manual_seed(num_tokens + num_experts)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
    weight = torch.randn(num_experts, hidden_size, generator=generator).to(dtype)
    bias = torch.randn(num_experts, generator=generator).to(dtype)
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)[:, :num_selected]
    if absent and num_tokens:
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -1)
    grad = torch.randn(num_tokens, num_selected, generator=generator)
    return [hidden, weight, bias], ids, grad


def gradients(scores, leaves, grad):
    return torch.autograd.grad(scores, leaves, grad.to(scores.dtype))


@pytest.mark.parametrize("router_dtype", (None, torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_scores_pass_through_and_gradients_equal_naive(dtype, router_dtype, backend):
    if backend == "triton" and torch.float64 in (dtype, router_dtype):
        pytest.skip("the kernels take no fp64")
    leaves, ids, grad = make(dtype=dtype)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    expected = naive_selected_scores(*leaves, ids, router_dtype or dtype)
    found = selected_scores(*leaves, ids, expected.detach())
    assert torch.equal(found, expected)
    grad = grad.masked_fill(ids < 0, 0.0)
    for name, wanted, got in zip(
        ("hidden", "weight", "bias"), gradients(expected, leaves, grad), gradients(found, leaves, grad), strict=True
    ):
        assert got.dtype == wanted.dtype
        error = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max()
        assert error <= max(TOLERANCES[dtype], TOLERANCES[router_dtype or dtype]), name


def test_an_absent_expert_gets_no_gradient_whatever_arrives(backend):
    (hidden, weight, _), _, _ = make(num_tokens=2)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    ids = torch.tensor([[3, -1], [-1, -1]])
    scores = selected_scores(hidden, weight, None, ids, torch.zeros(2, 2))
    grad_hidden, grad_weight = gradients(scores, [hidden, weight], torch.full((2, 2), 7.0))
    torch.testing.assert_close(grad_hidden, torch.stack((7 * weight[3].detach(), torch.zeros(13))))
    assert grad_weight.abs().sum(dim=1).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("sizes", [(0, 3, 4, 2), (1, 1, 1, 1), (5, 3, 4, 4)], ids=str)
def test_odd_sizes(sizes, backend):
    leaves, ids, grad = make(*sizes, absent=False)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    expected = naive_selected_scores(*leaves, ids, torch.float32)
    found = selected_scores(*leaves, ids, expected.detach())
    for wanted, got in zip(gradients(expected, leaves, grad), gradients(found, leaves, grad), strict=True):
        torch.testing.assert_close(got, wanted)


def test_only_the_gradients_asked_for_are_made(backend):
    (hidden, weight, bias), ids, grad = make()
    weight.requires_grad_()
    scores = selected_scores(hidden, weight, bias, ids, torch.zeros(ids.shape))
    (grad_weight,) = gradients(scores, [weight], grad)
    naive = naive_selected_scores(hidden, weight, bias, ids, torch.float32)
    torch.testing.assert_close(grad_weight, gradients(naive, [weight], grad)[0])
    assert not selected_scores(hidden, weight.detach(), bias, ids, torch.zeros(ids.shape)).requires_grad


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda hidden, weight, bias, ids, scores: (hidden[:, :-1], weight, bias, ids, scores), "same H"),
        (lambda hidden, weight, bias, ids, scores: (hidden, weight, bias[:-1], ids, scores), r"bias \(28,\)"),
        (lambda hidden, weight, bias, ids, scores: (hidden, weight, bias, ids[:-1], scores), "T = 37"),
        (lambda hidden, weight, bias, ids, scores: (hidden, weight, bias, ids, scores[:, :-1]), "T = 37"),
    ],
    ids=["hidden", "bias", "tokens", "selected"],
)
def test_shapes_that_do_not_fit_are_refused(change, message, backend):
    leaves, ids, grad = make()
    with pytest.raises(ValueError, match=message):
        selected_scores(*change(*leaves, ids, grad))


def test_gradients_of_the_centers_go_into_main_grad(backend):
    (hidden, weight, _), ids, grad = make(num_selected=7)
    grads = []
    for fused in (False, True):
        centers = torch.nn.Parameter(weight.clone())
        if fused:
            centers.main_grad = torch.ones_like(centers)
        selected_scores(hidden, centers, None, ids, torch.zeros_like(grad)).backward(grad)
        grads.append(centers.main_grad if fused else centers.grad)
    assert centers.grad_added_to_main_grad
    torch.testing.assert_close(grads[1], 1.0 + grads[0])
