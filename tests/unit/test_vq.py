"""VQRouter: the nearest codes and the best scores, and where each part of its loss goes."""

import pytest
import torch

from tests.builders import HIDDEN, make_config, make_router

pytestmark = pytest.mark.usefixtures("megatron_cpu")


def naive_routes(router, hidden):
    half = router.topk // 2
    distances = (hidden[:, None] - router.codes[None]).square().sum(dim=2)  # [T, E]
    codes = distances.topk(half, dim=1, largest=False).indices
    best, ids = (hidden @ router.weight.t()).topk(half, dim=1)
    gate = (hidden @ router.branch_weight.t()).softmax(dim=1)
    probs = torch.cat((gate[:, :1].expand(-1, half) / half, gate[:, 1:] * best.softmax(dim=1)), dim=1)
    return torch.cat((codes, ids), dim=1), probs


def vq_losses(router, hidden):
    """Codebook and commitment loss in words."""
    codes = router.codes[naive_routes(router, hidden)[0][:, : router.topk // 2]]
    tokens = hidden.unsqueeze(1)
    return (codes - tokens.detach()).square().mean(), (codes.detach() - tokens).square().mean()


def test_routes_equal_brute_force(megatron_cpu):
    router = make_router(megatron_cpu, moe_router_type="vq")
    router.eval()  # without the loss, which has a test of its own
    hidden = torch.randn(40, HIDDEN, requires_grad=True)
    routes = router.route(hidden)
    ids, probs = naive_routes(router, hidden)
    assert torch.equal(routes.topk_ids.long(), ids)
    torch.testing.assert_close(routes.probs, probs)
    torch.testing.assert_close(routes.probs.sum(dim=1), torch.ones(40))
    weights, leaves = torch.randn(probs.shape), [hidden, router.weight, router.branch_weight]
    found = torch.autograd.grad((routes.probs * weights).sum(), leaves)
    for actual, wanted in zip(found, torch.autograd.grad((probs * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


def test_the_codes_learn_by_the_codebook_loss_only_and_tokens_are_committed_to_them(megatron_cpu):
    router = make_router(megatron_cpu, moe_router_type="vq", moe_vq_loss_coeff=0.7, moe_vq_commitment=0.3)
    hidden = torch.randn(40, HIDDEN, requires_grad=True)
    probs = router.route(hidden).probs
    found_tokens, found_codes = torch.autograd.grad(0.0 * probs.sum(), [hidden, router.codes])
    codebook, commitment = vq_losses(router, hidden)
    (expected,) = torch.autograd.grad(0.7 * codebook, router.codes)
    torch.testing.assert_close(found_codes, expected)
    (expected,) = torch.autograd.grad(0.7 * 0.3 * commitment, hidden)
    torch.testing.assert_close(found_tokens, expected)
    # The main loss does not move the codes, whatever it is.
    router.eval()
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(router.route(hidden).probs.square().sum(), router.codes)


def test_the_loss_is_logged_without_its_coefficient(megatron_cpu):
    from air_moe_megatron.compat import destroy_moe_metrics_tracker, get_moe_metrics_tracker

    destroy_moe_metrics_tracker()
    router = make_router(megatron_cpu, moe_router_type="vq", moe_vq_loss_coeff=0.7, moe_vq_commitment=0.3)
    hidden = torch.randn(40, HIDDEN)
    router.route(hidden)
    codebook, commitment = vq_losses(router, hidden)
    logged = get_moe_metrics_tracker().metrics["vq_loss"].values[0]
    torch.testing.assert_close(logged, (codebook + 0.3 * commitment).detach())


REFUSED = {
    "odd": (dict(moe_router_topk=3), "moe_router_topk (3) must be even"),
    "one-each": (dict(moe_router_topk=2), "moe_router_topk (2)"),
    "coeff": (dict(moe_vq_loss_coeff=0.0), "moe_vq_loss_coeff (0.0)"),
    "commitment": (dict(moe_vq_commitment=-1.0), "moe_vq_commitment (-1.0)"),
    "aux": (dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1), "moe_aux_loss_coeff (0.1)"),
}


@pytest.mark.parametrize("settings, words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError) as error:
        make_config(moe_router_type="vq", **settings)
    assert words in str(error.value)
    make_config(moe_router_type="vq", moe_router_topk=2, moe_router_pre_softmax=True)
