"""The real training loop: when the codebook learns, what a checkpoint holds, and what is refused before it starts."""

import re

import pytest
import torch

from tests.megatron.conftest import AIR, EP2, GLOBAL_BATCH, SEQUENCE, read_checkpoint

HIDDEN = 32
ROUTER = "decoder.layers.mlp.router."
TOKENS = GLOBAL_BATCH * SEQUENCE  # per global batch
FIRST_DECAY = 0.1  # window_decay of the first update


def codebook_counts(tensors):
    """[layers] summed running counts of the codebooks, and [layers] numbers of updates."""
    return tensors[ROUTER + "codebook.ema"][..., HIDDEN].sum(dim=-1), tensors[ROUTER + "codebook.num_updates"].flatten()


def save_flags(directory, interval):
    return ["--save", directory, "--save-interval", interval]


def test_resumed_run_equals_the_uninterrupted_one(pretrain, tmp_path):
    flags = [*AIR, *EP2, "--moe-air-refresh-interval", "4", "--moe-input-jitter-eps", "0.01"]
    flags += ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
    whole = pretrain(*flags, "--train-iters", "10", *save_flags(tmp_path / "whole", 5))
    # The second run finds only the checkpoint of iteration 5, as after a kill.
    (tmp_path / "whole" / "latest_checkpointed_iteration.txt").write_text("5")
    saved = save_flags(tmp_path / "resumed", 5)
    resumed = pretrain(*flags, "--train-iters", "10", "--load", tmp_path / "whole", *saved)
    steps = range(6, 11)
    assert [resumed.norms[step] for step in steps] == [whole.norms[step] for step in steps]
    expected, found = (read_checkpoint(tmp_path / name, 10) for name in ("whole", "resumed"))
    assert expected.keys() == found.keys()
    assert ROUTER + "codebook.codewords" in expected and ROUTER + "index.shortlist" in expected
    different = [key for key in expected if not torch.equal(expected[key], found[key])]
    assert different == []
    assert codebook_counts(expected)[1].tolist() == [10, 10]
    assert re.search(r"routing health at iteration +10 .*quantisation error: 0\.\d+.*live codewords: \d", whole.output)


