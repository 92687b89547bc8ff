"""When lists are rebuilt, and in which blocks of codewords."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from air_moe_megatron.learned.rebuild_schedule import next_rebuild, schedule


def rebuilds(interval, number):
    """The updates of the codebook that the first lists of a training come from."""
    found = [0]
    while len(found) < number:
        found.append(next_rebuild(found[-1], interval))
    return found


def test_rebuilds_follow_a_young_codebook_closely_and_then_in_intervals():
    assert rebuilds(1, 8) == list(range(8))
    assert rebuilds(20, 31)[18:] == [18, 19, 20, 22, 24, 26, 28, 30, 33, 36, 39, 42, 46]
    assert rebuilds(20, 57)[-6:] == [295, 315, 335, 355, 375, 395]


@pytest.mark.parametrize("interval", (1, 3, 10, 20))
def test_lists_are_at_most_twice_the_share_of_an_interval_old(interval):
    for before, after in zip(rebuilds(interval, 200), rebuilds(interval, 200)[1:], strict=False):
        assert 1 <= after - before <= max(1, min(interval, 2 * before / interval))


@given(num_experts=st.integers(1, 2**21), num_clusters=st.integers(1, 2**13), on_gpu=st.booleans())
def test_blocks_and_turns(num_experts, num_clusters, on_gpu):
    """A GPU ranks all experts each time, in blocks that fill its tiles and hold few scores."""
    size, turns = schedule(num_experts, num_clusters, on_gpu)
    assert schedule(65_536, 1024, False) == (32, 8)
    assert schedule(65_536, 1024, True) == (256, 1)
    if on_gpu:
        assert turns == 1
        assert size % 128 == 0
        assert size == 128 or size * num_experts <= 2**24
    else:
        assert size == 32
        assert turns == min(8, -(-num_clusters // 32))
