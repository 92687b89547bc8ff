"""Every baseline in the real training loop: compact and stock path alike, learning, and resumed in another layout."""

import json
import re

import pytest
import torch

from tests.megatron.conftest import (
    AIR,
    EP2,
    GLOBAL_BATCH,
    PRINTED_LOSS,
    SEQUENCE,
    TP2,
    assert_same_norms,
    read_checkpoint,
    save_flags,
    trainer_of,
)

pytestmark = pytest.mark.slow

STEPS, SAVED = 4, 2
ROUTER = "decoder.layers.mlp.router."
NO_LOSS = ["--moe-router-load-balancing-type", "none", "--moe-aux-loss-coeff", "0"]
GRANULAR = [
    *("--moe-granular-experts", "--moe-router-topk", "4", "--attention-dropout", "0", "--hidden-dropout", "0"),
    *("--init-method-std", "0.1"),
]
COMPACT = ["--moe-dispatch", "compact"]
MEASURED = ["--moe-air-diagnostics-interval", "1"]
FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
BASELINES = {
    # type: (flags, what only its checkpoint holds, ranks and flags of the run that goes on)
    "topk": ([], None, None),
    "product_key": ([], "query_norm.variance", (2, [*EP2, *FULL_RECOMPUTE])),
    "hierarchical": ([], None, None),
    "hash": (NO_LOSS, "table", (2, [*TP2, *EP2])),
    "vq": (NO_LOSS, None, None),
}


@pytest.fixture(scope="module")
def train(pretrain, successors, validation):
    """A function that trains a granular model: flags -> Run."""
    data = ["--train-data-path", successors[1], *validation, *successors[-2:]]
    return trainer_of(pretrain, *GRANULAR, *data)


@pytest.fixture(scope="module", params=BASELINES)
def baseline(request, train, tmp_path_factory):
    """A compact run: (type, flags, run, directory of its checkpoints)."""
    flags = ["--moe-router-type", request.param, *BASELINES[request.param][0], "--train-iters", STEPS]
    directory = tmp_path_factory.mktemp(request.param)
    return request.param, flags, train(*flags, *COMPACT, *EP2, *save_flags(directory, SAVED)), directory


def test_it_trains_and_says_how_it_routes(baseline):
    router_type, _, run, _ = baseline
    assert list(run.steps) == list(range(1, STEPS + 1))
    assert float(run.steps[STEPS][0]) < float(run.steps[1][0]) - 0.1
    lines = [line for line in run.output.splitlines() if "routing health at iteration" in line]
    assert len(lines) == STEPS
    assert all("experts used: " in line and "dispatched bytes per token: " in line for line in lines)
    assert not any("codeword" in line or "recall" in line for line in lines)
    assert all(re.search(r"vq loss: \d+\.\d+ ", line) for line in lines) == (router_type == "vq")


@pytest.mark.parametrize(
    "baseline",
    ("topk", "product_key", *(pytest.param(name, marks=pytest.mark.long) for name in ("hierarchical", "hash", "vq"))),
    indirect=True,
)
def test_the_stock_path_trains_the_same(baseline, train):
    _, flags, run, _ = baseline
    stock = train(*flags, *EP2)
    assert_same_norms(stock, run, run.steps)
    found, expected = ([float(r.steps[step][0]) for step in run.steps] for r in (stock, run))
    assert found == pytest.approx(expected, rel=PRINTED_LOSS)


# Those with more than parameters to restore: running statistics, a table.
@pytest.mark.parametrize("baseline", ("product_key", pytest.param("hash", marks=pytest.mark.long)), indirect=True)
def test_resumed_in_another_layout_it_goes_on(baseline, train, tmp_path):
    router_type, flags, run, directory = baseline
    _, only_here, (ranks, layout) = BASELINES[router_type]
    load = ["--load", directory, "--ckpt-step", SAVED]
    resumed = train(*flags, *COMPACT, *layout, *load, *save_flags(tmp_path, SAVED), ranks=ranks)
    assert_same_norms(resumed, run, range(SAVED + 1, STEPS + 1))
    found, expected = (read_checkpoint(path, STEPS) for path in (tmp_path, directory))
    assert found.keys() == expected.keys() and ROUTER + only_here in expected
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("baseline", ("product_key",), indirect=True)
def test_another_router_does_not_load_it(baseline, train):
    router_type, _, _, directory = baseline
    other = train(*AIR, "--load", directory, "--train-iters", "5", ranks=1, succeeds=False)
    assert other.returncode != 0 and "time to initialize megatron" not in other.output
    assert f"holds routers of type {router_type}: --moe-router-type air cannot load them" in other.output


def figures_of(use, directory, validation, tmp_path, *flags, **settings):
    """What `evaluate` measures on the validation data, without any flag of the model."""
    file = tmp_path / "figures.json"
    run = use("evaluate", "--load", directory, "--data-path", validation[1], "--json", file, *flags, **settings)
    content = json.loads(file.read_text())
    assert content["iteration"] > 0
    (figures,) = content["data"]
    assert f"{figures['tokens']} " in run.output or f"{figures['tokens']:,} " in run.output
    return figures


def test_evaluation_repeats_the_loss_of_training(baseline, use, validation, tmp_path):
    router_type, _, run, directory = baseline
    figures = figures_of(use, directory, validation, tmp_path)
    assert figures["loss"] == pytest.approx(run.validation_loss, rel=PRINTED_LOSS)
    assert figures["tokens"] == GLOBAL_BATCH * SEQUENCE and figures["bytes"] is None
    assert [layer["router"] for layer in figures["layers"]] == [router_type, router_type]
    assert all(0 < layer["experts_used"] <= 1 <= layer["imbalance_factor"] for layer in figures["layers"])


def test_megatrons_own_experts_take_product_keys_of_two_heads(pretrain):
    """Two heads may name one expert; Megatron's all-to-all still finds K for each token."""
    flags = ["--moe-router-type", "product_key", "--moe-router-topk", "4", "--moe-product-key-heads", "2"]
    run = pretrain(*flags, *EP2, "--train-iters", "2")
    assert len(run.steps) == 2
    run = pretrain(*AIR, "--moe-product-key-heads", "2", "--train-iters", "1", ranks=1, succeeds=False)
    assert "--moe-product-key-heads (2) has no effect with --moe-router-type air" in run.output


def test_air_reports_its_recall_and_is_used_without_its_flags(train, use, validation, tmp_path):
    run = train(*AIR, *COMPACT, *EP2, "--train-iters", "2", *MEASURED, *save_flags(tmp_path, SAVED))
    found = re.findall(r"mass recall: ([0-9.]+) \| top-k recall: ([0-9.]+)", run.output)
    assert len(found) == 2
    assert all(0.2 < float(mass) <= 1.0 and 0.2 < float(topk) <= 1.0 for mass, topk in found)
    figures = figures_of(use, tmp_path, validation, tmp_path, *EP2, ranks=2)
    assert figures["loss"] == pytest.approx(run.validation_loss, rel=PRINTED_LOSS)
    for layer in figures["layers"]:
        assert 0.2 < layer["mass_recall"] <= 1.0 and 0.2 < layer["topk_recall"] <= 1.0 and layer["rank_imbalance"] >= 1
    prompts = ["1 2 3 4 5", "7"]
    run = use("generate", "--load", tmp_path, "--prompt", *prompts, "--num-tokens", "4", *EP2, ranks=2)
    texts = run.output.split(f"{'-' * 40}\n")
    assert [text.lstrip().startswith(prompt) for text, prompt in zip(texts[-2:], prompts, strict=True)]
