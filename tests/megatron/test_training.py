"""The real training loop: when the codebook learns, what a checkpoint holds, and what is refused before it starts."""

import json
import re

import pytest
import torch

from air_moe_megatron.report.runs import METRICS, read_run
from tests.megatron.conftest import (
    AIR,
    EP2,
    GLOBAL_BATCH,
    MODEL,
    OURS,
    SEQUENCE,
    TP2,
    read_checkpoint,
    read_diagnostics,
    refused,
    save_flags,
    untimed,
)

pytestmark = pytest.mark.slow

HIDDEN = 32
ROUTER = "decoder.layers.mlp.router."
TOKENS = GLOBAL_BATCH * SEQUENCE  # per global batch
FIRST_DECAY = 1 / 3  # window_decay of the first update
LONGER = "--override-opt-param-scheduler"  # the run that goes on has more steps than the one before
FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()


def updates_and_counts(directory, iteration):
    """Numbers of updates [layers] and summed running counts [layers] of the codebooks in a checkpoint."""
    tensors = read_checkpoint(directory, iteration)
    counts = tensors[ROUTER + "codebook.ema"][..., HIDDEN].sum(dim=-1)
    return tensors[ROUTER + "codebook.num_updates"].flatten().tolist(), counts


@pytest.fixture(scope="module")
def topk_run(pretrain, data_prefix, validation, tmp_path_factory):
    """Two top-k steps with Megatron's own experts: the run and its checkpoint."""
    directory, cache = (tmp_path_factory.mktemp(name) for name in ("topk", "cache"))
    data = ["--train-data-path", data_prefix, *validation, "--data-cache-path", cache]
    return pretrain(*EP2, *data, "--train-iters", "2", *save_flags(directory, 2), data=False), directory


@pytest.fixture(scope="module")
def topk_checkpoint(topk_run):
    return topk_run[1]


@pytest.fixture(scope="module")
def air_checkpoint(pretrain, topk_checkpoint, tmp_path_factory):
    """Two AIR steps that go on from the top-k checkpoint: the run and its checkpoint."""
    directory = tmp_path_factory.mktemp("air")
    load = ["--load", topk_checkpoint, LONGER]
    run = pretrain(*AIR, *EP2, *load, "--train-iters", "4", *save_flags(directory, 4))
    return run, directory


@pytest.mark.parametrize("precision", [[], pytest.param(["--bf16"], marks=pytest.mark.long)], ids=["fp32", "bf16"])
def test_resumed_run_equals_the_uninterrupted_one(pretrain, tmp_path, precision):
    flags = [
        *AIR,
        *precision,
        *EP2,
        "--moe-air-refresh-interval",
        "4",
        "--moe-input-jitter-eps",
        "0.01",
        *FULL_RECOMPUTE,
    ]
    flags += ["--moe-air-diagnostics-interval", "2", "--moe-router-input-norm", "low_rank_whitening"]
    whole = pretrain(*flags, "--train-iters", "10", *save_flags(tmp_path / "whole", 5))
    # The second run finds only the checkpoint of iteration 5, as after a kill.
    (tmp_path / "whole" / "latest_checkpointed_iteration.txt").write_text("5")
    saved = save_flags(tmp_path / "resumed", 5)
    resumed = pretrain(*flags, "--train-iters", "10", "--load", tmp_path / "whole", *saved)
    steps = range(6, 11)
    assert [resumed.norms[step] for step in steps] == [whole.norms[step] for step in steps]
    expected, found = (read_checkpoint(tmp_path / name, 10) for name in ("whole", "resumed"))
    assert expected.keys() == found.keys()
    learned = ("codebook.codewords", "index.shortlist", "input_norm.basis", "input_norm.eigenvalues")
    assert all(ROUTER + name in expected for name in learned)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert updates_and_counts(tmp_path / "resumed", 10)[0] == [10, 10]
    assert re.search(r"routing health at iteration +10 .*quantization error: 0\.\d+.*live codewords: \d", whole.output)
    check_diagnostics(tmp_path, whole)


