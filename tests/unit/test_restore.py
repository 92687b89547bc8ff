"""What of a checkpoint's arguments shapes its model, and that all of it comes over."""

import argparse
import dataclasses
import sys

import pytest
from megatron.training.arguments import parse_args, validate_args

from air_moe_megatron import cpu
from air_moe_megatron.command.arguments import extra_args_provider
from air_moe_megatron.command.checkpoints.saving import will_save
from air_moe_megatron.command.memory import needed_bytes
from air_moe_megatron.command.model import model_config_from_args
from air_moe_megatron.inference import restore

BASE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 24 "
    "--micro-batch-size 2 --vocab-size 64 --tokenizer-type NullTokenizer --train-iters 2 --lr 1 "
)
MOE = "--num-experts 16 --moe-ffn-hidden-size 8 --moe-router-topk 2 "
# Flags with values that Megatron would not choose, and for the most part does not bring over itself.
MODELS = {
    "air": BASE + MOE + "--moe-router-type air --moe-granular-experts --moe-dispatch compact --moe-router-dtype fp32 "
    "--moe-router-topk-scaling-factor 4 --moe-router-input-norm running --moe-air-num-clusters 8 "
    "--moe-air-num-probes 2 --norm-epsilon 1e-3 --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights",
    "attention": BASE + "--qk-layernorm --attention-softmax-in-fp32 --rotary-base 500 --rotary-percent 0.5 "
    "--squared-relu --position-embedding-type rope --group-query-attention --num-query-groups 2 --kv-channels 16 "
    "--add-qkv-bias --window-size 4,0 --softmax-type learnable --apply-query-key-layer-scaling --fp16 "
    "--use-rope-scaling",
    "megatron's experts": BASE + MOE + "--moe-layer-freq ([0]+[1]) --moe-shared-expert-intermediate-size 8 "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-pre-softmax "
    "--moe-apply-probs-on-input --moe-expert-capacity-factor 2 --moe-router-num-groups 4 --moe-router-group-topk 2 "
    "--bf16 --fp32-residual-connection --moe-router-load-balancing-type seq_aux_loss",
    "latent": BASE + "--multi-latent-attention --q-lora-rank 8 --kv-lora-rank 12 --qk-head-dim 6 "
    "--qk-pos-emb-head-dim 4 --v-head-dim 6 --rotary-scaling-factor 20 --mscale 0.5 --hidden-size 24",
    "hybrid": BASE.replace("--num-layers 2", "") + MOE + "--hybrid-layer-pattern *E*E --moe-router-type hash "
    "--moe-hash-seed 3 --moe-granular-experts --moe-router-load-balancing-type none --moe-aux-loss-coeff 0 "
    "--disable-bias-linear",
}  # fmt: skip
# Arguments of the training run that must not come over.
OF_THE_RUN = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --seed 3 --eod-mask-loss"
LEFT = {"recompute_granularity", "recompute_method", "recompute_num_layers", "inference_sampling_seed"}
READ_OF_A_RUN = {
    "air_moe",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "seed",
    "num_layers",
}


class Recorder(argparse.Namespace):
    """Remembers which arguments are read."""

    def __getattribute__(self, name):
        if not name.startswith("__"):
            object.__getattribute__(self, "__dict__").setdefault("_read", set()).add(name)
        return object.__getattribute__(self, name)


@pytest.fixture
def parse(megatron_cpu, monkeypatch):
    """A function that parses and validates: flags, defaults -> arguments."""

    def run(flags, defaults=None):
        monkeypatch.setattr(sys, "argv", cpu.with_required_flags(["test", "--cpu", *flags.split()]))

        def provider(parser):
            parser = extra_args_provider(parser)
            parser.set_defaults(**(defaults or {}))
            return parser

        args = parse_args(provider)
        validate_args(args, {})
        return args

    return run


def comparable(config):
    """The fields of a model's configuration and of its transformer, without functions."""
    fields = {**vars(config), **vars(config.transformer)}
    return {name: value for name, value in fields.items() if name != "transformer" and not callable(value)}


@pytest.mark.parametrize("model", MODELS)
def test_the_model_is_that_of_the_training_flags(parse, model):
    saved = parse(f"{MODELS[model]} {OF_THE_RUN}")
    expected = comparable(model_config_from_args(saved))
    found = comparable(model_config_from_args(parse("--micro-batch-size 1", restore.model_arguments(saved))))
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name] and "hook" not in name} == LEFT


