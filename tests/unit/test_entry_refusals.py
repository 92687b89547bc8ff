"""Flags that the entry point refuses, because it would accept and not honor them."""

import importlib.machinery
import importlib.util
import sys
import types

import pytest

AIR = "--moe-router-type air --num-experts 16 --moe-ffn-hidden-size 8 --disable-bias-linear".split()
GRANULAR = [*AIR, "--moe-granular-experts"]
REFUSED = {
    "cached-logits": (["--logits-load-dir", "somewhere"], "--logits-load-dir (somewhere)"),
    "captured-logits": ([*AIR, "--moe-routing-trace-capture-logits"], "--moe-routing-trace-capture-logits"),
    "megatron-fsdp": ([*AIR, "--use-megatron-fsdp"], "--use-megatron-fsdp"),
    "torch-fsdp": ([*AIR, "--use-torch-fsdp2"], "--use-torch-fsdp2"),
    "frozen": (["--freeze-all-layers"], "--freeze-all-layers"),
    "packed-hash": (
        [*AIR, "--moe-router-type", "hash", "--dataloader-inter-document-masking", "--micro-batch-size", "2"],
        "--micro-batch-size (2) is not supported with --moe-router-type hash and --dataloader-inter-document-masking",
    ),
    "packed-sequence-loss": (
        [*AIR, "--sft", *"--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.1".split()],
        "--moe-router-load-balancing-type (seq_aux_loss) is not supported with --moe-router-type air and --sft",
    ),
    "masked-sequence-loss": (
        [*GRANULAR, "--moe-router-type", "topk", "--dataloader-inter-document-masking"]
        + "--moe-router-load-balancing-type aux_loss seq_aux_loss --moe-aux-loss-coeff 0.1 0.1".split(),
        "seq_aux_loss) is not supported with --moe-granular-experts and --dataloader-inter-document-masking",
    ),
    "changing-ranks": (
        [*AIR, *"--hybrid-context-parallel --moe-router-load-balancing-type global_aux_loss".split()]
        + "--moe-aux-loss-coeff 0.1".split(),
        "(global_aux_loss) is not supported with --moe-router-type air and --hybrid-context-parallel",
    ),
    "changing-ranks-of-a-batch-norm": (
        [*AIR, "--moe-router-type", "product_key", "--hybrid-context-parallel"],
        "--hybrid-context-parallel is not supported with --moe-router-type product_key",
    ),
    "saved-counts": ([*GRANULAR, "--save-tokens-per-expert-interval", "5"], "--save-tokens-per-expert-interval (5)"),
    "upcycling": ([*GRANULAR, "--moe-use-upcycling"], "--moe-use-upcycling"),
    "reinforcement": (["--perform-rl-step"], "--perform-rl-step"),
    "ramp": (
        ["--rampup-batch-size", "4", "4", "16"],
        "--rampup-batch-size (4 4 16) is not supported: Megatron-Core 0.19 ignores it",
    ),
    "batch-schedule": (
        [*"--step-batch-size-schedule 0:8,64:16 --train-iters 10".split()],
        "--step-batch-size-schedule (0:8,64:16) is not supported with --train-iters: Megatron would count",
    ),
    "decreased-batch": (
        "--decrease-batch-size-if-needed --micro-batch-size 3 --global-batch-size 8 --train-iters 10".split(),
        "--decrease-batch-size-if-needed is not supported with a --global-batch-size that microbatches do not divide",
    ),
    "spec": (["--spec", "no.such.module", "layer"], "--spec (no.such.module layer) cannot be imported"),
    "name-of-spec": (
        ["--spec", "os", "layer"],
        "--spec (os layer) cannot be imported: it takes a module and a name in it",
    ),
    "half-a-spec": (["--spec", "os"], "--spec (os) cannot be imported: it takes a module and a name in it"),
}


