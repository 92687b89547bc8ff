"""The flags made from the fields, and what is refused on a command line only."""

import argparse
from dataclasses import fields

import pytest

from air_moe_megatron.config import AIRFields
from tests.builders import assert_says


def parsed(*flags):
    from air_moe_megatron.command.arguments import add_air_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    assert add_air_arguments(parser) is parser
    return parser, parser.parse_args(flags)


def test_the_flags_are_the_fields_with_the_same_defaults():
    parser, values = parsed()
    assert vars(values) == vars(AIRFields())
    flags = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}
    assert flags == {"--" + field.name.replace("_", "-") for field in fields(AIRFields)}


def test_every_flag_has_a_help_text():
    parser, _ = parsed()
    for action in parser._actions:
        assert action.help and len(action.help) > 20 or action.dest == "help", action.dest


def test_every_help_text_ends_with_the_default():
    parser, _ = parsed()
    defaults = {field.name: field.default for field in fields(AIRFields)}
    shown = {action.dest: action.help for action in parser._actions if action.dest != "help"}
    assert shown.keys() == defaults.keys()
    for name, text in shown.items():
        assert text.endswith(f" Default: {defaults[name]}.")
    assert "Default: 0.99." in parser.format_help()


def test_flags_are_converted_to_the_types_of_the_fields():
    _, values = parsed(
        *("--moe-router-type", "air"),
        *("--moe-router-input-norm", "running"),
        *("--moe-air-num-clusters", "8"),
        *("--moe-air-shortlist-size", "16"),
        *("--moe-air-num-probes", "2"),
        *("--moe-air-codebook-source", "experts"),
        *("--moe-air-codebook-ema", "0.5"),
        *("--moe-air-refresh-interval", "3"),
        *("--moe-dispatch", "compact"),
        "--moe-granular-experts",
    )
    expected = AIRFields(
        moe_router_type="air",
        moe_router_input_norm="running",
        moe_air_num_clusters=8,
        moe_air_shortlist_size=16,
        moe_air_num_probes=2,
        moe_air_codebook_source="experts",
        moe_air_codebook_ema=0.5,
        moe_air_refresh_interval=3,
        moe_dispatch="compact",
        moe_granular_experts=True,
    )
    assert vars(values) == vars(expected)


@pytest.mark.parametrize("flag", ("--moe-router-type", "--moe-air-codebook-source", "--moe-dispatch"))
def test_an_unknown_choice_is_refused_by_the_parser(flag, capsys):
    with pytest.raises(SystemExit):
        parsed(flag, "nonsense")
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(moe_product_key_heads=2), "--moe-product-key-heads (2)"),
        (dict(moe_dispatch="compact"), "--moe-dispatch ('compact')"),
        (dict(moe_air_num_probes=2), "--moe-air-num-probes (2)"),
        (dict(moe_router_input_norm="running"), "--moe-router-input-norm ('running')"),
    ],
)
def test_flags_that_the_topk_router_ignores_are_refused(settings, words):
    from air_moe_megatron.command.arguments import transformer_config_from_args

    with pytest.raises(ValueError) as error:
        transformer_config_from_args(AIRFields(**settings))
    assert_says(error, [words, "has no effect with --moe-router-type topk"])


@pytest.mark.parametrize("router_type", ("air", "hierarchical", "hash", "vq"))
def test_flags_of_another_router_are_refused(router_type):
    from air_moe_megatron.command.arguments import transformer_config_from_args

    with pytest.raises(ValueError) as error:
        transformer_config_from_args(AIRFields(moe_router_type=router_type, moe_product_key_dim=8))
    words = ["--moe-product-key-dim (8)", f"--moe-router-type {router_type}", "add --moe-router-type product_key"]
    assert_says(error, words)


@pytest.mark.parametrize(
    "padded, vocab, expected", [(640, 600, 640), (None, 600, 640), (None, None, 0)], ids=("given", "padded", "unknown")
)
def test_hash_takes_the_vocabulary_of_the_arguments(padded, vocab, expected):
    from air_moe_megatron.command.arguments import padded_vocab_size

    sizes = dict(padded_vocab_size=padded, vocab_size=vocab, make_vocab_size_divisible_by=64)
    args = argparse.Namespace(**sizes, tensor_model_parallel_size=2)
    assert padded_vocab_size(args) == expected


def test_a_hash_vocabulary_below_the_padded_one_is_refused():
    from air_moe_megatron.command.arguments import _hash_vocab_size

    args = argparse.Namespace(padded_vocab_size=640, vocab_size=600)
    for given, size in ((0, 640), (640, 640), (700, 700)):
        args.moe_hash_vocab_size = given
        assert _hash_vocab_size(args) == size
    for given in (600, 639, -1):
        args.moe_hash_vocab_size = given
        with pytest.raises(ValueError) as error:
            _hash_vocab_size(args)
        assert_says(error, [f"--moe-hash-vocab-size ({given})", "at least the padded vocabulary size (640)"])
