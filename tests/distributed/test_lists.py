"""Ranks that share the rebuilds of the lists: bitwise the lists of one rank, whatever their number divides."""

import pytest
import torch

from tests.codebooks import randn
from tests.processes import gloo_rank, ranks_fixture

EXPERTS, CLUSTERS, HIDDEN, SHORTLIST, STEPS = 203, 150, 8, 12, 60  # 150 codewords are five blocks, the last one shorter
SELECTIONS = {"plain": None, "expert-bias": "sigmoid"}


def train(group, function, interval, num_steps=STEPS, fails_at=None):
    """Train codebook and centers, the same on all ranks; returns codebook, index and each step's buffers."""
    from air_moe_megatron.learned.centers import Centers
    from air_moe_megatron.learned.codebook import Codebook
    from air_moe_megatron.learned.index import ShortlistIndex
    from air_moe_megatron.ops.coarse import assign_with_statistics

    codebook = Codebook(CLUSTERS, HIDDEN, 0.8)
    index = ShortlistIndex(EXPERTS, CLUSTERS, SHORTLIST, source="tokens", refresh_interval=interval, num_reserved=3)
    weight, bias = randn(EXPERTS, HIDDEN, seed=0), 0.1 * randn(EXPERTS, seed=1)
    expert_bias = None if function is None else 0.1 * randn(EXPERTS, seed=2)
    history = []
    for step in range(num_steps):
        centers = Centers(weight, bias[:-1] if step == fails_at else bias, function, expert_bias)
        index.refresh(codebook, centers, group=group)
        if step == num_steps - 1:
            break  # before the step's end
        index.commit(group)
        history.append({name: value.clone() for name, value in index.state_dict().items()})
        hidden = randn(200, HIDDEN, seed=100 + step)
        codebook.accumulate(assign_with_statistics(hidden, codebook.codewords, 1)[1])
        codebook.apply_update(codebook.statistics.clone(), True)
        codebook.discard()
        weight = weight + 0.1 * randn(EXPERTS, HIDDEN, seed=200 + step)
    return codebook, index, history


def fail(rank, group):
    """A step in which rank 1 cannot rank its share; the text of the error that it ends in, and of its cause."""
    from air_moe_megatron.sync import update_codebooks
    from tests.distributed.test_codebook_sync import make_layers

    codebook, index, _ = train(group, None, 20, num_steps=6, fails_at=5 if rank == 1 else None)
    assert (index.failure is None) == (rank != 1)
    layers = make_layers(2)
    layers[1].codebook, layers[1].index = codebook, index
    with pytest.raises(RuntimeError) as error:
        update_codebooks(layers, group)
    return str(error.value), None if error.value.__cause__ is None else type(error.value.__cause__).__name__


def worker(rank, world_size, directory):
    """All scenarios on one rank, saved for the tests; starting the processes takes longer than running them."""
    with gloo_rank(rank, world_size, directory) as group:
        sizes, original = [], torch.distributed.all_reduce

        def all_reduce(values, *args, **kwargs):
            sizes.append(values.numel() * values.element_size())
            return original(values, *args, **kwargs)

        torch.distributed.all_reduce = all_reduce
        results = {}
        for name, function in SELECTIONS.items():
            for interval in (1, 20):
                sizes.clear()
                history = train(group, function, interval)[2]
                results[name, interval] = history, list(sizes)
        results["failure"] = fail(rank, group)
        torch.save(results, f"{directory}/{rank}.pt")


ranks = ranks_fixture(worker, 2, 4)


@pytest.fixture(scope="module")
def alone():
    """The same trainings on one rank, with the one thread that ranks have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda name, interval: train(None, SELECTIONS[name], interval)[2]
    torch.set_num_threads(threads)


@pytest.mark.parametrize("interval", (1, 20))
@pytest.mark.parametrize("name", SELECTIONS)
def test_every_rank_has_bitwise_the_lists_and_the_staged_rebuild_of_one_rank(ranks, alone, name, interval):
    expected = alone(name, interval)
    assert not torch.equal(expected[-1]["shortlist"], expected[STEPS // 2]["shortlist"])
    for results in ranks:
        history, _ = results[name, interval]
        assert len(history) == len(expected)
        for found, wanted in zip(history, expected, strict=True):
            assert found.keys() == wanted.keys()
            for buffer, value in wanted.items():
                assert torch.equal(found[buffer], value), buffer


def test_a_step_that_ranks_codewords_takes_one_all_reduce_of_keys_and_pools(ranks):
    per_rebuild = 8 * CLUSTERS * 4 * SHORTLIST
    for results in ranks:
        assert results["plain", 1][1] == [8 * EXPERTS + per_rebuild] * (STEPS - 3)  # without the two in full
        # Spread over the steps, no pool is sent twice.
        sizes, history = results["plain", 20][1], results["plain", 20][0]
        num_rebuilds, num_done = history[-1]["progress"].tolist()
        sent = sum(sizes) - 8 * EXPERTS * len(sizes)
        assert sent == per_rebuild * (num_rebuilds - 2) + 8 * num_done * 4 * SHORTLIST and num_done > 0


def test_a_rank_that_fails_is_named_on_all_ranks(ranks):
    for rank, results in enumerate(ranks):
        message, cause = results["failure"]
        assert message == (
            "codewords could not be ranked for the next shortlists: rank 1 of the group, layer 2: ValueError: "
            f"bias ({EXPERTS - 1},) must be [E] with E = {EXPERTS}"
        )
        assert cause == ("ValueError" if rank == 1 else None)
