"""The figures of the health line, worked by hand."""

import types

import pytest
import torch

from air_moe_megatron.diagnostics.health import (
    StageHealth,
    dispatch_sums,
    health_metrics,
    listed_share_of,
    load_metrics_of,
    load_sums,
    sizes_of,
)
from air_moe_megatron.layer.dispatcher import CompactTokenDispatcher, Traffic
from air_moe_megatron.learned.recomputation import ForwardCounter
from air_moe_megatron.sync import discard_statistics, update_codebooks


def test_load_metrics_worked_example():
    figures = load_metrics_of(torch.tensor([2, 0, 1, 1]), num_ranks=2)
    assert figures == {"experts_used": 0.75, "imbalance_factor": 1.5, "rank_imbalance": 1.0}


def test_load_sums_worked_examples():
    loads = [torch.tensor([2, 0, 1, 1])]
    sums = load_sums(loads, torch.tensor([4]), [2], 1)
    assert sums == {
        "experts-used": (0.75, 1), "imbalance-factor": (1.5, 1), "rank-imbalance": (1.0, 1), "empty-slots": (4, 8),
    }  # fmt: skip
    sums = load_sums([*loads, torch.tensor([8, 0])], torch.tensor([4, 4]), [2, 3], 2)
    assert sums == {
        "experts-used": (1.25, 2), "imbalance-factor": (3.5, 2), "rank-imbalance": (3.0, 2), "empty-slots": (8, 20),
    }  # fmt: skip
    assert load_sums([torch.zeros(3)], torch.tensor([0]), [2], 1)["empty-slots"] == (0, 0)


def test_stages_weigh_by_what_they_sum_over():
    stages = [
        StageHealth(
            {"hash-experts-used": (0.5, 1), "hash-empty-slots": (0, 8), "recomputed-bytes-per-token": (0.0, 10.0)},
            {"hash-num_experts": [32]},
        ),
        StageHealth(
            {"experts-used": (1.5, 2), "empty-slots": (2, 8), "dropped-updates": (1, 2), "live-codewords": (10, 1)},
            {"num_experts": [64, 128], "num_clusters": [16, 16]},
        ),
        StageHealth(
            {"experts-used": (0.9, 1), "empty-slots": (1, 4), "dropped-updates": (2, 1), "live-codewords": (20, 2)},
            {"num_experts": [64], "num_clusters": [16]},
        ),
    ]
    figures = health_metrics(stages)
    assert figures == pytest.approx(
        {
            "experts-used": 0.8, "empty-slots": 0.25, "dropped-updates": 3, "live-codewords": 10,
            "hash-experts-used": 0.5,
        }
    )  # fmt: skip
    assert sizes_of(stages) == {"num_experts": "64 to 128", "num_clusters": "16"}
    assert health_metrics(stages[:1]) == {"experts-used": 0.5, "empty-slots": 0.0}
    assert sizes_of(stages[:1]) == {"num_experts": "32"}


def mixed_routers(groups):
    """Three types, with three numbers of experts, codewords and top-k."""
    from tests.builders import make_router, tell_ids

    routers = [
        make_router(groups, moe_router_type="hash", num_moe_experts=32, moe_router_topk=2),
        make_router(groups, moe_router_type="air", num_moe_experts=64),
        make_router(
            groups, moe_router_type="air", num_moe_experts=128, moe_air_codebook_source="experts",
            moe_air_num_clusters=32,
        ),
        make_router(groups, moe_router_type="vq", num_moe_experts=16),
    ]  # fmt: skip
    for router in routers:
        tell_ids(router, torch.arange(30).view(1, 30))
    return routers


