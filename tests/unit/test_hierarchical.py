"""HierarchicalRouter: the best experts of the best groups, by the product of both gates."""

import pytest
import torch

from air_moe_megatron.config import resolve_groups
from tests.builders import EXPERTS, HIDDEN, make_config, make_router

pytestmark = pytest.mark.usefixtures("megatron_cpu")

SETTINGS = {
    "automatic": {},
    "one-group-searched": dict(moe_hierarchical_topk_groups=1),
    "four-groups-of-sixteen": dict(moe_hierarchical_num_groups=4, moe_hierarchical_topk_groups=3),
    "every-group": dict(moe_hierarchical_topk_groups=8),
    "one-group": dict(moe_hierarchical_num_groups=1, moe_hierarchical_topk_groups=1),
    "groups-of-one": dict(moe_hierarchical_num_groups=64, moe_hierarchical_topk_groups=9),
    "linear-bias": dict(add_bias_linear=True, moe_granular_experts=False, moe_dispatch="stock"),
    "pre-softmax": dict(moe_router_pre_softmax=True),
}


def naive_routes(router, hidden):
    """Token by token: the best groups, and in them the best experts by the sum of log probabilities."""
    sizes, config = router.sizes, router.config
    group_logits, logits = hidden @ router.group_weight.t(), hidden @ router.weight.t()
    if router.bias is not None:
        group_logits, logits = group_logits + router.group_bias, logits + router.bias
    within = logits.view(-1, sizes.num_groups, sizes.group_size).log_softmax(dim=2)
    scores = (group_logits.log_softmax(dim=1).unsqueeze(2) + within).flatten(1)  # [T, E]
    ids, probs = [], []
    for token in range(len(hidden)):
        groups = group_logits[token].topk(sizes.topk_groups).indices.tolist()
        allowed = [e for e in range(config.num_moe_experts) if e // sizes.group_size in groups]
        best = sorted(allowed, key=lambda e: -scores[token, e].item())[: router.topk]
        ids.append(best)
        among = torch.tensor(allowed if config.moe_router_pre_softmax else best)
        probs.append(torch.stack([scores[token, e].exp() for e in best]) / scores[token, among].exp().sum())
    return ids, torch.stack(probs)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_routes_equal_brute_force_in_the_top_groups(megatron_cpu, settings):
    router = make_router(megatron_cpu, moe_router_type="hierarchical", **settings)
    hidden = torch.randn(40, HIDDEN, requires_grad=True)
    routes = router.route(hidden)
    ids, probs = naive_routes(router, hidden)
    assert routes.topk_ids.tolist() == ids
    torch.testing.assert_close(routes.probs, probs, rtol=1e-4, atol=1e-6)
    weights = torch.randn(probs.shape)
    leaves = [hidden, *router.parameters()]
    found = torch.autograd.grad((routes.probs * weights).sum(), leaves)
    expected = torch.autograd.grad((probs * weights).sum(), leaves)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-5)


def test_with_every_group_it_is_the_exact_softmax_of_summed_logits(megatron_cpu):
    router = make_router(
        megatron_cpu, moe_router_type="hierarchical", moe_hierarchical_topk_groups=8, moe_router_topk=EXPERTS,
        moe_router_pre_softmax=True,
    )  # fmt: skip
    hidden = torch.randn(20, HIDDEN)
    routes = router.route(hidden)
    within = (hidden @ router.weight.t()).view(20, 8, 8).log_softmax(dim=2)
    exact = ((hidden @ router.group_weight.t()).unsqueeze(2) + within).flatten(1).softmax(dim=1)
    found = torch.zeros_like(exact).scatter(1, routes.topk_ids.long(), routes.probs)
    torch.testing.assert_close(found, exact)


def test_gradients_reach_both_gates(megatron_cpu):
    router = make_router(megatron_cpu, moe_router_type="hierarchical")
    routes = router.route(torch.randn(30, HIDDEN))
    routes.probs[:, 0].sum().backward()
    assert router.group_weight.grad.any() and router.weight.grad.any()


def test_z_loss_is_of_the_logits_of_both_gates(megatron_cpu):
    from air_moe_megatron.compat import destroy_moe_metrics_tracker, get_moe_metrics_tracker

    destroy_moe_metrics_tracker()
    fields = dict(moe_router_type="hierarchical", moe_hierarchical_topk_groups=8, moe_z_loss_coeff=0.3)
    router = make_router(megatron_cpu, **fields)
    hidden = torch.randn(30, HIDDEN)
    routes = router.route(hidden)
    raw = torch.cat((hidden @ router.group_weight.t(), hidden @ router.weight.t()), dim=1)
    z_loss = raw.logsumexp(dim=1).square().mean()
    torch.testing.assert_close(get_moe_metrics_tracker().metrics["z_loss"].values[0], z_loss.detach())
    (grad,) = torch.autograd.grad(0.0 * routes.probs.sum(), router.group_weight)
    torch.testing.assert_close(grad, torch.autograd.grad(0.3 * z_loss, router.group_weight)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "num_experts, topk, expected",
    [(65536, 64, (256, 256, 2)), (8192, 32, (128, 64, 2)), (64, 16, (8, 8, 4)), (7, 2, (7, 1, 4)), (4, 4, (2, 2, 2))],
)
def test_automatic_sizes(num_experts, topk, expected):
    config = make_config(moe_router_type="hierarchical", num_moe_experts=num_experts, moe_router_topk=topk)
    sizes = resolve_groups(config)
    assert (sizes.num_groups, sizes.group_size, sizes.topk_groups) == expected