@pytest.mark.parametrize(
    "flags",
    [
        "--micro-batch-size 2 --global-batch-size 8",
        "--micro-batch-size 3 --global-batch-size 8 --skip-train",
        "--micro-batch-size 2 --global-batch-size 8 --tensor-model-parallel-size 4",  # more than there are ranks
        "--global-batch-size 8",
    ],
)
def test_a_batch_that_needs_no_decrease_is_not_refused(monkeypatch, flags):
    from megatron.training.arguments import parse_args

    from air_moe_megatron.command.arguments import extra_args_provider
    from air_moe_megatron.command.entry_refusals import FLAG_REFUSALS

    monkeypatch.setattr("sys.argv", ["pretrain", "--decrease-batch-size-if-needed", *flags.split()])
    (row,) = (row for row in FLAG_REFUSALS if row.flag == "--decrease-batch-size-if-needed")
    assert row.applies(parse_args(extra_args_provider)) is False


@pytest.mark.parametrize("flags, words", REFUSED.values(), ids=REFUSED)
def test_flags_that_cannot_be_honored_are_refused_by_name(monkeypatch, flags, words):
    from megatron.training.arguments import parse_args

    from air_moe_megatron.command.arguments import extra_args_provider
    from air_moe_megatron.command.entry_refusals import refused_flags
    from air_moe_megatron.config import raise_first

    monkeypatch.setattr(sys, "argv", ["pretrain"])
    raise_first(refused_flags(parse_args(extra_args_provider)))
    monkeypatch.setattr(sys, "argv", ["pretrain", *flags])
    with pytest.raises(ValueError) as error:
        raise_first(refused_flags(parse_args(extra_args_provider)))
    assert words in str(error.value)


@pytest.mark.parametrize(
    "flags",
    (
        "--sft --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.1",
        "--hybrid-context-parallel --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.1",
        "--moe-router-type air --sft --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 0.1",
        "--moe-router-type air --sft --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.0",
        "--moe-router-type air --hybrid-context-parallel --moe-router-load-balancing-type none --moe-z-loss-coeff 0.1",
    ),
)
def test_packed_data_without_a_loss_per_sequence_is_not_refused(monkeypatch, flags):
    from megatron.training.arguments import parse_args

    from air_moe_megatron.command.arguments import extra_args_provider
    from air_moe_megatron.command.entry_refusals import refused_flags
    from air_moe_megatron.config import raise_first

    monkeypatch.setattr(sys, "argv", ["pretrain", *flags.split()])
    raise_first(refused_flags(parse_args(extra_args_provider)))