def test_lists_of_automatic_length_keep_theirs_when_a_command_remakes_them(parse):
    """The automatic length depends on probes and top-k, so those of the checkpoint decide what it holds."""
    model = MODELS["air"].replace("--moe-air-num-probes 2 ", "").replace("--num-experts 16", "--num-experts 1024")
    saved = parse(model)
    given = model_config_from_args(parse(f"{model} --moe-air-num-probes 1 --moe-air-shortlist-size 64")).transformer
    as_saved = restore._with_lists_as_saved(given, saved)
    assert restore.list_form(as_saved) == restore.list_form(model_config_from_args(saved).transformer)
    assert given.moe_air_num_probes == 1 and restore.list_form(given) == (64, 1)
    assert restore._with_lists_as_saved(given, None) is given


@pytest.mark.parametrize("model", MODELS)
def test_every_argument_that_a_model_is_made_from_is_brought_or_named_as_the_runs(parse, model):
    args = parse(MODELS[model])
    recorder = Recorder(**vars(args))
    model_config_from_args(recorder)
    read = recorder.__dict__["_read"] & vars(args).keys()
    assert {"hidden_size", "layernorm_epsilon"} <= read
    assert read <= restore.model_arguments(args).keys() | restore.RUN_ARGUMENTS | READ_OF_A_RUN


def test_the_names_are_those_of_this_megatron(parse):
    known = vars(parse(BASE)).keys()
    optional = {"kitchen_config_file", "kitchen_recipe_number"}  # only with the library of that name
    assert restore.MODEL_ARGUMENTS - known <= optional
    fields = {field.name for config in restore._CONFIGS for field in dataclasses.fields(config)}
    assert restore.RUN_ARGUMENTS <= fields


def test_another_padding_of_the_vocabulary_is_refused():
    with pytest.raises(
        ValueError, match=r"--tensor-model-parallel-size \(2\) must divide .* of the checkpoint \(257\)"
    ):
        restore._check_padding({"padded_vocab_size": 257}, 2)
    restore._check_padding({"padded_vocab_size": 256}, 2)


def test_a_command_needs_no_apex(parse, monkeypatch):
    """Megatron's default is a fused gradient, which needs Apex; the flag that turned it off belongs to the training."""
    saved = parse(MODELS["air"])
    monkeypatch.setattr(restore, "meet", lambda given: argparse.Namespace(rank=0))
    monkeypatch.setattr(restore, "saved_arguments", lambda given, ranks: saved)
    monkeypatch.setattr(restore, "check_agreement", lambda args, ranks: None)
    monkeypatch.setattr(restore, "refused_flags", lambda args: iter(()))
    monkeypatch.setattr(restore, "rebuild_tokenizer", lambda args: None)
    flags = [flag for flag in cpu.with_required_flags(["test", "--cpu", "--load", "checkpoint"]) if "accum" not in flag]
    monkeypatch.setattr(sys, "argv", flags)
    args = restore.complete_arguments(restore.read_command_line(lambda parser: None))
    assert args.gradient_accumulation_fusion is False and args.hidden_size == 32


class Stopped(Exception):
    """Ends a function behind the checks that a test looks at."""


@pytest.mark.parametrize("saves", [False, True])
def test_the_memory_is_that_of_weights_and_the_folder_is_checked_where_the_command_saves(parse, monkeypatch, saves):
    seen = {}

    def check_checkpoint(args, config, ranks):
        seen["saves"] = will_save(args)
        raise Stopped

    monkeypatch.setattr(restore, "check_memory", lambda args: seen.update(bytes=needed_bytes(args)["experts"]))
    monkeypatch.setattr(restore, "check_checkpoint", check_checkpoint)
    args = parse(f"{MODELS['air']} --skip-train --save new --save-interval 1")
    ranks = argparse.Namespace(check=lambda name, check: check())
    with pytest.raises(Stopped):
        restore.build_and_load(args, ranks, saves=saves)
    assert seen == {"saves": saves, "bytes": 2 * 16 * (3 * 8 * 32) * 4} and args.skip_train
