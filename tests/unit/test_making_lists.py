"""Lists made at once: which experts are in which list."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from air_moe_megatron.learned.lists import balanced_lists, inverted_lists, list_every_expert, reserved_slots
from air_moe_megatron.ops.coarse import assign
from air_moe_megatron.ops.ranking import Ranking, rank_experts
from air_moe_megatron.ops.ranking import eager as eager_ranking
from tests.codebooks import randn


def directions(num, hidden_size, seed=0):
    return torch.nn.functional.normalize(randn(num, hidden_size, seed=seed), dim=1)


def in_chunks(*args, selection=(None, None), chunk_elements=eager_ranking.CHUNK_ELEMENTS):
    """The ranking that streams chunks of experts, of a given size."""
    return Ranking(*eager_ranking.rank_experts(*args, *selection, chunk_elements))


def top_scoring_lists(*args, **kwargs):
    """The lists of the experts that score highest, without regard to the others."""
    return list_every_expert(in_chunks(*args, **kwargs), reserved=0)


def present(lists):
    """The expert ids in the lists, one after another."""
    return lists[lists >= 0].tolist()


# Lists of source 'tokens'.


def test_top_scoring_worked_example():
    weight = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [2.0, 2.5]])
    assert top_scoring_lists(torch.eye(2), torch.ones(2), weight, None, 2).tolist() == [[1, 3], [2, 3]]


@pytest.mark.parametrize("chunk", (1, 3, 7, 8, 20, 100), ids=lambda n: f"chunks-of-{n}")
@pytest.mark.parametrize("shortlist_size", (1, 7, 20))
@pytest.mark.parametrize("with_bias", (False, True), ids=("no-bias", "bias"))
def test_top_scoring_equals_topk_over_all_experts_for_any_chunk(chunk, shortlist_size, with_bias):
    codewords, weight = directions(5, 6), randn(20, 6, seed=1)
    scale = torch.rand(5, generator=torch.Generator().manual_seed(2)) * 3.0
    bias = randn(20, seed=3) if with_bias else None
    scores = codewords @ weight.t()
    if with_bias:
        scores = scores * scale.unsqueeze(1) + bias
    expected = scores.topk(shortlist_size, dim=1).indices.sort(dim=1).values
    lists = top_scoring_lists(codewords, scale, weight, bias, shortlist_size, chunk_elements=5 * chunk)
    assert lists.dtype == torch.int32
    assert torch.equal(lists.long(), expected)


def test_bias_weighs_more_where_tokens_are_short():
    """At the codeword [1, 0], expert 0 leads by 1 in its center and expert 1 by 2 in its bias."""
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0.0, 2.0])
    codewords = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    lists = top_scoring_lists(codewords, torch.tensor([1.0, 3.0]), weight, bias, 1)
    assert lists.tolist() == [[1], [0]]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
def test_top_scoring_takes_centers_of_any_dtype(dtype):
    codewords, weight = directions(5, 6), randn(20, 6, seed=1).to(dtype)
    expected = top_scoring_lists(codewords, torch.ones(5), weight.float(), None, 4)
    assert torch.equal(top_scoring_lists(codewords, torch.ones(5), weight, None, 4), expected)


@settings(max_examples=150)
@given(
    num_experts=st.integers(1, 300), num_clusters=st.sampled_from((1, 3, 8, 16)), shortlist_size=st.integers(1, 40),
    chunk=st.integers(1, 300), sorted_weights=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_ranking_equals_topk_and_argmax(num_experts, num_clusters, shortlist_size, chunk, sorted_weights, seed):
    """Also where each chunk beats those before, so that the guess of how many entries change is wrong."""
    shortlist_size = min(shortlist_size, num_experts)
    codewords, weight = directions(num_clusters, 4, seed), randn(num_experts, 4, seed=seed + 1)
    if sorted_weights:
        weight = weight[(weight @ codewords[0]).argsort()]
    ranking = in_chunks(
        codewords, torch.ones(num_clusters), weight, None, shortlist_size, chunk_elements=chunk * num_clusters
    )
    scores = codewords @ weight.t()
    found = scores.gather(1, ranking.lists)
    torch.testing.assert_close(found, scores.topk(shortlist_size, dim=1).values, rtol=1e-5, atol=1e-6)
    assert all(len(set(row)) == shortlist_size for row in ranking.lists.tolist())
    torch.testing.assert_close(ranking.score, scores.amax(dim=0), rtol=1e-5, atol=1e-6)
    at_nearest = scores.gather(0, ranking.nearest.unsqueeze(0)).squeeze(0)
    torch.testing.assert_close(at_nearest, scores.amax(dim=0), rtol=1e-5, atol=1e-6)


def test_lists_rank_by_what_the_top_k_ranks_by():
    codewords, weight = torch.eye(2, 4), torch.zeros(5, 4)
    weight[:, 0] = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0])
    favor = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0])
    lists = top_scoring_lists(
        codewords,
        torch.ones(2),
        weight,
        None,
        2,
        selection=("sigmoid", favor),
        chunk_elements=4,
    )
    assert lists[0].tolist() == [0, 4]


def test_a_score_function_needs_an_expert_bias():
    with pytest.raises(
        ValueError, match="score_function \\('sigmoid'\\) and expert_bias \\(None\\) must be given together"
    ):
        rank_experts(torch.eye(2), torch.ones(2), torch.eye(2), None, 1, score_function="sigmoid")


# The orphan rule: every expert stands in a list.


def crowded(num_experts, num_clusters, seed=0):
    """Codewords so close together that their best experts are nearly the same."""
    codewords = directions(1, 8, seed) + 0.1 * directions(num_clusters, 8, seed + 1)
    return torch.nn.functional.normalize(codewords, dim=1), randn(num_experts, 8, seed=seed + 2)


@settings(max_examples=150)
@given(
    num_experts=st.integers(1, 200), num_clusters=st.integers(1, 20), topk=st.integers(1, 8),
    spare=st.integers(0, 30), is_crowded=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_every_expert_stands_in_a_list(num_experts, num_clusters, topk, spare, is_crowded, seed):
    topk = min(topk, num_experts)
    shortlist_size = min(topk + -(-num_experts // num_clusters) + spare, num_experts)
    codewords, weight = crowded(num_experts, num_clusters, seed)
    if not is_crowded:
        codewords = directions(num_clusters, 8, seed)
    ranking = rank_experts(codewords, torch.ones(num_clusters), weight, None, shortlist_size)
    reserved = reserved_slots(num_experts, num_clusters, shortlist_size, topk)
    lists = list_every_expert(ranking, reserved, num_rebuilds=seed % 5)
    assert lists.shape == (num_clusters, shortlist_size) and lists.dtype == torch.int32
    assert set(lists.flatten().tolist()) == set(range(num_experts))
    for codeword in range(num_clusters):
        ids = lists[codeword].tolist()
        assert ids == sorted(set(ids))  # none twice
        assert set(ranking.lists[codeword, : shortlist_size - reserved].tolist()) <= set(ids)  # the best stay


def test_an_orphan_goes_to_the_codeword_where_it_scores_highest():
    codewords = torch.eye(2)
    # Expert 4 scores nowhere among the best two, and higher at the second codeword than at the first.
    weight = torch.tensor([[9.0, 0.0], [8.0, 0.0], [0.0, 9.0], [0.0, 8.0], [-2.0, -1.0]])
    ranking = rank_experts(codewords, torch.ones(2), weight, None, 3)
    assert list_every_expert(ranking, 1).tolist() == [[0, 1, 2], [2, 3, 4]]


def test_where_the_best_codeword_is_full_an_orphan_goes_where_there_is_room():
    codewords = torch.eye(2)
    weight = torch.tensor([[9.0, 9.0], [8.0, 0.3], [7.0, 0.2], [6.0, 0.1]])
    ranking = rank_experts(codewords, torch.ones(2), weight, None, 3)
    assert list_every_expert(ranking, 2).tolist() == [[0, 1, 2], [0, 1, 3]]


def test_more_orphans_than_slots_get_them_one_after_another():
    codewords, weight = crowded(100, 4)
    ranking = rank_experts(codewords, torch.ones(4), weight, None, 10)
    reserved = reserved_slots(100, 4, 10, topk=7)
    assert reserved == 3  # 12 slots for at least 72 orphans
    listed = set()
    for num_rebuilds in range(9):
        lists = list_every_expert(ranking, reserved, num_rebuilds)
        assert all(len(set(row)) == 10 for row in lists.tolist())
        listed |= set(lists.flatten().tolist())
    assert listed == set(range(100))


# Lists of source 'experts'.


def test_inverted_lists_put_each_expert_at_its_nearest_codeword_where_there_is_room():
    codewords, weight = directions(5, 6), randn(40, 6, seed=1)
    lists = inverted_lists(codewords, weight, 40)
    nearest = assign(weight, codewords, 1).squeeze(1)
    for codeword in range(5):
        assert present(lists[codeword]) == torch.nonzero(nearest == codeword).flatten().tolist()


def test_inverted_lists_see_the_directions_of_centers_of_every_length():
    codewords, weight = directions(5, 6), torch.nn.functional.normalize(randn(40, 6, seed=1), dim=1)
    lengths = torch.logspace(-36, 37, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    lists = inverted_lists(codewords, weight * lengths.unsqueeze(1), 9)  # so short that experts compete
    assert torch.equal(lists, inverted_lists(codewords, weight, 9))


def test_a_full_list_keeps_the_nearest_and_sends_the_others_on():
    codewords = torch.eye(2)
    weight = torch.tensor([[1.0, 0.3], [1.0, 0.1], [1.0, 0.2], [0.1, 1.0]])
    assert inverted_lists(codewords, weight, 2).tolist() == [[1, 2], [0, 3]]


@settings(max_examples=60)
@given(
    num_experts=st.integers(1, 40), num_clusters=st.integers(1, 8), spare=st.integers(0, 6), seed=st.integers(0, 1000)
)
def test_inverted_lists_are_a_bounded_partition(num_experts, num_clusters, spare, seed):
    capacity = -(-num_experts // num_clusters) + spare
    codewords, weight = directions(num_clusters, 4, seed), randn(num_experts, 4, seed=seed + 1)
    lists = inverted_lists(codewords, weight, capacity)
    assert lists.dtype == torch.int32 and lists.shape == (num_clusters, capacity)
    assert sorted(present(lists)) == list(range(num_experts))
    lengths = (lists >= 0).sum(dim=1)
    similarity = torch.nn.functional.normalize(weight, dim=1) @ codewords.t()
    for codeword in range(num_clusters):
        ids = present(lists[codeword])
        assert ids == sorted(ids) and lists[codeword, : len(ids)].tolist() == ids  # -1 only at the end
        for expert in ids:
            nearer = similarity[expert] > similarity[expert, codeword]
            assert (lengths[nearer] == capacity).all()


def test_equal_centers_fill_one_list_after_another():
    lists = inverted_lists(directions(4, 6), randn(1, 6, seed=1).expand(10, 6), 3)
    assert sorted(present(lists)) == list(range(10))
    assert sorted((lists >= 0).sum(dim=1).tolist()) == [1, 3, 3, 3]


# Lists for load tests.


@settings(max_examples=100)
@given(num_experts=st.integers(1, 60), num_clusters=st.integers(1, 20), data=st.data())
def test_balanced_lists_give_every_expert_the_same_number_of_slots_up_to_one(num_experts, num_clusters, data):
    num_clusters = min(num_clusters, num_experts)
    shortlist_size = data.draw(st.integers(1, num_experts))
    lists = balanced_lists(num_clusters, shortlist_size, num_experts, "cpu")
    assert lists.dtype == torch.int32 and lists.shape == (num_clusters, shortlist_size)
    assert all(len(set(row)) == shortlist_size and row == sorted(row) for row in lists.tolist())
    counts = torch.bincount(lists.flatten(), minlength=num_experts)
    assert counts.numel() == num_experts and counts.max() - counts.min() <= 1