def check_diagnostics(folder, whole):
    """The file of a whole run of ten steps, measured every second, and that of a run which resumes after the fifth."""
    run, *lines = read_diagnostics(folder / "whole")
    assert (run["kind"], run["iteration"], run["format"]) == ("run", 0, 1)
    assert run["arguments"]["moe_air_refresh_interval"] == 4 and run["tokenizer"]["type"] == "NullTokenizer"
    assert [(layer["layer"], layer["router"], layer["num_clusters"]) for layer in run["layers"]] == [
        (1, "air", 4), (2, "air", 4)
    ]  # fmt: skip
    assert run["layers"][0]["exact_router_flops_per_token"] == 6 * HIDDEN * 16 + 12 * HIDDEN * 16  # norm of rank 16
    steps, measured = ([line for line in lines if line["kind"] == kind] for kind in ("step", "diagnostics"))
    assert len(steps) + len(measured) == len(lines)
    assert [line["iteration"] for line in steps] == list(range(1, 11))
    for line in steps:
        loss, norm = map(float, whole.steps[line["iteration"]])
        assert line["tokens"] == TOKENS * line["iteration"] and line["step_seconds"] > 0
        assert line["grad_norm"] == pytest.approx(norm, abs=1e-3)
        if line["iteration"] > 2:  # Megatron's second line is the mean of two
            assert line["loss"] == pytest.approx(loss, rel=1e-5)
    assert [line["iteration"] for line in measured] == [2, 4, 6, 8, 10]
    for line in measured:
        assert [layer["layer"] for layer in line["layers"]] == [1, 2]
        for layer in line["layers"]:
            for share in ("mass_recall", "topk_recall", "certified", "experts_listed", "experts_used"):
                assert 0.0 <= layer[share] <= 1.0
            assert layer["paper_bound"] <= layer["mass_bound"] + 1e-4 <= layer["mass_recall"] + 2e-4
            assert len(layer["load_bins"]) == 16 and sum(layer["load_bins"]) == pytest.approx(16, rel=1e-4)
            assert layer["load_bins"] == layer["max_bins"]
            assert ("list_overlap" in layer) == (line["iteration"] > 2)
            names = {*METRICS, "layer", "router", "load_bins", "max_bins"}  # those that the report reads
            assert layer.keys() == (names if line["iteration"] > 2 else names - {"list_overlap"})
        assert 0.0 < line["routing_share"] < 1.0
    read = read_run(folder / "whole", "whole")
    assert read.steps.notna().all(axis=None) and read.totals.notna().all(axis=None)
    assert len(read.steps) == 10 and len(read.layers) == 2 * len(measured)
    resumed, *lines = read_diagnostics(folder / "resumed")
    assert (resumed["kind"], resumed["iteration"]) == ("run", 5)
    again = [line for line in lines if line["kind"] == "diagnostics"]
    assert [line["iteration"] for line in again] == [6, 8, 10]
    # That of the sixth step lacks the fifth, which the first run trained.
    assert [untimed(line) for line in again[1:]] == [untimed(line) for line in measured[3:]]
    assert [line["tokens"] for line in lines if line["kind"] == "step"] == [TOKENS * step for step in range(6, 11)]
    shown = re.findall(r"iteration +(\d+) .*mass recall: ([0-9.]+) \| top-k recall: ([0-9.]+)", whole.output)
    assert [int(iteration) for iteration, *_ in shown] == [2, 4, 6, 8, 10]
    for (_, mass, topk), line in zip(shown, measured, strict=True):
        for name, value in (("mass_recall", mass), ("topk_recall", topk)):
            mean = sum(layer[name] for layer in line["layers"]) / 2
            assert float(value) == pytest.approx(mean, abs=0.0051)
    snapshot = json.loads((folder / "whole" / "air_codebook.json").read_text())
    assert snapshot["iteration"] == 10
    for layer in snapshot["layers"]:
        assert sum(layer["load"]) == TOKENS
        assert [len(layer[name]) for name in ("x", "y", "load", "recall", "tokens")] == [4] * 5
        for load, found in zip(layer["load"], layer["tokens"], strict=True):
            assert len(found) == min(5, len(found)) and sum(count for _, count in found) <= load
            assert bool(found) == bool(load)