RUN = ["--train-iters", "3", "--eval-interval", "10"]
BAD_VALUES = {
    "log-interval": (["--log-interval", "0"], "--log-interval (0) must be at least 1"),
    "negative": (["--log-interval", "-1"], "--log-interval (-1) must be at least 1"),
    "tensorboard-interval": (["--tensorboard-log-interval", "0"], "--tensorboard-log-interval (0) must be at least 1"),
    "memory-interval": (["--log-memory-interval", "0"], "--log-memory-interval (0) must be at least 1"),
    "eval-interval": (["--eval-interval", "0"], "--eval-interval (0) must be at least 1"),
    "ranks": (
        ["--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "3"],
        "--expert-model-parallel-size (2) times --expert-tensor-parallel-size (3) and --pipeline-model-parallel-size "
        "(1) must divide the number of ranks (1)",
    ),
    "full-validation": (["--full-validation"], "--full-validation needs --multiple-validation-sets"),
    "validation-sets": (["--multiple-validation-sets"], "--multiple-validation-sets needs --full-validation"),
    "muon-in-fp16": (["--optimizer", "muon", "--fp16"], "--optimizer (muon) excludes --fp16"),
    "distributed-muon-in-fp32": (
        ["--optimizer", "muon", "--use-distributed-optimizer"],
        "--optimizer (muon) needs --bf16 if it is distributed",
    ),
    "distributed-muon-by-its-old-name": (["--optimizer", "dist_muon"], "--optimizer (dist_muon) needs --bf16"),
    "distributed-muon-on-cpu": (
        ["--optimizer", "lion", "--use-distributed-optimizer", "--bf16", "--cpu"],
        "--optimizer (lion) cannot be distributed with --cpu",
    ),
    "no-moe-layer": (
        [*AIR, "--hybrid-layer-pattern", "M*-"],
        "--hybrid-layer-pattern (M*-) must have a layer E: without an MoE layer --moe-router-type air has no effect",
    ),
}


@pytest.mark.parametrize("flags, words", BAD_VALUES.values(), ids=BAD_VALUES)
def test_values_that_would_end_the_run_later_are_refused_by_name(monkeypatch, flags, words):
    from megatron.training.arguments import parse_args

    from air_moe_megatron.command.arguments import extra_args_provider
    from air_moe_megatron.command.entry_refusals import refused_flags
    from air_moe_megatron.config import raise_first

    monkeypatch.setattr(sys, "argv", ["pretrain", *RUN])
    raise_first(refused_flags(parse_args(extra_args_provider)))
    monkeypatch.setattr(sys, "argv", ["pretrain", *RUN, *flags])
    with pytest.raises(ValueError) as error:
        raise_first(refused_flags(parse_args(extra_args_provider)))
    assert words in str(error.value)


def test_a_full_validation_of_pipeline_stages_takes_sequences_one_by_one(monkeypatch):
    from megatron.training.arguments import parse_args

    from air_moe_megatron.command.arguments import extra_args_provider
    from air_moe_megatron.command.entry_refusals import refused_flags

    def problems(*flags):
        flags = ["--full-validation", "--multiple-validation-sets", "--pipeline-model-parallel-size", "2", *flags]
        monkeypatch.setattr(sys, "argv", ["pretrain", *RUN, *flags])
        return [str(problem) for problem in refused_flags(parse_args(extra_args_provider))]

    monkeypatch.setenv("WORLD_SIZE", "2")
    (problem,) = problems("--micro-batch-size", "2")
    assert problem.startswith("--full-validation needs --eval-micro-batch-size 1 with pipeline stages")
    assert (
        problems("--micro-batch-size", "2", "--eval-micro-batch-size", "1") == problems("--micro-batch-size", "1") == []
    )


def test_muon_needs_its_package(monkeypatch):
    from megatron.training.arguments import parse_args

    from air_moe_megatron.command.arguments import extra_args_provider
    from air_moe_megatron.command.entry_refusals import refused_flags

    def problems(*flags):
        monkeypatch.setattr(sys, "argv", ["pretrain", *RUN, *flags])
        return [str(problem) for problem in refused_flags(parse_args(extra_args_provider))]

    assert problems("--optimizer", "muon", "--cpu") == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert problems("--optimizer", "muon") == [
        "--optimizer (muon) needs the package emerging-optimizers, which is not installed"
    ]
    assert problems("--optimizer", "sgd") == []


def test_wandb_needs_its_package_a_name_and_a_folder(monkeypatch):
    from megatron.training.arguments import parse_args

    from air_moe_megatron.command.arguments import extra_args_provider
    from air_moe_megatron.command.entry_refusals import refused_flags

    def problems(*flags):
        monkeypatch.setattr(sys, "argv", ["pretrain", *RUN, "--wandb-project", "x", *flags])
        return [str(problem) for problem in refused_flags(parse_args(extra_args_provider))]

    monkeypatch.setitem(sys.modules, "wandb", None)
    assert problems()[0] == "--wandb-project (x) needs the package wandb, which is not installed"
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    sys.modules["wandb"].__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    assert problems() == [
        "--wandb-project (x) needs --wandb-exp-name, the name of the run",
        "--wandb-project (x) needs --wandb-save-dir or --save, the folder of its files",
    ]
    assert problems("--wandb-exp-name", "y", "--save", "z") == []


def test_a_missing_interval_of_evaluations_is_refused_where_it_counts(monkeypatch):
    from megatron.training.arguments import parse_args

    from air_moe_megatron.command.arguments import extra_args_provider
    from air_moe_megatron.command.entry_refusals import refused_flags
    from air_moe_megatron.config import raise_first

    monkeypatch.setattr(sys, "argv", ["pretrain", "--train-iters", "3"])
    with pytest.raises(ValueError, match="--eval-interval .None. must be given"):
        raise_first(refused_flags(parse_args(extra_args_provider)))
    monkeypatch.setattr(sys, "argv", ["pretrain", "--train-iters", "3", "--skip-train"])
    raise_first(refused_flags(parse_args(extra_args_provider)))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--moe-router-type", "soft"], "argument --moe-router-type: invalid choice: 'soft'"),
        (["--moe-air-num-probes", "two"], "argument --moe-air-num-probes: invalid int value: 'two'"),
    ],
    ids=["unknown", "choice", "type"],
)
def test_a_command_line_that_cannot_be_parsed_is_refused_without_the_usage(monkeypatch, capsys, flags, words):
    from megatron.training.arguments import parse_args

    from air_moe_megatron.command.arguments import extra_args_provider

    monkeypatch.setattr(sys, "argv", ["pretrain", *flags])
    with pytest.raises(ValueError) as error:
        parse_args(extra_args_provider)
    assert words in str(error.value)
    assert "usage" not in capsys.readouterr().err