def test_health_of_routers_of_different_types_and_sizes(megatron_cpu, monkeypatch):
    from megatron.core import num_microbatches_calculator

    from air_moe_megatron.compat import destroy_moe_metrics_tracker, get_moe_metrics_tracker
    from air_moe_megatron.diagnostics import health
    from tests.builders import HIDDEN

    destroy_moe_metrics_tracker()
    monkeypatch.setattr(num_microbatches_calculator, "get_num_microbatches", lambda: 1)
    routers = mixed_routers(megatron_cpu)
    routes = [router.route(torch.randn(30, HIDDEN)) for router in routers]
    loads = [
        torch.bincount(r.topk_ids[r.topk_ids >= 0], minlength=m.num_experts)
        for r, m in zip(routes, routers, strict=True)
    ]
    hashed, *alone = [load_metrics_of(load, 1) for load in loads]
    empty = sum(int((r.topk_ids < 0).sum()) for r in routes) / sum(r.topk_ids.numel() for r in routes[1:])
    logged = float(get_moe_metrics_tracker().metrics["vq_loss"].values.sum())
    stage = health.stage_health(routers, [], *health.expert_loads(routers))
    figures = health_metrics([stage])
    for name in alone[0]:
        assert figures[health.scalar_name(name)] == pytest.approx(sum(one[name] for one in alone) / 3)
        assert figures[f"hash-{health.scalar_name(name)}"] == pytest.approx(hashed[name])
    assert figures["empty-slots"] == pytest.approx(empty) and empty > 0
    assert figures["vq-loss"] == pytest.approx(logged) and logged > 0
    line = health.health_line(figures, sizes_of([stage]), 7)
    assert "live codewords: 32.0 of 32 |" in line  # of the one that is fitted: the other has not been updated yet
    for words in ("% of 16 to 128", f"empty slots: {100 * empty:.2g}%", "vq loss: ", "experts listed: 100.0%"):
        assert words in line
    assert f"experts used by hash layers: {hashed['experts_used']:.1%} | imbalance factor of hash layers: " in line
    # Everything was set back; without tokens and AIR routers there is less to tell.
    stage = health.stage_health(routers[:1], [], *health.expert_loads(routers[:1]))
    line = health.health_line(health_metrics([stage]), sizes_of([stage]), 8)
    assert "experts used: 0.0% of 32" in line
    for words in ("empty slots", "codewords", "listed", "vq loss", "recall", "hash layers"):
        assert words not in line


def test_the_line_of_a_dispatch_that_is_recomputed():
    from air_moe_megatron.diagnostics.health import health_line

    figures = {
        "quantization-error": 0.15144, "live-codewords": 15.5, "experts-listed": 1.0, "experts-used": 0.638,
        "imbalance-factor": 4.031, "rank-imbalance": 1.0094, "empty-slots": 0.0, "dispatch-bytes-per-token": 1024.4,
        "remote-bytes-per-token": 640.0, "recomputed-bytes-per-token": 512.0, "mass-recall": 0.111,
        "top-k-recall": 0.81, "dropped-updates": 2,
    }  # fmt: skip
    assert health_line(figures, {"num_experts": "64", "num_clusters": "32"}, 7) == (
        " routing health at iteration        7 | quantization error: 0.1514 | live codewords: 15.5 of 32 | "
        "experts listed: 100.0% | experts used: 63.8% of 64 | imbalance factor: 4.03 | "
        "most loaded rank: 1.009 of the mean | dispatched bytes per token: 1024 (640 to other ranks) | "
        "dispatched again when recomputed: 512 | mass recall: 0.11 | top-k recall: 0.81 | "
        "dropped codebook updates: 2 |"
    )


def test_figures_are_the_same_under_any_default_dtype(megatron_cpu):
    from air_moe_megatron.diagnostics.metrics import layer_metrics, reduce_stage
    from air_moe_megatron.diagnostics.observation import CodewordCounter
    from tests.builders import HIDDEN, make_router

    router = make_router(megatron_cpu, moe_router_type="air", moe_air_num_clusters=8, moe_air_shortlist_size=12)
    router.route(torch.randn(60, HIDDEN, generator=torch.Generator().manual_seed(0)))
    sample = router.sample

    def figures():
        router.sample = sample
        (sums,) = reduce_stage([router], [0.1], {router: CodewordCounter(8, 0, torch.device("cpu"))})
        return layer_metrics(router, sums, router.expert_load, router.index.shortlist)

    expected = figures()
    assert 0 < expected["mass_recall"] < 1
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert figures() == expected
        finally:
            torch.set_default_dtype(torch.float32)


def test_no_tokens_at_all_are_no_error():
    assert load_metrics_of(torch.zeros(4, dtype=torch.int64), 1)["experts_used"] == 0.0


