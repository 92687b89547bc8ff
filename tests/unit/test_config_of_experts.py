"""AIRMoEConfig: what granular experts, compact dispatch and sharded routing exclude, and with which words."""

import pytest

from air_moe_megatron.config import validate
from tests.builders import assert_says, plain_config

# Settings that granular experts, or compact dispatch, exclude: the field, its value, and a word of the reason. They are
# set after construction, as Megatron's own checks want companions of some.
NOT_WITH_GRANULAR_EXPERTS = {
    "expert-tensor-parallel": (
        dict(expert_tensor_parallel_size=2),
        ["expert_tensor_parallel_size (2)", "add --expert-tensor-parallel-size 1"],
    ),
    "biases": (dict(add_bias_linear=True), ["add_bias_linear (True)", "--disable-bias-linear"]),
    "no-hidden-size": (dict(moe_ffn_hidden_size=None), ["moe_ffn_hidden_size (None)", "at least 1"]),
    "hidden-size-zero": (dict(moe_ffn_hidden_size=0), ["moe_ffn_hidden_size (0)", "at least 1"]),
    "fp8": (dict(fp8="e4m3"), ["fp8 ('e4m3')", "8 or 4 bits"]),
    "fp4": (dict(fp4="e2m1"), ["fp4 ('e2m1')", "8 or 4 bits"]),
    "latent-size": (dict(moe_latent_size=8), ["moe_latent_size (8)", "hidden_size"]),
    "interleaved-gates": (
        dict(moe_mlp_glu_interleave_size=4),
        ["moe_mlp_glu_interleave_size (4)", "Transformer Engine"],
    ),
    "grouped-weight": (
        dict(moe_single_grouped_weight=True),
        ["moe_single_grouped_weight (True)", "Transformer Engine"],
    ),
    "te-activation": (dict(use_te_activation_func=True), ["use_te_activation_func (True)", "Transformer Engine"]),
    "kitchen": (dict(use_kitchen=True), ["use_kitchen (True)", "linear layers"]),
    "grouped-gemm": (dict(moe_grouped_gemm=True), ["moe_grouped_gemm (True)", "one tensor already"]),
    "probs-on-input": (dict(moe_apply_probs_on_input=True), ["moe_apply_probs_on_input (True)", "activations"]),
    "recomputed-activation": (
        dict(recompute_granularity="selective", recompute_modules=["core_attn", "moe_act"]),
        ["recompute_modules (['core_attn', 'moe_act'])", "recompute 'moe' instead"],
    ),
    "offloaded-projection": (
        dict(fine_grained_activation_offloading=True, offload_modules=["expert_fc1"]),
        ["offload_modules (['expert_fc1'])", "'expert_fc1' and 'moe_act'"],
    ),
    "offloaded-activation": (
        dict(fine_grained_activation_offloading=True, offload_modules=["attn_norm", "moe_act"]),
        ["offload_modules (['attn_norm', 'moe_act'])", "'expert_fc1' and 'moe_act'"],
    ),
    "weight-shards": (
        dict(expert_gtp_weight_remat_size=2),
        ["expert_gtp_weight_remat_size (2)", "expert-parallel"],
    ),
    "delayed-gradients": (dict(delay_wgrad_compute=True), ["delay_wgrad_compute (True)", "one pass"]),
    "overlapped-gradients": (
        dict(overlap_dispatch_backward_with_experts_wgrad=True),
        ["overlap_dispatch_backward_with_experts_wgrad (True)", "one pass"],
    ),
}
NOT_WITH_COMPACT_DISPATCH = {
    "capacity": (dict(moe_expert_capacity_factor=1.5), ["moe_expert_capacity_factor (1.5)", "dense maps"]),
    "capacity-of-a-rank": (
        dict(moe_expert_rank_capacity_factor=2.0),
        ["moe_expert_rank_capacity_factor (2.0)", "drops no token"],
    ),
    "overlapped-shared-expert": (
        dict(moe_shared_expert_overlap=True),
        ["moe_shared_expert_overlap (True)", "shared expert"],
    ),
    "flex": (dict(moe_token_dispatcher_type="flex"), ["moe_token_dispatcher_type ('flex')", "DeepEP"]),
    "overlapped-communication": (
        dict(overlap_moe_expert_parallel_comm=True),
        ["overlap_moe_expert_parallel_comm (True)", "schedule"],
    ),
    "fused-permutation": (dict(moe_permute_fusion=True), ["moe_permute_fusion (True)", "not permuted"]),
    "padding-for-quantization": (
        dict(moe_router_padding_for_quantization=True),
        ["moe_router_padding_for_quantization (True)", "not permuted"],
    ),
    "padding-for-fp8": (
        dict(moe_router_padding_for_fp8=True),
        ["moe_router_padding_for_fp8 (True)", "not permuted"],
    ),
}


def with_settings(config, settings):
    for name, value in settings.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("settings, words", NOT_WITH_GRANULAR_EXPERTS.values(), ids=NOT_WITH_GRANULAR_EXPERTS)
