"""The figures of the health line, worked by hand."""

import types

import pytest
import torch

from air_moe_megatron.diagnostics import dispatch_figures, listed_share, load_figures
from air_moe_megatron.dispatcher import Traffic


def test_load_figures_worked_example():
    figures = load_figures(torch.tensor([[2, 0, 1, 1]]), num_ranks=2)
    assert figures == {"experts-used": 0.75, "imbalance-factor": 1.5, "rank-imbalance": 1.0}


def test_load_figures_are_means_over_routers():
    figures = load_figures(torch.tensor([[1, 1, 1, 1], [8, 0, 0, 0]]), num_ranks=4)
    assert figures["experts-used"] == pytest.approx((1.0 + 0.25) / 2)
    assert figures["imbalance-factor"] == pytest.approx((1.0 + 4.0) / 2)
    assert figures["rank-imbalance"] == pytest.approx((1.0 + 4.0) / 2)


def test_no_tokens_at_all_are_no_error():
    assert load_figures(torch.zeros(1, 4, dtype=torch.int64), 1)["experts-used"] == 0.0


def test_listed_share_counts_each_expert_once_and_no_empty_place():
    def router(lists):
        return types.SimpleNamespace(num_experts=4, index=types.SimpleNamespace(shortlist=torch.tensor(lists)))

    assert listed_share([router([[0, 1], [1, -1]])]) == 0.5
    assert listed_share([router([[0, 1], [1, -1]]), router([[0, 1], [2, 3]])]) == 0.75


def test_dispatch_figures_are_per_token_and_start_anew():
    layer = torch.nn.Linear(1, 1)
    layer.token_dispatcher = types.SimpleNamespace(traffic=Traffic(10, 4000, 1000, 800, 200))
    other = torch.nn.Linear(1, 1)
    other.token_dispatcher = types.SimpleNamespace(traffic=Traffic(10, 2000, 1000, 800, 200))
    figures = dispatch_figures([layer, other], None)
    assert figures == {"dispatch-bytes-per-token": 300.0, "remote-bytes-per-token": 120.0}
    assert vars(layer.token_dispatcher.traffic) == vars(Traffic())
    assert dispatch_figures([], None) == {}


def naive_recall(router):
    """From the exact probabilities of all experts, token by token."""
    sample, lists = router.sample, router.index.shortlist.tolist()
    logits = sample.hidden @ router.weight.t()
    mass, topk = [], []
    for token, codewords in enumerate(sample.codewords.tolist()):
        listed = sorted({expert for codeword in codewords for expert in lists[codeword] if expert >= 0})
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
        {},
        dict(moe_air_num_probes=2),
        dict(moe_air_codebook_source="experts", moe_air_num_probes=2, moe_air_shortlist_size=16),
        dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
    ),
    ids=("one-probe", "two-probes", "lists-of-experts", "expert-bias"),
)
def test_recall_against_all_probabilities(megatron_cpu, monkeypatch, fields, num_tokens):
    from air_moe_megatron import diagnostics
    from tests.builders import HIDDEN, make_router

    monkeypatch.setattr(diagnostics, "_CHUNK", 10)  # 64 experts in seven chunks
    lists = dict(moe_air_num_clusters=8, moe_air_shortlist_size=12)
    router = make_router(megatron_cpu, moe_router_type="air", **{**lists, **fields})
    assert diagnostics.recall(router) is None
    if router.expert_bias is not None:
        router.expert_bias.copy_(torch.randn(64))
    router.route(torch.randn(num_tokens, HIDDEN))
    assert router.sample.hidden.shape[0] == min(num_tokens, 50)  # every fourth of 200
    found = diagnostics.recall(router)
    assert found == pytest.approx(naive_recall(router), abs=1e-5)
    assert 0.0 < found[0] < 1.0 and 0.0 < found[1] < 1.0
    figures = diagnostics.recall_figures([router, router])
    assert figures == pytest.approx({"mass-recall": found[0], "top-k-recall": found[1]})


def test_recall_of_full_lists_is_one_and_padding_is_left_out(megatron_cpu):
    from air_moe_megatron.diagnostics import recall
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
