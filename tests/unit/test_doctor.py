"""The doctor: all that would stop a command line, in the words of the start."""

import ast
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from air_moe_megatron import cpu
from air_moe_megatron.config import ROUTER_TYPES, AIRFields, invalid, validate
from air_moe_megatron.doctor import command as doctor
from air_moe_megatron.doctor import machine
from tests.builders import make_config
from tests.processes import run
from tests.unit.test_layering import PACKAGE

FLAGS = (
    "--cpu --num-layers 2 --hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --seq-length 16 "
    "--max-position-embeddings 16 --num-experts 64 --moe-ffn-hidden-size 8 --moe-router-topk 2 --moe-router-type air "
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --train-iters 2 --eval-interval 10 --eval-iters 1 "
    "--tokenizer-type NullTokenizer --vocab-size 64 --mock-data --disable-bias-linear"
).split()
# One mistake each: its flags, and the words of the start.
MISTAKES = {
    "flag": (["--freeze-all-layers"], "--freeze-all-layers is not supported: Megatron freezes only models that it"),
    "rule": (["--log-interval", "0"], "--log-interval (0) must be at least 1"),
    "data": (["--full-validation", "--multiple-validation-sets"], "--full-validation excludes test data"),
    "unused": (["--moe-hash-seed", "3"], "--moe-hash-seed (3) has no effect with --moe-router-type air"),
    "value": (["--moe-air-num-probes", "-1"], "moe_air_num_probes (-1) must be positive, or 0 for the automatic one"),
    "fusion": (["--moe-router-fusion"], "moe_router_fusion (True) is not supported with moe_router_type 'air'"),
    "compact": (["--moe-dispatch", "compact"], "moe_granular_experts (False) is not supported with moe_dispatch"),
    "checkpoint": (["--load", "nowhere"], "--load 'nowhere' holds no checkpoint"),
}  # fmt: skip


OF_HASH_LAYERS = {
    "number": (
        ["--moe-num-hash-layers", "5"],
        "moe_num_hash_layers (5) must be from 0 to below the number of MoE layers (2)",
    ),
    "token-counts": (
        ["--moe-num-hash-layers", "1", "--moe-hash-balance", "frequency"],
        "--moe-hash-balance (frequency) cannot count the tokens of --mock-data: give --moe-hash-counts FILE",
    ),
}


@pytest.fixture
def examine():
    """The doctor's checks of a command line, without what CPU mode leaves behind."""
    was_enabled = cpu.is_enabled()
    yield lambda *more: doctor.examine([*FLAGS, *more])
    if not was_enabled:
        cpu.disable()


