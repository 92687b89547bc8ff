"""The codebook: adaptive spherical k-means in fp32, equal on every rank."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from air_moe_megatron.learned.codebook import (
    Codebook,
    CodebookHealth,
    lloyd_step,
    split_loaded,
    update_from_tokens,
    window_decay,
)
from air_moe_megatron.ops.coarse import assign, assign_with_statistics, eager, token_statistics
from tests.codebooks import CLOSE, assert_same_bits, clustered, learn, randn, state


def split_one(codewords, ema, statistics, num_updates):
    """``split_loaded`` of one codebook."""
    alone = (value.unsqueeze(0) for value in (codewords, ema, statistics))
    return tuple(value.squeeze(0) for value in split_loaded(*alone, num_updates))


def quantization_error(codewords, hidden):
    unit = torch.nn.functional.normalize(hidden, dim=1)
    return 1.0 - (unit @ codewords.t()).max(dim=1).values.mean().item()


# Coarse assignment.


def test_assign_worked_example():
    assert assign(torch.tensor([[0.0, 3.0]]), torch.eye(2), 1).tolist() == [[1]]


@pytest.mark.parametrize("block_size", (1, 35, 1 << 22))  # similarities: blocks of one token, of seven, of all 20
@pytest.mark.parametrize("num_probes", (1, 2, 5))
def test_assign_orders_codewords_by_cosine(num_probes, block_size, monkeypatch):
    monkeypatch.setattr(eager, "_BLOCK_SIZE", block_size)
    hidden, codewords = randn(20, 6), torch.nn.functional.normalize(randn(5, 6, seed=1), dim=1)
    cosines = torch.nn.functional.cosine_similarity(hidden.unsqueeze(1), codewords.unsqueeze(0), dim=2)
    expected = [sorted(range(5), key=row.__getitem__, reverse=True)[:num_probes] for row in cosines.tolist()]
    assert assign(hidden, codewords, num_probes).tolist() == expected


def test_assign_does_not_depend_on_the_length_of_a_token():
    hidden, codewords = randn(20, 6), torch.nn.functional.normalize(randn(5, 6, seed=1), dim=1)
    assert torch.equal(assign(hidden * 2.0**20, codewords, 2), assign(hidden, codewords, 2))


@pytest.mark.parametrize("num_probes", (1, 2))
def test_assign_never_chooses_what_is_not_allowed(num_probes):
    hidden, codewords = randn(50, 6), torch.nn.functional.normalize(randn(5, 6, seed=1), dim=1)
    allowed = torch.tensor([True, False, True, False, True])
    chosen = assign(hidden, codewords, num_probes, allowed)
    assert allowed[chosen].all()
    ids = torch.tensor([0, 2, 4])
    assert torch.equal(chosen, ids[assign(hidden, codewords[ids], num_probes)])


# Statistics.


def test_statistics_worked_example():
    statistics = token_statistics(torch.tensor([[0.0, 2.0]]), torch.eye(2), torch.tensor([1]))
    assert statistics.tolist() == [[0, 0, 0, 0, 0], [0, 1, 1, 1, 2]]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_statistics_equal_a_loop_over_tokens(dtype):
    hidden = randn(40, 6).to(dtype)
    codewords = torch.nn.functional.normalize(randn(5, 6, seed=1), dim=1)
    nearest = assign(hidden, codewords, 1).squeeze(1)
    expected = torch.zeros(5, 9)
    for token, codeword in zip(hidden.float(), nearest.tolist(), strict=True):
        unit = token / token.norm()
        expected[codeword, :6] += unit
        expected[codeword, 6] += 1
        expected[codeword, 7] += unit @ codewords[codeword]
        expected[codeword, 8] += token.norm()
    statistics = token_statistics(hidden, codewords, nearest)
    assert statistics.dtype == torch.float32
    torch.testing.assert_close(statistics, expected, **CLOSE)


@pytest.mark.parametrize("sizes", ((64,), (32, 32), (1, 63), (0, 20, 44)), ids=str)
def test_microbatches_accumulate_to_one_batch(sizes):
    hidden = randn(64, 8)
    whole, parts = Codebook(6, 8, 0.9), Codebook(6, 8, 0.9)
    whole.accumulate(assign_with_statistics(hidden, whole.codewords, 1)[1])
    for part in hidden.split(sizes):
        parts.accumulate(assign_with_statistics(part, parts.codewords, 1)[1])
    torch.testing.assert_close(parts.statistics, whole.statistics, **CLOSE)
    assert parts.statistics[:, 8].sum() == 64


def test_padding_is_left_out_even_where_it_is_nan():
    hidden = randn(30, 8)
    padding_mask = torch.arange(30) % 3 == 0
    alone, padded = Codebook(4, 8, 0.9), Codebook(4, 8, 0.9)
    alone.accumulate(assign_with_statistics(hidden[~padding_mask], alone.codewords, 1)[1])
    nearest = assign(hidden, padded.codewords, 1).squeeze(1)
    hidden[padding_mask] = float("nan")
    padded.accumulate(token_statistics(hidden, padded.codewords, nearest, padding_mask))
    assert torch.equal(padded.statistics, alone.statistics)


def test_discard_forgets_what_was_accumulated():
    codebook = Codebook(4, 8, 0.9)
    hidden = randn(30, 8)
    codebook.accumulate(assign_with_statistics(hidden, codebook.codewords, 1)[1])
    assert codebook.statistics.count_nonzero() > 0
    codebook.discard()
    assert codebook.statistics.count_nonzero() == 0


# Updates.


def test_codewords_are_unit_directions_and_equal_for_equal_sizes():
    first, second = Codebook(12, 8, 0.9), Codebook(12, 8, 0.5)
    torch.testing.assert_close(first.codewords.norm(dim=1), torch.ones(12))
    assert torch.equal(first.codewords, second.codewords)


def test_starting_does_not_touch_the_random_state():
    before = torch.get_rng_state()
    codebook = Codebook(12, 8, 0.9)
    learn(codebook, clustered(50, 3, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_decayed_sums_equal_a_naive_reference():
    """Loads are even, so nothing is split: each codeword is the direction of its decayed sum of unit tokens."""
    decay, num_clusters = 0.7, 4
    codewords = torch.eye(num_clusters, 6)
    ema = torch.zeros(num_clusters, 9)
    sums = [[0.0] * 6 for _ in range(num_clusters)]
    counts = [0.0] * num_clusters
    for step in range(5):
        hidden = codewords.repeat_interleave(10, dim=0) + 0.3 * randn(40, 6, seed=step)
        nearest = torch.arange(num_clusters).repeat_interleave(10)
        statistics = token_statistics(hidden, codewords, nearest)
        codewords, ema = (
            of_one[0] for of_one in update_from_tokens(codewords[None], ema[None], statistics[None], decay, step)
        )
        for cluster in range(num_clusters):
            members = [[x / math.hypot(*row) for x in row] for row in hidden[nearest == cluster].tolist()]
            new = [sum(column) for column in zip(*members, strict=True)]
            sums[cluster] = [decay * a + (1 - decay) * b for a, b in zip(sums[cluster], new, strict=True)]
            counts[cluster] = decay * counts[cluster] + (1 - decay) * len(members)
            expected = torch.tensor(sums[cluster]) / math.hypot(*sums[cluster])
            torch.testing.assert_close(codewords[cluster], expected, **CLOSE)
            torch.testing.assert_close(ema[cluster, :6], torch.tensor(sums[cluster]), **CLOSE)
            torch.testing.assert_close(ema[cluster, 6].item(), counts[cluster], **CLOSE)


def test_window_decay_grows_to_the_decay_and_stays_there():
    decays = [window_decay(0.99, num_updates) for num_updates in range(400)]
    assert decays[:3] == pytest.approx([1 / 3, 2 / 4, 3 / 5])
    assert decays == sorted(decays) and decays[196] < 0.99 and set(decays[197:]) == {0.99}
    assert {window_decay(0.25, num_updates) for num_updates in range(400)} == {0.25}


def test_the_codebook_forgets_by_the_window_decay():
    codebook = Codebook(2, 4, 0.45)
    with torch.no_grad():
        codebook.codewords.copy_(torch.eye(2, 4))
    counts = 0.0
    for decay, num_tokens in zip((1 / 3, 0.45, 0.45), (10, 30, 20), strict=True):
        learn(codebook, torch.eye(2, 4).repeat(num_tokens, 1))
        counts = decay * counts + (1.0 - decay) * num_tokens
        torch.testing.assert_close(codebook.ema[:, 4], torch.tensor([counts, counts]))


@pytest.mark.parametrize("num_groups", (1, 2, 16), ids=lambda n: f"{n}-groups")
def test_first_statistics_leave_no_trace_of_the_random_start(num_groups):
    """Also where the tokens point in so few directions that most random codewords get none of them."""
    codebook = Codebook(16, 32, 0.9)
    start = codebook.codewords.clone()
    hidden = clustered(400, num_groups, 32)
    learn(codebook, hidden)
    assert ((codebook.codewords * start).sum(dim=1) < 0.9).all()
    # Every codeword lies in the cone of the tokens: a mean of up to four groups, where chance would give about 0.2.
    nearest = (torch.nn.functional.normalize(hidden, dim=1) @ codebook.codewords.t()).max(dim=0).values
    assert nearest.min() > 0.45


def test_quantization_error_falls_on_clustered_data():
    codebook = Codebook(16, 16, 0.5)
    errors = []
    for step in range(12):
        hidden = clustered(500, 12, 16, noise=0.2, seed=step)
        errors.append(quantization_error(codebook.codewords, hidden))
        learn(codebook, hidden)
    assert errors[0] > 0.3
    # One codeword per cluster is enough: what is left is the noise, 0.2**2 / 2.
    assert errors[-1] < 0.2**2
    assert all(later <= earlier + 0.01 for earlier, later in zip(errors, errors[1:], strict=False))


def test_lloyd_steps_do_not_raise_the_objective():
    weight = clustered(300, 20, 8, noise=0.5)
    codewords = torch.nn.functional.normalize(weight[:10], dim=1)
    errors = [quantization_error(codewords, weight)]
    for _ in range(6):
        codewords, _ = lloyd_step(codewords, weight)
        errors.append(quantization_error(codewords, weight))
    assert errors[-1] < errors[0]
    torch.testing.assert_close(codewords.norm(dim=1), torch.ones(10))


def starving(num_clusters=8, hidden_size=16):
    """Codewords and running sums where clusters 2 and 5 are starved and 1 carries most."""
    counts = torch.tensor([10.0, 100.0, 0.0, 12.0, 11.0, 0.5, 40.0, 9.0])
    codewords = torch.nn.functional.normalize(randn(num_clusters, hidden_size), dim=1)
    ema = torch.cat((codewords * 0.8 * counts.unsqueeze(1), torch.stack((counts, 0.8 * counts, counts), dim=1)), dim=1)
    return codewords, ema, 2.0 * ema


def test_starved_codewords_take_half_of_the_most_loaded_in_order():
    codewords, ema, statistics = starving()
    new_codewords, new_ema = split_one(codewords, ema, statistics, 3)
    for starved, loaded in ((2, 1), (5, 6)):
        assert new_ema[starved, 16] == new_ema[loaded, 16] == ema[loaded, 16] / 2
        torch.testing.assert_close(new_ema[starved, 17:], ema[loaded, 17:] / 2)
        both = new_codewords[[starved, loaded]]
        assert not torch.equal(both[0], both[1])
        torch.testing.assert_close(both.norm(dim=1), torch.ones(2))
        # The two halves lie on either side of the loaded codeword.
        torch.testing.assert_close(torch.nn.functional.normalize(both.sum(0), dim=0), codewords[loaded], **CLOSE)
        # The running sums point where the codewords do, or the next update would undo the split.
        torch.testing.assert_close(torch.nn.functional.normalize(new_ema[[starved, loaded], :16], dim=1), both)
    untouched = [0, 3, 4, 7]
    assert torch.equal(new_codewords[untouched], codewords[untouched])
    assert torch.equal(new_ema[untouched], ema[untouched])


def test_a_split_cuts_the_tokens_of_the_loaded_codeword_in_two():
    hidden = clustered(400, 1, 16, noise=0.5)
    codewords = torch.nn.functional.normalize(torch.stack((hidden.mean(0), -hidden.mean(0))), dim=1)
    statistics = token_statistics(hidden, codewords, assign(hidden, codewords, 1).squeeze(1))
    assert statistics[:, 16].tolist() == [400, 0]
    codewords = update_from_tokens(codewords[None], torch.zeros(1, 2, 19), statistics[None], 0.9, 0)[0][0]
    counts = torch.bincount(assign(hidden, codewords, 1).squeeze(1), minlength=2)
    assert counts.min() > 100


def test_splits_are_the_same_on_two_copies_and_ignore_the_random_state():
    arguments = starving()
    first = split_one(*arguments, 3)
    torch.manual_seed(12345)
    second = split_one(*(value.clone() for value in arguments), 3)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    another_update = split_one(*arguments, 4)
    assert not torch.equal(first[0], another_update[0])


def test_splits_do_not_write_into_their_arguments():
    arguments = starving()
    originals = [value.clone() for value in arguments]
    split_one(*arguments, 3)
    assert all(torch.equal(*pair) for pair in zip(arguments, originals, strict=True))


def test_halves_start_at_the_latest_mean_of_the_cluster():
    """A codeword that lags behind its tokens would have all of them on one side."""
    codewords, ema, statistics = starving()
    latest = torch.nn.functional.normalize(randn(16, seed=9), dim=0)
    statistics[1, :16] = 200 * latest
    new_codewords, _ = split_one(codewords, ema, statistics, 3)
    halves = new_codewords[[1, 2]]
    torch.testing.assert_close(torch.nn.functional.normalize(halves.sum(dim=0), dim=0), latest, **CLOSE)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12), st.integers(0, 3))
def test_splits_move_the_load_and_starve_nobody_new(counts, num_updates):
    counts = torch.tensor(counts, dtype=torch.float32)
    codewords = torch.nn.functional.normalize(randn(len(counts), 4), dim=1)
    scalars = torch.stack((counts, 0.5 * counts, counts), dim=1)
    ema = torch.cat((codewords * counts.unsqueeze(1), scalars), dim=1)
    new_codewords, new_ema = split_one(codewords, ema, ema, num_updates)
    limit = 0.1 * counts.mean()
    # The tokens that a starved codeword had are forgotten; all others are kept.
    assert counts[counts >= limit].sum() - 0.5 <= new_ema[:, 4].sum() <= counts.sum() + 0.5
    torch.testing.assert_close(new_codewords.norm(dim=1), torch.ones(len(counts)))
    assert new_ema.isfinite().all()
    assert ((new_ema[:, 4] < limit) <= (counts < limit)).all()


def test_two_copies_stay_bitwise_equal_over_many_updates():
    first, second = Codebook(16, 8, 0.8), Codebook(16, 8, 0.8)
    for step in range(8):
        hidden = clustered(60, 3, 8, seed=step)
        learn(first, hidden)
        learn(second, hidden)
        assert_same_bits(state(second), state(first))


def test_typical_projections_are_those_of_the_tokens_and_one_before_any():
    codebook = Codebook(2, 4, 0.5)
    assert codebook.typical_projections().tolist() == [1.0, 1.0]
    with torch.no_grad():
        codebook.codewords.copy_(torch.eye(2, 4))
    hidden = torch.cat((torch.eye(2, 4) * 2.0, torch.eye(2, 4) * 4.0))
    learn(codebook, hidden)
    torch.testing.assert_close(codebook.typical_projections(), torch.tensor([3.0, 3.0]))


def test_health_tells_of_the_last_batch():
    codebook = Codebook(3, 4, 0.5)
    with torch.no_grad():
        codebook.codewords.copy_(torch.eye(3, 4))
    learn(codebook, torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]))
    health = codebook.health()
    assert health.quantization_error == pytest.approx(1.0 - (0.8 + 1.0) / 2)
    assert health.live_codewords == 1 and health.num_dropped == 0
    other = Codebook(3, 4, 0.5)
    other.load_state_dict(codebook.state_dict())
    assert other.health() == CodebookHealth(None, None, 0)
