"""AIRMoEConfig: what is refused, and with which words."""

from dataclasses import fields

import pytest
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from air_moe_megatron.config import (
    ROUTER_TYPES,
    AIRFields,
    attach,
    resolve_sizes,
    validate,
)
from tests.builders import PLAIN, assert_says, plain_config

# Settings, and what the message must hold: the field, its value, the rule and the other value.
REFUSED = {
    "unknown-router": (dict(moe_router_type="soft"), ["moe_router_type ('soft')", "'topk', 'air'", "or 'vq'"]),
    "no-experts": (
        dict(num_moe_experts=None, moe_ffn_hidden_size=None),
        ["moe_router_type ('air')", "num_moe_experts", "not set"],
    ),
    "unknown-source": (
        dict(moe_air_codebook_source="weights"),
        ["moe_air_codebook_source ('weights')", "'tokens' or 'experts'"],
    ),
    "decay-zero": (dict(moe_air_codebook_ema=0.0), ["moe_air_codebook_ema (0.0)", "between 0 and 1"]),
    "decay-one": (dict(moe_air_codebook_ema=1.0), ["moe_air_codebook_ema (1.0)", "between 0 and 1"]),
    "decay-negative": (dict(moe_air_codebook_ema=-0.5), ["moe_air_codebook_ema (-0.5)", "between 0 and 1"]),
    "interval-zero": (dict(moe_air_refresh_interval=0), ["moe_air_refresh_interval (0)", "at least 1"]),
    "clusters-negative": (dict(moe_air_num_clusters=-8), ["moe_air_num_clusters (-8)", "positive, or 0"]),
    "shortlist-negative": (dict(moe_air_shortlist_size=-1), ["moe_air_shortlist_size (-1)", "positive, or 0"]),
    "candidates-fewer-than-topk": (
        dict(moe_air_num_candidates=1),
        ["moe_air_num_candidates (1)", "between moe_router_topk (4)"],
    ),
    "explored-negative": (dict(moe_air_num_explored=-1), ["moe_air_num_explored (-1)", "at least 0"]),
    "candidates-more-than-searched": (
        dict(moe_air_num_candidates=33, moe_air_num_probes=2, moe_air_shortlist_size=16),
        ["moe_air_num_candidates (33)", "moe_air_num_probes (2) times moe_air_shortlist_size (16)"],
    ),
    "candidates-with-expert-bias": (
        dict(
            moe_air_num_candidates=4,
            moe_router_enable_expert_bias=True,
            moe_router_score_function="sigmoid",
        ),
        ["moe_air_num_candidates (4)", "moe_router_enable_expert_bias (True)"],
    ),
    "no-moe-layer": (dict(moe_layer_freq=[0, 0]), ["moe_layer_freq ([0, 0])", "must have a 1"]),
    "layer-without-entry": (
        dict(num_layers=3, moe_layer_freq=[0, 1]),
        ["moe_layer_freq ([0, 1])", "an entry for each layer, by num_layers (3)", "it has 2"],
    ),
    "moe-layer-frequency-zero": (dict(moe_layer_freq=0), ["moe_layer_freq (0)", "at least 1"]),
    "probes-negative": (dict(moe_air_num_probes=-1), ["moe_air_num_probes (-1)", "positive, or 0"]),
    "probes-above-clusters": (
        dict(moe_air_num_probes=9, moe_air_num_clusters=8),
        ["moe_air_num_probes (9)", "must not exceed", "moe_air_num_clusters (8)"],
    ),
    "probes-above-automatic-clusters": (
        dict(moe_air_num_probes=33),
        ["moe_air_num_probes (33)", "must not exceed", "moe_air_num_clusters (32)"],
    ),
    "clusters-above-experts": (
        dict(moe_air_num_clusters=65),
        ["moe_air_num_clusters (65)", "must not exceed", "num_moe_experts (64)"],
    ),
    "shortlist-above-experts": (
        dict(moe_air_shortlist_size=65),
        ["moe_air_shortlist_size (65)", "must not exceed", "num_moe_experts (64)"],
    ),
    "topk-above-shortlist": (
        dict(moe_router_topk=9, moe_air_shortlist_size=8),
        ["moe_air_shortlist_size (8)", "must exceed moe_router_topk (9)", "unless it is num_moe_experts (64)"],
    ),
    "one-list-of-topk": (
        dict(moe_air_num_clusters=1, moe_air_shortlist_size=4),
        ["moe_air_shortlist_size (4)", "must exceed moe_router_topk (4)", "lost for good", "use 8 or more, or 0"],
    ),
    "many-lists-of-topk": (
        dict(moe_air_num_clusters=64, moe_air_shortlist_size=4, moe_air_num_probes=8),
        ["moe_air_shortlist_size (4)", "must exceed moe_router_topk (4)", "lost for good", "use 8 or more, or 0"],
    ),
    "topk-above-experts": (
        dict(moe_router_topk=65),
        ["moe_router_topk (65)", "must be between 1 and", "num_moe_experts (64)"],
    ),
    "topk-zero": (
        dict(moe_router_topk=0),
        ["moe_router_topk (0)", "must be between 1 and", "num_moe_experts (64)"],
    ),
    "experts-not-divisible-by-ep": (
        dict(num_moe_experts=63, expert_model_parallel_size=2),
        ["num_moe_experts (63)", "divisible by", "expert_model_parallel_size (2)"],
    ),
    "no-parts": (dict(moe_air_list_parts=0), ["moe_air_list_parts (0)", "at least 1"]),
    "parts-of-experts": (
        dict(moe_air_list_parts=3),
        ["moe_air_list_parts (3)", "must divide num_moe_experts (64)"],
    ),
    "parts-of-lists": (
        dict(moe_air_list_parts=4, moe_air_shortlist_size=18),
        ["moe_air_list_parts (4)", "must divide moe_air_shortlist_size (18)"],
    ),
    "parts-without-room-for-orphans": (
        dict(moe_air_list_parts=8, moe_air_shortlist_size=8),
        ["moe_air_shortlist_size (8)", "at least 16", "moe_air_list_parts (8)", "moe_router_topk (4)"],
    ),
    "parts-of-inverted-lists": (
        dict(moe_air_codebook_source="experts", moe_air_list_parts=2),
        ["moe_air_list_parts (2)", "moe_air_codebook_source 'experts'", "is in one list"],
    ),
    "inverted-lists-too-small": (
        dict(moe_air_codebook_source="experts", moe_air_num_clusters=8, moe_air_shortlist_size=7),
        ["moe_air_num_clusters (8)", "moe_air_shortlist_size (7)", "at least num_moe_experts (64)"],
    ),
    "mean-lists-below-topk": (
        dict(moe_air_codebook_source="experts", moe_air_num_clusters=32, moe_air_num_probes=2, moe_router_topk=5),
        [
            "moe_air_num_probes (2) times the mean list, num_moe_experts (64) over moe_air_num_clusters (32)",
            "at least moe_router_topk (5)",
            "use at most 25 clusters, at least 3 probes, or 0",
        ],
    ),
}

