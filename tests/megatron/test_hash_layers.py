"""First layers by hash in the real training loop: layouts, recomputation, both paths, checkpoints, and their use.

One run on two expert-parallel ranks is what the others are compared with. Its first layer is dense, so the hash layer
is the second one.
"""

import json

import pytest
import torch

from tests.megatron.conftest import (
    AIR,
    EP2,
    PRINTED_LOSS,
    assert_same_norms,
    read_checkpoint,
    read_diagnostics,
    save_flags,
    trainer_of,
)

pytestmark = pytest.mark.slow

STEPS, SAVED = 4, 2
MODEL = [
    *(*AIR, "--moe-num-hash-layers", "1", "--moe-granular-experts", "--num-layers", "4"),
    *("--moe-layer-freq", "[0,1,1,1]", "--moe-router-input-norm", "running", "--init-method-std", "0.1"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--moe-air-diagnostics-interval", "2"),
    *("--moe-hash-balance", "frequency"),
]
COMPACT = ["--moe-dispatch", "compact"]
PP2 = ["--pipeline-model-parallel-size", "2"]
FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
MOE_RECOMPUTE = "--recompute-granularity selective --recompute-modules moe".split()
RESUMED = {
    # name: (ranks, flags)
    "PP2-full-recompute": (2, [*COMPACT, *PP2, *FULL_RECOMPUTE]),
    "stock-one-rank-moe-recompute": (1, MOE_RECOMPUTE),
}
SAME_HEALTH = (  # in every layout: means over the layers of all pipeline stages
    *("quantization error", "live codewords", "experts listed", "experts used", "imbalance factor"),
    *("experts used by hash layers", "imbalance factor of hash layers"),
)


@pytest.fixture(scope="module")
def train(pretrain, successors, validation):
    """A function that trains: flags -> Run."""
    data = ["--train-data-path", successors[1], *validation, *successors[-2:]]
    return trainer_of(pretrain, *MODEL, *data, "--train-iters", STEPS)


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The run that the others are compared with, and the folder of its checkpoints."""
    directory = tmp_path_factory.mktemp("whole")
    return train(*COMPACT, *EP2, *save_flags(directory, SAVED)), directory


def test_it_trains_and_tells_hash_layers_apart(whole):
    run, directory = whole
    assert list(run.steps) == list(range(1, STEPS + 1))
    assert float(run.steps[STEPS][0]) < float(run.steps[1][0]) - 0.1
    assert list(run.health) == list(range(1, STEPS + 1))
    assert all("experts used by hash layers" in figures for figures in run.health.values())
    (start,) = read_diagnostics(directory, "run")
    assert [(layer["layer"], layer["router"]) for layer in start["layers"]] == [(2, "hash"), (3, "air"), (4, "air")]
    assert [layer["router_flops_per_token"] > 0 for layer in start["layers"]] == [False, True, True]
    measured = read_diagnostics(directory, "diagnostics")[-1]["layers"]
    assert ["topk_recall" in layer for layer in measured] == [False, True, True]
    assert all(0 < layer["experts_used"] <= 1 for layer in measured)


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_in_another_layout_it_goes_on(train, whole, tmp_path, name):
    run, directory = whole
    ranks, flags = RESUMED[name]
    load = ["--load", directory, "--ckpt-step", SAVED, *save_flags(tmp_path, STEPS)]
    load += ["--moe-hash-counts", tmp_path / "missing"]  # not read: the table comes from the checkpoint
    resumed = train(*flags, *load, ranks=ranks)
    assert_same_norms(resumed, run, range(SAVED + 1, STEPS + 1))
    found, expected = ({label: one.health[STEPS][label] for label in SAME_HEALTH} for one in (resumed, run))
    assert found == pytest.approx(expected, rel=0.01)
    assert "top-k recall" in resumed.health[STEPS]
    found, expected = (read_checkpoint(path, STEPS) for path in (tmp_path, directory))
    assert found.keys() == expected.keys()
    routers = {key for key in expected if ".router." in key and not key.startswith("optimizer")}
    assert {key for key in routers if key.startswith("decoder.layers.1.")} == {
        f"decoder.layers.1.mlp.router.{name}" for name in ("seed", "table")
    }
    for key in routers:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5)


def test_another_number_of_hash_layers_does_not_load(train, whole):
    other = train("--moe-num-hash-layers", "2", "--load", whole[1], ranks=1, succeeds=False)
    assert other.returncode != 0 and "time to initialize megatron" not in other.output
    assert "was trained with 1 first layers by hash: --moe-num-hash-layers (2) must be 1" in other.output


def test_it_is_evaluated_without_its_flags(use, whole, validation, tmp_path):
    run, directory = whole
    file = tmp_path / "figures.json"
    use("evaluate", "--load", directory, "--data-path", validation[1], "--json", file)
    (figures,) = json.loads(file.read_text())["data"]
    assert figures["loss"] == pytest.approx(run.validation_loss, rel=PRINTED_LOSS)
    assert [layer["router"] for layer in figures["layers"]] == ["hash", "air", "air"]
    assert ["topk_recall" in layer for layer in figures["layers"]] == [False, True, True]
