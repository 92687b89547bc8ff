"""Checks that cost seconds and save the minutes until Megatron would find the same mistake, or would not find it."""

import argparse
import json
import os
import struct
from collections.abc import Iterator

from megatron.core.datasets.indexed_dataset import _INDEX_HEADER, DType, get_bin_path, get_idx_path
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.training.utils import get_blend_and_blend_per_split

_HEADER = struct.Struct("<QBQQ")
"""After the magic bytes: version, code of the token type, number of sequences, number of document boundaries."""

_LENGTH = struct.Struct("<i")
"""Tokens of a sequence; the index lists one per sequence after its header."""

_POINTER = struct.Struct("<q")
"""First byte of a sequence in the .bin file; one per sequence after the lengths. Document boundaries are as long."""

_SPLITS = ("train", "valid", "test")
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
    for name, prefix in _entries(args):
        if not is_object_storage_path(prefix):
            if args.sft:
                _check_file(prefix, f"{name} entry '{prefix}'", "with --sft it is a JSON Lines file")
            else:
                _check_indexed_dataset(prefix, f"{name} entry '{prefix}'")


def _value(args: argparse.Namespace, flag: str) -> list[str] | str | None:
    return getattr(args, flag.removeprefix("--").replace("-", "_"))


def _entries(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield (flag, prefix) for every data set of the command line and of the files that it names."""
    for flag in ("--data-args-path", "--per-split-data-args-path"):
        path = _value(args, flag)
        if path is not None and not is_object_storage_path(path):
            _check_file(path, f"{flag} '{path}'", "it is a file that lists data sets")
    if args.per_split_data_args_path is not None and not is_object_storage_path(args.per_split_data_args_path):
        _check_per_split_file(args.per_split_data_args_path)

    blend, blend_per_split = get_blend_and_blend_per_split(args)
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
    for name, (prefixes, weights) in ((name, blend) for name, blend in named_blends if blend is not None):
        if weights is not None and None in weights:
            raise ValueError(f"{name}: weights must be numbers, each followed by its prefix; got weights {weights}")
        yield from ((name, prefix) for prefix in prefixes)


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
