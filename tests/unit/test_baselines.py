"""What every baseline shares: the layer on both paths, padding, checkpoints, odd numbers of tokens, losses, counts."""

import pytest
import torch

from air_moe_megatron.config import ROUTER_TYPES
from air_moe_megatron.routers import ROUTERS
from air_moe_megatron.sync import update_codebooks
from tests.builders import HIDDEN, make_config, make_layer, make_router, tell_ids

pytestmark = pytest.mark.usefixtures("megatron_cpu")

EVERY_LOSS = dict(
    moe_router_load_balancing_type=["aux_loss", "seq_aux_loss", "global_aux_loss"],
    moe_aux_loss_coeff=[0.01, 0.01, 0.01],
    moe_z_loss_coeff=0.001,
)
BASELINES = {
    "exact": dict(moe_router_type="topk"),
    "exact-losses": dict(moe_router_type="topk", **EVERY_LOSS),
    "exact-bias": dict(moe_router_type="topk", moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
    "product-keys": dict(moe_router_type="product_key", **EVERY_LOSS),
    "product-keys-one-head-layernorm": dict(
        moe_router_type="product_key", moe_product_key_heads=1, moe_product_key_query_norm="layernorm"
    ),
    "product-keys-on-tokens": dict(
        moe_router_type="product_key", moe_product_key_heads=1, moe_product_key_on_tokens=True
    ),
    "omnimoe": dict(
        moe_router_type="product_key", moe_product_key_heads=1, moe_product_key_on_tokens=True,
        moe_router_pre_softmax=True, **EVERY_LOSS,
    ),
    "product-keys-sigmoid": dict(
        moe_router_type="product_key", moe_product_key_heads=4, moe_router_score_function="sigmoid"
    ),
    "hierarchical": dict(moe_router_type="hierarchical", **EVERY_LOSS),
    "hash": dict(moe_router_type="hash"),
    "vq": dict(moe_router_type="vq", moe_z_loss_coeff=0.001),
}  # fmt: skip


def steps(layer, seed=0):
    """Outputs and gradients over two training steps."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(2):
        hidden = torch.randn(15, 2, HIDDEN, generator=generator).requires_grad_()
        tell_ids(layer.router, torch.randint(40, (2, 15), generator=generator))
        out, _ = layer(hidden)
        found.append(out)
        found += torch.autograd.grad(out.square().sum(), [hidden, *layer.parameters()], allow_unused=True)
    return [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize("fields", BASELINES.values(), ids=BASELINES)
def test_compact_equals_stock(megatron_cpu, fields):
    layers = [make_layer(megatron_cpu, **fields)]
    layers.append(make_layer(megatron_cpu, moe_dispatch="stock", moe_token_dispatcher_type="alltoall", **fields))
    layers[1].load_state_dict(layers[0].state_dict())
    assert layers[0].is_compact and not layers[1].is_compact
    found, expected = (steps(layer) for layer in layers)
    assert len(found) == len(expected) >= 8
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", BASELINES.values(), ids=BASELINES)
def test_megatrons_own_experts_take_the_dense_maps(megatron_cpu, fields):
    """The router alone under Megatron's dispatchers: K experts of each token, with the probs of the compact routes."""
    router = make_router(megatron_cpu, **{**fields, "moe_dispatch": "stock"})
    hidden = torch.randn(7, 3, HIDDEN)
    tell_ids(router, torch.arange(21).view(3, 7))
    probs, routing_map = router(hidden)
    assert probs.shape == routing_map.shape == (21, router.num_experts)
    assert (routing_map.sum(dim=1) == router.topk).all()
    assert not probs[~routing_map].any()
    router.eval() if fields["moe_router_type"] == "product_key" else None
    probs, _ = router(hidden)
    routes = router.route(hidden)
    expected = torch.zeros(21, router.num_experts)
    for token in range(21):
        for expert, prob in zip(routes.topk_ids[token].tolist(), routes.probs[token].tolist(), strict=True):
            expected[token, expert] += prob
    torch.testing.assert_close(probs, expected)


@pytest.mark.parametrize("fields", BASELINES.values(), ids=BASELINES)
def test_the_scaling_factor_scales_every_prob(megatron_cpu, fields):
    """Without it a comparison of routers compares the scales of their probs."""
    hidden, routes = torch.randn(21, HIDDEN), []
    for scaled in ({}, dict(moe_router_topk_scaling_factor=3.0)):
        router = make_router(megatron_cpu, **fields, **scaled)
        tell_ids(router, torch.arange(21).view(1, 21))
        routes.append(router.route(hidden))
    assert torch.equal(routes[0].topk_ids, routes[1].topk_ids)
    torch.testing.assert_close(routes[1].probs, 3 * routes[0].probs)


@pytest.mark.parametrize("fields", BASELINES.values(), ids=BASELINES)
@pytest.mark.parametrize("num_tokens", (0, 1))
def test_no_token_and_one_token(megatron_cpu, fields, num_tokens):
    router = make_router(megatron_cpu, **fields)
    tell_ids(router, torch.zeros(1, num_tokens, dtype=torch.int64))
    hidden = torch.randn(num_tokens, 1, HIDDEN, requires_grad=True)
    routes = router.route(hidden)
    assert routes.topk_ids.shape == routes.probs.shape == (num_tokens, router.topk)
    assert routes.topk_ids.dtype == torch.int32 and routes.probed is None
    if routes.probs.requires_grad and num_tokens:
        routes.probs.square().sum().backward()
        assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("fields", BASELINES.values(), ids=BASELINES)
def test_every_parameter_gets_a_gradient_and_follows_the_routers_marks(megatron_cpu, fields):
    router = make_router(megatron_cpu, params_dtype=torch.bfloat16, bf16=True, **fields)
    for name, parameter in router.named_parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.sequence_parallel is False, name
    tell_ids(router, torch.zeros(2, 30, dtype=torch.int64))
    routes = router.route(torch.randn(30, 2, HIDDEN, dtype=torch.bfloat16))
    assert routes.probs.dtype == torch.float32
    if list(router.parameters()):
        (routes.probs * torch.randn(routes.probs.shape)).sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("fields", BASELINES.values(), ids=BASELINES)
def test_padding_has_no_experts_and_counts_nowhere(megatron_cpu, fields):
    """The gradients of padded tokens' companions, losses and statistics included, are those of a batch without them."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(12, 1, HIDDEN, generator=generator)
    hidden[10] = float("nan")  # padding may hold anything
    padding = torch.arange(12).view(12, 1) >= 8
    weights = torch.randn(8, 4, generator=generator)
    found = []
    for length, mask in ((8, None), (12, padding)):
        router = make_router(megatron_cpu, **fields)
        tell_ids(router, torch.arange(length).view(1, length))
        routes = router.route(hidden[:length], mask)
        assert int(router.expert_load.sum()) == 8 * router.topk
        assert (routes.topk_ids[8:] == -1).all() and not routes.probs[8:].any()
        loss = (routes.probs[:8] * weights).sum()
        grads = torch.autograd.grad(loss, list(router.parameters())) if list(router.parameters()) else []
        buffers = [buffer for name, buffer in router.named_buffers() if "tokens_per_expert" not in name]
        found.append([routes.topk_ids[:8], routes.probs[:8], *grads, *buffers])
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", BASELINES.values(), ids=BASELINES)
def test_checkpoints_hold_the_whole_router(megatron_cpu, fields):
    router, other = make_router(megatron_cpu, **fields), make_router(megatron_cpu, seed=5, **fields)
    tell_ids(router, torch.zeros(1, 9, dtype=torch.int64))
    router.route(torch.randn(9, 1, HIDDEN))
    update_codebooks(router)  # running statistics move
    state = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    assert {name for name, _ in router.named_parameters()} <= state.keys()
    sharded = {name.removeprefix("router."): part for name, part in router.sharded_state_dict("router.").items()}
    assert sharded.keys() == state.keys()
    other.load_state_dict(state)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("router_type", sorted(ROUTERS))
def test_everything_follows_the_tokens_to_their_device(megatron_cpu, router_type):
    """With use_cpu_initialization nobody else moves the buffers to the GPU."""
    norm = {} if router_type in ("product_key", "hash") else dict(moe_router_input_norm="running")
    router = make_router(megatron_cpu, moe_router_type=router_type, **norm)
    router._follow_device(torch.empty(1, device="meta"))
    tensors = dict(router.named_parameters()) | dict(router.named_buffers())
    assert tensors and {tensor.device.type for tensor in tensors.values()} == {"meta"}


def test_running_statistics_stay_fp32_in_a_model_of_bf16(megatron_cpu):
    router = make_router(megatron_cpu, moe_router_type="product_key").bfloat16()
    assert router.query_norm.mean.dtype == torch.float32
    assert router.query_norm.variance.dtype == torch.float64
    assert router.keys1.dtype == torch.bfloat16


@pytest.mark.parametrize("router_type", ("product_key", "hash"))
def test_no_weight_per_expert_is_held(megatron_cpu, router_type):
    router = make_router(megatron_cpu, moe_router_type=router_type, num_moe_experts=2**16)
    assert router.weight is None and router.bias is None
    assert sum(parameter.numel() for parameter in router.parameters()) < 2**16 * HIDDEN / 4


@pytest.mark.parametrize("router_type", [name for name in ROUTERS if name != "air"])
def test_capacity_on_the_stock_path(megatron_cpu, router_type):
    fields = dict(moe_router_type=router_type, moe_dispatch="stock", moe_expert_capacity_factor=1.0)
    router = make_router(megatron_cpu, moe_token_dispatcher_type="alltoall", **fields)
    tell_ids(router, torch.zeros(1, 32, dtype=torch.int64))
    _, routing_map = router(torch.randn(32, 1, HIDDEN))
    capacity = -(-32 * router.topk // router.num_experts)
    assert routing_map.sum(dim=0).max() <= capacity
    assert 0 < router.expert_load.sum() <= routing_map.sum() < 32 * router.topk  # dropped tokens do not count
    assert router.expert_load.max() <= capacity and router.num_routed == 32
    with pytest.raises(ValueError, match="moe_expert_capacity_factor"):
        router.route(torch.randn(32, 1, HIDDEN))


def test_specs_build_the_router_of_the_type(megatron_cpu):
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec

    from air_moe_megatron.routers import AIRRouter, find_routers
    from air_moe_megatron.specs import require_routers, with_air_layers

    for router_type, router_class in ROUTERS.items():
        layer = make_layer(megatron_cpu, moe_router_type=router_type)
        spec = get_moe_module_spec(use_te=False, num_experts=64, moe_grouped_gemm=False)
        assert with_air_layers(spec, layer.config).keywords["submodules"].router is router_class
        assert require_routers([layer]) == [layer]
        assert len(find_routers(layer, AIRRouter)) == (router_type == "air")
        layer.config = make_config(moe_router_type="air")
        layer.router.config = layer.config
        if router_type != "air":
            with pytest.raises(
                ValueError, match=f"moe_router_type 'air' did not reach router, a {router_class.__name__}"
            ):
                require_routers([layer])


def test_what_a_type_is_stands_on_its_class(megatron_cpu):
    assert tuple(ROUTERS) == ROUTER_TYPES
    routers = {name: make_router(megatron_cpu, moe_router_type=name) for name in ROUTERS}
    for name, router in routers.items():
        assert type(router) is ROUTERS[name] and router.router_type == name
        holders = [other for other in routers if router.checkpoint_key in routers[other].state_dict()]
        assert holders == ([] if name in ("topk", "air") else [name])
        assert all(hasattr(router.config, field) for field in router.checkpoint_fields(router.config))