SHAPE = (
    "--disable-bias-linear --num-layers 2 --hidden-size 16 --num-attention-heads 2 --num-experts 256 "
    "--moe-ffn-hidden-size 1 --micro-batch-size 1 --seq-length 8 --max-position-embeddings 8"
).split()
ONE_BY_ONE = (
    "--moe-router-type air --moe-granular-experts --moe-dispatch compact --moe-router-input-norm running "
    "--moe-router-dtype fp32 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01"
).split()


@pytest.fixture
def config_of(monkeypatch, megatron_cpu):
    """A function: flags -> the values of the config that they make, through parsing and validation."""
    from megatron.training.arguments import parse_args, validate_args

    from air_moe_megatron import cpu
    from air_moe_megatron.command.arguments import extra_args_provider, transformer_config_from_args

    def config_of(*flags):
        monkeypatch.setattr(sys, "argv", cpu.with_required_flags(["pretrain", "--cpu", *SHAPE, *flags]))
        args = parse_args(extra_args_provider)
        validate_args(args, {})
        values = vars(transformer_config_from_args(args))
        return {name: value for name, value in values.items() if not name.endswith("init_method")}  # functions

    return config_of


@pytest.mark.parametrize("topk, scale", [(2, 1.0), (7, 3.5), (16, 8.0)])
def test_one_flag_gives_all_recommended_settings(config_of, topk, scale):
    of_one = config_of("--air-moe", "--moe-router-topk", str(topk))
    assert of_one["moe_router_topk_scaling_factor"] == scale
    assert of_one == config_of(
        *ONE_BY_ONE, "--moe-router-topk-scaling-factor", str(scale), "--moe-router-topk", str(topk)
    )


def test_the_benchmarks_time_what_the_flag_gives(config_of):
    from benchmarks.models import Sizes, make_config

    timed = vars(make_config(Sizes(experts=256, hidden=16, tokens=8, topk=16), "air", compact=True))
    of_flag = config_of("--air-moe", "--moe-router-topk", "16")
    about_routing = {name for name in timed if name.startswith("moe_")}
    assert len(about_routing) > 40
    assert {name: timed[name] for name in about_routing} == {name: of_flag[name] for name in about_routing}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    "given",
    [
        "--moe-router-type topk",
        "--moe-dispatch=stock",
        "--moe-router-input-norm none",
        "--moe-aux-loss-coeff 0.0",
        "--moe-router-topk-scaling-factor 1.0",
        "--moe-router-load-balancing-type none",
    ],
)
def test_a_flag_that_is_given_wins_over_the_recommended_one(config_of, given, place):
    """Also at its own default, which no comparison of values could tell from one that is not given."""
    words = given.replace("=", " ").split()
    changed = config_of(*([*given.split(), "--air-moe"] if place == "before" else ["--air-moe", *given.split()]))
    name, value = words[0].removeprefix("--").replace("-", "_"), words[1]
    assert str(changed[name]) == value
    assert changed == config_of("--air-moe") | {name: changed[name]}
