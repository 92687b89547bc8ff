"""Granular experts: gradients in fp64, every activation against Megatron's MLP, precision, flags, checkpoint shards."""

import types

import pytest
import torch
from torch.nn.functional import gelu, silu

from air_moe_megatron import AIRMoEConfig
from air_moe_megatron.layer.experts import GranularExperts
from air_moe_megatron.ops.pair_products import make_pairs

HIDDEN, EXPERTS = 6, 5


def squared_relu(x):
    return torch.relu(x).square()


def make_config(**fields):
    defaults = dict(
        num_layers=2, hidden_size=HIDDEN, num_attention_heads=2, num_moe_experts=EXPERTS, moe_router_topk=2,
        moe_ffn_hidden_size=2, ffn_hidden_size=2, add_bias_linear=False, use_cpu_initialization=True,
        init_method_std=0.5, moe_router_type="air", moe_granular_experts=True,
    )  # fmt: skip
    return AIRMoEConfig(**{**defaults, **fields})


def make_experts(groups, **fields):
    torch.manual_seed(3)
    return GranularExperts(EXPERTS, make_config(**fields), pg_collection=groups)


def make_inputs(dtype=torch.float32):
    """Rows with 0 to 3 experts each; expert 4 has none."""
    generator = torch.Generator().manual_seed(1)
    rows, ids = torch.tensor([0, 0, 2, 2, 2, 3]), torch.tensor([1, 0, 3, 2, 0, 3])
    hidden = torch.randn(5, HIDDEN, generator=generator).to(dtype)
    probs = torch.rand(6, generator=generator).to(torch.promote_types(dtype, torch.float32))
    return hidden, rows, ids, probs, make_pairs(rows, ids, 5, EXPERTS)


