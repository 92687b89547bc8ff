"""When lists are rebuilt, and in which blocks of codewords."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from air_moe_megatron.learned.rebuild_schedule import RebuildState, Schedule, next_rebuild, schedule


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


def test_the_steps_of_an_interval_share_the_codewords():
    """In whole blocks, evenly, and the last step takes what is left."""
    blocks, state = Schedule(32, 4), RebuildState(built_at=100, num_rebuilds=3, num_done=0)
    assert state.due(20) == 110 and RebuildState(-1, 0, 0).due(20) == 0
    found = []
    for num_updates in range(100, 105):
        rows = blocks.rows_due(state, num_updates, 104, num_clusters=150)
        found.append((rows.start, rows.stop))
        state = state._replace(num_done=rows.stop)
    assert found == [(0, 0), (0, 32), (32, 64), (64, 96), (96, 150)]
    assert [blocks.has_turn(first, 3) for first in (0, 32, 64, 96, 128)] == [False, False, False, True, False]
