"""Save the model of a checkpoint with another router: top-k as AIR and back, AIR with lists of another form.

Expert centers are the same parameters in both routers. A codebook that a top-k checkpoint lacks is fitted to tokens of
given data by the rule of training, and the lists are made from it. So the saved model can be used without training.
"""

import argparse
import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TextIO

import numpy
import torch
from megatron.core import mpu
from megatron.training.checkpointing import save_checkpoint
from tqdm import tqdm

from air_moe_megatron.command import console
from air_moe_megatron.command.checkpoints.reader import Checkpoint, Location, holds_checkpoint, locate
from air_moe_megatron.command.checkpoints.reader import read as read_checkpoint
from air_moe_megatron.inference import restore
from air_moe_megatron.inference.data import TokenStream, Windows, read, require_paths
from air_moe_megatron.inference.forwards import run_forwards
from air_moe_megatron.inference.text import Tokenizer, tokenizer_of
from air_moe_megatron.learned.codebook import FIT_BATCHES, FIT_PASSES, FIT_TOKENS
from air_moe_megatron.ops.coarse import assign_with_statistics
from air_moe_megatron.process_groups import process_groups_released, sum_over_ranks
from air_moe_megatron.routers import AIRRouter, find_routers
from air_moe_megatron.routers.losses import layer_of

_CONVERTIBLE = ("topk", "air")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``python -m air_moe_megatron.convert``."""
    group = parser.add_argument_group(title="convert")
    group.add_argument(
        "--fit-tokens", type=int, help=f"Tokens that new codebooks are fitted to. Default: {FIT_TOKENS}."
    )


def saved_router_type(saved: argparse.Namespace) -> str:
    """The router type in a checkpoint's arguments; top-k if Megatron alone has written them."""
    return getattr(saved, "moe_router_type", "topk")


def check_convertible(saved: argparse.Namespace, given: argparse.Namespace) -> None:
    """Refuse what cannot be converted, by the arguments of the checkpoint and of the command line.

    Raises:
        ValueError: naming the flag, its value and the rule.
    """
    if given.save is None:
        raise ValueError("--save must name the folder of the new checkpoint")
    own = saved_router_type(saved)
    wanted = own if given.moe_router_type is None else given.moe_router_type
    name = f"--load '{given.load}'"
    if saved.num_experts is None:
        raise ValueError(f"{name} holds a model without experts: there is no router to convert")
    if own not in _CONVERTIBLE or wanted not in _CONVERTIBLE:
        raise ValueError(
            f"{name} holds routers of type {own}, which cannot become {wanted}: only topk and air have the same "
            "expert centers"
        )
    if saved.ckpt_format != "torch_dist":
        raise ValueError(f"{name} is in the format {saved.ckpt_format}: only torch_dist is converted")
    norm = getattr(saved, "moe_router_input_norm", "none")
    if wanted == "topk" and norm != "none" and not saved.moe_granular_experts:
        raise ValueError(
            f"{name} was trained with --moe-router-input-norm {norm} and Megatron's own experts, so it cannot become "
            "topk: Megatron's own top-k router has no norm of its input"
        )
    if given.async_save:
        raise ValueError("--async-save is not supported: the command ends when the checkpoint is written")


