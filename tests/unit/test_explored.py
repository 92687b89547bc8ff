"""Explored candidates: drawn from the lists for the balancing losses, and what they change there."""

import pytest
import torch

from air_moe_megatron.config import resolve_sizes
from air_moe_megatron.learned.lists import draw_slots, without_repeats
from tests.builders import EXPERTS, HIDDEN, make_config, make_router

BALANCED = dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.5)
FIELDS = dict(
    moe_router_type="air", moe_router_topk=2, moe_air_num_clusters=12, moe_air_shortlist_size=12, moe_air_num_probes=3,
    moe_air_num_candidates=4, moe_air_num_explored=6, **BALANCED,
)  # fmt: skip


def make_hidden(num_tokens=20, seed=5):
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def test_every_slot_is_drawn_once_in_as_many_updates_as_there_are_slots():
    probes = torch.tensor([[3, 0, 7], [7, 3, 0], [1, 2, 4095]])
    drawn = torch.stack([draw_slots(probes, 5, 4, num_updates) for num_updates in range(1000, 1015)])  # [15, T, X]
    assert torch.equal(drawn.sort(dim=0).values, torch.arange(15).view(15, 1, 1).expand(15, 3, 4))
    assert all(row.unique().numel() == 4 for slots in drawn for row in slots)


def test_the_draw_follows_from_the_codewords_alone():
    probes = torch.stack([torch.randperm(40)[:3] for _ in range(200)])
    drawn, order = draw_slots(probes, 16, 8, num_updates=3), torch.randperm(200)
    assert torch.equal(draw_slots(probes[order], 16, 8, num_updates=3), drawn[order])
    assert drawn[:, 0].unique().numel() > 40  # of 48: tokens of different codewords draw different slots
    assert not torch.equal(draw_slots(probes, 16, 8, num_updates=4), drawn)


def test_what_is_drawn_twice_or_is_a_candidate_already_is_left_out():
    drawn = torch.tensor([[5, 6, 5, 9], [1, 1, 1, 2]], dtype=torch.int32)
    others = torch.tensor([[9, -1], [2, 3]], dtype=torch.int32)
    assert without_repeats(drawn, others).tolist() == [[5, 6, -1, -1], [1, -1, -1, -1]]


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(moe_air_num_explored=0), 0),
        ({}, 6),
        (dict(moe_air_num_explored=1000), 3 * 12 - 4),
        (dict(moe_air_num_candidates=36), 0),
        (dict(moe_air_list_parts=4), 8),
        (dict(moe_air_list_parts=4, moe_air_num_candidates=30), 4),
    ],
)
def test_as_many_are_drawn_as_the_lists_have_room_for(fields, expected):
    assert resolve_sizes(make_config(**{**FIELDS, **fields})).num_explored == expected


@pytest.mark.parametrize("function", ("softmax", "sigmoid"))
@pytest.mark.parametrize("parts", (1, 2))
def test_the_loss_counts_each_of_them_for_the_slots_it_stands_for(megatron_cpu, parts, function):
    """Against a direct computation over the best candidates and the drawn ones."""
    settings = {**FIELDS, "moe_air_list_parts": parts, "moe_router_score_function": function}
    router = make_router(megatron_cpu, **settings)
    hidden = make_hidden().requires_grad_()
    routes = router.route(hidden)
    # The main loss leaves the centers alone: what they get comes from the balancing loss.
    found = torch.autograd.grad(0.0 * routes.probs.sum(), (hidden, router.weight))

    lists = router.index.shortlist[routes.probed].flatten(1).long()  # [T, P * L]
    scores = hidden @ router.weight.t()
    drawn = router._draw(router.index.shortlist, routes.probed, 6).long()
    counts = torch.zeros(EXPERTS).index_add_(0, routes.topk_ids.flatten().long(), torch.ones(routes.topk_ids.numel()))
    shares, loss, num_counted = counts / counts.sum(), 0.0, 0
    for token in range(hidden.shape[0]):
        candidates = lists[token].unique()
        best = candidates[scores[token, candidates].topk(4).indices].tolist()
        others = [e for e in dict.fromkeys(drawn[token].tolist()) if e not in best]
        num_counted += len(others)
        values = scores[token].exp() if function == "softmax" else scores[token].sigmoid()
        weights = torch.tensor([1.0] * len(best) + [36 / 6] * len(others))
        values = values[best + others] * weights
        loss = loss + (values / values.sum() * shares[best + others]).sum()
    assert num_counted > 40
    expected = torch.autograd.grad(0.5 * EXPERTS * loss / hidden.shape[0], (hidden, router.weight))
    for name, a, b in zip(("hidden", "weight"), found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_selection_and_probs_do_not_see_them(megatron_cpu):
    hidden = make_hidden()
    for fields in ({}, dict(moe_z_loss_coeff=0.1), dict(moe_router_pre_softmax=True)):
        with_them, without = (
            make_router(megatron_cpu, **{**FIELDS, **fields, "moe_air_num_explored": number}).route(hidden)
            for number in (6, 0)
        )
        assert torch.equal(with_them.topk_ids, without.topk_ids) and torch.equal(with_them.probs, without.probs)


def test_experts_behind_the_best_candidates_get_gradients_in_time(megatron_cpu):
    """Without them an expert that is among no token's best M gets none, however often its list is searched."""
    hidden, reached = make_hidden(), {}
    for number in (0, 6):
        router = make_router(megatron_cpu, **{**FIELDS, "moe_air_num_explored": number})
        gets = torch.zeros(EXPERTS, dtype=torch.bool)
        router.route(hidden)
        searched = router.index.shortlist[router.route(hidden).probed].unique().long()
        for num_updates in range(36):
            router.codebook.load_state_dict(
                {**router.codebook.state_dict(), "num_updates": torch.tensor([num_updates])}
            )
            router.index.built_at.fill_(num_updates)
            router.zero_grad()
            router.route(hidden).probs.sum().backward()
            gets |= router.weight.grad.abs().sum(dim=1) > 0
        reached[number] = gets[searched].float().mean()
    assert reached[0] < 0.9 and reached[6] == 1.0


def test_evaluation_draws_none(megatron_cpu, monkeypatch):
    router = make_router(megatron_cpu, **FIELDS)
    monkeypatch.setattr(type(router), "_draw", lambda *_: pytest.fail("drawn"))
    router.eval().route(make_hidden())
