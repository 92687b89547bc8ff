"""Our command-line flags, generated from the fields of ``config/fields.py``, and the config made from them."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import ArgumentGroupFactory, core_transformer_config_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.utils import print_rank_0
from megatron.training.vocab_utils import calculate_padded_vocab_size

from air_moe_megatron.command import console
from air_moe_megatron.compat import megatron_has_our_fields
from air_moe_megatron.config import (
    AIRFields,
    AIRMoEConfig,
    Problems,
    attach,
    invalid,
    is_plain_topk,
    layers_with_experts,
    megatron_has_hash_layers,
    raise_first,
    router_type_of,
    set_fields,
    unused,
    uses_hash,
)

RECOMMENDED = {
    "moe_router_type": "air",
    "moe_granular_experts": True,
    "moe_dispatch": "compact",
    "moe_router_input_norm": "running",
    "moe_router_dtype": "fp32",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
}
"""Defaults that ``--air-moe`` sets; flags on the command line override them. :func:`transformer_config_from_args` adds
:func:`recommended_scale`."""

ARGS_DEFAULTS = {"tokenizer_type": "GPT2BPETokenizer"}
"""Defaults that this entry passes to Megatron's argument validation, as ``pretrain_gpt.py`` does."""

NOT_GIVEN = {"moe_router_type": None, "moe_num_hash_layers": None}
"""Defaults with which a parsed command line tells whether it gives routers other than its checkpoint's."""

NO_YAML = "it replaces the whole command line, and its form has none of our flags"
"""Why ``--yaml-cfg`` is refused."""


def recommended_scale(topk: int) -> float:
    """The ``moe_router_topk_scaling_factor`` of ``--air-moe``: half of the top-k, and at least 1."""
    return max(1.0, topk / 2)