def test_a_plain_checkpoint_is_evaluated_as_it_was_trained(topk_run, use, validation, tmp_path):
    run, directory = topk_run
    use("evaluate", "--load", directory, "--data-path", validation[1], "--json", tmp_path / "x.json")
    (figures,) = json.loads((tmp_path / "x.json").read_text())["data"]
    assert figures["loss"] == pytest.approx(run.validation_loss, rel=1.1e-6)
    assert [(layer["layer"], layer["router"]) for layer in figures["layers"]] == [(1, "topk"), (2, "topk")]
    assert all(0 < layer["experts_used"] <= 1 for layer in figures["layers"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "evaluate: error: --load must name the folder of a checkpoint"),
        (["--load", "FOLDER"], "holds no checkpoint: name a folder that does"),
        (["--load", "TOPK", "--data-path", "none"], "none.idx' does not exist"),
        (["--load", "TOPK", "--data-path", "DATA", "--moe-router-type", "air"], "the codebooks would be random"),
        (
            ["--load", "TOPK", "--data-path", "DATA", "--moe-router-type", "hierarchical"],
            "--moe-router-type hierarchical cannot load them",
        ),
    ],
    ids=("no-load", "no-checkpoint", "absent-data", "air", "hierarchical"),
)
def test_evaluation_names_what_is_wrong(topk_checkpoint, use, validation, tmp_path, flags, message):
    places = {"FOLDER": tmp_path, "TOPK": topk_checkpoint, "DATA": validation[1]}
    assert refused(use("evaluate", *(places.get(flag, flag) for flag in flags), succeeds=False), message)


NO_DROPOUT = ["--attention-dropout", "0", "--hidden-dropout", "0"]