def test_listed_share_counts_each_expert_once_and_no_empty_slot():
    def router(lists):
        index = types.SimpleNamespace(num_experts=4, shortlist=torch.tensor(lists))
        return types.SimpleNamespace(index=index, mean_over_shards=lambda share: share)

    assert listed_share_of(router([[0, 1], [1, -1]])) == 0.5
    assert listed_share_of(router([[0, 1], [2, 3]])) == 1.0


def layer_with(*traffics):
    layer = torch.nn.Linear(1, 1)
    layer.token_dispatcher = CompactTokenDispatcher.__new__(CompactTokenDispatcher)
    layer.token_dispatcher.traffic, layer.token_dispatcher.recomputed_traffic = traffics
    layer.token_dispatcher._forwards = ForwardCounter()
    return layer


def test_dispatch_figures_are_per_token_and_start_anew():
    layer = layer_with(Traffic(4000, 1000, 800, 200), Traffic())
    other = layer_with(Traffic(2000, 1000, 800, 200), Traffic())
    sums = dispatch_sums([layer, other], 20, None)
    assert sums["dispatch-bytes-per-token"] == (6000.0, 20.0)
    figures = health_metrics([StageHealth(sums, {"num_experts": [4]})])
    assert figures == {"dispatch-bytes-per-token": 300.0, "remote-bytes-per-token": 120.0}
    assert vars(layer.token_dispatcher.traffic) == vars(Traffic())
    assert dispatch_sums([], 20, None) == {}


def test_rows_that_a_recomputation_moves_again_are_told_apart():
    layer = layer_with(Traffic(4000, 1000, 800, 200), Traffic(1000, 100, 200, 20))
    figures = health_metrics([StageHealth(dispatch_sums([layer], 10, None), {"num_experts": [4]})])
    assert figures["dispatch-bytes-per-token"] == 400.0 and figures["recomputed-bytes-per-token"] == 100.0
    assert vars(layer.token_dispatcher.recomputed_traffic) == vars(Traffic())


def test_neither_evaluation_nor_padding_changes_the_bytes_of_a_token(megatron_cpu):
    from air_moe_megatron.diagnostics import health
    from tests.builders import HIDDEN, make_layer

    layer = make_layer(megatron_cpu, moe_router_type="air").train()
    found = []
    for padding in (None, (torch.arange(20) >= 8).unsqueeze(0)):
        layer(torch.randn(20, 1, HIDDEN), padding_mask=padding)
        layer.eval()
        for _ in range(3):
            layer(torch.randn(20, 1, HIDDEN))
        layer.train()
        stage = health.stage_health([layer.router], [layer], *health.expert_loads([layer.router]))
        found.append(health_metrics([stage])["dispatch-bytes-per-token"])
    assert found == [4 * HIDDEN, 4 * HIDDEN]


def test_forwards_without_gradients_are_told_apart(megatron_cpu):
    """In training mode, as of a teacher: their tokens do not count, so their bytes may not count per token."""
    from air_moe_megatron.diagnostics import health
    from tests.builders import HIDDEN, make_layer

    layer = make_layer(megatron_cpu, moe_router_type="air").train()
    hidden = torch.randn(20, 1, HIDDEN)
    with torch.no_grad():
        for _ in range(3):
            layer(hidden)
    layer(hidden)
    figures = health_metrics([health.stage_health([layer.router], [layer], *health.expert_loads([layer.router]))])
    assert figures["dispatch-bytes-per-token"] == 4 * HIDDEN
    assert figures["recomputed-bytes-per-token"] == 3 * 4 * HIDDEN


@pytest.mark.parametrize("attempts", (1, 2, 3))
def test_a_step_that_is_attempted_again_counts_its_bytes_once(megatron_cpu, attempts):
    from air_moe_megatron.diagnostics import health
    from tests.builders import HIDDEN, make_layer

    layer = make_layer(megatron_cpu, moe_router_type="air").train()
    for number in range(2):  # steps of one log line
        for _ in range(attempts):
            discard_statistics([layer])
            hidden = torch.randn(20, 1, HIDDEN)
            torch.utils.checkpoint.checkpoint(lambda h: layer(h)[0], hidden, use_reentrant=False).sum().backward()
        update_codebooks(module for module in [layer])
        assert layer.token_dispatcher.traffic.row_bytes == (number + 1) * 20 * 4 * HIDDEN
    stage = health.stage_health([layer.router], [layer], *health.expert_loads([layer.router]))
    assert stage.sums["dispatch-bytes-per-token"] == (2 * 20 * 4 * HIDDEN, 40)
    assert stage.sums["recomputed-bytes-per-token"] == (2 * 20 * 4 * HIDDEN, 40)
    discard_statistics(layer)  # the next step, of the next line
    assert vars(layer.token_dispatcher.traffic) == vars(Traffic())