def test_what_granular_experts_cannot_do_is_refused_with_the_reason(settings, words):
    validate(with_settings(plain_config(), settings))  # Megatron's own experts can
    config = with_settings(plain_config(moe_granular_experts=True), settings)
    with pytest.raises(ValueError) as error:
        validate(config)
    assert_says(error, [*words, "moe_granular_experts (True)"])


@pytest.mark.parametrize("settings, words", NOT_WITH_COMPACT_DISPATCH.values(), ids=NOT_WITH_COMPACT_DISPATCH)
def test_what_compact_dispatch_cannot_do_is_refused_with_the_reason(settings, words):
    validate(with_settings(plain_config(moe_granular_experts=True), settings))  # Megatron's own dispatchers can
    with pytest.raises(ValueError) as error:
        validate(with_settings(plain_config(moe_granular_experts=True, moe_dispatch="compact"), settings))
    assert_says(error, [*words, "moe_dispatch 'compact'"])


def test_compact_dispatch_needs_granular_experts():
    with pytest.raises(ValueError) as error:
        plain_config(moe_dispatch="compact")
    assert_says(error, ["moe_granular_experts (False)", "moe_dispatch 'compact'", "--moe-granular-experts"])


def test_the_topk_router_takes_granular_experts_and_then_compact_dispatch():
    plain_config(moe_router_type="topk", moe_granular_experts=True)
    plain_config(moe_router_type="topk", moe_granular_experts=True, moe_dispatch="compact")
    with pytest.raises(ValueError) as error:
        plain_config(moe_router_type="topk", moe_dispatch="compact")
    assert_says(error, ["moe_dispatch ('compact')", "moe_router_type 'topk'", "--moe-granular-experts"])


def test_an_unknown_dispatch_is_refused():
    with pytest.raises(ValueError, match=r"moe_dispatch \('sparse'\) must be 'stock' or 'compact'"):
        plain_config(moe_dispatch="sparse")


@pytest.mark.parametrize("gated, num_rows", [(False, 2**30), (True, 2**29)], ids=("plain", "gated"))
def test_the_rows_of_a_rank_are_fewer_than_an_int32_counts(gated, num_rows):
    """Two experts of a rank; the largest size that is accepted, and one more."""
    settings = dict(moe_granular_experts=True, num_moe_experts=8, expert_model_parallel_size=4, gated_linear_unit=gated)
    plain_config(**settings, moe_ffn_hidden_size=num_rows - 1)
    with pytest.raises(ValueError) as error:
        plain_config(**settings, moe_ffn_hidden_size=num_rows)
    words = ["num_moe_experts (8)", "expert_model_parallel_size (4)", f"{2**30} rows each", f"makes {2**31} rows"]
    assert_says(error, [*words, "fewer than 2^31"])


@pytest.mark.parametrize("modules", (["moe"], ["core_attn"]), ids=("moe", "attention"))
@pytest.mark.parametrize("dispatch", ("stock", "compact"))
def test_recomputed_modules_shared_experts_and_single_rows_are_accepted(dispatch, modules):
    plain_config(
        transformer_impl="local",
        moe_granular_experts=True,
        moe_dispatch=dispatch,
        recompute_granularity="selective",
        recompute_modules=modules,
        moe_shared_expert_intermediate_size=16,
        moe_ffn_hidden_size=1,
    )


# What sharded routing does not take: the fields, and words of the message.
NOT_SHARDED = {
    "fewer-parts-than-ranks": (
        dict(moe_air_list_parts=2, expert_model_parallel_size=4),
        ["moe_air_list_parts (2)", "multiple of expert_model_parallel_size (4)"],
    ),
    "stock": (dict(moe_dispatch="stock"), ["moe_dispatch ('stock')", "add --moe-dispatch compact"]),
    "source": (
        dict(moe_air_codebook_source="experts", moe_air_list_parts=1),
        ["moe_air_codebook_source ('experts')", "use 'tokens'"],
    ),
    "hash-layers": (
        dict(moe_num_hash_layers=1, num_layers=2, moe_hash_vocab_size=10),
        ["moe_num_hash_layers (1)", "a hash router gathers none"],
    ),
    "jitter": (dict(moe_input_jitter_eps=0.1), ["moe_input_jitter_eps (0.1)", "without jitter"]),
    "load-test": (
        dict(moe_router_force_load_balancing=True),
        ["moe_router_force_load_balancing (True)", "its own only"],
    ),
}


@pytest.mark.parametrize("fields, words", NOT_SHARDED.values(), ids=NOT_SHARDED)
def test_what_sharded_routing_does_not_take_is_refused_with_the_reason(fields, words):
    compact = dict(moe_granular_experts=True, moe_dispatch="compact", add_bias_linear=False, moe_air_list_parts=4)
    plain_config(**compact, moe_air_shard_experts=True, expert_model_parallel_size=4)
    with pytest.raises(ValueError) as error:
        plain_config(**{**compact, **fields}, moe_air_shard_experts=True)
    assert_says(error, [*words, "moe_air_shard_experts (True)"])