def check_data_flags(args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """Refuse flags of data that are missing, invalid or without effect, before the model is built.

    Raises:
        ValueError: naming the flag, its value and the rule.
    """
    if needs_fit(args, saved):
        require_paths(args)
    elif args.data_path or args.fit_tokens is not None:
        flag, value = ("--data-path", args.data_path) if args.data_path else ("--fit-tokens", args.fit_tokens)
        raise ValueError(
            f"{flag} ({value}) has no effect: a codebook is fitted to data where routers become air with "
            "--moe-air-codebook-source tokens"
        )
    if args.fit_tokens is not None and args.fit_tokens < 1:
        raise ValueError(f"--fit-tokens ({args.fit_tokens}) must be at least 1")


def check_save_folder(folder: str) -> None:
    """Refuse a folder that holds a checkpoint or a part of one.

    Raises:
        ValueError: naming what it holds.
    """
    found = holds_checkpoint(folder)
    if found is not None:
        raise ValueError(f"--save '{folder}' holds {found}, of a checkpoint: name a new or empty folder")


def needs_fit(args: argparse.Namespace, saved: argparse.Namespace) -> bool:
    """Whether the conversion fits codebooks to data."""
    is_new = args.moe_router_type == "air" and saved_router_type(saved) == "topk"
    return is_new and args.moe_air_codebook_source == "tokens"


@torch.no_grad()
def fit_codebooks(
    model: list[torch.nn.Module],
    streams: Sequence[TokenStream],
    eod: int,
    args: argparse.Namespace,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Fit the codebooks of all AIR routers to the tokens that they see, as training does.

    A pass over the tokens makes eight updates. After each update the routers rebuild their lists, so that later layers
    see routed tokens. Nothing else in the model changes. Communicates, per update and router, one all-reduce of
    ``C * (H + 3)`` fp32 numbers over ``tp_dp_cp``; every rank must call it.

    Args:
        model: in evaluation mode, as ``restore.build_and_load`` returns it.
        streams: the data sets, which contribute equally; windows are spread evenly over each.
        eod: id of the end of a document.
        args: as ``restore.complete_arguments`` returns them.
        progress: wraps the loop over updates, such as tqdm.
    Raises:
        ValueError: on every rank of a pipeline stage in which a token is NaN or infinite.
    """
    routers = find_routers(model, AIRRouter)
    hooks = [router.register_forward_pre_hook(_accumulate) for router in routers]
    rank, num_ranks = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    num_windows = -(-(args.fit_tokens or FIT_TOKENS) // args.seq_length)
    windows = list(_spread([Windows(stream.tokens, eod, args) for stream in streams], num_windows))
    size = args.micro_batch_size
    num_microbatches = max(1, len(windows) // (FIT_BATCHES * size * num_ranks))  # per rank and update
    for number in progress(range(FIT_PASSES * FIT_BATCHES)):
        first = (number * num_ranks + rank) * num_microbatches * size
        batches = _batches([windows[(first + i) % len(windows)] for i in range(num_microbatches * size)], size)
        run_forwards(model, batches, args, num_microbatches)
        for router in routers:
            codebook = router.codebook
            statistics = sum_over_ranks(codebook.statistics, router.tp_dp_cp_group)
            if not bool(statistics.isfinite().all()):
                raise ValueError(f"layer {layer_of(router)}: a token that its router sees is NaN or infinite")
            codebook.apply_update(statistics, is_finite=True)
            codebook.discard()
    for hook in hooks:
        hook.remove()


def list_experts(model: list[torch.nn.Module]) -> bool:
    """Make the lists of AIR routers that have none, from their codebooks. Returns whether any rank made some.

    Communicates: one all-reduce of a number over all ranks.
    """
    unlisted = [router for router in find_routers(model, AIRRouter) if not router.index.is_built]
    for router in unlisted:
        router.refresh_lists(training=True)
    device = next(model[0].parameters()).device
    return bool(sum_over_ranks(torch.tensor(len(unlisted), device=device), torch.distributed.group.WORLD))


def _accumulate(router: AIRRouter, inputs: tuple) -> None:
    """Add the tokens of a forward, as the router scores them, to the statistics of the codebook."""
    hidden = router.as_scored(inputs[0].reshape(-1, inputs[0].shape[-1]))
    router.codebook.accumulate(assign_with_statistics(hidden, router.codebook.codewords, 1)[1])


def _spread(windows: Sequence[Windows], number: int) -> Iterator[tuple[Windows, int]]:
    """Up to ``number`` windows as (windows, index), taken from the data sets in turn."""
    share = -(-number // len(windows))
    spread = [numpy.linspace(0, len(one) - 1, min(share, len(one))).astype(int).tolist() for one in windows]
    for index in range(max(map(len, spread))):
        yield from ((one, indices[index]) for one, indices in zip(windows, spread, strict=True) if index < len(indices))


def _batches(windows: Sequence[tuple[Windows, int]], size: int) -> Iterator[dict[str, torch.Tensor]]:
    for first in range(0, len(windows), size):
        yield torch.utils.data.default_collate([one[index] for one, index in windows[first : first + size]])


def save(model: list[torch.nn.Module], args: argparse.Namespace, saved: argparse.Namespace) -> None:
    """Save the model by Megatron's own function, at the iteration of its checkpoint. Communicates.

    Args:
        model: as ``restore.build_and_load`` returns it.
        args: as ``restore.build_and_load`` leaves them.
        saved: the arguments of the checkpoint.
    """
    args.global_batch_size = saved.global_batch_size  # `tune` reads it
    save_checkpoint(args.iteration, model, None, None, args.num_floating_point_operations_so_far)


def run(screen: TextIO) -> None:
    """Parse the command line, load the checkpoint, convert, save, and print what was kept.

    Args:
        screen: where rank 0 prints it.
    Raises:
        SystemExit: if the command line, the checkpoint or the data cannot work; one line says why.
    """
    with contextlib.ExitStack() as stack:
        with console.refusals():
            command = restore.read_command_line(add_flags, saves=True)
            saved, ranks = command.saved, command.ranks
            check_convertible(saved, command.given)
            args = restore.complete_arguments(command)
            check_data_flags(args, saved)
            ranks.check("target", lambda: check_save_folder(args.save))
            args.no_save_optim = args.no_save_rng = True
            tokenizer: Tokenizer = tokenizer_of(args)
            streams: list[TokenStream] = []
            if needs_fit(args, saved):
                ranks.check("data", lambda: streams.extend(read(path, tokenizer, args) for path in args.data_path))
            source = read_checkpoint(locate(args))
            stack.enter_context(process_groups_released())
            model = restore.build_and_load(args, ranks, remakes_lists_of=saved, saves=True)
            if streams:
                bar = partial(tqdm, desc="fit", leave=False) if ranks.rank == 0 else iter
                fit_codebooks(model, streams, tokenizer.eod, args, bar)
        has_new_lists = list_experts(model)
        save(model, args, saved)
        if ranks.rank == 0:
            name = source.location.name
            target = read_checkpoint(Location("--save", args.save, f"iter_{args.iteration:07d}"))
            screen.write(
                f"{args.load}, {name}: {saved_router_type(saved)} -> {args.moe_router_type}, saved as "
                f"{target.location.directory}\n{describe(source, target, has_new_lists)}"
            )
            screen.flush()


_KINDS = (("routers", r".*\.router\.(.*)"), ("experts", r".*\.experts\.(.*)"), ("all other layers", "(.*)"))
"""Kinds of layers and patterns of their tensors' names. The first pattern that matches counts."""


def describe(source: Checkpoint, target: Checkpoint, has_new_lists: bool) -> str:
    """One line for each kind of layer, by comparing both checkpoints, and two for the state of training.

    Example: routers: weight kept; codebook, index made anew
    """
    lines = []
    found = [_by_kind(checkpoint) for checkpoint in (source, target)]
    for kind, _ in _KINDS:
        before, after = (names.get(kind, {}) for names in found)
        kept = [name for name in before if before[name] == after.get(name)]
        if kind == "routers" and has_new_lists:
            kept = [name for name in kept if name != "index"]
        changes = (
            ("kept", kept),
            ("made anew", [name for name in after if name not in kept]),
            ("dropped", [name for name in before if name not in after]),
        )
        said = [f"{_listed(kind, names)} {change}" for change, names in changes if names]
        if said:
            lines.append(f"  {kind}: {'; '.join(said)}\n")
    lines.append(
        "  optimizer, learning-rate schedule and random states: not saved; all start anew if you train on with\n"
    )
    lines.append("  --no-load-optim, which keeps the iteration, or with --finetune, which starts at iteration 0\n")
    return "".join(lines)


def _by_kind(checkpoint: Checkpoint) -> dict[str, dict[str, set[tuple[int, ...]]]]:
    """Kind -> name of a tensor (in routers, of a parameter or part) -> keys with shapes."""
    found: dict[str, dict[str, set]] = {}
    for key, shape in checkpoint.shapes.items():
        kind, name = next((kind, match[1]) for kind, form in _KINDS if (match := re.fullmatch(form, key)))
        if kind == "routers":
            name = name.split(".")[0]
        found.setdefault(kind, {}).setdefault(name, set()).add((key, *shape))
    return found


def _listed(kind: str, names: Sequence[str]) -> str:
    return ", ".join(sorted(names)) if kind == "routers" else f"{len(names)} tensors"
