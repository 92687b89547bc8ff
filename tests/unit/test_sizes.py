"""The automatic sizes of AIR, by experts, top-k and the sizes that are given."""

import pytest

from air_moe_megatron.config import resolve_sizes
from tests.builders import make_config

EXPERT_LISTS = dict(moe_air_codebook_source="experts")


def air_config(**fields):
    return make_config(moe_router_type="air", **fields)


# E, K, fields -> C, L, P, M
AUTOMATIC = {
    "16384": (16384, 32, {}, 512, 72, 8, 128),
    "4096": (4096, 16, {}, 256, 40, 8, 64),
    "65536": (65536, 64, {}, 1024, 144, 8, 256),
    "1048576": (1048576, 512, {}, 4096, 1024, 8, 1024),
    "rounded-up-to-8": (1000, 4, {}, 128, 24, 8, 32),
    "two-times-topk": (1024, 100, {}, 128, 200, 6, 200),
    "few-experts": (8, 2, {}, 8, 8, 1, 8),
    "topk-all": (64, 64, {}, 32, 64, 1, 64),
    "one-probe": (65536, 64, dict(moe_air_num_probes=1), 1024, 256, 1, 256),
    "one-probe-of-few": (4096, 16, dict(moe_air_num_probes=1), 256, 64, 1, 64),
    "parts-round-up": (4096, 16, dict(moe_air_list_parts=16), 256, 48, 8, 64),
    "many-parts": (4096, 16, dict(moe_air_list_parts=32), 256, 64, 8, 64),
    "full-lists": (64, 4, dict(moe_air_shortlist_size=64), 32, 64, 1, 16),
    "fewer-codewords-than-probes": (4096, 16, dict(moe_air_num_clusters=3), 3, 40, 3, 64),
    "experts-four-topk-in-the-mean-list": (16384, 32, EXPERT_LISTS, 128, 256, 1, 256),
    "experts-small-topk": (16384, 4, EXPERT_LISTS, 512, 64, 1, 64),
    "experts-rounded-down-to-8": (4096, 20, EXPERT_LISTS, 48, 171, 1, 171),
    "experts-large-topk": (16384, 1000, EXPERT_LISTS, 4, 8192, 1, 8192),
    "experts-few": (8, 2, EXPERT_LISTS, 1, 8, 1, 8),
}


@pytest.mark.parametrize(
    "num_experts, topk, fields, expected", [(*case[:3], case[3:]) for case in AUTOMATIC.values()], ids=AUTOMATIC
)
def test_automatic_sizes(num_experts, topk, fields, expected):
    sizes = resolve_sizes(air_config(num_moe_experts=num_experts, moe_router_topk=topk, **fields))
    assert (sizes.num_experts, sizes.topk) == (num_experts, topk)
    assert (sizes.num_clusters, sizes.shortlist_size, sizes.num_probes, sizes.num_candidates) == expected


@pytest.mark.parametrize("source", ("tokens", "experts"))
def test_given_sizes_are_kept(source):
    config = air_config(
        moe_air_num_clusters=9, moe_air_shortlist_size=11, moe_air_num_probes=2, moe_air_codebook_source=source
    )
    sizes = resolve_sizes(config)
    num_candidates = 16 if source == "tokens" else 22
    assert (sizes.num_clusters, sizes.shortlist_size, sizes.num_probes, sizes.num_candidates) == (
        9,
        11,
        2,
        num_candidates,
    )
    config.moe_air_num_candidates = 20
    assert resolve_sizes(config).num_candidates == 20


@pytest.mark.parametrize("source", ("tokens", "experts"))
@pytest.mark.parametrize("num_experts", (1, 2, 3, 7, 16, 17, 100, 257, 5000))
def test_automatic_sizes_are_always_valid(num_experts, source):
    for topk in {1, -(-num_experts // 2), num_experts}:
        config = air_config(
            num_moe_experts=num_experts,
            moe_router_topk=topk,
            moe_router_pre_softmax=True,
            moe_air_codebook_source=source,
        )
        sizes = resolve_sizes(config)
        assert 1 <= sizes.num_clusters <= num_experts
        assert topk < sizes.shortlist_size or sizes.shortlist_size == num_experts
        if source == "experts":
            assert sizes.num_clusters * sizes.shortlist_size >= num_experts
            assert num_experts / sizes.num_clusters >= min(4 * topk, num_experts)


@pytest.mark.parametrize(
    "topk, num_probes, shortlist_size, num_clusters",
    ((32, 8, 0, 256), (32, 2, 0, 64), (100, 16, 0, 160), (1024, 8, 0, 8), (32, 1, 64, 64)),
    ids=("as-for-tokens", "two-probes", "sixteen-probes", "all-lists-probed", "enough-for-short-lists"),
)
def test_automatic_clusters_of_expert_lists(topk, num_probes, shortlist_size, num_clusters):
    config = air_config(
        num_moe_experts=4096, moe_router_topk=topk, moe_air_num_probes=num_probes,
        moe_air_shortlist_size=shortlist_size, moe_air_codebook_source="experts",
    )  # fmt: skip
    assert resolve_sizes(config).num_clusters == num_clusters
