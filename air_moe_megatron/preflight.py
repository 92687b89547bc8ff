"""Checks that cost seconds and save the minutes until Megatron would find the same mistake, or would not find it."""

import argparse
import enum
import json
import os
import struct
from collections.abc import Iterator
from datetime import timedelta

import torch
from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType, get_bin_path, get_idx_path
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.dist_checkpointing import check_is_distributed_checkpoint, load_tensors_metadata
from megatron.core.transformer import TransformerConfig
from megatron.training.checkpointing import (
    checkpoint_exists,
    get_checkpoint_name,
    get_checkpoint_tracker_filename,
    read_metadata,
)
from megatron.training.utils import get_blend_and_blend_per_split, print_rank_0

from air_moe_megatron.config import resolve_sizes

_HEADER = struct.Struct("<QBQQ")
"""After the magic bytes: version, code of the token type, number of sequences, number of document boundaries."""

_LENGTH = struct.Struct("<i")
"""Tokens of a sequence; the index lists one per sequence after its header."""

_POINTER = struct.Struct("<q")
"""First byte of a sequence in the .bin file; one per sequence after the lengths. Document boundaries are as long."""

_SPLITS = ("train", "valid", "test")

_PER_RANK = ("rank", "local_rank", "load", "save", "pretrained_checkpoint", "ict_load", "bert_load", "tokenizer_model")
"""Arguments that may differ between ranks: their number, and paths whose names do not say so."""
_ONLY_IN = {"product_key": "keys1", "hierarchical": "group_weight", "hash": "table", "vq": "codes"}
"""What only the router of a type holds in a checkpoint."""
_PAIR_RULE = "a Megatron indexed data set is a pair x.bin, x.idx, named without its ending"


def check_data(args: argparse.Namespace) -> None:
    """Refuse a command line whose data sets cannot be read.

    Reads a few bytes of each index; paths in object storage are left to Megatron. Does not communicate.

    Args:
        args: Megatron's parsed and validated arguments.
    Raises:
        ValueError: naming the flag, the path and the rule that it breaks.
    """
    single = [flag for flag in ("--data-path", "--data-args-path") if _value(args, flag)]
    per_split_flags = [f"--{split}-data-path" for split in _SPLITS] + ["--per-split-data-args-path"]
    per_split = [flag for flag in per_split_flags if _value(args, flag)]
    if args.mock_data:
        if single + per_split:
            raise ValueError(f"--mock-data excludes {', '.join(single + per_split)}: give one source of data")
        return
    if single and per_split:
        raise ValueError(f"{', '.join(single)} excludes {', '.join(per_split)}: give one source of data")
    if not single + per_split:
        raise ValueError(
            "no data set is given: add --data-path PREFIX (with --split), or --train-data-path PREFIX "
            "(with --valid-data-path and --test-data-path), or --mock-data for random tokens"
        )
    for name, prefix in _entries(args, single + per_split):
        if not is_object_storage_path(prefix):
            if args.sft:
                _check_file(prefix, f"{name} entry '{prefix}'", "with --sft it is a JSON Lines file")
            else:
                _check_indexed_dataset(prefix, f"{name} entry '{prefix}'")


def _value(args: argparse.Namespace, flag: str) -> list[str] | str | None:
    return getattr(args, flag.removeprefix("--").replace("-", "_"))


