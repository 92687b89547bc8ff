"""The compact layer: nothing of size [tokens, experts], few waits for the device, equal to the stock path."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from air_moe_megatron import AIRMoELayer, AIRRouter, update_codebooks
from air_moe_megatron.layer.experts import GranularExperts
from air_moe_megatron.learned.module_state import HostCopy
from air_moe_megatron.specs import require_routers
from tests import builders

HIDDEN = 8
AIR = dict(hidden_size=HIDDEN, moe_router_type="air")
EVERY_LOSS = dict(
    moe_router_load_balancing_type=["aux_loss", "seq_aux_loss", "global_aux_loss"],
    moe_aux_loss_coeff=[0.01, 0.01, 0.01],
    moe_z_loss_coeff=0.001,
)

SHARDED = dict(moe_air_shard_experts=True, moe_air_list_parts=2)


def make_layer(groups, num_experts=64, **fields):
    return builders.make_layer(groups, **{**AIR, "num_moe_experts": num_experts, **fields})


def test_probs_that_are_not_finite_name_their_layer(megatron_cpu):
    layer = make_layer(megatron_cpu)
    layer.set_layer_number(7)
    with torch.no_grad():
        layer.router.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="^layer 7: .* of the routing probs of expert-parallel rank 0 are NaN"):
        layer(torch.randn(4, 2, HIDDEN))


class Recorder(TorchDispatchMode):
    """The largest tensor that any operation returns, in numbers of four bytes, and the operations that make the host
    wait."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "repeat_interleave", "equal")

    def __init__(self):
        super().__init__()
        self.largest, self.waits = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        sizes = [(t.numel() if t.layout == torch.strided else t._nnz()) * t.itemsize // 4 for t in tensors]
        self.largest = max([self.largest, *sizes])
        name = function.name().removeprefix("aten::").split(".")[0]
        if (
            name in self.WAITS
            or name == "index"
            and any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1]))
        ):
            self.waits.append(name)
        return out


