"""The inverted index: which experts stand in which list, and when the lists are rebuilt."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from air_moe_megatron.learned import index as index_module
from air_moe_megatron.learned.centers import Centers
from air_moe_megatron.learned.codebook import Codebook
from air_moe_megatron.learned.expert_keys import pack_keys, unpack_keys
from air_moe_megatron.learned.index import REBUILDING, ShortlistIndex
from air_moe_megatron.learned.lists import balanced_lists, inverted_lists, list_every_expert, reserved_slots
from air_moe_megatron.learned.rebuild_schedule import Schedule, next_rebuild, num_rebuilds
from air_moe_megatron.ops.coarse import assign_with_statistics
from air_moe_megatron.ops.ranking import rank_experts
from tests.codebooks import assert_same_bits, randn


def present(lists):
    """The expert ids in the lists, one after another."""
    return lists[lists >= 0].tolist()


class Setup:
    """A codebook and an index over moving centers, as one router has them.

    There are more codewords than one step ranks together, so that a rebuild is spread over several.
    """

    def __init__(self, source, interval=3, num_experts=90, shortlist_size=9, num_clusters=80):
        self.codebook = Codebook(num_clusters, 6, 0.8)
        self.index = ShortlistIndex(
            num_experts, num_clusters, shortlist_size, source=source, refresh_interval=interval, num_reserved=3
        )
        self.weight = randn(num_experts, 6)

    def forward(self):
        """Tell whether it made lists or ranked codewords."""
        before = self.index.shortlist.clone()
        self.index.refresh(self.codebook, Centers(self.weight))
        return self.index._share is not None or not torch.equal(before, self.index.shortlist)

    def step(self, seed):
        """The end of a training step: the lists and the codebook change, the centers move."""
        self.index.commit()
        if self.index.source == "tokens":
            hidden = randn(60, 6, seed=seed)
            self.codebook.accumulate(assign_with_statistics(hidden, self.codebook.codewords, 1)[1])
            self.codebook.apply_update(self.codebook.statistics.clone(), True)
            self.codebook.discard()
        else:
            self.codebook.count_update()
        self.weight = self.weight + 0.3 * randn(*self.weight.shape, seed=seed + 1000)

    def state(self):
        state = {f"codebook.{name}": value for name, value in self.codebook.state_dict().items()}
        state |= {f"index.{name}": value for name, value in self.index.state_dict().items()}
        return {name: value.clone() for name, value in state.items()}

    def resumed(self):
        """Another process that loads what this one saved."""
        other = Setup(self.index.source, self.index.refresh_interval)
        other.codebook.load_state_dict(self.codebook.state_dict())
        other.index.load_state_dict(self.index.state_dict())
        other.weight = self.weight.clone()
        return other


SOURCES = pytest.mark.parametrize("source", ("tokens", "experts"))


@SOURCES
@pytest.mark.parametrize("interval", (1, 3, 7, 20))
def test_num_rebuilds_counts_those_of_a_training(source, interval):
    setup, built_at = Setup(source, interval), set()
    assert num_rebuilds(0, interval) == 0
    for step in range(1, 6 * interval):
        setup.forward()
        setup.step(step)
        built_at.add(int(setup.index.built_at))
        assert len(built_at) == num_rebuilds(step, interval)
    assert num_rebuilds(400, 20) == 57


@SOURCES
def test_first_forward_builds_the_lists(source):
    setup = Setup(source)
    assert setup.forward()
    if source == "tokens":
        ranking = rank_experts(setup.codebook.codewords, torch.ones(80), setup.weight, None, 9)
        expected = list_every_expert(ranking, 3)
    else:
        expected = inverted_lists(setup.codebook.codewords, setup.weight, 9)
    assert torch.equal(setup.index.shortlist.long(), expected.long())


@SOURCES
def test_a_checkpoint_holds_no_tensor_without_numbers(source):
    """Megatron cannot save one. Older checkpoints of source 'experts' hold some, which are left."""
    setup, other = Setup(source), Setup(source)
    setup.forward()
    state = setup.index.state_dict()
    assert all(value.numel() for value in state.values())
    if source == "experts":
        state = {**state, "pool": torch.zeros(0, 36, dtype=torch.int32), "staged_keys": torch.zeros(0).long()}
    other.index.load_state_dict(state)
    assert_same_bits(other.index.state_dict(), setup.index.state_dict())


def test_codewords_are_ranked_step_by_step_and_the_lists_change_with_the_last():
    setup, changed, ranked = Setup("tokens", interval=20), [], []
    for step in range(70):
        before = setup.index.shortlist.clone()
        setup.forward()
        if setup.index._share is not None:
            ranked.append((step, setup.index._share.rows))
        setup.step(step)
        if not torch.equal(setup.index.shortlist, before):
            changed.append(step)
    due = [0]
    while due[-1] < 70:
        due.append(next_rebuild(due[-1], 20))
    assert changed == due[:-1]
    assert [step for step, rows in ranked if rows.stop == 80] == changed[2:]  # 0 and 1 at once, in the forward
    assert all(after.start == before.stop % 80 for (_, before), (_, after) in zip(ranked, ranked[1:], strict=False))
    assert [(step, rows.start, rows.stop) for step, rows in ranked if 60 < step < 67] == [
        (63, 0, 32), (65, 32, 64), (66, 64, 80),
    ]  # fmt: skip


def test_lists_of_experts_are_rebuilt_in_the_forward_after_each_due_update_only():
    setup = Setup("experts", interval=5)
    rebuilt = []
    for step in range(21):
        if setup.forward():
            rebuilt.append(step)
        setup.step(step)
    assert rebuilt == [0, 1, 2, 3, 4, 5, 7, 9, 12, 16]


@SOURCES
@pytest.mark.parametrize("interval", (1, 20))
def test_forwards_of_a_step_see_the_same_lists_and_work_once(source, interval):
    setup = Setup(source, interval)
    for step in range(27):
        setup.forward()
        before, share = setup.state(), setup.index._share
        # The centers move between two forwards of one step only where a test moves them.
        setup.weight = setup.weight + randn(90, 6, seed=50 + step)
        setup.forward()
        setup.index.refresh(setup.codebook, Centers(setup.weight), training=False)
        assert setup.index._share is share
        assert_same_bits(setup.state(), before)
        setup.step(step)


def test_what_a_discarded_attempt_has_ranked_is_ranked_again():
    run, other = Setup("tokens"), Setup("tokens")
    for step in range(6):
        other.forward()
        other.index.discard()
        for setup in (run, other):
            setup.forward()
            setup.step(step)
        assert_same_bits(other.state(), run.state())


def test_lists_of_experts_follow_moving_centers():
    setup = Setup("experts", interval=1)
    for step in range(4):
        setup.forward()
        assert sorted(present(setup.index.shortlist)) == list(range(90))
        torch.testing.assert_close(setup.codebook.codewords.norm(dim=1), torch.ones(80))
        before = setup.index.shortlist.clone()
        setup.step(step)
    setup.forward()
    assert not torch.equal(setup.index.shortlist, before)


@SOURCES
@pytest.mark.parametrize("saved_after", (*range(4), *range(20, 27)))
@pytest.mark.parametrize("forward_between", (False, True), ids=("at-step-end", "after-evaluation"))
def test_a_resumed_run_sees_the_lists_of_the_uninterrupted_one(source, saved_after, forward_between):
    run = Setup(source, interval=12)
    for step in range(saved_after):
        run.forward()
        run.step(step)
    if forward_between:
        run.index.refresh(run.codebook, Centers(run.weight), training=False)
    other = run.resumed()
    for step in range(saved_after, saved_after + 8):
        assert run.forward() == other.forward()
        assert_same_bits(other.state(), run.state())
        run.step(step)
        other.step(step)


def test_a_checkpoint_without_lists_builds_them_in_the_first_forward():
    setup = Setup("tokens")
    result = setup.index.load_state_dict({}, strict=True)
    assert result.missing_keys == []
    assert setup.forward()


def test_a_checkpoint_from_before_there_were_pools_makes_the_next_lists_at_once():
    run = Setup("tokens", interval=20)
    for step in range(50):
        run.forward()
        run.step(step)
    assert 0 < int(run.index.progress[1]) < 80
    other, before = run.resumed(), run.index.shortlist.clone()
    other.index.load_state_dict(
        {name: value for name, value in run.index.state_dict().items() if name not in REBUILDING}
    )
    assert other.index.progress.tolist() == [0, 0] and (other.index.staged_keys == index_module._UNTRIED).all()
    due = next_rebuild(int(run.index.built_at), 20)
    for step in range(50, due + 1):
        assert torch.equal(other.index.shortlist, before)
        other.forward()
        other.step(step)
    assert not torch.equal(other.index.shortlist, before)  # made at once, as there are no pools to choose from
    assert other.index.progress.tolist() == [1, 0] and int(other.index.built_at) == due
    assert set(other.index.shortlist.flatten().tolist()) == set(range(90))


@pytest.mark.parametrize("assign", (False, True), ids=("copied", "assigned"))
def test_a_shard_leaves_the_state_that_it_loads_as_it_is(assign):
    """Checkpoints hold global expert ids, and a shard local ones."""
    index = ShortlistIndex(8, 4, 4, source="tokens", refresh_interval=3, shard=1, num_shards=2)
    index.shortlist.copy_(torch.arange(4))
    saved = index.state_dict()
    expected = {name: value.clone() for name, value in saved.items()}
    index.load_state_dict(saved, assign=assign)
    assert (saved["shortlist"] == torch.arange(8, 12)).all()
    assert (index.shortlist == torch.arange(4)).all()
    assert_same_bits(saved, expected)


@pytest.mark.parametrize("missing", ("shortlist", "built_at", *REBUILDING))
def test_a_checkpoint_with_half_an_index_is_an_error(missing):
    index = Setup("tokens").index
    incomplete = {name: value for name, value in index.state_dict().items() if name != missing}
    with pytest.raises(RuntimeError, match=missing):
        index.load_state_dict(incomplete)


@pytest.mark.parametrize("shape", ((5, 7), (4, 6)), ids=str)
def test_a_checkpoint_of_another_shape_is_refused(shape):
    other = ShortlistIndex(20, *shape, source="tokens", refresh_interval=3).state_dict()
    with pytest.raises(ValueError) as error:
        ShortlistIndex(20, 5, 6, source="tokens", refresh_interval=3).load_state_dict(other)
    message = str(error.value)
    assert "moe_air_num_clusters" in message and "moe_air_shortlist_size" in message
    assert str(shape) in message and "(5, 6)" in message


# A rebuild from what is near, against the ranking of all experts.

SELECTIONS = {
    "plain": (False, None),
    "bias": (True, None),
    "sigmoid": (True, "sigmoid"),
    "sqrt": (False, "sqrtsoftplus"),
}


def fixed(selection, num_experts=600, num_clusters=100, shortlist_size=40, num_reserved=12, interval=1):
    """Codebook, index and centers, which stay as they are; the lists are those of all experts."""
    with_bias, function = SELECTIONS[selection]
    codebook = Codebook(num_clusters, 8, 0.8)
    codebook.accumulate(assign_with_statistics(2.0 * randn(500, 8, seed=5), codebook.codewords, 1)[1])
    codebook.apply_update(codebook.statistics.clone(), True)
    index = ShortlistIndex(
        num_experts, num_clusters, shortlist_size, source="tokens", refresh_interval=interval, num_reserved=num_reserved
    )
    bias = 0.3 * randn(num_experts, seed=3) if with_bias else None
    expert_bias = None if function is None else 0.1 * randn(num_experts, seed=4)
    centers = Centers(randn(num_experts, 8, seed=2), bias, function, expert_bias)
    index.refresh(codebook, centers)
    return codebook, index, centers


def rebuild(codebook, index, centers):
    codebook.count_update()
    index.refresh(codebook, centers)
    index.commit()


def as_sets(lists):
    return [set(row) for row in lists.tolist()]


def full_ranking(codebook, index, centers):
    return centers.rank_experts(codebook.codewords, codebook.typical_projections(), index.shortlist.shape[1])


def scrambled(selection):
    """The same, with lists of every expert, but in the wrong places, and pools to match; and the lists of before."""
    codebook, index, centers = fixed(selection)
    expected = index.shortlist.clone()
    index.shortlist.copy_(balanced_lists(100, 40, 600, "cpu"))
    index.pool.copy_(balanced_lists(100, 160, 600, "cpu"))
    return codebook, index, centers, expected


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("block", (32, 128))
def test_a_rebuild_in_which_every_codeword_has_its_turn_is_a_full_one(selection, block, monkeypatch):
    """As on a GPU."""
    codebook, index, centers, expected = scrambled(selection)
    monkeypatch.setattr(index_module, "schedule", lambda *_: Schedule(block, 1))
    rebuild(codebook, index, centers)
    assert torch.equal(index.shortlist, expected)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_rebuild_that_chooses_from_all_experts_is_a_full_one(selection):
    codebook, index, centers, expected = scrambled(selection)
    index.pool = torch.arange(600, dtype=torch.int32).expand(100, 600).contiguous()
    rebuild(codebook, index, centers)
    assert torch.equal(index.shortlist, expected)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_after_a_turn_of_every_codeword_the_lists_keep_the_best_of_all_experts(selection):
    """Whatever stood there; experts that no list keeps are where they were tried last."""
    codebook, index, centers, _ = scrambled(selection)
    assert index.schedule.num_turns == 4
    for _ in range(index.schedule.num_turns):
        rebuild(codebook, index, centers)
    best = full_ranking(codebook, index, centers).lists[:, :28]
    assert all(kept <= listed for kept, listed in zip(as_sets(best), as_sets(index.shortlist), strict=True))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_lists_in_parts_are_bitwise_the_lists_of_an_index_for_each_part(selection):
    """Over spread rebuilds with moving centers; saved, they are the columns of the whole, with its ids."""
    num_parts, num_experts, size = 3, 120, 12
    with_bias, function = SELECTIONS[selection]
    bias = 0.3 * randn(num_experts, seed=3) if with_bias else None
    expert_bias = None if function is None else 0.1 * randn(num_experts, seed=4)
    whole = Setup("tokens", 3, num_experts, size)
    options = dict(source="tokens", refresh_interval=3, num_reserved=1)
    whole.index = ShortlistIndex(num_experts, 80, size, num_parts=num_parts, **options)
    each = num_experts // num_parts
    parts = [slice(first, first + each) for first in range(0, num_experts, each)]
    indices = [
        ShortlistIndex(each, 80, size // num_parts, shard=shard, num_shards=num_parts, **options)
        for shard in range(num_parts)
    ]
    for step in range(24):
        centers = Centers(whole.weight, bias, function, expert_bias)
        whole.index.refresh(whole.codebook, centers)
        for index, part in zip(indices, parts, strict=True):
            index.refresh(whole.codebook, centers[part])
            index.commit()
        whole.step(step)
        states = [index.state_dict() for index in indices]
        for name, value in whole.index.state_dict().items():
            of_parts = [state[name] for state in states]
            split = {"shortlist": 1, "pool": 1, "staged_keys": 0}.get(name)
            assert torch.equal(value, of_parts[0] if split is None else torch.cat(of_parts, dim=split)), (step, name)
    assert int(whole.index.progress[0]) > 8  # every codeword had its turn
    held = whole.index.shortlist.view(80, num_parts, -1) // each
    assert bool((held == torch.arange(num_parts).view(1, -1, 1)).all())
    assert set(present(whole.index.shortlist)) == set(range(num_experts))


def test_a_part_is_saved_with_the_ids_of_the_model_and_loaded_from_them():
    options = dict(source="tokens", refresh_interval=3, num_reserved=1, shard=1, num_shards=2)
    index = ShortlistIndex(40, 80, 4, **options)
    codebook = Codebook(80, 6, 0.8)
    index.refresh(codebook, Centers(randn(40, 6)))
    state = {name: value.clone() for name, value in index.state_dict().items()}
    assert torch.equal(state["shortlist"], index.shortlist + 40) and torch.equal(state["pool"], index.pool + 40)
    again = ShortlistIndex(40, 80, 4, **options)
    again.load_state_dict(state)
    assert torch.equal(again.shortlist, index.shortlist) and torch.equal(again.pool, index.pool)


def test_a_shard_that_fails_says_so_at_the_end_of_the_step_where_the_other_ranks_learn_of_it():
    def after(num_steps, num_shards):
        setup = Setup("tokens", interval=1)
        setup.index = ShortlistIndex(
            90, 80, 9, source="tokens", refresh_interval=1, num_reserved=3, num_shards=num_shards
        )
        for step in range(num_steps):
            setup.forward()
            setup.step(step)
        setup.index.refresh(setup.codebook, Centers(setup.weight, torch.zeros(3)))
        return setup.index.failure

    assert isinstance(after(4, num_shards=2), ValueError)
    with pytest.raises(ValueError, match="bias"):
        after(4, num_shards=1)


@pytest.mark.parametrize("saved, loading", ((1, 3), (2, 3)))
def test_lists_in_other_parts_are_refused(saved, loading):
    def index_of(num_parts):
        return ShortlistIndex(120, 80, 12, source="tokens", refresh_interval=3, num_reserved=1, num_parts=num_parts)

    index = index_of(saved)
    index.refresh(Codebook(80, 6, 0.8), Centers(randn(120, 6)))
    index_of(saved).load_state_dict(index.state_dict())
    with pytest.raises(ValueError, match="another number of parts than moe_air_list_parts"):
        index_of(loading).load_state_dict(index.state_dict())


def test_every_expert_is_tried_in_every_rebuild():
    """At least where it stands: so the orphan rule knows a codeword for it."""
    codebook, index, centers = fixed("plain")
    for _ in range(6):
        codebook.count_update()
        index.refresh(codebook, centers)
        assert (index._share.keys > index_module._UNTRIED).all()
        index.commit()


@settings(max_examples=40, deadline=None)
@given(
    num_experts=st.integers(1, 150), num_clusters=st.integers(1, 90), topk=st.integers(1, 6), spare=st.integers(0, 20),
    interval=st.sampled_from((1, 20, 40)), seed=st.integers(0, 1000),
)  # fmt: skip
def test_every_expert_stands_in_a_list_after_every_swap(num_experts, num_clusters, topk, spare, interval, seed):
    topk = min(topk, num_experts)
    size = min(topk + -(-num_experts // num_clusters) + spare, num_experts)
    reserved = reserved_slots(num_experts, num_clusters, size, topk)
    codebook = Codebook(num_clusters, 4, 0.8)
    index = ShortlistIndex(
        num_experts, num_clusters, size, source="tokens", refresh_interval=interval, num_reserved=reserved
    )
    weight = randn(num_experts, 4, seed=seed)
    for step in range(26):
        index.refresh(codebook, Centers(weight))
        assert set(index.shortlist.flatten().tolist()) == set(range(num_experts))
        assert (index.shortlist.diff(dim=1) > 0).all()  # sorted, and none twice
        index.commit()
        hidden = randn(30, 4, seed=seed + step)
        codebook.accumulate(assign_with_statistics(hidden, codebook.codewords, 1)[1])
        codebook.apply_update(codebook.statistics.clone(), True)
        codebook.discard()
        weight = weight + 0.3 * randn(*weight.shape, seed=seed + step)


def test_keys_order_scores_and_then_codewords():
    scores = torch.tensor([-torch.inf, -3.0, -1e-30, 0.0, 2.5, 2.5, torch.inf])
    codewords = torch.tensor([7, 2**31 - 1, 0, 4, 6, 5, 1])
    keys = pack_keys(scores, codewords)
    assert torch.equal(keys.sort().values, keys)
    assert all(torch.equal(*pair) for pair in zip(unpack_keys(keys), (scores, codewords), strict=True))
    assert torch.equal(pack_keys(torch.tensor([torch.nan, -torch.nan]), codewords[-1:]), keys[-1:].expand(2))


def test_a_share_of_several_ranks_is_not_taken_for_all():
    class TwoRanks:
        rank, size = staticmethod(lambda: 1), staticmethod(lambda: 2)

    codebook, index, centers = fixed("plain")
    codebook.count_update()
    index.refresh(codebook, centers, group=TwoRanks)
    with pytest.raises(ValueError, match="made by 2 ranks together.*not with one of 1"):
        index.commit()


@pytest.mark.parametrize("saved, loading", [("tokens", "experts"), ("experts", "tokens")])
def test_lists_of_the_other_source_are_refused(saved, loading):
    state = ShortlistIndex(9, 4, 3, source=saved, refresh_interval=10).state_dict()
    with pytest.raises(ValueError, match=f"moe_air_codebook_source \\('{loading}'\\) must be .* '{saved}'"):
        ShortlistIndex(9, 4, 3, source=loading, refresh_interval=10).load_state_dict(state)


def test_provisional_lists_of_many_experts_are_told_apart_by_a_single_id():
    """Ids beyond 2^24, where fp32 has no odd numbers."""
    index = ShortlistIndex(8, 2, 4, source="tokens", refresh_interval=1)
    codebook, centers = Codebook(2, 3, 0.9), Centers(torch.zeros(8, 3))
    index.shortlist.fill_(2**25)
    before = index.identify(codebook, centers)
    index.shortlist[1, 3] += 1
    assert index.identify(codebook, centers) != before
