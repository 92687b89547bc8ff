"""Diagnostics over ranks with unequal numbers of tokens, none on one: the figures of one rank with all tokens."""

import pytest
import torch

from tests.processes import rank_of, ranks_fixture

NUM_TOKENS = (17, 0, 24, 10)  # of each rank; together no more than a rank samples
TYPES = ("air", "air", "product_key")
SETTINGS = dict(moe_air_num_clusters=8, moe_air_shortlist_size=12)
COLLECTIVES = ("all_reduce", "gather", "all_gather_object", "all_gather", "broadcast")


def tokens_of(rank):
    from tests.builders import HIDDEN, VOCABULARY

    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randn(NUM_TOKENS[rank], HIDDEN, generator=generator)
    return hidden, torch.randint(VOCABULARY, (1, NUM_TOKENS[rank]), generator=generator)


def make_routers(groups):
    from tests.builders import make_router

    routers = []
    for seed, router_type in enumerate(TYPES):
        fields = SETTINGS if router_type == "air" else {"moe_product_key_query_norm": "layernorm"}
        routers.append(make_router(groups, seed, moe_router_type=router_type, **fields))
        routers[-1].set_layer_number(seed + 1)
    return routers


def measure(routers, group, hidden, ids, num_ranks):
    """Figures and snapshots of routers that see these tokens in a step; the snapshots on the last rank alone."""
    from air_moe_megatron.diagnostics.health import expert_loads
    from air_moe_megatron.diagnostics.metrics import layer_metrics, reduce_stage
    from air_moe_megatron.diagnostics.snapshot import CodewordRecall, codebook_snapshot, gather_pairs
    from air_moe_megatron.diagnostics.watch import StepWatch
    from air_moe_megatron.routers import AIRRouter

    for router in routers:
        router.tp_dp_cp_group = group
    watch = StepWatch([torch.nn.ModuleList(routers)], routers)
    for router in routers:
        if isinstance(router, AIRRouter):
            router.observer.token_ids = ids
        router(hidden.unsqueeze(1))
    _, seconds, counters = watch.end()
    loads = expert_loads(routers)[0]
    sums = reduce_stage(routers, seconds, counters)
    figures = [layer_metrics(*parts, None) for parts in zip(routers, sums, loads, strict=True)]
    for one in figures:
        assert one.pop("routing_seconds") > 0
    pairs = gather_pairs(counters, num_ranks - 1, group)
    snapshots = []
    for router, total in zip(routers, sums, strict=True):
        if router in pairs:
            recall = CodewordRecall(router.sizes.num_clusters)
            recall.add(total.codeword_recall)
            snapshots.append(codebook_snapshot(router, total, recall, pairs[router]))
    return figures, snapshots


def worker(rank, world_size, directory):
    with rank_of(rank, world_size, directory) as groups:
        every = [tokens_of(one) for one in range(world_size)]
        hidden, ids = torch.cat([one for one, _ in every]), torch.cat([one for _, one in every], dim=1)
        alone = measure(make_routers(groups), None, hidden, ids, 1)

        counts, originals = [], {name: getattr(torch.distributed, name) for name in COLLECTIVES}
        for name, original in originals.items():

            def counted(*args, name=name, original=original, **kwargs):
                counts.append(name)
                return original(*args, **kwargs)

            setattr(torch.distributed, name, counted)
        together = measure(make_routers(groups), torch.distributed.group.WORLD, *every[rank], world_size)
        torch.save({"alone": alone, "together": together, "counts": counts}, f"{directory}/{rank}.pt")


ranks = ranks_fixture(worker, 2, 4)


def test_every_rank_has_the_figures_of_one_rank_with_all_tokens(ranks):
    for results in ranks:
        (found, _), (expected, _) = results["together"], results["alone"]
        assert [one["router"] for one in found] == list(TYPES)
        for one, wanted in zip(found, expected, strict=True):
            assert one.keys() == wanted.keys() and ("topk_recall" in one) == (one["router"] == "air")
            for name, value in wanted.items():
                assert one[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5)), name


def test_the_last_rank_has_the_codewords_and_token_ids_of_all_tokens(ranks):
    for results in ranks[:-1]:
        assert results["together"][1] == []
    found, expected = ranks[-1]["together"][1], ranks[-1]["alone"][1]
    assert len(found) == len(expected) == 2
    for one, wanted in zip(found, expected, strict=True):
        assert sum(one["load"]) == sum(NUM_TOKENS[: len(ranks)])
        seen = [(mean, value) for mean, value in zip(one["recall"], wanted["recall"], strict=True) if mean != value]
        assert all(mean == pytest.approx(value, rel=1e-5) for mean, value in seen)  # None only where both are
        assert one == wanted | {"recall": one["recall"]}


def test_three_collectives_however_many_routers(ranks):
    for results in ranks:
        assert results["counts"] == ["all_reduce", "all_reduce", "gather"]
