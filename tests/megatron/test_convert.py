"""`python -m air_moe_megatron.convert`: what it keeps bitwise, and that the new model is whole."""

import json

import pytest
import torch

from tests.megatron.conftest import EP2, read_checkpoint, refused, save_flags

pytestmark = pytest.mark.slow

COMPACT = ["--moe-granular-experts", "--moe-dispatch", "compact", "--moe-router-input-norm", "running"]
SIZES = ["--moe-air-num-clusters", "4", "--moe-air-shortlist-size", "8", "--moe-air-num-probes", "2"]
AIR = ["--moe-router-type", "air", *SIZES]
STEPS = 3
ROUTER = "decoder.layers.mlp.router."


@pytest.fixture(scope="module")
def trained(pretrain, tmp_path_factory):
    """The checkpoint of an AIR model with a norm of its routers' input and lists in two parts."""
    folder = tmp_path_factory.mktemp("air")
    flags = [*AIR, *COMPACT, "--moe-air-list-parts", "2", *save_flags(folder, STEPS)]
    pretrain(*flags, "--train-iters", STEPS, ranks=1)
    return folder


@pytest.fixture(scope="module")
def convert(use, tmp_path_factory):
    """A function that converts: checkpoint, flags -> folder, what was printed."""

    def run(load, *flags, **settings):
        folder = tmp_path_factory.mktemp("converted")
        result = use("convert", "--load", load, "--save", folder, *flags, **settings)
        return folder, result.output

    return run


@pytest.fixture(scope="module")
def exact(convert, trained):
    """The AIR checkpoint as top-k."""
    return convert(trained, "--moe-router-type", "topk")


@pytest.fixture(scope="module")
def again(convert, exact, data_prefix):
    """That as AIR again."""
    return convert(exact[0], *AIR, "--data-path", data_prefix, "--fit-tokens", "256")


def parameters(folder):
    """The tensors of a model, without those that AIR learns beside it."""
    found = read_checkpoint(folder, STEPS)
    own = (ROUTER + "codebook.", ROUTER + "index.", "optimizer.", "rng_state")
    return {key: value for key, value in found.items() if not key.startswith(own)}


def assert_bitwise(found, expected):
    assert found.keys() == expected.keys() and len(found) > 5
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


def test_there_and_back_every_parameter_is_bitwise_what_it_was(trained, exact, again):
    expected = parameters(trained)
    assert ROUTER + "input_norm.mean" in expected
    for folder, _ in (exact, again):
        assert_bitwise(parameters(folder), expected)
    assert not [key for key in read_checkpoint(exact[0], STEPS) if ".codebook." in key or ".index." in key]
    assert "routers: input_norm, weight kept; codebook, index dropped" in exact[1]
    assert "routers: input_norm, weight kept; codebook, index made anew" in again[1]
    assert "optimizer, learning-rate schedule and random states: not saved" in again[1]


def test_air_as_topk_has_the_logits_of_air_with_lists_of_all_experts(convert, trained, exact, forkserver, tmp_path):
    full, output = convert(trained, "--moe-air-shortlist-size", "16", "--moe-air-num-probes", "1")
    assert "codebook, input_norm, weight kept; index made anew" in output
    for folder in (exact[0], full):
        run = forkserver(["--cpu", "--load", str(folder), "--out", str(tmp_path)], 1, {}, "tests.megatron.logits")
        assert run.returncode == 0, run.output[-4000:]
    found, expected = (torch.load(tmp_path / f"{folder.name}.pt") for folder in (exact[0], full))
    assert found.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_a_converted_model_routes_at_once(again, use, validation, tmp_path):
    use("evaluate", "--load", again[0], "--data-path", validation[1], "--json", tmp_path / "x.json")
    (figures,) = json.loads((tmp_path / "x.json").read_text())["data"]
    assert all(layer["experts_listed"] == 1 and layer["topk_recall"] > 0.7 for layer in figures["layers"])


def test_a_converted_model_trains_on(again, pretrain):
    flags = [*AIR, *COMPACT, "--load", again[0], "--train-iters", STEPS + 1, "--override-opt-param-scheduler"]
    assert list(pretrain(*flags, "--no-load-optim", ranks=1).steps) == [STEPS + 1]


@pytest.mark.long
def test_replicated_to_sharded_and_back_keeps_all_of_the_model(convert, trained):
    sharded, output = convert(trained, "--moe-air-shard-experts", *EP2, ranks=2)
    assert "codebook, index, input_norm, weight kept" in output
    replicated, _ = convert(sharded)
    expected = {key: value for key, value in read_checkpoint(trained, STEPS).items() if not key.startswith("optimizer")}
    for folder in (sharded, replicated):
        assert_bitwise(read_checkpoint(folder, STEPS), expected)


@pytest.mark.long
def test_a_sharded_model_is_measured_as_a_replicated_one(use, trained, validation, tmp_path):
    found = []
    for flags, ranks in (([], 1), (["--moe-air-shard-experts", *EP2], 2)):
        data = ["--data-path", validation[1], "--json", tmp_path / f"{ranks}.json"]
        use("evaluate", "--load", trained, *flags, *data, ranks=ranks)
        (figures,) = json.loads((tmp_path / f"{ranks}.json").read_text())["data"]
        found.append(figures["layers"])
    for replicated, sharded in zip(*found, strict=True):
        assert 0 < replicated["mass_recall"] < 1 and replicated.keys() == sharded.keys()
        for name in set(replicated) - {"rank_imbalance"}:
            value = replicated[name]
            assert sharded[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5)), name


def test_a_refusal_is_one_line_and_nothing_is_written(exact, use, tmp_path):
    run = use("convert", "--load", exact[0], "--save", tmp_path / "new", *AIR, succeeds=False)
    assert refused(run, "convert: error: --data-path must name the data") and not (tmp_path / "new").exists()