def extra_args_provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags to Megatron's parser, which already has Megatron's own, and return it.

    Raises:
        ValueError: if the command line has ``--yaml-cfg``: Megatron reads that file while it parses.
    """
    if any(word.partition("=")[0] == "--yaml-cfg" for word in sys.argv):
        raise ValueError(f"--yaml-cfg is not supported: {NO_YAML}")
    group = parser.add_argument_group(title="air_moe_megatron")
    group.add_argument("--cpu", action="store_true", help="Train on CPU with the gloo backend; no GPU is needed.")
    group.add_argument(
        "--air-moe",
        action="store_true",
        help="AIR routing of granular experts on the compact path, with the recommended value of each flag not given.",
    )
    group.add_argument(
        "--log-file",
        help="Append all output to this file; the screen gets losses, routing health, warnings and errors. "
        "Default: all output goes to the screen.",
    )
    parser.error = _refuse_command_line
    parser = repair_help(add_air_arguments(parser))
    if "--air-moe" in sys.argv:  # a given flag, even at its default value, overrides these
        parser.set_defaults(**RECOMMENDED)
    return parser


def repair_help(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Escape stray percent signs in help texts: one in megatron-core 0.19 makes ``--help`` crash."""
    for action in parser._actions:
        try:
            (action.help or "") % vars(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")
    return parser


def _refuse_command_line(message: str) -> NoReturn:
    """Replaces argparse's ``error``, which would print the usage of all of Megatron's flags on every rank."""
    raise ValueError(message)


def parse_flags(
    defaults: dict[str, Any] | None = None, add_flags: Callable[[argparse.ArgumentParser], object] | None = None
) -> argparse.Namespace:
    """Parse the command line by Megatron's parser, with our flags.

    Args:
        defaults: defaults that override Megatron's, ours and those of ``--air-moe``.
        add_flags: adds the flags of one command to the parser.
    Raises:
        ValueError: if it cannot be parsed, whatever Megatron raises for the value of a flag.
    """

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = extra_args_provider(parser)
        if add_flags is not None:
            add_flags(parser)
        parser.set_defaults(**defaults or {})
        return parser

    try:
        return parse_args(provider)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(console.megatrons_words(error)) from error


def complete(args: argparse.Namespace, build: Callable[[argparse.Namespace], object] = build_tokenizer) -> None:
    """Complete parsed arguments by Megatron: by the checkpoint of ``--use-checkpoint-args``, validation and tokenizer.

    Sets no global variable of Megatron, unless ``build`` does.

    Args:
        args: changed in place.
        build: Megatron's function that makes the tokenizer and sets the size of the vocabulary.
    Raises:
        ValueError: in Megatron's words, whatever it raises.
    """
    with megatrons_errors():
        if args.use_checkpoint_args:
            load_args_from_checkpoint(args, load_arg="pretrained_checkpoint")
            load_args_from_checkpoint(args)
        if args.skip_train and args.train_iters is None and args.train_samples is None:
            args.train_iters = 0  # Megatron computes with it all the same
        validate_args(args, ARGS_DEFAULTS)
        build(args)


@contextlib.contextmanager
def megatrons_errors() -> Iterator[None]:
    """Within this context every error of Megatron becomes a ValueError in its words.

    It is used where Megatron judges flags. Unfit flags make it raise errors of all kinds, or exit.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ValueError(console.megatrons_words(error)) from error


def without_fields_of_others(values: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Drop fields of a checkpoint that have no effect with the routers that a command line gives.

    Example: of moe_air_num_clusters 8 and moe_router_topk 2, a given --moe-router-type topk keeps the second.

    Args:
        values: arguments of the checkpoint.
        given: arguments of the command line, parsed with the defaults :data:`NOT_GIVEN`.
    """
    if given.moe_router_type is None and given.moe_num_hash_layers is None:
        return values
    router_type = given.moe_router_type or values.get("moe_router_type", "topk")
    number = given.moe_num_hash_layers
    number = values.get("moe_num_hash_layers", 0) if number is None else number
    kept = {None, router_type} | ({"hash"} if number else set())
    dropped = {"moe_num_hash_layers"} if router_type == "hash" else set()
    if given.moe_router_type not in (None, "air"):
        dropped.add("moe_air_diagnostics_interval")
    return {name: value for name, value in values.items() if router_type_of(name) in kept and name not in dropped}


def add_air_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of AIR-MoE to Megatron's parser and return it, as an ``extra_args_provider`` must.

    A checkout with ``patches/`` applied already has them, from its own config. If Megatron has its own
    ``--moe-num-hash-layers``, ours is left out.
    """
    if not megatron_has_our_fields():
        given = ["moe_num_hash_layers"] if megatron_has_hash_layers() else []
        group = ArgumentGroupFactory(AIRFields, exclude=given).build_group(parser, title="AIR-MoE")
        for action in group._group_actions:
            action.help += f" Default: {action.default}."
    return parser


def transformer_config_from_args(args: argparse.Namespace) -> TransformerConfig:
    """Make the transformer config: with our fields, or Megatron's own if the arguments use no feature of ours.

    Args:
        args: Megatron's parsed and validated arguments, modified in place. With hash routers a ``moe_hash_vocab_size``
            of 0 becomes the size of the embedding. With ``--air-moe`` a ``moe_router_topk_scaling_factor`` that is not
            given becomes :func:`recommended_scale`.
    Raises:
        ValueError: naming the field, value and rule that the arguments break.
    """
    raise_first(unused(args))
    if getattr(args, "air_moe", False) and args.moe_router_topk_scaling_factor is None:
        args.moe_router_topk_scaling_factor = recommended_scale(args.moe_router_topk)
        print_rank_0(f"> --air-moe: --moe-router-topk-scaling-factor {args.moe_router_topk_scaling_factor}")
    if is_plain_topk(args):
        return core_transformer_config_from_args(args)
    if uses_hash(args):
        args.moe_hash_vocab_size = _hash_vocab_size(args)
    config = core_transformer_config_from_args(args, AIRMoEConfig)
    if not isinstance(config, AIRMoEConfig):
        attach(config, args)  # multi-latent attention and heterogeneous layers bring config classes of their own
    return config


def unfit_fields(args: argparse.Namespace, config: TransformerConfig) -> Problems[None]:
    """Yield all our errors in :func:`transformer_config_from_args`; Megatron's own are left out.

    Args:
        args: as for that function, which also replaces a ``moe_hash_vocab_size`` of 0 in this way.
        config: Megatron's own config of these arguments; our fields are set on it.
    """
    yield from unused(args)
    if is_plain_topk(args):
        return
    if uses_hash(args):
        try:
            args.moe_hash_vocab_size = _hash_vocab_size(args)
        except ValueError as error:
            yield error
    set_fields(config, args)
    yield from invalid(config)


def _hash_vocab_size(args: argparse.Namespace) -> int:
    """Number of token ids in the hash router's table: as given, or the size of the embedding."""
    given, needed = args.moe_hash_vocab_size, padded_vocab_size(args)
    if given and given < needed:
        raise ValueError(
            f"--moe-hash-vocab-size ({given}) must be at least the padded vocabulary size ({needed}); leave it out to "
            "take that"
        )
    return given or needed


def padded_vocab_size(args: argparse.Namespace) -> int:
    """Number of token ids in the model's embedding; 0 if the arguments do not determine it."""
    if args.padded_vocab_size is not None or args.vocab_size is None:
        return args.padded_vocab_size or 0
    sizes = (args.make_vocab_size_divisible_by, args.tensor_model_parallel_size)
    return calculate_padded_vocab_size(args.vocab_size, *sizes, logging_enabled=False)


def value_of(args: argparse.Namespace, flag: str) -> Any:
    """The value of a flag."""
    return getattr(args, flag.removeprefix("--").replace("-", "_"))


def is_packed(args: argparse.Namespace) -> bool:
    """Whether a sequence holds several documents whose boundaries attention and routers must know."""
    return args.sft or args.dataloader_inter_document_masking


def has_experts_by_layer(args: argparse.Namespace) -> list[bool]:
    """Say for each layer whether it has experts, by ``--moe-layer-freq`` or the hybrid pattern."""
    if getattr(args, "num_experts", None) is None:
        return [False] * args.num_layers
    if args.hybrid_layer_pattern is not None:
        return [symbol == Symbols.MOE for symbol in bare_pattern(args.hybrid_layer_pattern)]
    return layers_with_experts(getattr(args, "moe_layer_freq", 1), args.num_layers)


def bare_pattern(pattern: str) -> str:
    """The decoder layers of a hybrid pattern, without multi-token prediction and marks of pipeline stages."""
    return pattern.split("/")[0].replace("|", "")
