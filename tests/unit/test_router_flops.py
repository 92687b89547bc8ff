"""The formulas of the router classes against the operations that torch counts while each router runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from air_moe_megatron.config import resolve_sizes
from air_moe_megatron.learned.centers import Centers
from air_moe_megatron.learned.low_rank_whitening_norm import LowRankWhiteningNorm
from air_moe_megatron.learned.rebuild_schedule import num_rebuilds, rebuild_products
from air_moe_megatron.learned.whitening_norm import WhiteningNorm
from air_moe_megatron.ops.fine_scores import eager
from air_moe_megatron.routers import ROUTERS
from air_moe_megatron.routers.flops import Rebuilds
from benchmarks.quality.flops import expert_flops, with_dispatch
from tests.builders import VOCABULARY, make_config, tell_ids

pytestmark = pytest.mark.usefixtures("megatron_cpu")

HIDDEN, EXPERTS, TOPK, TOKENS = 32, 256, 8, 64

AUX_LOSS = dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01)
SETTINGS = {
    "topk": dict(moe_router_type="topk"),
    "air": dict(moe_router_type="air"),
    "air-two-probes": dict(moe_router_type="air", moe_air_num_probes=2),
    "air-every-score": dict(moe_router_type="air", moe_router_pre_softmax=True),
    "air-balanced": dict(moe_router_type="air", **AUX_LOSS),
    "air-balanced-by-candidates": dict(moe_router_type="air", moe_air_num_candidates=2 * TOPK, **AUX_LOSS),
    "air-balanced-by-candidates-of-two-probes": dict(
        moe_router_type="air", moe_air_num_probes=2, moe_air_num_candidates=2 * TOPK, **AUX_LOSS
    ),
    "air-explored": dict(moe_router_type="air", moe_air_num_candidates=2 * TOPK, moe_air_num_explored=4, **AUX_LOSS),
    "product-keys": dict(moe_router_type="product_key"),
    "product-keys-one-head": dict(moe_router_type="product_key", moe_product_key_heads=1),
    "product-keys-on-tokens": dict(
        moe_router_type="product_key", moe_product_key_heads=1, moe_product_key_on_tokens=True
    ),
    "hierarchical": dict(moe_router_type="hierarchical"),
    "hash": dict(moe_router_type="hash"),
    "vq": dict(moe_router_type="vq"),
}


def router_flops(config, *rebuilds, **on_gpu):
    return ROUTERS[config.moe_router_type].flops(config, Rebuilds(*rebuilds, **on_gpu) if rebuilds else None)


def bag_flops(weight, indices, *_, **__):
    """Of sums of weighted rows, which torch does not count: a product and an addition per element of each row."""
    return 2 * indices[0] * weight[1]


@pytest.mark.parametrize("fields", SETTINGS.values(), ids=SETTINGS)
def test_formulas_equal_what_torch_counts(megatron_cpu, fields, monkeypatch):
    monkeypatch.setattr(eager, "_MIN_FILL", 1.0)  # no tile is padded
    config = make_config(
        hidden_size=HIDDEN, num_moe_experts=EXPERTS, moe_router_topk=TOPK,
        **{"moe_air_num_clusters": 16, "moe_air_shortlist_size": 24, **fields},
    )  # fmt: skip
    torch.manual_seed(0)
    router = ROUTERS[config.moe_router_type](config, megatron_cpu)
    router.set_layer_number(1)
    tell_ids(router, torch.randint(VOCABULARY, (1, TOKENS)))
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    router.route(hidden.detach())  # AIR's lists are built
    with FlopCounterMode(display=False) as forward:
        routes = router.route(hidden)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._embedding_bag: bag_flops}) as backward:
        if routes.probs.requires_grad:
            routes.probs.square().sum().backward()
    expected = router_flops(config)
    # The scores of the explored candidates are sums of products, which torch does not count.
    uncounted = 2 * HIDDEN * config.moe_air_num_explored
    assert forward.get_total_flops() == TOKENS * (expected.forward - uncounted)
    assert backward.get_total_flops() == TOKENS * expected.backward


def test_refresh_is_spread_over_the_tokens_between_two():
    config = make_config(moe_router_type="air", moe_air_num_clusters=16, moe_air_refresh_interval=5)
    plain, spread = router_flops(config), router_flops(config, 100)
    assert plain.refresh == 0.0
    products = rebuild_products(num_experts=64, num_clusters=16, shortlist_size=resolve_sizes(config).shortlist_size)
    assert spread.refresh == pytest.approx(2 * 16 * products / 500)
    assert spread.total == plain.total + spread.refresh
    young = router_flops(config, 100, 10).refresh
    assert num_rebuilds(10, 5) == 8
    assert young == pytest.approx(2 * 16 / 100 * (2 * 64 * 16 + 6 * products) / 10)
    assert young > spread.refresh
    assert router_flops(config, 100, on_gpu=True).refresh == 2 * 16 * 64 * 16 / 500
    assert router_flops(config, 100, 10, on_gpu=True).refresh == 2 * 16 / 100 * 8 * 64 * 16 / 10
    young = router_flops(config, 100, 10, num_ranks=4).refresh  # the first two are not shared
    assert young == pytest.approx(2 * 16 / 100 * (4 * 2 * 64 * 16 + 6 * products) / 10)
    config.moe_air_codebook_source = "experts"
    assert router_flops(config, 100).refresh == 2 * 2 * 16 * 64 * 16 / 500
    assert router_flops(config, 100, num_ranks=4).refresh == 4 * router_flops(config, 100).refresh
    young = router_flops(config, 100, 10).refresh
    assert young == pytest.approx(2 * 16 * 64 * 16 / 100 * (11 + 7 * 2) / 10)


@pytest.mark.parametrize(
    "fields",
    (dict(moe_air_shortlist_size=12), dict(moe_air_num_clusters=12)),
    ids=("spread-over-turns", "one-block"),
)
def test_products_of_a_rebuild_equal_what_torch_counts(megatron_cpu, fields):
    """In full the first two times, then on average of all turns."""
    config = make_config(
        moe_router_type="air", num_moe_experts=EXPERTS, moe_router_topk=TOPK, hidden_size=HIDDEN,
        **{"moe_air_num_clusters": 128, "moe_air_shortlist_size": 24, **fields},
    )  # fmt: skip
    router = ROUTERS["air"](config, megatron_cpu)
    sizes, counts = router.sizes, []
    weight = router.weight.bfloat16()  # the products with fp32 centers are sparse, which torch does not count
    for _ in range(2 + router.index.schedule.num_turns):
        with FlopCounterMode(display=False) as counter:
            router.index.refresh(router.codebook, Centers(weight))
        router.index.commit()
        router.codebook.count_update()
        counts.append(counter.get_total_flops())
    in_full = 2 * HIDDEN * sizes.num_clusters * EXPERTS
    assert counts[:2] == [in_full, in_full]
    mean = sum(counts[2:]) / router.index.schedule.num_turns
    assert mean == 2 * HIDDEN * rebuild_products(EXPERTS, sizes.num_clusters, sizes.shortlist_size)
    assert (mean == in_full) == (sizes.num_clusters == 12)


def test_products_with_source_experts_equal_what_torch_counts(megatron_cpu):
    config = make_config(
        moe_router_type="air", moe_air_codebook_source="experts", moe_air_num_clusters=16, moe_air_shortlist_size=24,
        num_moe_experts=EXPERTS, moe_router_topk=TOPK, hidden_size=HIDDEN, moe_air_refresh_interval=1,
    )  # fmt: skip
    router = ROUTERS["air"](config, megatron_cpu)
    weight, total = router.weight.bfloat16(), 0  # as above
    for num_steps in range(1, 5):
        with FlopCounterMode(display=False) as counter:
            router.index.refresh(router.codebook, Centers(weight))
        router.codebook.count_update()
        total += counter.get_total_flops()
        assert router_flops(config, 1, num_steps).refresh * num_steps == pytest.approx(total)


@pytest.mark.parametrize(("name", "width"), [("whitening", 128), ("low_rank_whitening", 2 * 32)])
def test_owners_whiten_the_tokens_of_all_ranks(name, width):
    config = make_config(moe_router_type="air", moe_router_input_norm=name, hidden_size=128)
    config.moe_air_shard_experts, config.expert_model_parallel_size = True, 4
    assert router_flops(config).norm == (4 + 4 * 4) * 128 * width


def test_a_whitening_norm_costs_what_torch_counts():
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    norm = WhiteningNorm(HIDDEN)
    with FlopCounterMode(display=False) as counter:
        norm.accumulate(hidden.detach(), None)
        norm(hidden).sum().backward()
    config = make_config(moe_router_type="air", moe_router_input_norm="whitening", hidden_size=HIDDEN)
    covariance = 2 * (HIDDEN + 1) ** 2  # with a row of ones
    assert counter.get_total_flops() == TOKENS * (4 * HIDDEN**2 + covariance)
    flops = router_flops(config)
    assert flops.norm == 6 * HIDDEN**2
    assert flops.total - flops.norm == router_flops(make_config(moe_router_type="air", hidden_size=HIDDEN)).total


def test_a_low_rank_whitening_norm_costs_what_torch_counts():
    hidden = torch.randn(TOKENS, 128, requires_grad=True)
    norm = LowRankWhiteningNorm(128)
    with FlopCounterMode(display=False) as counter:
        norm.accumulate(hidden.detach(), None)
        norm(hidden).sum().backward()
    config = make_config(moe_router_type="air", moe_router_input_norm="low_rank_whitening", hidden_size=128)
    assert counter.get_total_flops() == TOKENS * router_flops(config).norm == TOKENS * 12 * 128 * 32


def test_dispatch_constant_of_krajewski():
    config = make_config(moe_router_type="topk")
    flops = router_flops(config)
    assert flops.total == 6 * 16 * 64
    assert with_dispatch(flops) == 14 * 16 * 64


def test_expert_flops_are_those_of_k_small_mlps():
    config = make_config(moe_router_type="topk", moe_ffn_hidden_size=3)
    assert expert_flops(config) == 3 * (2 * 4 * 16 * 3) * 2
    config.gated_linear_unit = True
    assert expert_flops(config) == 3 * (2 * 4 * 16 * 3) * 3