LAYOUTS = {
    "accumulated-evaluated-full-recompute": [*EP2, *FULL_RECOMPUTE, "--eval-interval", "1"],
    "virtual-pipeline-moe-recompute": [
        *("--num-layers", "4", "--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"),
        *("--recompute-granularity", "selective", "--recompute-modules", "moe"),
    ],
    "sequence-parallel-bf16": [
        *TP2,
        *EP2,
        *("--bf16", "--use-distributed-optimizer", "--no-save-optim"),
    ],
    "every-step-rerun": ["--rerun-mode", "report_stats"],  # Megatron runs each step again to compare the results
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_token_of_the_global_batch_counts_once(pretrain, tmp_path, layout):
    is_rerun = "--rerun-mode" in LAYOUTS[layout]
    entry = ("-m", "tests.megatron.with_rerun_mode", "--cpu") if is_rerun else OURS
    measured = ["--moe-air-diagnostics-interval", "1"]
    run = pretrain(*AIR, *LAYOUTS[layout], *measured, "--train-iters", "1", *save_flags(tmp_path, 1), entry=entry)
    assert not is_rerun or "attempts at a step: 2" in run.output
    updates, counts = updates_and_counts(tmp_path, 1)
    assert updates == [1] * (4 if "virtual" in layout else 2)
    torch.testing.assert_close(counts, torch.full_like(counts, (1 - FIRST_DECAY) * TOKENS))
    snapshot = json.loads((tmp_path / "air_codebook.json").read_text())
    assert [sum(layer["load"]) for layer in snapshot["layers"]] == [TOKENS] * len(updates)
    for layer in snapshot["layers"]:
        # Other layers of a pipeline are not told the token ids.
        assert ("tokens" in layer) == ("virtual" not in layout)
        assert "virtual" in layout or sum(count for found in layer["tokens"] for _, count in found) <= TOKENS
    (line,) = read_diagnostics(tmp_path, "diagnostics")
    assert [layer["layer"] for layer in line["layers"]] == list(range(1, len(updates) + 1))
    assert all(0.0 < layer["topk_recall"] <= 1.0 for layer in line["layers"])


def test_every_rank_holds_the_same_codebook(pretrain, tmp_path):
    # The legacy format writes one file per expert-parallel rank, each with that rank's own buffers.
    pretrain(*AIR, *EP2, "--train-iters", "4", "--ckpt-format", "torch", *save_flags(tmp_path, 4))
    files = sorted(tmp_path.glob("iter_0000004/*/model_optim_rng.pt"))
    assert len(files) == 2
    first, second = (torch.load(file, weights_only=False)["model"] for file in files)
    names = [name for name in first if ".codebook." in name]
    assert len(names) == 2 * 4
    assert [name for name in names if not torch.equal(first[name], second[name])] == []
    assert all(first[name].dtype == torch.float32 for name in names if name.endswith(("codewords", "ema")))


def test_skipped_steps_leave_the_codebook_alone(pretrain, tmp_path):
    flags = ["--fp16", "--initial-loss-scale", 2**40, "--train-iters", "2", *save_flags(tmp_path, 2)]
    run = pretrain(*AIR, *flags, "--moe-air-diagnostics-interval", "2")
    assert "number of skipped iterations:   1" in run.output
    updates, counts = updates_and_counts(tmp_path, 2)
    assert updates == [0, 0]
    assert counts.tolist() == [0.0, 0.0]
    run, *steps, measured = read_diagnostics(tmp_path)
    assert not any("loss" in step for step in steps) and len(steps) == 2
    # Its tokens were routed; the codebook has not been fitted to any.
    assert all("topk_recall" in layer and "quantization_error" not in layer for layer in measured["layers"])


def test_topk_checkpoint_loads_into_an_air_run(topk_checkpoint, air_checkpoint):
    run, directory = air_checkpoint
    assert "expert centers are kept, codebooks are seeded from the first batch" in run.output
    assert list(run.steps) == [3, 4]
    updates, counts = updates_and_counts(directory, 4)
    assert updates == [2, 2]
    assert (counts > 0).all()


def test_parameters_and_optimizer_of_a_topk_checkpoint_are_kept(pretrain, topk_checkpoint, tmp_path):
    # No step is left to train, so that the AIR run saves what it has loaded.
    pretrain(*AIR, *EP2, "--train-iters", "2", "--load", topk_checkpoint, *save_flags(tmp_path, 3))
    before, after = read_checkpoint(topk_checkpoint, 2), read_checkpoint(tmp_path, 2)
    assert ROUTER + "weight" in before and f"optimizer.state.exp_avg.{ROUTER}weight" in before
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert updates_and_counts(tmp_path, 2)[0] == [0, 0]


def test_air_checkpoint_loads_into_a_topk_run(pretrain, air_checkpoint, tmp_path):
    load = ["--load", air_checkpoint[1], LONGER]
    run = pretrain(*EP2, *load, "--train-iters", "5", *save_flags(tmp_path, 5))
    assert "its experts are loaded, its codebooks are not" in run.output
    assert list(run.steps) == [5]
    assert not any("codebook" in key for key in read_checkpoint(tmp_path, 5))


def test_checkpoint_with_another_codebook_is_refused(pretrain, air_checkpoint):
    flags = [*AIR, *EP2, "--moe-air-num-clusters", "5", "--train-iters", "5", "--load", air_checkpoint[1]]
    run = pretrain(*flags, ranks=2, succeeds=False)
    assert refused(run, "codebook.codewords is [4, 32], so --moe-air-num-clusters (5) must be 4")


def test_a_checkpoint_brings_our_fields(pretrain, air_checkpoint, tmp_path):
    load = ["--use-checkpoint-args", "--load", air_checkpoint[1], LONGER]
    run = pretrain(*EP2, *load, "--train-iters", "5", *save_flags(tmp_path, 5))
    assert list(run.steps) == [5]
    assert updates_and_counts(tmp_path, 5)[0] == [3, 3]
    other = pretrain(*EP2, *load, "--moe-air-shortlist-size", "4", "--train-iters", "5", succeeds=False)
    assert refused(other, "index.shortlist is [4, 8], so --moe-air-shortlist-size (4) must be 8")


def test_a_checkpoint_of_the_one_flag_brings_its_settings(forkserver, data_prefix, tmp_path):
    """With neither ``--air-moe`` nor any of its settings, the step after the checkpoint is that of the whole run."""
    words = list(map(str, MODEL))
    for flag in ("--moe-router-dtype", "--moe-router-load-balancing-type", "--moe-aux-loss-coeff"):
        place = words.index(flag)
        del words[place : place + 2]
    words += ["--cpu", "--data-path", data_prefix, "--split", "8,1,1", "--data-cache-path", str(tmp_path / "cache")]
    words += ["--train-iters", "3", "--save-interval", "2"]
    saved = tmp_path / "whole"
    whole = forkserver([*words, "--air-moe", "--save", str(saved)], 1, {})
    (saved / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = forkserver([*words, "--use-checkpoint-args", "--load", str(saved)], 1, {})
    assert list(resumed.steps) == [3] and resumed.steps[3] == whole.steps[3]
    losses = [re.findall(r"iteration +3/.* load_balancing_loss: ([0-9.E+-]+)", run.output) for run in (whole, resumed)]
    assert losses[0] == losses[1] and float(losses[0][0]) > 0
    restored = re.search(r"> --use-checkpoint-args: from the checkpoint (.*)", resumed.output)[1]
    assert "moe_router_dtype fp32" in restored and "moe_aux_loss_coeff 0.01" in restored


@pytest.mark.long
def test_a_damaged_checkpoint_ends_every_rank_and_the_one_before_loads(pretrain, tmp_path):
    flags = [*AIR, *EP2, "--load", tmp_path, *save_flags(tmp_path, 1), "--moe-air-diagnostics-interval", "2"]
    assert list(pretrain(*flags, "--train-iters", "2").steps) == [1, 2]  # a new folder that is also that of --save
    (tmp_path / "iter_0000002" / ".metadata").unlink()
    for reading in ([], ["--use-checkpoint-args"]):
        run = pretrain(*flags, *reading, "--train-iters", "3", succeeds=False)
        message = "/.metadata' is missing; iteration 1 is whole: add --ckpt-step 1 to load it"
        assert refused(run, message)
        assert run.output.count(f"error: --load '{tmp_path}/iter_0000002' is damaged: ") == 1
        assert run.returncode == 2 and "Traceback" not in run.output
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    with (tmp_path / "air_diagnostics.jsonl").open("a") as file:
        file.write('{"kind": "st')  # killed within a line
    assert list(pretrain(*flags, "--ckpt-step", "1", "--train-iters", "2").steps) == [2]
    text = (tmp_path / "air_diagnostics.jsonl").read_text()
    (tmp_path / "air_diagnostics.jsonl").write_text(text.replace('{"kind": "st\n', ""))
    assert [(line["kind"], line["iteration"]) for line in read_diagnostics(tmp_path)] == [
        ("run", 0), ("step", 1), ("step", 2), ("diagnostics", 2), ("run", 1), ("step", 2), ("diagnostics", 2)
    ]  # fmt: skip


def test_a_garbled_tracker_does_not_start_from_scratch(pretrain, tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("")
    flags = [*AIR, "--train-iters", "1", "--load", tmp_path, *save_flags(tmp_path, 1)]
    assert refused(pretrain(*flags, ranks=1, succeeds=False), "holds '' instead of an iteration; no iteration")


def test_a_rank_that_does_not_see_the_checkpoint_ends_all(pretrain, topk_checkpoint, tmp_path):
    load = {0: ["--load", str(topk_checkpoint)], 1: ["--load", str(tmp_path / "elsewhere")]}
    run = pretrain(*AIR, *EP2, "--train-iters", "3", succeeds=False, flags_of_rank=load)
    assert refused(run, "every rank must see the same checkpoint: rank 0 ")
    assert run.output.count("error: every rank must see the same checkpoint: rank 0 ") == 1
    assert run.returncode == 2 and "Traceback" not in run.output


@pytest.mark.long
def test_legacy_checkpoints_are_refused_like_others(pretrain, tmp_path):
    pretrain("--train-iters", "1", "--ckpt-format", "torch", *save_flags(tmp_path, 1), ranks=1)
    granular = ["--moe-granular-experts", "--skip-train", "--train-iters", "1", "--load", tmp_path]
    run = pretrain(*granular, ranks=1, succeeds=False)
    assert refused(run, "holds Megatron's own experts, one module each: train without --moe-granular-experts")
    run = pretrain(*AIR, "--load", tmp_path, LONGER, "--train-iters", "2", ranks=1)
    assert "expert centers are kept, codebooks are seeded from the first batch" in run.output
    assert list(run.steps) == [2]


def test_bad_flags_are_refused(pretrain):
    run = pretrain(*AIR, "--moe-router-topk", "9", "--train-iters", "1", ranks=1, succeeds=False)
    assert refused(run, "pretrain: error: moe_air_shortlist_size (8) must exceed moe_router_topk (9)")
    assert run.returncode == 2 and "Traceback" not in run.output


def test_missing_data_is_refused(pretrain, tmp_path):
    missing = ["--data-path", tmp_path / "none"]
    run = pretrain(*AIR, *missing, "--train-iters", "1", ranks=1, succeeds=False, data=False)
    assert refused(run, f"error: --data-path entry '{tmp_path / 'none'}'")


# Flags that end in errors, or never, without a check: what is said before the start.
REFUSED = {
    "unknown-flag": (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    "no-document-in-a-split": (
        ["--split", "998,1,1"],
        "--split 998,1,1 gives 0 of 200 sequences (documents) with 0 tokens to valid",
    ),
    "token-beyond-the-vocabulary": (["--vocab-size", "63"], "holds the token id 63, and the model's vocabulary"),
    "tensor-parallel": (
        ["--moe-granular-experts", "--tensor-model-parallel-size", "2", "--sequence-parallel"],
        "expert_tensor_parallel_size (2) is not supported with moe_granular_experts (True): an expert of a few hidden "
        "units is not split; add --expert-tensor-parallel-size 1",
    ),
    "too-large-for-the-host": (["--num-experts", "1000000000"], "--num-experts (1000000000): a rank needs at least"),
}


@pytest.mark.parametrize("flags, message", REFUSED.values(), ids=REFUSED)
def test_a_refused_start_is_one_line_of_rank_0(pretrain, flags, message):
    run = pretrain(*AIR, "--train-iters", "1", *flags, succeeds=False)
    assert refused(run, message) and "Traceback" not in run.output
    of_rank_0 = [line for line in run.output.splitlines() if line.startswith("air_moe_megatron.pretrain: error: ")]
    assert len(of_rank_0) == 1 and message in of_rank_0[0]


@pytest.mark.parametrize("router", [AIR, []], ids=["air", "topk"])
def test_with_a_log_file_the_screen_gets_losses_and_health(pretrain, tmp_path, router):
    log = tmp_path / "logs" / "train.log"
    run = pretrain(*router, "--train-iters", "3", "--log-file", log)
    assert list(run.steps) == [1, 2, 3]
    assert run.output.count("validation loss at iteration 3 on test set") == 1
    assert run.output.count("routing health at iteration") == (3 if router else 0)
    assert len(run.output.splitlines()) < 40
    for text in ("arguments -----", "iteration        3/", "on validation set", "time to initialize megatron"):
        assert text in log.read_text()
    assert ("routing health at iteration        3" in log.read_text()) == bool(router)


@pytest.mark.long
def test_every_set_is_validated_in_full_where_megatron_can(pretrain, data_prefix):
    data = ["--train-data-path", data_prefix, "--valid-data-path", data_prefix, "--train-iters", "1"]
    flags = [*AIR, *data, *NO_DROPOUT, "--full-validation", "--multiple-validation-sets"]
    runs = [pretrain(*flags, data=False, ranks=1), pretrain(*flags, *TP2, data=False, ranks=2)]
    found = [
        re.search(r"validation-0 loss at iteration 1 on .*? lm loss value: ([0-9.E+-]+)", run.output) for run in runs
    ]
    losses = [float(one[1]) for one in found]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_an_evaluation_without_training_needs_no_length(pretrain):
    assert 3.0 < pretrain(*AIR, "--skip-train", ranks=1).validation_loss < 6.0


def test_microbatches_of_an_evaluation_may_have_another_size(pretrain):
    """Tensor-parallel ranks get the batch from the first of them, into memory of the size that they expect."""
    flags = [*AIR, *NO_DROPOUT, "--train-iters", "1"]
    sizes = ["--eval-micro-batch-size", "4"]
    losses = [
        pretrain(*flags, ranks=1).validation_loss,
        pretrain(*flags, *sizes, ranks=1).validation_loss,
        pretrain(*flags, *sizes, *TP2, ranks=2).validation_loss,
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_multi_token_prediction_layers_get_the_router(pretrain, tmp_path):
    pretrain(*AIR, "--mtp-num-layers", "1", "--train-iters", "1", *save_flags(tmp_path, 1))
    assert [layer["layer"] for layer in read_diagnostics(tmp_path, "run")[0]["layers"]] == [1, 2, 3]
    (measured,) = read_diagnostics(tmp_path, "diagnostics")  # the last step, whatever the interval
    assert [layer["layer"] for layer in measured["layers"]] == [1, 2, 3]
    tensors = read_checkpoint(tmp_path, 1)
    codebooks = [key for key in tensors if key.endswith("codebook.num_updates")]
    assert any(key.startswith("mtp.") for key in codebooks)
    assert all(tensors[key].eq(1).all() for key in codebooks)


def test_ranks_with_different_flags_are_refused(pretrain):
    flags = ["--moe-router-type", "topk", "--moe-router-topk", "3", "--log-interval", "2", "--micro-batch-size", "1"]
    flags += ["--expert-model-parallel-size", "1"]
    run = pretrain(*AIR, *EP2, "--train-iters", "1", succeeds=False, flags_of_rank={1: flags})
    assert run.returncode != 0
    assert run.steps == {}
    assert run.output.count("error: all ranks must be started with the same flags and versions: ") == 1
    for difference in (
        "moe_router_type is 'air' on rank 0, 'topk' on rank 1",
        "moe_router_topk is 2 on rank 0, 3 on rank 1",
        "log_interval is 1 on rank 0, 2 on rank 1",
        "micro_batch_size is 2 on rank 0, 1 on rank 1",
        "expert_model_parallel_size is 2 on rank 0, 1 on rank 1",
    ):
        assert re.search(rf"\b(?<!_){difference}", run.output)


def test_paths_may_differ_between_ranks(pretrain, tmp_path):
    paths = {rank: ["--tensorboard-dir", str(tmp_path / str(rank))] for rank in (0, 1)}
    assert len(pretrain(*AIR, *EP2, "--train-iters", "1", flags_of_rank=paths).steps) == 1