def _entries(args: argparse.Namespace, flags: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (flag, prefix) for every data set that `flags`, or the files that they name, list."""
    for flag in ("--data-args-path", "--per-split-data-args-path"):
        path = _value(args, flag)
        if path is not None and not is_object_storage_path(path):
            _check_file(path, f"{flag} '{path}'", "it is a file that lists data sets")
    if args.per_split_data_args_path is not None and not is_object_storage_path(args.per_split_data_args_path):
        _check_per_split_file(args.per_split_data_args_path)

    try:
        blend, blend_per_split = get_blend_and_blend_per_split(args)
    except AssertionError as error:  # what Megatron's parser says of a list that has weights for some prefixes only
        raise ValueError(f"{', '.join(flags)}: give every prefix a weight before it, or none of them") from error
    if blend_per_split is None:
        flag = "--data-path" if args.data_args_path is None else f"--data-args-path '{args.data_args_path}'"
        named_blends = [(flag, blend)]
    elif args.per_split_data_args_path is not None:
        path = args.per_split_data_args_path
        named_blends = [
            (f"--per-split-data-args-path '{path}' ({split})", blend)
            for split, blend in zip(_SPLITS, blend_per_split, strict=True)
        ]
    else:
        named_blends = [(f"--{split}-data-path", blend) for split, blend in zip(_SPLITS, blend_per_split, strict=True)]
    for name, blend in named_blends:
        if blend is not None:
            yield from ((name, prefix) for prefix in blend[0])


def _check_per_split_file(path: str) -> None:
    with open(path) as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"--per-split-data-args-path '{path}': not a JSON file ({error})") from error
    missing = [split for split in _SPLITS if not isinstance(content, dict) or split not in content]
    if missing:
        raise ValueError(
            f"--per-split-data-args-path '{path}': keys {', '.join(missing)} are missing; "
            "it is a JSON object with the keys train, valid, test"
        )


def _check_file(path: str, name: str, rule: str) -> int:
    """Return the size in bytes of a regular file that is not empty."""
    if not os.path.isfile(path):
        raise ValueError(f"{name}: '{path}' does not exist; {rule}")
    size = os.path.getsize(path)
    if size == 0:
        raise ValueError(f"{name}: '{path}' is empty; {rule}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{name}: '{path}' is not readable; {rule}")
    return size


def _check_indexed_dataset(prefix: str, name: str) -> None:
    idx_path, bin_path = get_idx_path(prefix), get_bin_path(prefix)
    idx_size = _check_file(idx_path, name, _PAIR_RULE)
    bin_size = _check_file(bin_path, name, _PAIR_RULE)

    with open(idx_path, "rb") as file:
        header = file.read(len(_INDEX_HEADER) + _HEADER.size)
        if not header.startswith(_INDEX_HEADER):
            raise ValueError(f"{name}: '{idx_path}' does not begin with {_INDEX_HEADER!r}; {_PAIR_RULE}")
        if len(header) < len(_INDEX_HEADER) + _HEADER.size:
            raise ValueError(f"{name}: '{idx_path}' ends within its header, at byte {idx_size}")
        version, dtype_code, num_sequences, num_boundaries = _HEADER.unpack_from(header, len(_INDEX_HEADER))
        if version != 1:
            raise ValueError(f"{name}: '{idx_path}' has version {version}; Megatron reads version 1")
        if dtype_code not in {dtype.value for dtype in DType}:
            raise ValueError(f"{name}: '{idx_path}' has the unknown token type {dtype_code}")
        if num_sequences == 0:
            raise ValueError(f"{name}: '{idx_path}' lists no sequences; a data set needs at least one")

        pointers_at = len(header) + num_sequences * _LENGTH.size
        boundaries_at = pointers_at + num_sequences * _POINTER.size
        idx_size_needed = boundaries_at + num_boundaries * _POINTER.size
        if idx_size < idx_size_needed:
            raise ValueError(
                f"{name}: '{idx_path}' has {idx_size} bytes where {num_sequences} sequences need {idx_size_needed}"
            )
        file.seek(pointers_at - _LENGTH.size)
        (last_length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        file.seek(boundaries_at - _POINTER.size)
        (last_pointer,) = _POINTER.unpack(file.read(_POINTER.size))

    # Sequences lie one after the other, so the last one ends where the data end.
    bin_size_needed = last_pointer + last_length * DType.size(dtype_code)
    if bin_size < bin_size_needed:
        raise ValueError(
            f"{name}: '{bin_path}' has {bin_size} bytes where its index '{idx_path}' needs {bin_size_needed}"
        )


def check_agreement(args: argparse.Namespace) -> None:
    """Refuse a start in which ranks were given different flags: it would hang, or train different models.

    Called before Megatron makes any process group, whose sizes come from flags too; the ranks meet in the store of
    their rendezvous. Every argument is compared, given or default, except paths and names of files, which may differ
    from node to node. Each rank reads what rank 0 was given, some kilobytes, and waits for the last rank.

    Args:
        args: Megatron's parsed and validated arguments.
    Raises:
        ValueError: on every rank, naming the arguments that differ, with their values and ranks.
    """
    if args.world_size == 1 or args.fake_process_group:
        return
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    store = torch.distributed.PrefixStore("air_moe_megatron", store)
    own = {name: repr(value) for name, value in vars(args).items() if _must_agree(name, value)}
    if rank == 0:
        store.set("differing ranks", "")
        store.set("arguments", json.dumps(own))
    first = json.loads(store.get("arguments"))
    differences = {
        name: (first.get(name, "unset"), own.get(name, "unset"))
        for name in sorted(first.keys() | own.keys())
        if first.get(name) != own.get(name)
    }
    if differences:
        store.set(f"differences {rank}", json.dumps(differences))
        store.append("differing ranks", f"{rank} ")
    _arrive(store, "compared", world_size)
    store.wait(["compared by all"])
    by_value = {}
    for other in sorted(map(int, store.get("differing ranks").split())):
        for name, (value_first, value) in json.loads(store.get(f"differences {other}")).items():
            by_value.setdefault((name, value_first), {}).setdefault(value, []).append(other)
    _arrive(store, "read", world_size)
    if rank == 0:  # it may hold the store, and so leaves last
        store.wait(["read by all"])
    if by_value:
        raise ValueError(
            "all ranks must be started with the same flags: "
            + "; ".join(
                f"{name} is {value_first} on rank 0, "
                + ", ".join(f"{value} on rank {_abbreviate(ranks)}" for value, ranks in others.items())
                for (name, value_first), others in by_value.items()
            )
        )


def _must_agree(name, value):
    where = ("_path", "_paths", "_dir", "_file", "_filename")
    if name in _PER_RANK or name.endswith(where):
        return False
    # What else there is holds addresses, which differ in every process.
    plain = (bool, int, float, str, list, tuple, enum.Enum, torch.dtype, type(None))
    return isinstance(value, plain)


def _arrive(store, what, world_size):
    """Note that this rank has come so far; the last one sets the key "<what> by all"."""
    if store.add(f"{what} by", 1) == world_size:
        store.set(f"{what} by all", "")


def _abbreviate(ranks, limit=8):
    shown = ", ".join(map(str, ranks[:limit]))
    return shown if len(ranks) <= limit else f"{shown} and {len(ranks) - limit} more"


class Codebooks(enum.Enum):
    """What the checkpoint that a run will load holds of its codebooks."""

    ABSENT = "absent"  # an AIR run starts from a top-k checkpoint
    AS_NEEDED = "as needed"  # also where no checkpoint is loaded


def check_checkpoint(args: argparse.Namespace, config: TransformerConfig) -> Codebooks:
    """Compare the checkpoint that the run will load with its router, and say what will become of the codebooks.

    Reads the metadata of a ``torch_dist`` checkpoint; does not communicate. Between top-k and AIR only the codebooks
    differ, so either loads into the other: one that is missing is learned anew, one not wanted is left. The rivals have
    parameters of their own.

    Args:
        args: Megatron's parsed and validated arguments.
        config: the transformer config of the run.
    Raises:
        ValueError: if the checkpoint holds codebooks or shortlists of other sizes, or the other form of experts,
            or routers of another type.
    """
    found = _codebooks_in_checkpoint(args)
    if found is None:
        return Codebooks.AS_NEEDED
    directory, keys, shapes = found
    _check_experts(directory, keys, getattr(config, "moe_granular_experts", False))
    router_type = getattr(config, "moe_router_type", "topk")
    _check_router(directory, keys, router_type)
    _check_input_norm(directory, keys, getattr(config, "moe_router_input_norm", "none"))
    if router_type != "air":
        if shapes:
            print_rank_0(f"> {directory} was trained with AIR routing: its codebooks are left, its experts are loaded")
        return Codebooks.AS_NEEDED
    if not shapes:
        print_rank_0(
            f"> {directory} was trained with top-k routing: expert centres are kept, codebooks are seeded from the "
            "first batch"
        )
        return Codebooks.ABSENT
    sizes = resolve_sizes(config)
    expected = {
        "codebook.codewords": {
            "--moe-air-num-clusters": sizes.num_clusters,
            "--hidden-size": config.hidden_size,
        },
        "index.shortlist": {
            "--moe-air-num-clusters": sizes.num_clusters,
            "--moe-air-shortlist-size": sizes.shortlist_size,
        },
    }
    for key, shape in shapes.items():
        for flag, own, in_checkpoint in (
            (flag, own, size)
            for name, flags in expected.items()
            if key.endswith(name)
            for (flag, own), size in zip(flags.items(), shape[-2:], strict=True)
        ):
            if own != in_checkpoint:
                raise ValueError(
                    f"--load '{directory}': {key} is {list(shape[-2:])}, so {flag} ({own}) must be {in_checkpoint}"
                )
    return Codebooks.AS_NEEDED


def _check_router(directory, keys, router_type):
    """Routers of different types have different parameters; only top-k and AIR load into each other."""
    routers = {key.rpartition(".router.")[2] for key in keys if ".router." in key and not key.startswith("optimizer.")}
    if not routers:
        return
    found = next((name for name, parameter in _ONLY_IN.items() if parameter in routers), None)
    if found != (router_type if router_type in _ONLY_IN else None):
        raise ValueError(
            f"--load '{directory}' holds routers of type {found or 'topk or air'}: "
            f"--moe-router-type {router_type} cannot load them"
        )


def _check_input_norm(directory, keys, norm):
    """Centres that were trained on normalised tokens are of no use for others, nor the other way round."""
    has_routers = any(".router." in key for key in keys)
    found = "running" if any(key.endswith("router.input_norm.mean") for key in keys) else "none"
    if has_routers and found != norm:
        raise ValueError(
            f"--load '{directory}' was trained with --moe-router-input-norm {found}, so --moe-router-input-norm "
            f"({norm}) must be {found}"
        )


def _check_experts(directory, keys, granular):
    """The two forms of experts have different parameters, and neither is made of the other."""
    has_granular = any(key.endswith("mlp.experts.weight1") for key in keys)
    has_modules = any(".mlp.experts." in key for key in keys) and not has_granular
    if granular and has_modules:
        raise ValueError(
            f"--load '{directory}' holds Megatron's own experts, one module each: train without --moe-granular-experts"
        )
    if has_granular and not granular:
        raise ValueError(f"--load '{directory}' holds granular experts: add --moe-granular-experts")


def _codebooks_in_checkpoint(args) -> tuple[str, list[str], dict[str, tuple[int, ...]]] | None:
    """Directory, keys, and shapes of codebooks and shortlists by key; None where no such checkpoint will be loaded."""
    load_dir = next((path for path in (args.load, args.pretrained_checkpoint) if checkpoint_exists(path)), None)
    if load_dir is None:
        return None
    iteration, release = read_metadata(get_checkpoint_tracker_filename(load_dir))
    directory = get_checkpoint_name(load_dir, args.ckpt_step or iteration, release, return_base_dir=True)
    if not check_is_distributed_checkpoint(directory):
        return None  # legacy formats name their tensors only when read; the codebook checks its own shapes then
    metadata = load_tensors_metadata(directory)
    endings = ("router.codebook.codewords", "router.index.shortlist")
    shapes = {key: value.global_shape for key, value in metadata.items() if key.endswith(endings)}
    return directory, list(metadata), shapes
