"""The command that chooses AIR's sizes, on checkpoints of AIR and of plain top-k."""

import re

import pandas
import pytest

pytestmark = pytest.mark.slow

EXPERTS = ["--num-experts", "64", "--attention-dropout", "0", "--hidden-dropout", "0"]
AIR = ["--moe-router-type", "air", "--moe-granular-experts", "--moe-dispatch", "compact"]
TOKENS = ["--fit-tokens", "1024", "--test-tokens", "200"]
FLAGS = re.compile(
    r"^  --moe-router-type air --moe-air-num-clusters (\d+) --moe-air-shortlist-size (\d+) --moe-air-num-probes (\d+)$",
    re.MULTILINE,
)


@pytest.fixture(scope="module", params=["air", "topk"])
def checkpoint(request, pretrain, tmp_path_factory):
    """Router type, and the folder of a checkpoint of two steps."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = [*EXPERTS, *(AIR + ["--moe-router-input-norm", "running"] if request.param == "air" else [])]
    pretrain(*flags, "--train-iters", "2", "--save", folder, "--save-interval", "2", ranks=1)
    return request.param, folder


def test_the_cheapest_setting_that_suffices_is_printed_as_flags(forkserver, checkpoint, data_prefix, tmp_path):
    words = ["--cpu", "--load", checkpoint[1], "--data-path", data_prefix, "--out-dir", tmp_path, *TOKENS]
    words += ["--target-recall", "0.5"]
    run = forkserver([str(word) for word in words], 1, {}, "air_moe_megatron.tune.__main__")
    assert run.returncode == 0, run.output[-4000:]
    assert f"2 layers of 64 experts, top-2, hidden size 32, router {checkpoint[0]}\n" in run.output
    assert "1024 tokens fit the codebooks, 200 held-out ones" in run.output
    (sizes,) = FLAGS.findall(run.output)
    table = pandas.read_csv(tmp_path / "tune.csv")
    names = ["num_clusters", "shortlist_size", "num_probes"]
    worst = table[table.name == "air"].groupby(names).agg({"topk_recall": "min", "flops_per_token": "first"})
    reaching = worst[worst.topk_recall >= 0.5]
    assert len(worst) > len(reaching) > 0
    assert reaching.loc[tuple(map(int, sizes))].flops_per_token == reaching.flops_per_token.min()
    assert ("AIR as in the checkpoint" in run.output) == (checkpoint[0] == "air")
    assert all(word in run.output for word in ("groups: 1 of 8", "product keys: 8 x 8", "exact top-k", "automatic"))
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")


def test_data_with_too_few_tokens_to_fit_to_are_refused_in_one_line(forkserver, checkpoint, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text(" ".join(map(str, range(50))))
    words = ["--cpu", "--load", checkpoint[1], "--data-path", text, "--out-dir", tmp_path]
    run = forkserver([str(word) for word in words], 1, {}, "air_moe_megatron.tune.__main__")
    assert run.returncode == 2, run.output[-4000:]
    (line,) = [line for line in run.output.splitlines() if "error: " in line]
    assert (
        "the number of tokens of --data-path to fit codebooks to (32) must be at least 64: the smallest codebook"
        in line
    )
