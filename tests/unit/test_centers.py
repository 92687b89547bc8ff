"""Expert centers: what is taken from a router, slices of them, and what their experts are selected by."""

import pytest
import torch

from air_moe_megatron.learned.centers import Centers
from tests.builders import EXPERTS, HIDDEN, make_router

BIASED = dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)


@pytest.mark.parametrize("router_type", ("air", "topk"))
@pytest.mark.parametrize("fields", ({}, dict(moe_router_score_function="sigmoid"), BIASED), ids=str)
def test_centers_of_a_router_hold_its_parameters_and_a_score_function_with_an_expert_bias_only(
    megatron_cpu, router_type, fields
):
    router = make_router(megatron_cpu, moe_router_type=router_type, **fields)
    centers = Centers.of(router)
    assert centers.weight is router.weight and centers.bias is router.bias
    assert centers.expert_bias is router.expert_bias
    assert centers.score_function == ("sigmoid" if fields is BIASED else None)


def test_the_scores_of_a_router_have_the_gradients_of_its_weight(megatron_cpu):
    router = make_router(megatron_cpu, moe_router_type="air")
    assert router.centers.weight is router.weight
    scores, ids = router.centers.fine_topk(
        torch.randn(3, HIDDEN),
        torch.arange(EXPERTS).view(1, -1),
        torch.zeros(3, 1, dtype=torch.int64),
        2,
        torch.float32,
    )
    scores.sum().backward()
    assert (router.weight.grad.abs().sum(dim=1) > 0).nonzero().flatten().tolist() == sorted(set(ids.flatten().tolist()))


def test_a_slice_holds_views_of_all_vectors():
    vectors = torch.arange(12.0).view(6, 2), torch.arange(6.0), None
    centers = Centers(*vectors)
    part = centers[2:4]
    assert part.weight.tolist() == [[4.0, 5.0], [6.0, 7.0]] and part.bias.tolist() == [2.0, 3.0]
    assert part.score_function is part.expert_bias is None
    assert part.weight.data_ptr() == centers.weight[2:].data_ptr()
    biased = Centers(vectors[0], None, "sigmoid", torch.arange(6.0))[4:6]
    assert biased.bias is None and biased.score_function == "sigmoid" and biased.expert_bias.tolist() == [4.0, 5.0]
    ranking = biased.rank_experts(torch.tensor([[1.0, 0.0]]), torch.ones(1), 1)
    assert ranking.lists.tolist() == [[1]]  # ids count from the first expert of the slice


@pytest.mark.parametrize("function", (None, "sigmoid", "sqrtsoftplus"))
def test_experts_are_selected_by_the_function_of_the_score_and_the_bias(function):
    scores = torch.tensor([[1.0, -2.0, 0.5]])
    weight, bias = torch.zeros(3, HIDDEN), torch.tensor([0.0, 0.25, -1.0])
    centers = Centers(weight, None, function, None if function is None else bias)
    functions = {"sigmoid": torch.sigmoid, "sqrtsoftplus": lambda x: torch.log1p(x.exp()).sqrt()}
    expected = scores if function is None else functions[function](scores) + bias
    torch.testing.assert_close(centers.selection_scores(scores), expected)
    ids = torch.tensor([[2, 0, -1]], dtype=torch.int32)
    found = centers.selection_scores(scores[:, [2, 0, 1]], ids)
    torch.testing.assert_close(found[:, :2], expected[:, [2, 0]])
