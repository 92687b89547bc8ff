"""Sharded routing in the real training loop: the model of the replicated router, in other layouts and checkpoints.

One run of the replicated router on one rank is what the others are compared with, as in test_compact_training.py.
"""

import re

import pytest

from tests.megatron.conftest import EP2, TP2, assert_same_norms, read_checkpoint, save_flags, trainer_of
from tests.megatron.test_compact_training import (
    ADAM_MEAN,
    COMPACT,
    EXPERTS,
    HIDDEN,
    LAYERS,
    SAVED,
    STEPS,
    TRAFFIC,
    assert_same_steps,
    assert_same_tensors,
)  # fmt: skip

pytestmark = pytest.mark.slow

PARTS = ["--moe-air-list-parts", "4", "--moe-router-input-norm", "running"]
RECALL = re.compile(r"mass recall: [0-9.]+ \| top-k recall: [0-9.]+")
SHARDED = ["--moe-air-shard-experts"]
LOADED = {
    # name: (ranks, flags)
    "sharded-EP4": (4, [*SHARDED, "--expert-model-parallel-size", "4"]),
    "sharded-TP2-SP-EP2": (2, [*SHARDED, *TP2, *EP2]),
    "replicated-EP1": (1, []),
}


@pytest.fixture(scope="module")
def train(pretrain, successors):
    """A function that trains the model with lists in parts: number of steps, flags -> Run."""
    return trainer_of(pretrain, *COMPACT, *PARTS, *successors, "--train-iters")


@pytest.fixture(scope="module")
def replicated(train, tmp_path_factory):
    """The run that the others are compared with, and its checkpoints of the steps SAVED and STEPS."""
    directory = tmp_path_factory.mktemp("replicated")
    return train(STEPS, *save_flags(directory, SAVED), ranks=1), directory


@pytest.fixture(scope="module")
def sharded(train, tmp_path_factory):
    """The same on two expert-parallel ranks, sharded."""
    directory = tmp_path_factory.mktemp("sharded")
    return train(STEPS, *SHARDED, *EP2, *save_flags(directory, SAVED)), directory


def test_losses_norms_and_shapes_of_checkpoints_are_those_of_the_replicated_router_on_one_rank(sharded, replicated):
    assert_same_steps(sharded[0], replicated[0])
    assert_same_norms(sharded[0], replicated[0], range(1, STEPS + 1))
    found, expected = (read_checkpoint(directory, SAVED) for _, directory in (sharded, replicated))
    assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in expected.items()}
    centers = "decoder.layers.mlp.router.weight"
    assert all(found[part + centers].shape == (LAYERS, EXPERTS, HIDDEN) for part in ("", ADAM_MEAN))


def test_the_health_line_counts_rows_to_all_ranks_and_has_the_recall_of_the_replicated_router(sharded, replicated):
    output = sharded[0].output
    traffic = TRAFFIC.findall(output)
    assert len(traffic) == STEPS
    assert all(int(rows) == 2 * 4 * HIDDEN and 4 * HIDDEN < int(remote) < int(rows) for rows, remote in traffic)
    assert output.count("experts listed: 100.0%") == STEPS
    assert RECALL.findall(output) == RECALL.findall(replicated[0].output) != []


@pytest.mark.long
@pytest.mark.parametrize("layout", LOADED)
def test_a_sharded_checkpoint_goes_on_as_the_uninterrupted_run(train, sharded, tmp_path, layout):
    ranks, flags = LOADED[layout]
    load = ["--load", sharded[1], "--ckpt-step", SAVED]
    run = train(STEPS, *flags, *load, *save_flags(tmp_path, STEPS), ranks=ranks)
    assert_same_norms(run, sharded[0], range(SAVED + 1, STEPS + 1))
    assert_same_tensors(*(read_checkpoint(directory, STEPS) for directory in (tmp_path, sharded[1])))


@pytest.mark.long
def test_a_replicated_checkpoint_goes_on_sharded(train, replicated, tmp_path):
    load = ["--load", replicated[1], "--ckpt-step", SAVED]
    run = train(STEPS, *SHARDED, *EP2, *load, *save_flags(tmp_path, STEPS))
    assert_same_norms(run, replicated[0], range(SAVED + 1, STEPS + 1))
    assert_same_tensors(*(read_checkpoint(directory, STEPS) for directory in (tmp_path, replicated[1])))