@pytest.fixture
def start(monkeypatch, capsys):
    """A function that starts a training run up to Megatron's loop: flags -> the words of its refusal, None without."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    from air_moe_megatron.training import run

    monkeypatch.setattr(run, "rebuild_tokenizer", build_tokenizer)  # no global variable of Megatron is set
    monkeypatch.setattr(run, "set_global_variables", lambda args, build_tokenizer: None)
    monkeypatch.setattr(run, "run", lambda *given: None)

    def start(*flags):
        monkeypatch.setattr(sys, "argv", cpu.with_required_flags(["pretrain", *flags]))
        capsys.readouterr()
        try:
            run.train()
        except SystemExit as end:
            assert end.code == 2
            return capsys.readouterr().err.partition("air_moe_megatron.pretrain: error: ")[2].strip()
        return None

    return start


def checks_of(call):
    """The functions of ours that look for a reason to refuse, among those that a call runs: file and name."""
    found = set()

    def record(frame, event, argument):
        code = frame.f_code
        if event == "call" and "ValueError" in code.co_names and code.co_filename.startswith(f"{PACKAGE}/"):
            found.add((code.co_filename.removeprefix(f"{PACKAGE}/"), code.co_qualname))

    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def test_the_doctor_makes_every_check_of_a_start(examine, start, tmp_path):
    """A check that is added to ``train`` must be added to the doctor. Agreement takes several ranks."""
    (tmp_path / "counts").write_text("1\n2\n")
    flags = ["--moe-num-hash-layers", "1", "--moe-hash-balance", "frequency", "--moe-hash-counts", tmp_path / "counts"]
    flags = [*map(str, flags), "--save", str(tmp_path), "--save-interval", "1", "--log-file", str(tmp_path / "log")]
    of_a_start = checks_of(lambda: start(*FLAGS, *flags))
    assert ("command/memory.py", "check_memory") in of_a_start
    missing = of_a_start - checks_of(lambda: examine(*flags))
    assert {file for file, _ in missing} <= {"command/agreement.py", "command/console.py"}, missing


def calls_of(file, *functions):
    """Names of all that the functions of a file call, without those of modules and objects."""
    nodes = ast.parse((PACKAGE / file).read_text()).body
    called = [node for own in nodes if getattr(own, "name", None) in functions for node in ast.walk(own)]
    return {ast.unparse(node.func).rpartition(".")[2] for node in called if isinstance(node, ast.Call)}


def test_a_checkpoint_that_is_used_is_checked_as_one_that_is_trained():
    """A check that is added to ``train`` must be added to the start of the other commands, or be named here."""
    checks = {"check", "complete", "meet", "model_config_from_args", "agreed_counts", "refused_flags", "unfit_data"}
    of_a_start = {
        name for name in calls_of("training/run.py", "parse", "train") if name in checks or name.startswith("check_")
    }
    assert {"refused_flags", "check_memory", "complete"} <= of_a_start
    missing = of_a_start - calls_of("inference/restore.py", "read_command_line", "complete_arguments", "build_and_load")
    # The commands read their own data, and a checkpoint brings the tables of its hash routers.
    assert missing == {"unfit_data", "agreed_counts"}


def test_a_sound_command_line_has_no_problem(examine):
    args, found = examine()
    assert (found.problems, found.unchecked) == ([], [])
    assert args.num_experts == 64 and args.padded_vocab_size
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("flags, words", OF_HASH_LAYERS.values(), ids=OF_HASH_LAYERS)
def test_hash_layers_that_cannot_be_are_named(examine, start, flags, words):
    _, found = examine(*flags)
    assert len(found.problems) == 1 and words in found.problems[0]
    assert found.problems[0] == start(*FLAGS, *flags)


# One mistake each in what Megatron asserts after minutes: its flags, and the words of the start.
OF_SCHEDULES = {
    "no-length": (["--train-iters", "0"], "--train-iters (0) must be at least 1"),
    "minimum": (["--min-lr", "-1"], "--min-lr (-1.0) must not be negative"),
    "initial": (["--lr-warmup-init", "2"], "--lr-warmup-init (2.0) must not exceed --lr (0.001)"),
    "warm-up": (["--lr-warmup-iters", "2"], "--lr-warmup-iters (2) must be below --train-iters (2)"),
    "decay": (
        ["--lr-warmup-iters", "5", "--lr-decay-iters", "4"],
        "--lr-warmup-iters (5) must be below --lr-decay-iters (4)",
    ),
    "no-decay": (["--lr-decay-iters", "0"], "--lr-decay-iters (0) must be at least 1"),
    "all-warm-up": (["--lr-warmup-fraction", "1.0"], "--lr-warmup-fraction (1.0) must be below 1"),
    "stable": (["--lr-decay-style", "WSD"], "--lr-decay-style (WSD) needs --lr-wsd-decay-iters"),
    "weight-decay": (["--weight-decay", "-1"], "--end-weight-decay (-1.0) must be at least --start-weight-decay"),
}  # fmt: skip


@pytest.mark.parametrize("flags, words", OF_SCHEDULES.values(), ids=OF_SCHEDULES)
def test_a_schedule_that_megatron_would_refuse_is_refused_by_its_flag(examine, start, flags, words):
    _, found = examine(*flags)
    assert len(found.problems) == 1 and found.problems[0].startswith(words)
    assert found.problems[0] == start(*FLAGS, *flags)
    assert start(*FLAGS, *flags, "--skip-train") is None


@pytest.mark.parametrize("left_out", ["--train-iters", "--lr"])
def test_length_and_learning_rate_must_be_given(start, left_out):
    index = FLAGS.index(left_out)
    others = [*FLAGS[:index], *FLAGS[index + 2 :]]
    assert start(*others).startswith(left_out)
    assert start(*others, "--skip-train") is None


OF_RANKS = {
    "tensor": ("--tensor-model-parallel-size 2", "--tensor-model-parallel-size (2) needs --sequence-parallel"),
    "context": ("--context-parallel-size 2", "--context-parallel-size (2) needs --transformer-impl transformer_engine"),
    "microbatches": (
        "--pipeline-model-parallel-size 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1 "
        "--global-batch-size 2",
        "--global-batch-size (2) makes 1 microbatches: interleaved pipeline stages take groups of 2",
    ),
    "last group": (
        "--pipeline-model-parallel-size 2 --num-layers 4 --num-layers-per-virtual-pipeline-stage 1 "
        "--global-batch-size 6",
        "--global-batch-size (6) makes 3 microbatches: interleaved pipeline stages take groups of 2",
    ),
}


@pytest.mark.parametrize("flags, words", OF_RANKS.values(), ids=OF_RANKS)
def test_a_layout_that_megatron_would_refuse_in_the_first_step_is_refused(examine, monkeypatch, flags, words):
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, found = examine(*flags.split())
    assert len(found.problems) == 1 and found.problems[0].startswith(words)


def test_interleaved_stages_with_enough_microbatches_pass(examine, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    sound, _ = OF_RANKS["microbatches"]
    assert examine(*sound.split(), "--global-batch-size", "8")[1].problems == []


def test_all_problems_of_a_command_line_are_listed_at_once_in_the_words_of_the_start(examine, start):
    _, found = examine(*(flag for flags, _ in MISTAKES.values() for flag in flags))
    assert len(found.problems) == len(MISTAKES) and found.unchecked == []
    for flags, words in MISTAKES.values():
        message = start(*FLAGS, *flags)
        assert message.startswith(words) and message in found.problems


def test_megatrons_first_problem_is_named_as_its_own_and_ours_are_listed_beside_it(examine):
    args, found = examine("--global-batch-size", "3", "--log-interval", "0", "--moe-hash-seed", "3")
    megatrons, *ours = found.problems
    assert args is None and megatrons.startswith("Megatron: ") and "3" in megatrons
    assert [problem.split()[0] for problem in ours] == ["--log-interval", "--moe-hash-seed"]
    assert found.unchecked == ["model", "memory", "checkpoint"]


# Refused by Megatron, or before it: its flags, and words of the refusal.
REFUSED_EARLY = {
    "position": (["--seq-length", "32"], "Megatron: max_position_embeddings (16) must be"),
    "no words": (["--save", "new"], "Megatron: assert args.save_interval is not None"),
    "pattern": (["--moe-layer-freq", "[1,"], "Megatron: "),
    "ranks": (["--expert-model-parallel-size", "2"], "--expert-model-parallel-size (2) times --expert-"),
    "seed": (["--seed", "0"], "--seed (0) must be at least 1"),
    "of the tokenizer": (["--tokenizer-type", "SentencePieceTokenizer"], "Megatron: "),
    "batch": (["--global-batch-size", "3"], "Megatron: "),
    "no checkpoint": (["--use-checkpoint-args"], "--use-checkpoint-args needs --load (or --pretrained-checkpoint)"),
    "local": (
        ["--use-checkpoint-args", "--load", "nowhere", "--non-persistent-ckpt-type", "local"],
        "--non-persistent-ckpt-type ('local') is not supported with --use-checkpoint-args",
    ),
    "yaml": (["--yaml-cfg", "nowhere.yaml"], "--yaml-cfg is not supported: it replaces the whole command line"),
    "board": (["--tensorboard-dir", "/dev/null/x"], "--tensorboard-dir '/dev/null/x' cannot be written: Not a dir"),
}  # fmt: skip


@pytest.mark.parametrize("flags, words", REFUSED_EARLY.values(), ids=REFUSED_EARLY)
def test_the_start_and_the_doctor_refuse_in_the_same_line(examine, start, flags, words):
    message = start(*FLAGS, *flags)
    assert message.startswith(words) and message in examine(*flags)[1].problems


OTHER_ROUTERS = {
    "router": ["--moe-router-type", "topk", "--moe-num-hash-layers", "0"],
    "layers": ["--moe-num-hash-layers", "0"],
    "everywhere": ["--moe-router-type", "hash", "--moe-router-load-balancing-type", "none"],
}


@pytest.mark.parametrize("flags", OTHER_ROUTERS.values(), ids=OTHER_ROUTERS)
def test_no_field_of_the_checkpoint_alone_is_refused_as_unused(examine, start, monkeypatch, flags):
    """The command line gives another router: the user cannot leave out what only the checkpoint has."""
    fields = dict(moe_router_type="air", moe_granular_experts=True, moe_air_num_clusters=8, moe_num_hash_layers=1)
    fields |= dict(moe_hash_seed=3, moe_air_diagnostics_interval=5)
    monkeypatch.setattr("air_moe_megatron.command.checkpoints.fields_of_checkpoint", lambda args, ranks: fields)
    monkeypatch.setattr("air_moe_megatron.command.arguments.load_args_from_checkpoint", lambda args, load_arg="": None)
    given = [flag for flag in FLAGS if flag not in ("--moe-router-type", "air")]
    message = start(*given, *flags, "--use-checkpoint-args", "--load", "nowhere")
    assert message.startswith("--load 'nowhere' holds no checkpoint")
    words = [*given, *flags, "--use-checkpoint-args", "--load", "nowhere"]
    assert doctor.examine(words)[1].problems == [message]


@pytest.mark.parametrize("path", [".", "new/", "/dev/null/run.log"])
def test_a_log_file_that_cannot_be_written_is_named_with_its_flag(examine, tmp_path, monkeypatch, path):
    from air_moe_megatron.command import console

    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError) as error:
        console.write_log_file(path)
    assert str(error.value).startswith(f"--log-file '{path}' cannot be written: ")
    assert examine("--log-file", path)[1].problems == [str(error.value)]
    assert list(tmp_path.iterdir()) == []


def test_flags_that_cannot_be_parsed_are_the_one_problem(examine):
    args, found = examine("--no-such-flag", "--log-interval", "0")
    assert args is None and found.problems == ["unrecognized arguments: --no-such-flag"]


def test_a_gpu_command_is_checked_without_a_gpu(examine):
    args, found = doctor.examine([flag for flag in FLAGS if flag != "--cpu"])
    assert found.problems[0] == "no CUDA GPU is visible; give --cpu to run on CPU with gloo"
    assert args is None or "memory" in found.unchecked


def test_a_megatron_that_is_not_supported_is_the_one_problem(examine, monkeypatch):
    monkeypatch.setattr("air_moe_megatron.compat.SUPPORTED_MEGATRON", ("0.1", "0.2"))
    args, found = examine("--log-interval", "0")
    assert args is None and len(found.problems) == 1 and "is not supported: air_moe_megatron needs" in found.problems[0]
    assert "needs >= 0.1, < 0.2" in machine.versions()["megatron-core"]


def test_a_failing_check_is_unchecked_behind_a_problem_and_a_fault_without_one():
    def fails():
        yield ValueError("first")
        raise KeyError("presumed")

    found = doctor.Findings()
    assert found.walk("topic", fails()) is None
    assert (found.problems, found.unchecked) == (["first"], ["topic"])

    def breaks():
        yield from ()
        raise KeyError("a fault")

    with pytest.raises(KeyError):
        doctor.Findings().walk("topic", breaks())


SETTINGS = st.fixed_dictionaries(
    {
        "moe_router_type": st.sampled_from(ROUTER_TYPES),
        "num_moe_experts": st.sampled_from([None, 7, 64]),
        "moe_router_topk": st.integers(-1, 65),
        "expert_model_parallel_size": st.sampled_from([1, 2]),
        "moe_ffn_hidden_size": st.sampled_from([None, 0, 1]),
        "moe_dispatch": st.sampled_from(["stock", "compact", "other"]),
        "moe_granular_experts": st.booleans(),
        "moe_air_codebook_source": st.sampled_from(["tokens", "experts", "other"]),
        "moe_air_codebook_ema": st.sampled_from([0.99, 1.0, float("nan")]),
        **{
            name: st.integers(-1, 70)
            for name in AIRFields.__dataclass_fields__
            if AIRFields.__dataclass_fields__[name].type is int
        },
    }
)


@given(SETTINGS)
def test_every_problem_of_a_config_is_found_and_the_first_is_the_error(settings):
    config = make_config()
    for name, value in settings.items():
        setattr(config, name, value)
    problems = [str(problem) for problem in invalid(config)]
    assert len(set(problems)) == len(problems)
    if problems:
        with pytest.raises(ValueError) as error:
            validate(config)
        assert str(error.value) == problems[0]
    else:
        validate(config)


def test_the_command_ends_with_2_where_a_start_would_not_work_and_writes_nothing(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "air_moe_megatron.doctor", "--world-size", "2", *FLAGS]
    save = ["--save", str(tmp_path / "out"), "--save-interval", "1", "--tensorboard-dir", str(tmp_path / "board")]
    ended = run([*command, *save, "--log-interval", "0"])
    assert ended.returncode == 2 and "as rank 0 of 2" in ended.stdout and "arguments -----" not in ended.stdout
    assert ended.stdout.startswith("Versions\n")
    assert ended.stdout.endswith("Problems: 1\n  1. --log-interval (0) must be at least 1\n")
    assert list(tmp_path.iterdir()) == []