LAYOUTS = {
    "expert-parallel-accumulated": [*EP2],  # two microbatches each
    "full-recompute": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split(),
    "moe-recompute": "--recompute-granularity selective --recompute-modules moe".split(),
    "pipeline": ["--pipeline-model-parallel-size", "2"],
    "virtual-pipeline": [
        *("--num-layers", "4", "--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"),
    ],
    "sequence-parallel": [*EP2, "--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "bf16-distributed-optimizer": ["--bf16", "--use-distributed-optimizer"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_token_of_the_global_batch_counts_once(pretrain, tmp_path, layout):
    pretrain(*AIR, *LAYOUTS[layout], "--train-iters", "1", "--eval-interval", "1", *save_flags(tmp_path, 1))
    counts, updates = codebook_counts(read_checkpoint(tmp_path, 1))
    assert updates.tolist() == [1] * len(updates)
    torch.testing.assert_close(counts, torch.full_like(counts, (1 - FIRST_DECAY) * TOKENS))


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
    scale = ["--fp16", "--initial-loss-scale", str(2**40), "--hysteresis", "1", "--moe-router-dtype", "fp32"]
    run = pretrain(*AIR, *scale, "--train-iters", "3", *save_flags(tmp_path, 3))
    assert "number of skipped iterations:   1" in run.output
    counts, updates = codebook_counts(read_checkpoint(tmp_path, 3))
    assert updates.tolist() == [0, 0]
    assert counts.tolist() == [0.0, 0.0]


def test_rerun_steps_count_once(pretrain, tmp_path):
    # Megatron's own fault injection: a result that is wrong once makes it run the step again.
    entry = ("-m", "tests.megatron.rerun_once")
    run = pretrain(*AIR, "--cpu", "--rerun-mode", "validate_results", "--train-iters", "1", entry=entry, ranks=1)
    attempts, counts = re.search(r"attempts (\d+), tokens counted ([\d.]+)", run.output).groups()
    assert int(attempts) > 1
    assert float(counts) == TOKENS


def test_topk_checkpoint_loads_into_air_and_back(pretrain, tmp_path):
    pretrain(*EP2, "--train-iters", "2", *save_flags(tmp_path / "topk", 2))
    there = pretrain(*AIR, *EP2, "--train-iters", "4", "--load", tmp_path / "topk", *save_flags(tmp_path / "air", 2))
    assert "expert centres are kept, codebooks are seeded from the first batch" in there.output
    assert list(there.steps) == [3, 4]
    assert codebook_counts(read_checkpoint(tmp_path / "air", 4))[1].tolist() == [2, 2]
    back = pretrain(*EP2, "--train-iters", "5", "--load", tmp_path / "air", *save_flags(tmp_path / "back", 5))
    assert "its codebooks are left, its experts are loaded" in back.output
    assert list(back.steps) == [5]
    assert not any("codebook" in key for key in read_checkpoint(tmp_path / "back", 5))


def test_expert_centres_of_a_topk_checkpoint_are_kept(pretrain, tmp_path):
    pretrain(*EP2, "--train-iters", "2", *save_flags(tmp_path / "topk", 2))
    frozen = ["--lr", "0", "--weight-decay", "0", "--no-load-optim", "--finetune"]
    pretrain(*AIR, *EP2, *frozen, "--train-iters", "1", "--load", tmp_path / "topk", *save_flags(tmp_path / "air", 1))
    before, after = read_checkpoint(tmp_path / "topk", 2), read_checkpoint(tmp_path / "air", 1)
    assert torch.equal(before[ROUTER + "weight"], after[ROUTER + "weight"])


def test_checkpoint_with_another_codebook_is_refused(pretrain, tmp_path):
    pretrain(*AIR, "--train-iters", "1", *save_flags(tmp_path, 1), ranks=1)
    run = pretrain(
        *AIR, "--moe-air-num-clusters", "5", "--train-iters", "2", "--load", tmp_path, ranks=1, succeeds=False
    )
    assert run.returncode != 0
    assert re.search(r"ValueError: --load .*codewords is \[4, 32\].*--moe-air-num-clusters \(5\)", run.output)
    assert "training ..." not in run.output


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--moe-router-topk", "9"], "moe_router_topk (9) must not exceed moe_air_shortlist_size (8)"),
        (["--moe-air-num-probes", "5"], "moe_air_num_probes (5) must not exceed moe_air_num_clusters (4)"),
        (["--moe-air-codebook-ema", "1.0"], "moe_air_codebook_ema (1.0) must lie strictly between 0 and 1"),
    ],
    ids=["topk", "probes", "ema"],
)
def test_bad_flags_are_refused_before_training(pretrain, flags, message):
    run = pretrain(*AIR, *flags, "--train-iters", "1", ranks=1, succeeds=False)
    assert run.returncode != 0
    assert f"ValueError: {message}" in run.output
    assert "building GPT model" not in run.output and "training ..." not in run.output


def test_missing_data_is_refused_before_training(pretrain, tmp_path):
    run = pretrain(*AIR, "--data-path", tmp_path / "none", "--train-iters", "1", ranks=1, succeeds=False, data=False)
    assert run.returncode != 0
    assert re.search(r"ValueError: --data-path entry '.*none'.* does not exist", run.output)


def test_multi_token_prediction_layers_get_the_router(pretrain, tmp_path):
    pretrain(*AIR, "--mtp-num-layers", "1", "--train-iters", "1", *save_flags(tmp_path, 1))
    tensors = read_checkpoint(tmp_path, 1)
    codebooks = [key for key in tensors if key.endswith("codebook.num_updates")]
    assert any(key.startswith("mtp.") for key in codebooks)
    assert all(tensors[key].eq(1).all() for key in codebooks)