# The same of baselines.
BASELINES_REFUSED = {
    "vocabulary": (dict(moe_router_type="hash"), ["moe_hash_vocab_size (0)", "number of token ids"]),
    "heads": (
        dict(moe_router_type="product_key", moe_product_key_heads=3),
        ["moe_product_key_heads (3)", "divide moe_router_topk (4)"],
    ),
    "one-per-head": (
        dict(moe_router_type="product_key", moe_product_key_heads=4),
        ["moe_product_key_heads (4)", "moe_router_topk (4)", "no gradient"],
    ),
    "prime": (dict(moe_router_type="product_key", num_moe_experts=61), ["num_moe_experts (61)", "product"]),
    "key-size": (dict(moe_router_type="product_key", moe_product_key_dim=-1), ["moe_product_key_dim (-1)", "positive"]),
    "norm": (
        dict(moe_router_type="product_key", moe_product_key_query_norm="rms"),
        ["moe_product_key_query_norm ('rms')", "'batchnorm'"],
    ),
    "key-size-on-tokens": (
        dict(moe_router_type="product_key", moe_product_key_on_tokens=True, moe_product_key_dim=4),
        ["moe_product_key_dim (4)", "moe_product_key_on_tokens (True)"],
    ),
    "groups": (
        dict(moe_router_type="hierarchical", moe_hierarchical_num_groups=7),
        ["moe_hierarchical_num_groups (7)", "divide num_moe_experts (64)"],
    ),
    "too-many-groups": (
        dict(moe_router_type="hierarchical", moe_hierarchical_topk_groups=9),
        ["moe_hierarchical_topk_groups (9)", "moe_hierarchical_num_groups (8)"],
    ),
    "too-few-candidates": (
        dict(moe_router_type="hierarchical", moe_hierarchical_num_groups=32, moe_hierarchical_topk_groups=1),
        ["moe_router_topk (4)", "moe_hierarchical_topk_groups (1)", "2 experts"],
    ),
    "hierarchical-sigmoid": (
        dict(moe_router_type="hierarchical", moe_router_score_function="sigmoid"),
        ["moe_router_score_function ('sigmoid')", "probabilities"],
    ),
    "expert-bias": (
        dict(moe_router_type="vq", moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
        ["moe_router_enable_expert_bias (True)", "moe_router_type 'vq'"],
    ),
    "forced-balance": (
        dict(moe_router_type="product_key", moe_router_force_load_balancing=True),
        ["moe_router_force_load_balancing (True)", "moe_router_type 'product_key'"],
    ),
    "group-limited": (
        dict(moe_router_type="hierarchical", moe_router_num_groups=4, moe_router_group_topk=2),
        ["moe_router_num_groups (4)", "moe_router_type 'hierarchical'"],
    ),
    "replay-with-granular-experts": (
        dict(moe_router_type="topk", moe_granular_experts=True, moe_enable_routing_replay=True),
        ["moe_enable_routing_replay (True)", "moe_granular_experts (True)"],
    ),
    "experts-over-ranks": (
        dict(moe_router_type="vq", num_moe_experts=63, expert_model_parallel_size=2),
        ["num_moe_experts (63)", "expert_model_parallel_size (2)"],
    ),
}

# Settings of Megatron that cannot keep their meaning: the field, its value, and a word of the reason.
UNSUPPORTED = {
    "sinkhorn": (
        dict(moe_router_load_balancing_type="sinkhorn"),
        ["moe_router_load_balancing_type ('sinkhorn')", "dense"],
    ),
    "sinkhorn-in-a-list": (
        dict(moe_router_load_balancing_type=["aux_loss", "sinkhorn"], moe_aux_loss_coeff=[0.1, 0.0]),
        ["moe_router_load_balancing_type", "sinkhorn", "dense"],
    ),
    "quantile-balancing": (
        dict(moe_router_load_balancing_type="quantile_balancing"),
        ["moe_router_load_balancing_type ('quantile_balancing')", "quantile"],
    ),
    "group-limited": (
        dict(moe_router_num_groups=4, moe_router_group_topk=2),
        ["moe_router_num_groups (4)", "group"],
    ),
    "paged-stash": (
        dict(
            moe_paged_stash=True,
            moe_expert_rank_capacity_factor=2.0,
            moe_flex_dispatcher_backend="ncclep",
            moe_token_dispatcher_type="flex",
        ),
        ["moe_paged_stash (True)", "would count twice"],
    ),
    "replay": (dict(moe_enable_routing_replay=True), ["moe_enable_routing_replay (True)", "replay"]),
    "force-biased": (dict(moe_router_force_biased=0.5), ["moe_router_force_biased (0.5)", "bias"]),
    "meta-device": (dict(init_model_with_meta_device=True), ["init_model_with_meta_device (True)", "codebooks"]),
    "fused-router": (dict(moe_router_fusion=True), ["moe_router_fusion (True)", "fused"]),
    "int64-ids": (
        dict(num_moe_experts=2**31, expert_model_parallel_size=64),
        [f"num_moe_experts ({2**31})", "int32"],
    ),
}

# Settings that Megatron's own checks refuse too where their companions are absent: set after construction.
UNSUPPORTED_LATER = {
    "inference-optimized": (dict(transformer_impl="inference_optimized"), ["transformer_impl", "router"]),
    "padded-experts": (
        dict(moe_pad_experts_for_cuda_graph_inference=True),
        ["moe_pad_experts_for_cuda_graph_inference (True)", "dropping"],
    ),
    "group-topk-alone": (dict(moe_router_group_topk=2), ["moe_router_group_topk (2)", "group"]),
    "full-iteration-graph": (
        dict(cuda_graph_impl="full_iteration", cuda_graph_modules=[]),
        ["cuda_graph_impl ('full_iteration')", "counts on the host"],
    ),
    "whole-layer-graph": (
        dict(cuda_graph_impl="local", cuda_graph_modules=[]),
        ["cuda_graph_impl ('local')", "counts on the host"],
    ),
    "router-graph": (
        dict(cuda_graph_impl="transformer_engine", cuda_graph_modules=["attn", "moe_router"]),
        ["cuda_graph_impl ('transformer_engine')", "counts on the host"],
    ),
}


def test_tables_that_are_joined_have_no_name_in_common():
    for other in (BASELINES_REFUSED, UNSUPPORTED):
        assert not REFUSED.keys() & other.keys()


@pytest.mark.parametrize("settings, words", (REFUSED | BASELINES_REFUSED).values(), ids=REFUSED | BASELINES_REFUSED)
def test_bad_values_are_refused_with_field_value_and_rule(settings, words):
    with pytest.raises(ValueError) as error:
        plain_config(**settings)
    assert_says(error, words)


@pytest.mark.parametrize("settings, words", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_cannot_keep_its_meaning_is_refused_with_the_reason(settings, words):
    with pytest.raises(ValueError) as error:
        plain_config(**settings)
    assert_says(error, [*words, "moe_router_type 'air'"])


@pytest.mark.parametrize("settings, words", UNSUPPORTED_LATER.values(), ids=UNSUPPORTED_LATER)
def test_what_cannot_keep_its_meaning_is_refused_by_validate(settings, words):
    config = plain_config()
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(ValueError) as error:
        validate(config)
    assert_says(error, [*words, "moe_router_type 'air'"])


def test_graphs_that_leave_the_router_out_are_accepted():
    config = plain_config()
    config.cuda_graph_impl, config.cuda_graph_modules = "local", ["attn"]
    validate(config)


@pytest.mark.parametrize("settings, _", (REFUSED | UNSUPPORTED).values(), ids=REFUSED | UNSUPPORTED)
def test_our_rules_leave_the_topk_router_alone(settings, _):
    """What Megatron accepts with its own router stays accepted, whatever our fields say."""
    ours = {field.name for field in fields(AIRFields)}
    TransformerConfig(**{name: value for name, value in {**PLAIN, **settings}.items() if name not in ours})
    assert plain_config(**{**settings, "moe_router_type": "topk"}).moe_router_type == "topk"


def test_topk_is_the_default():
    assert AIRFields().moe_router_type == "topk"


FLOATS = [field.name for field in fields(AIRFields) if isinstance(field.default, float)]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("router_type", ROUTER_TYPES)
@pytest.mark.parametrize("name", FLOATS)
def test_a_field_that_is_not_finite_is_refused_whatever_the_router(name, router_type, value):
    with pytest.raises(ValueError) as error:
        plain_config(**{"moe_router_type": router_type, "moe_hash_vocab_size": 8, name: value})
    assert_says(error, [f"{name} ({value}) must be a finite number"])


# Config classes that lack our fields.


def mla_config():
    return MLATransformerConfig(**{name: value for name, value in PLAIN.items() if name != "moe_router_type"})


def test_attach_gives_the_fields_to_another_config_class():
    config = mla_config()
    values = AIRFields(moe_router_type="air", moe_air_num_clusters=8, moe_air_shortlist_size=16)
    attach(config, values)
    assert {field.name: getattr(config, field.name) for field in fields(AIRFields)} == vars(values)
    assert resolve_sizes(config).num_clusters == 8


def test_attach_validates():
    with pytest.raises(ValueError, match=r"moe_air_num_clusters \(65\)"):
        attach(mla_config(), AIRFields(moe_router_type="air", moe_air_num_clusters=65))


@pytest.mark.parametrize("name", ["moe_z_loss_coeff", "moe_aux_loss_coeff", "moe_router_topk_scaling_factor"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_coefficients_of_megatron_that_are_not_finite_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} \({value}\) must be a finite number"):
        plain_config(moe_router_type="air", **{name: value})