def reference(groups, experts, hidden, rows, ids, probs):
    """Pair by pair, each expert as Megatron's own MLP of the same weights."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    config = experts.config
    out = torch.zeros_like(hidden)
    for row, expert, prob in zip(rows.tolist(), ids.tolist(), probs, strict=True):
        mlp = MLP(
            config, MLPSubmodules(ColumnParallelLinear, RowParallelLinear), is_expert=True,
            ffn_hidden_size=config.moe_ffn_hidden_size, tp_group=groups.expt_tp,
        )  # fmt: skip
        with torch.no_grad():
            mlp.linear_fc1.weight.copy_(experts.weight1[expert])
            mlp.linear_fc2.weight.copy_(experts.weight2[expert].t())
        out[row] += mlp(hidden[row : row + 1], prob.view(1))[0][0]
    return out


@pytest.mark.parametrize(
    "fields",
    (
        dict(activation_func=gelu),
        dict(activation_func=silu, gated_linear_unit=True),
        dict(activation_func=gelu, gated_linear_unit=True),
        dict(activation_func=squared_relu),
        dict(activation_func=silu, gated_linear_unit=True, activation_func_clamp_value=0.3, glu_linear_offset=1.0),
        dict(activation_func=gelu, moe_ffn_hidden_size=1, ffn_hidden_size=1),
        dict(activation_func=silu, gated_linear_unit=True, moe_ffn_hidden_size=7, ffn_hidden_size=7),
    ),
    ids=("gelu", "swiglu", "geglu", "squared-relu", "clamped-swiglu", "one-row", "seven-rows"),
)
def test_equals_megatrons_mlp(megatron_cpu, fields):
    experts = make_experts(megatron_cpu, **fields)
    hidden, rows, ids, probs, pairs = make_inputs()
    out, bias = experts(hidden, pairs, probs)
    assert bias is None
    torch.testing.assert_close(out, reference(megatron_cpu, experts, hidden, rows, ids, probs), rtol=1e-5, atol=1e-6)
    assert not out[[1, 4]].any() and out[[0, 2, 3]].any(dim=1).all()


@pytest.mark.parametrize("gated", (False, True), ids=("plain", "gated"))
@pytest.mark.parametrize("ffn", (1, 3))
def test_gradcheck(megatron_cpu, gated, ffn):
    experts = make_experts(
        megatron_cpu, activation_func=gelu, gated_linear_unit=gated, moe_ffn_hidden_size=ffn, ffn_hidden_size=ffn
    ).double()
    hidden, _, _, probs, pairs = make_inputs(torch.float64)

    def forward(hidden, probs, weight1, weight2):
        named = {"weight1": weight1, "weight2": weight2}
        return torch.func.functional_call(experts, named, (hidden, pairs, probs))[0]

    leaves = (hidden, probs, experts.weight1.detach(), experts.weight2.detach())
    assert torch.autograd.gradcheck(forward, [leaf.requires_grad_() for leaf in leaves])


def test_bf16_is_near_fp32(megatron_cpu):
    experts = make_experts(megatron_cpu, activation_func=gelu)
    hidden, _, _, probs, pairs = make_inputs()
    expected = experts(hidden, pairs, probs)[0]
    expected.sum().backward()
    grads = [experts.weight1.grad, experts.weight2.grad]
    low = make_experts(megatron_cpu, activation_func=gelu).bfloat16()
    out = low(hidden.bfloat16(), pairs, probs)[0]
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    for found, wanted in ((out, expected), (low.weight1.grad, grads[0]), (low.weight2.grad, grads[1])):
        error = (found.float() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert error < 0.02  # weights, tokens and results are rounded to 8 bits


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("of_tokens", (True, False), ids=("tokens", "weights"))
def test_tokens_and_weights_may_differ_in_dtype(megatron_cpu, monkeypatch, backend, of_tokens):
    """As under torch.autocast, where earlier layers make bf16 tokens and weights stay fp32."""
    monkeypatch.setenv("AIR_MOE_BACKEND", backend)
    hidden, _, _, probs, pairs = make_inputs(torch.bfloat16)
    found = []
    for is_mixed in (True, False):
        experts = make_experts(megatron_cpu, activation_func=gelu).bfloat16()
        if of_tokens or not is_mixed:
            experts.float()
        tokens = hidden.detach().to(torch.bfloat16 if of_tokens and is_mixed else torch.float32).requires_grad_()
        out = experts(tokens, pairs, probs)[0]
        assert out.dtype == experts.weight2.dtype
        out.square().sum().backward()
        leaves = (tokens, experts.weight1, experts.weight2)
        assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves)
        found.append([out, *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*found, strict=True):
        error = (actual.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 0.01  # results are rounded to 8 bits


def test_no_pairs_give_zeros_and_zero_gradients(megatron_cpu):
    experts = make_experts(megatron_cpu, activation_func=gelu)
    none = torch.zeros(0, dtype=torch.int64)
    for num_rows in (0, 3):
        hidden = torch.randn(num_rows, HIDDEN, requires_grad=True)
        out, _ = experts(hidden, make_pairs(none, none, num_rows, EXPERTS), torch.zeros(0))
        assert out.shape == (num_rows, HIDDEN) and not out.any()
        out.sum().backward()
        assert not experts.weight1.grad.any() and not experts.weight2.grad.any()


def test_weights_are_marked_as_experts_and_sharded_by_global_id(megatron_cpu):
    experts = make_experts(megatron_cpu, activation_func=silu, gated_linear_unit=True)
    assert experts.weight1.shape == (EXPERTS, 4, HIDDEN) and experts.weight2.shape == (EXPERTS, 2, HIDDEN)
    for weight in (experts.weight1, experts.weight2):
        assert weight.allreduce is False
        assert weight.tensor_model_parallel is True
    second_of_three = types.SimpleNamespace(rank=lambda: 1, size=lambda: 3)
    experts.ep_group = second_of_three
    state = experts.sharded_state_dict("experts.", ((0, 4, 8),))
    shard = state["experts.weight1"]
    assert set(state) == {"experts.weight1", "experts.weight2"}
    assert shard.global_shape == (8, 3 * EXPERTS, 4, HIDDEN)
    assert shard.global_offset == (4, EXPERTS, 0, 0)
    assert shard.replica_id == (0, 0, 0)


def test_output_projection_is_initialized_by_its_own_rule(megatron_cpu):
    many = make_config(num_moe_experts=2000, init_method_std=0.5)
    experts = GranularExperts(2000, many, pg_collection=megatron_cpu)
    assert experts.weight1.detach().std() == pytest.approx(0.5, rel=0.05)
    assert experts.weight2.detach().std() == pytest.approx(0.5 / (2 * many.num_layers) ** 0.5, rel=0.05)
    assert experts.weight1[0].ne(experts.weight1[1]).all()  # within a block of one seed
    assert experts.weight1[0].ne(experts.weight1[256]).all()  # and across blocks
    bare = GranularExperts(4, make_config(perform_initialization=False, num_moe_experts=4), pg_collection=megatron_cpu)
    assert bare.weight1.shape == (4, 2, HIDDEN)


def test_a_method_that_looks_at_the_shape_gets_the_matrix_of_one_expert(megatron_cpu):
    shapes = []

    def method(matrix):
        shapes.append(tuple(matrix.shape))
        torch.nn.init.xavier_uniform_(matrix)

    config = make_config(num_moe_experts=300, init_method=method, output_layer_init_method=method)
    experts = GranularExperts(300, config, pg_collection=megatron_cpu)
    rows = experts.weight1.shape[1]
    assert set(shapes) == {(rows, HIDDEN), (HIDDEN, rows)}  # as those of Megatron's two projections
    largest = (6 / (rows + HIDDEN)) ** 0.5
    for weight in (experts.weight1, experts.weight2):
        assert 0.95 * largest < weight.abs().amax() <= largest
        assert weight[0].ne(weight[1]).all() and weight[0].ne(weight[256]).all()


def test_initialization_leaves_the_generators_of_gpus_alone(megatron_cpu, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    config, before = make_config(), torch.get_rng_state()
    GranularExperts(EXPERTS, config, pg_collection=megatron_cpu)
    assert seeded == []
    torch.set_rng_state(before)
    torch.randint(2**31, ()), torch.randint(2**31, ())  # one seed for each weight is all that it draws
    expected = torch.get_rng_state()
    torch.set_rng_state(before)
    GranularExperts(EXPERTS, config, pg_collection=megatron_cpu)
    assert torch.equal(torch.get_rng_state(), expected)
