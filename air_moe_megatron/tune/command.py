"""The command ``tune``: its flags and their checks, the order of the work, and the report."""

import argparse
import contextlib
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TextIO

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from tqdm import tqdm

from air_moe_megatron.command import console
from air_moe_megatron.command.checkpoints.saving import check_writable
from air_moe_megatron.command.console import flag_of
from air_moe_megatron.config import num_hash_layers
from air_moe_megatron.inference import restore
from air_moe_megatron.inference.data import read, require_paths
from air_moe_megatron.inference.text import tokenizer_of
from air_moe_megatron.learned.codebook import FIT_TOKENS
from air_moe_megatron.process_groups import process_groups_released
from air_moe_megatron.routers import AIRRouter, find_routers
from air_moe_megatron.tune import output
from air_moe_megatron.tune.capture import collect, split
from air_moe_megatron.tune.measured import Measured
from air_moe_megatron.tune.recall import Layer
from air_moe_megatron.tune.report import METRICS, report
from air_moe_megatron.tune.search import TOKENS_PER_CLUSTER, grid, measure_loaded, measure_others, search


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``python -m air_moe_megatron.tune``."""
    group = parser.add_argument_group(title="tune")
    group.add_argument("--target-recall", type=float, default=0.9, help="Recall that every layer must reach.")
    group.add_argument(
        "--target-metric", choices=list(METRICS), default="topk", help="Recall of the exact top-k or softmax mass."
    )
    group.add_argument("--fit-tokens", type=int, default=FIT_TOKENS, help="Tokens per layer to fit codebooks to.")
    group.add_argument("--test-tokens", type=int, default=2048, help="Held-out tokens per layer to measure on.")
    group.add_argument("--batch-tokens", type=int, help="Tokens of a global batch. Default: as in the checkpoint.")
    group.add_argument("--time-limit", type=float, default=600.0, help="Seconds after which no further C is tried.")
    group.add_argument("--out-dir", default="out/tune", help="Folder of tune.csv and tune.png.")


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before the model is built.

    Raises:
        ValueError: naming the flag, its value and the rule.
    """
    require_paths(args)
    if args.world_size != 1:
        raise ValueError(f"the number of ranks ({args.world_size}) must be 1: a checkpoint loads at any sizes")
    if args.num_experts is None:
        raise ValueError(f"--load '{args.load}' holds a model without experts: there is nothing to choose")
    if args.moe_router_type not in ("topk", "air"):
        raise ValueError(
            f"--load '{args.load}' holds routers of type {args.moe_router_type}: recall is measured against the exact "
            "top-k of expert centers, as routers of type topk and air have them"
        )
    if not 0 < args.target_recall <= 1:
        raise ValueError(f"--target-recall ({args.target_recall}) must be above 0 and at most 1")
    if not 0 < args.time_limit < math.inf:
        raise ValueError(f"--time-limit ({args.time_limit}) must be a positive number of seconds")
    for name in ("fit_tokens", "test_tokens", "batch_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{flag_of(name)} ({value}) must be at least 1")
    check_writable(f"--out-dir '{args.out_dir}'", args.out_dir)


def check_grid(config: TransformerConfig) -> None:
    """Refuse a model of so few experts that exact scores cost less than any setting.

    Raises:
        ValueError: naming the number of experts.
    """
    if not grid(config):
        raise ValueError(
            f"num_moe_experts ({config.num_moe_experts}) with moe_router_topk ({config.moe_router_topk}) leaves no "
            "setting that costs less than exact scores: keep --moe-router-type topk"
        )


def check_fit(config: TransformerConfig, num_tokens: int, name: str) -> None:
    """Refuse too few tokens for the codebooks of all settings.

    Args:
        config: the model's config, which has settings.
        num_tokens: tokens per layer to fit to.
        name: what this number is called.
    Raises:
        ValueError: naming the number and the rule.
    """
    smallest = min(grid(config))
    least = TOKENS_PER_CLUSTER * smallest
    if num_tokens < least:
        raise ValueError(
            f"{name} ({num_tokens}) must be at least {least}: the smallest codebook that is tried has {smallest} "
            f"codewords, and each takes {TOKENS_PER_CLUSTER} tokens to fit to"
        )


def _tokens_per_batch(saved: argparse.Namespace) -> int:
    """Tokens of a global batch of the training, for which a checkpoint's arguments are given.

    Raises:
        ValueError: if the batch grew during the training.
    """
    schedule = getattr(saved, "step_batch_size_schedule", None)  # 0.17 and 0.18 lack it
    if schedule is not None:
        raise ValueError(
            f"--batch-tokens must be given: the checkpoint was trained with --step-batch-size-schedule ({schedule})"
        )
    return saved.global_batch_size * saved.seq_length


def run(screen: TextIO) -> None:
    """Parse the command line, load the checkpoint, measure, and print the choice.

    Args:
        screen: where it is printed.
    Raises:
        SystemExit: if the command line, the checkpoint or the data cannot work; one line says why.
    """
    with contextlib.ExitStack() as stack:
        with console.refusals():
            command = restore.read_command_line(add_flags)
            args, saved = restore.complete_arguments(command), command.saved
            check(args)
            tokenizer = tokenizer_of(args)
            streams = [read(path, tokenizer, args) for path in args.data_path]
            data = [split(stream, args.seq_length, args.fit_tokens, args.test_tokens) for stream in streams]
            batch = args.batch_tokens or _tokens_per_batch(saved)
            stack.enter_context(process_groups_released())
            model = restore.build_and_load(args, command.ranks)
            config = get_model_config(model[0])
            check_grid(config)
            check_fit(config, args.fit_tokens, "--fit-tokens")
            out = Path(args.out_dir)
            out.mkdir(parents=True, exist_ok=True)
        bar = partial(tqdm, delay=3, leave=False)
        layers = collect(
            model, data, tokenizer.eod, args, args.fit_tokens, args.test_tokens, partial(bar, desc="forwards")
        )
        with console.refusals():
            check_fit(config, layers[0].fit.shape[0], "the number of tokens of --data-path to fit codebooks to")
        screen.write(describe(args, config, layers, batch))
        screen.flush()
        target, metric = args.target_recall, args.target_metric
        loaded = measure_loaded(layers, config, find_routers(model, AIRRouter), metric, batch)
        with bar(total=len(layers) * len(grid(config)), desc="search") as progress:
            found = search(layers, config, target, metric, batch, args.time_limit, progress.update)
        others = measure_others(bar(layers, desc="baselines"), config)
        measured = Measured(config, layers, batch, target, metric, found, loaded, others)
        screen.write(report(measured))
        output.rows_of(measured).to_csv(out / "tune.csv", index=False)
        output.plot(out / "tune.png", measured)
        screen.write(f"\nall settings: {out / 'tune.csv'}, plot: {out / 'tune.png'}\n")
        screen.flush()


def describe(args: argparse.Namespace, config: TransformerConfig, layers: Sequence[Layer], batch: int) -> str:
    """Say in two lines what is measured."""
    fit, test = (layers[0].fit.shape[0], layers[0].test.shape[0])
    hashed = num_hash_layers(config)
    left_out = f" (the first {hashed} with experts, by hash, left out)" if hashed else ""
    return (
        f"{args.load}, iteration {args.iteration}: {len(layers)} layers{left_out} of {config.num_moe_experts} experts, "
        f"top-{config.moe_router_topk}, hidden size {config.hidden_size}, router {args.moe_router_type}\n"
        f"{fit} tokens fit the codebooks, {test} held-out ones measure the recall; {batch} tokens share a rebuild\n"
    )
