"""Check the folders that a run will write to, and that the run can resume from what it saves."""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from megatron.core.transformer import TransformerConfig

from air_moe_megatron.command.arguments import has_experts_by_layer
from air_moe_megatron.command.checkpoints.checks import loads_optimizer
from air_moe_megatron.command.checkpoints.reader import Checkpoint, holds_checkpoint
from air_moe_megatron.command.memory import parameters_of_expert
from air_moe_megatron.config import num_hash_layers

_GIB = 2**30


def will_save(args: argparse.Namespace) -> bool:
    """Whether the run saves checkpoints on a file system."""
    return args.save is not None and not args.skip_train and not is_object_storage_path(args.save)


def checkpoint_write_problem(args: argparse.Namespace) -> str | None:
    """Say what keeps this rank from writing into the folder of ``--save`` or, on the last rank, ``--tensorboard-dir``.

    None if nothing does. Leaves nothing behind.
    """
    folders = {"--save": args.save} if will_save(args) else {}
    board = args.tensorboard_dir
    if board and args.rank == args.world_size - 1 and not is_object_storage_path(board):
        folders["--tensorboard-dir"] = board
    try:
        for flag, folder in folders.items():
            check_writable(f"{flag} '{folder}'", folder)
    except ValueError as error:
        return str(error)
    return None


def check_writable(name: str, folder: str) -> None:
    """Refuse a folder in which no file can be made. A missing one counts as its nearest parent. Leaves nothing behind.

    Args:
        name: flag and value in the error.
        folder: its path.
    Raises:
        ValueError: with the name, the folder that exists and the reason.
    """
    existing = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise ValueError(f"{name} cannot be written: {error.strerror} in '{existing}'") from error


def check_room(args: argparse.Namespace, config: TransformerConfig) -> None:
    """Refuse a folder whose file system has no room for one checkpoint.

    Raises:
        ValueError: naming the space that is needed at least, and the free space.
    """
    if not will_save(args):
        return
    needed, free = estimate_bytes(args, config), shutil.disk_usage(_existing(args.save)).free
    if needed > free:
        raise ValueError(
            f"--save '{args.save}' has {free / _GIB:.1f} GiB free, and one checkpoint takes at least "
            f"{needed / _GIB:.1f} GiB: free some, save elsewhere, or add --no-save-optim"
        )


def note_on_overwriting(args: argparse.Namespace) -> str | None:
    """Say that the folder of ``--save`` holds a run that is not loaded, and what happens to it; None otherwise."""
    if not will_save(args) or (args.load is not None and os.path.realpath(args.load) == os.path.realpath(args.save)):
        return None
    found = holds_checkpoint(args.save)
    if found is None:
        return None
    return (
        f"--save '{args.save}' holds '{found}' of a run that is not loaded. Equal iterations will be overwritten, and "
        f"the folder's newest checkpoint will be of this run; to go on with the other run add --load {args.save}"
    )


def check_optimizer_resumes(args: argparse.Namespace, checkpoint: Checkpoint | None) -> None:
    """Refuse the distributed optimizer if Megatron could not load its state.

    Raises:
        ValueError: if the run would save or load that state without Transformer Engine or Apex installed.
    """
    if HAVE_APEX_OR_TE or not args.use_distributed_optimizer:
        return
    reason = (
        "--use-distributed-optimizer is not supported here: without Transformer Engine or Apex Megatron-Core 0.19 "
        "saves its state but cannot load it; leave it out"
    )
    if checkpoint is not None and loads_optimizer(args, checkpoint):
        raise ValueError(f"{reason}, or add --no-load-optim")
    if will_save(args) and not args.no_save_optim:
        raise ValueError(f"{reason}, or add --no-save-optim")


def estimate_bytes(args: argparse.Namespace, config: TransformerConfig) -> int:
    """Lower bound on the bytes of one checkpoint: embeddings, experts, centers and their optimizer state.

    Example: E = 16, H = 32, F = 8, SwiGLU, two layers, vocabulary 64 untied, fp32 with Adam: 29,696 values of 12 bytes.
    """
    hidden_size = config.hidden_size
    num_values = (args.padded_vocab_size or 0) * hidden_size * (2 if args.untie_embeddings_and_output_weights else 1)
    if config.num_moe_experts is not None:
        per_expert = parameters_of_expert(
            config.moe_latent_size or hidden_size, config.moe_ffn_hidden_size, config.gated_linear_unit
        )
        num_layers = sum(has_experts_by_layer(args))
        num_values += num_layers * config.num_moe_experts * per_expert
        if getattr(config, "moe_router_type", "topk") in ("topk", "air"):
            num_values += (num_layers - num_hash_layers(config)) * config.num_moe_experts * hidden_size
    is_low = args.bf16 or args.fp16
    per_value = 2 if is_low else 4
    if not args.no_save_optim and not args.use_precision_aware_optimizer:
        per_value += (4 if is_low else 0) + (8 if args.optimizer == "adam" else 0)
    return num_values * per_value


def _existing(folder: str) -> Path:
    """The folder, or the nearest of its parents that exists."""
    path = Path(folder).resolve()
    while not os.path.lexists(path):
        path = path.parent
    return path