@pytest.mark.parametrize(
    "fields",
    ({}, EVERY_LOSS, SHARDED, {**EVERY_LOSS, **SHARDED}),
    ids=("no-loss", "every-loss", "sharded", "sharded-every-loss"),
)
def test_nothing_is_as_large_as_tokens_times_experts(megatron_cpu, fields):
    """Nor much larger than [T, C], [T, L] or the weights; and the recorder does see [T, E] in the stock path."""
    tokens, num_experts = 512, 16384
    largest, rebuilding = {}, {}
    for dispatch in ("compact", "stock"):
        stock = {}
        if dispatch == "stock":
            stock = dict(moe_dispatch="stock", moe_token_dispatcher_type="alltoall", moe_air_shard_experts=False)
        layer = make_layer(megatron_cpu, num_experts, **{**fields, **stock})
        layer.train()
        hidden = torch.randn(tokens // 2, 2, HIDDEN, requires_grad=True)
        for found in (rebuilding, largest):
            with Recorder() as recorder:
                out, _ = layer(hidden)
                out.sum().backward()
            found[dispatch] = recorder.largest
        assert layer.router.weight.grad.any()
    sizes = layer.router.sizes
    # Rebuilding streams the experts in chunks, of which this small layer needs only one.
    assert rebuilding["compact"] <= max(sizes.num_clusters, 2 * sizes.shortlist_size) * num_experts < largest["stock"]
    per_token = max(sizes.num_clusters, sizes.num_probes * sizes.shortlist_size)
    assert largest["compact"] <= 2 * max(tokens * per_token, num_experts * HIDDEN) < tokens * num_experts / 10
    assert largest["stock"] >= tokens * num_experts


@pytest.mark.parametrize(
    "fields",
    (
        {},
        dict(moe_ffn_hidden_size=3, gated_linear_unit=True, activation_func=torch.nn.functional.silu),
        EVERY_LOSS,
        dict(moe_air_num_probes=2),
        dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
        dict(moe_air_codebook_source="experts", moe_air_num_probes=2),
        SHARDED,
    ),
    ids=("softmax", "gated", "every-loss", "two-probes", "sigmoid-bias", "lists-of-experts", "sharded"),
)
def test_a_step_waits_for_the_device_twice(megatron_cpu, monkeypatch, fields):
    monkeypatch.setattr(HostCopy, "is_on_cpu", lambda _: False)  # as on a device
    layer = make_layer(megatron_cpu, **fields)
    layer(torch.randn(20, 1, HIDDEN))
    lists = []
    original = torch.Tensor.tolist

    def tolist(tensor):
        lists.append(tuple(tensor.shape))
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    with Recorder() as recorder:
        # The lists are up to date, and no token is padding.
        out, _ = layer(torch.randn(20, 1, HIDDEN, requires_grad=True))
        out.sum().backward()
    assert recorder.waits == []
    assert len(lists) == 2, lists  # rows of each codeword, and rows and pairs of each rank


def steps(layer, seed=0):
    """Outputs and gradients over two training steps, with a codebook update between."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(2):
        hidden = torch.randn(15, 2, HIDDEN, generator=generator).requires_grad_()
        out, bias = layer(hidden)
        assert bias is None
        grads = torch.autograd.grad(out.square().sum(), [hidden, *layer.parameters()])
        found += [out, *grads]
        update_codebooks(layer)
    return found


@pytest.mark.parametrize(
    "fields",
    (
        {},
        EVERY_LOSS,
        dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
        dict(moe_air_codebook_source="experts", moe_air_num_probes=2),
        dict(
            moe_air_codebook_source="experts",
            moe_air_num_clusters=10,
            moe_air_shortlist_size=8,
            moe_router_topk=6,
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
        ),
        dict(moe_shared_expert_intermediate_size=4),
    ),
    ids=("softmax", "every-loss", "sigmoid-bias", "lists-of-experts", "lists-that-run-out", "shared-expert"),
)
def test_compact_equals_stock(megatron_cpu, fields):
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    layers = []
    for stock in ({}, dict(moe_dispatch="stock", moe_token_dispatcher_type="alltoall")):
        if "moe_shared_expert_intermediate_size" in fields:
            from air_moe_megatron.specs import with_air_layers

            config = builders.make_config(**AIR, **fields, **stock)
            spec = get_moe_module_spec(use_te=False, num_experts=64, moe_grouped_gemm=False)
            torch.manual_seed(0)
            layer = with_air_layers(spec, config)(config, layer_number=1, pg_collection=megatron_cpu)
            layer.set_layer_number(1)
            assert isinstance(layer, AIRMoELayer) and layer.shared_experts is not None
        else:
            layer = make_layer(megatron_cpu, **fields, **stock)
        layers.append(layer)
    assert layers[0].is_compact and not layers[1].is_compact
    layers[1].load_state_dict(layers[0].state_dict())
    for found, expected in zip(steps(layers[0]), steps(layers[1]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dispatch", ("compact", "stock"))
@pytest.mark.parametrize("fields", ({}, dict(gated_linear_unit=True, moe_ffn_hidden_size=3)), ids=("plain", "gated"))
def test_a_compiled_layer_equals_the_layer(megatron_cpu, monkeypatch, dispatch, fields):
    """Every operation breaks the graph: what is compiled is around them, and outputs and gradients are the same."""
    fields = fields | dict(moe_dispatch=dispatch)
    if dispatch == "stock":
        fields |= dict(moe_token_dispatcher_type="alltoall")
    layers = [make_layer(megatron_cpu, **fields) for _ in range(2)]
    expected = steps(layers[0])
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")  # CPU mode sets it
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch._dynamo.config.patch(disable=False):
        layers[1].compile(backend=backend)
        found = steps(layers[1])
    assert graphs
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_hooks_of_every_part_run(megatron_cpu):
    """Megatron gathers the parameters of a module in a hook before its forward, with --overlap-param-gather."""
    layer = make_layer(megatron_cpu)
    called = []
    for name in ("router", "experts"):
        getattr(layer, name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
    layer(torch.randn(5, 1, HIDDEN))
    assert called == ["router", "experts"]


def test_padding_is_not_dispatched_and_counts_nowhere(megatron_cpu):
    """Outputs and gradients of the other tokens are those of a batch without padding; that of padding is zero."""
    hidden = torch.randn(20, 1, HIDDEN)
    padding = (torch.arange(20) % 10 >= 7).unsqueeze(1)
    kept = ~padding.flatten()
    padded = hidden.masked_fill(padding.unsqueeze(2), float("nan"))
    found = []
    for tokens, mask in ((hidden[kept], None), (padded, padding.t())):
        layer = make_layer(megatron_cpu).train()
        output = layer(tokens, padding_mask=mask)[0]
        if mask is not None:
            assert not output[~kept].any()
            assert layer.token_dispatcher.traffic.row_bytes == 14 * 4 * HIDDEN
            assert layer.token_dispatcher.traffic.pair_bytes == 14 * 4 * (4 + 4)
            output = output[kept]
        assert int(layer.router.expert_load.sum()) == 14 * 4
        assert int(layer.router.codebook.statistics[:, HIDDEN].sum()) == 14
        output.square().sum().backward()
        found.append([output, *(parameter.grad for parameter in layer.parameters())])
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("source", ("tokens", "experts"))
def test_a_batch_of_padding_alone_gives_zeros(megatron_cpu, source):
    layer = make_layer(
        megatron_cpu,
        moe_air_codebook_source=source,
        moe_aux_loss_coeff=0.1,
        moe_z_loss_coeff=0.1,
        moe_router_load_balancing_type="aux_loss",
    ).train()
    hidden = torch.randn(6, 2, HIDDEN, requires_grad=True)
    output = layer(hidden, padding_mask=torch.ones(2, 6, dtype=torch.bool))[0]
    assert not output.any()
    output.sum().backward()
    for parameter in (hidden, *layer.parameters()):
        assert not parameter.grad.any()


def test_a_layer_that_cannot_dispatch_compact_routes_is_named(megatron_cpu):
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

    layer = make_layer(megatron_cpu)
    assert require_routers([layer]) == [layer]
    submodules = MoESubmodules(experts=GranularExperts, router=AIRRouter)
    plain = torch.nn.ModuleDict({"mlp": MoELayer(layer.config, submodules, 1, megatron_cpu)})
    with pytest.raises(ValueError, match="moe_dispatch 'compact' did not reach mlp, a MoELayer"):
        require_routers([plain])


@pytest.mark.parametrize("is_sharded", (False, True))
def test_a_router_that_does_not_fit_sharded_routing_is_refused(megatron_cpu, is_sharded):
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    from air_moe_megatron.routers import ShardedAIRRouter

    config = builders.make_config(**AIR, **(SHARDED if is_sharded else {}))
    router = AIRRouter if is_sharded else ShardedAIRRouter
    with pytest.raises(ValueError, match=rf"moe_air_shard_experts \({is_sharded}\) .* {router.__name__}"):
        AIRMoELayer(config, MoESubmodules(experts=GranularExperts, router=router), 1, megatron_cpu)