def naive_recall(router):
    """From the exact probabilities of all experts, token by token."""
    sample, lists = router.sample, router.index.shortlist.tolist()
    logits = sample.hidden @ router.weight.t()
    mass, topk = [], []
    for token, probes in enumerate(sample.probed.tolist()):
        listed = sorted({expert for codeword in probes for expert in lists[codeword] if expert >= 0})
        mass.append(logits[token].softmax(dim=0)[listed].sum().item())
        rank = logits[token]
        if router.expert_bias is not None:
            rank = rank.sigmoid() + router.expert_bias
        exact = set(rank.topk(router.topk).indices.tolist())
        topk.append(len(exact & set(sorted(listed, key=lambda e: -rank[e].item())[: router.topk])) / router.topk)
    return sum(mass) / len(mass), sum(topk) / len(topk)


@pytest.mark.parametrize("num_tokens", (20, 200), ids=("all-tokens", "a-sample"))
@pytest.mark.parametrize(
    "fields",
    (
        dict(moe_air_num_probes=1),
        dict(moe_air_num_probes=2),
        dict(moe_air_codebook_source="experts", moe_air_num_probes=2, moe_air_shortlist_size=16),
        dict(moe_air_num_probes=1, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
    ),
    ids=("one-probe", "two-probes", "lists-of-experts", "expert-bias"),
)
def test_recall_against_all_probabilities(megatron_cpu, monkeypatch, fields, num_tokens):
    from air_moe_megatron.diagnostics import recall
    from tests.builders import HIDDEN, make_router

    monkeypatch.setattr(recall, "CHUNK", 10)  # 64 experts in seven chunks
    lists = dict(moe_air_num_clusters=8, moe_air_shortlist_size=12)
    router = make_router(megatron_cpu, moe_router_type="air", **{**lists, **fields})
    assert recall.recall(router) is None
    if router.expert_bias is not None:
        router.expert_bias.copy_(torch.randn(64))
    router.route(torch.randn(num_tokens, HIDDEN))
    assert router.sample.hidden.shape[0] == min(num_tokens, 50)  # every fourth of 200
    found = recall.recall(router)
    assert found == pytest.approx(naive_recall(router), abs=1e-5)
    assert 0.0 < found[0] < 1.0 and 0.0 < found[1] < 1.0


def test_recall_of_full_lists_is_one_and_padding_is_left_out(megatron_cpu):
    from air_moe_megatron.diagnostics.recall import recall
    from tests.builders import HIDDEN, make_router

    full = make_router(megatron_cpu, moe_router_type="air", moe_air_num_clusters=4, moe_air_shortlist_size=64)
    full.route(torch.randn(30, HIDDEN))
    assert recall(full) == pytest.approx((1.0, 1.0), abs=1e-5)
    short = make_router(megatron_cpu, moe_router_type="air", moe_air_num_clusters=8, moe_air_shortlist_size=12)
    hidden, padding = torch.randn(30, HIDDEN), torch.arange(30) >= 20
    short.route(hidden[:20])
    expected = recall(short)
    short.route(hidden, padding)
    assert recall(short) == pytest.approx(expected, abs=1e-5)
    short.route(hidden, padding.fill_(True))
    assert recall(short) is None


def test_recall_of_large_finite_tokens(megatron_cpu):
    """Of scores of 1e30 one expert holds all mass: it is listed or not, whatever the products round to."""
    from air_moe_megatron.diagnostics.recall import recall
    from tests.builders import HIDDEN, make_router

    router = make_router(megatron_cpu, moe_router_type="air", moe_air_num_clusters=8, moe_air_shortlist_size=12)
    router.route(1e30 * torch.randn(50, HIDDEN))
    mass, topk = recall(router)
    expected = naive_recall(router)
    assert 0.0 < mass < 1.0 and (mass, topk) == pytest.approx(expected, abs=1e-5)
