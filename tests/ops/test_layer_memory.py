"""A compact layer of mostly empty experts: what neither kernels nor torch operations write must not be read."""

import pytest
import torch

from tests.builders import HIDDEN, make_layer, naive_layer, tell_ids

pytestmark = pytest.mark.usefixtures("megatron_cpu")

NUM_EXPERTS = 256  # of which at most 28 get one of 7 tokens
LOSSES = dict(
    moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"], moe_aux_loss_coeff=[0.01, 0.01], moe_z_loss_coeff=1e-3
)
ROUTERS = {
    "air": dict(moe_router_type="air"),
    "air-full-lists": dict(moe_router_type="air", moe_air_num_clusters=4, moe_air_shortlist_size=NUM_EXPERTS),
    "air-losses": dict(moe_router_type="air", moe_air_num_probes=2, **LOSSES),
    "air-experts": dict(moe_router_type="air", moe_air_codebook_source="experts", moe_air_num_clusters=64),
    "exact": dict(moe_router_type="topk"),
    "product-keys": dict(moe_router_type="product_key", moe_product_key_heads=2),
    "hierarchical": dict(moe_router_type="hierarchical"),
    "hash": dict(moe_router_type="hash"),
    "vq": dict(moe_router_type="vq"),
}


def make(groups, fields):
    layer = make_layer(groups, num_moe_experts=NUM_EXPERTS, **fields)
    tell_ids(layer.router, torch.arange(7).view(1, 7))
    return layer


def outputs_and_gradients(layer, apply):
    """Of a layer applied to 7 tokens, by name."""
    hidden = torch.randn(7, 1, HIDDEN, generator=torch.Generator().manual_seed(6)).requires_grad_()
    out = apply(hidden)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(7)))
    grads = {
        name: parameter.main_grad if getattr(parameter, "grad_added_to_main_grad", False) else parameter.grad
        for name, parameter in layer.named_parameters()
    }
    return {"out": out.detach(), "hidden": hidden.grad, **grads}


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("into", (pytest.param("grad", marks=pytest.mark.long), "main_grad"))
@pytest.mark.parametrize("fields", ROUTERS.values(), ids=ROUTERS)
def test_a_layer_of_mostly_empty_experts_over_poisoned_memory(
    megatron_cpu, request, monkeypatch, fields, into, backend
):
    """Equal to a dense reference over clean memory: each expert of each token by itself."""
    layer = make(megatron_cpu, fields)

    def reference(hidden):
        routes = layer.router.route(hidden)
        assert routes.topk_ids.unique().numel() <= 28
        return naive_layer(layer, hidden.view(7, HIDDEN), routes).view_as(hidden)

    monkeypatch.setenv("AIR_MOE_BACKEND", "torch")
    expected = outputs_and_gradients(layer, reference)
    monkeypatch.setenv("AIR_MOE_BACKEND", backend)
    request.getfixturevalue("poisoned_memory")
    layer = make(megatron_cpu, fields)
    if into == "main_grad":  # as Megatron's data-parallel wrapper gives it
        for parameter in layer.parameters():
            parameter.main_grad = torch.zeros(parameter.shape)
    found = outputs_and_gradients(layer, lambda hidden: layer(hidden)[0])
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (found[name] is None) == (wanted is None), name
        if wanted is not None:
            torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5)
    experts = found["experts.weight1"].flatten(1)
    assert (experts.abs().sum(dim=1) > 0).sum() <= 28  # exact zeros for all others
