"""Check data sets within seconds. Megatron finds the same mistakes after minutes, or not at all."""

import argparse
import json
import os
import re
from dataclasses import dataclass

import numpy
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.training.utils import get_blend_and_blend_per_split

from air_moe_megatron.command.arguments import padded_vocab_size, value_of
from air_moe_megatron.command.checkpoints.saving import check_writable
from air_moe_megatron.command.indexed_dataset import (
    SCANNED_BLOCKS,
    IndexedTokens,
    check_file,
    check_token_ids,
    read_indexed_dataset,
)
from air_moe_megatron.config import Problems, problem_of

_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class _Blend:
    """Data sets that are mixed, and the splits that Megatron takes from each of them."""

    name: str  # the flag that lists them
    prefixes: list[str]
    is_weighted: bool
    shares: dict[str, tuple[float, float]]  # split -> where it begins and ends, as fractions of the sequences


def unfit_data(args: argparse.Namespace) -> Problems[None]:
    """Yield an error for each data set that cannot be read or trained on, with the flag, the path and the broken rule.

    Reads the lengths in each index and at most 64 MiB of tokens; if there are more than 64 data sets, 1 MiB of each. A
    data set is read up to its first damage. Paths in object storage are left to Megatron. Does not communicate.
    """
    if args.data_cache_path is not None:
        yield from problem_of(_check_cache, args, args.data_cache_path, f"--data-cache-path '{args.data_cache_path}'")
    single = [flag for flag in ("--data-path", "--data-args-path") if value_of(args, flag)]
    per_split_flags = [f"--{split}-data-path" for split in _SPLITS] + ["--per-split-data-args-path"]
    per_split = [flag for flag in per_split_flags if value_of(args, flag)]
    if args.mock_data:
        if single + per_split:
            yield ValueError(f"--mock-data excludes {', '.join(single + per_split)}: give one source of data")
        yield from _missing_splits(args, set(_SPLITS))
        return
    if single and per_split:
        yield ValueError(f"{', '.join(single)} excludes {', '.join(per_split)}: give one source of data")
        return
    if not single + per_split:
        yield ValueError(
            "no data set is given: add --data-path PREFIX (with --split), or --train-data-path PREFIX "
            "(with --valid-data-path and --test-data-path), or --mock-data for random tokens"
        )
        return
    try:
        blends = _blends(args, single + per_split)
    except (ValueError, OSError) as error:
        yield error
        return
    if not args.sft:
        yield from _missing_splits(args, {split for blend in blends for split in blend.shares})
    num_datasets = sum(len(blend.prefixes) for blend in blends)
    for blend in blends:
        if not args.sft:
            yield from problem_of(_check_drawn, args, blend)
        for prefix in blend.prefixes:
            if not is_object_storage_path(prefix):
                yield from _unfit_dataset(args, blend, prefix, max(1, SCANNED_BLOCKS // num_datasets))


def _unfit_dataset(args: argparse.Namespace, blend: _Blend, prefix: str, num_blocks: int) -> Problems[None]:
    """Yield the problems of one data set of a blend: damage, splits without tokens, ids beyond the vocabulary."""
    name = f"{blend.name} entry '{prefix}'"
    if args.sft:
        yield from problem_of(check_file, prefix, name, "with --sft it is a JSON Lines file")
        return
    try:
        dataset = read_indexed_dataset(prefix, name)
    except (ValueError, OSError) as error:
        yield error
        return
    if args.data_cache_path is None:
        folder = os.path.join(prefix, "cache")
        yield from problem_of(_check_cache, args, folder, f"{name}: its folder '{folder}'")
    yield from problem_of(_check_splits, args, blend, dataset, name)
    yield from problem_of(check_token_ids, dataset, name, padded_vocab_size(args), num_blocks)


def _check_cache(args: argparse.Namespace, folder: str, name: str) -> None:
    """Refuse a folder in which Megatron could not write its index of samples; rank 0 does.

    A folder that exists may hold all that the run needs. It is left to Megatron.
    """
    if args.rank != 0 or is_object_storage_path(folder) or os.path.isdir(folder):
        return
    try:
        check_writable(name, folder)
    except ValueError as error:
        raise ValueError(
            f"{error}; Megatron keeps an index of samples there: give --data-cache-path a folder"
        ) from error


def _blends(args: argparse.Namespace, flags: list[str]) -> list[_Blend]:
    """The data sets that ``flags`` list, directly or in the files that they name."""
    for flag in ("--data-args-path", "--per-split-data-args-path"):
        path = value_of(args, flag)
        if path is not None and not is_object_storage_path(path):
            check_file(path, f"{flag} '{path}'", "it is a file that lists data sets")
    if args.per_split_data_args_path is not None and not is_object_storage_path(args.per_split_data_args_path):
        _check_per_split_file(args.per_split_data_args_path)

    try:
        blend, blend_per_split = get_blend_and_blend_per_split(args)
    except AssertionError as error:  # by Megatron's parser, if only some prefixes have weights
        raise ValueError(f"{', '.join(flags)}: give every prefix a weight before it, or none of them") from error
    if blend_per_split is None:
        flag = "--data-path" if args.data_args_path is None else f"--data-args-path '{args.data_args_path}'"
        return [_Blend(flag, blend[0], blend[1] is not None, split_shares(args.split))]
    if args.per_split_data_args_path is not None:
        names = [f"--per-split-data-args-path '{args.per_split_data_args_path}' ({split})" for split in _SPLITS]
    else:
        names = [f"--{split}-data-path" for split in _SPLITS]
    return [
        _Blend(name, blend[0], blend[1] is not None, {split: (0.0, 1.0)})
        for name, split, blend in zip(names, _SPLITS, blend_per_split, strict=True)
        if blend is not None
    ]


def split_shares(split: str | None) -> dict[str, tuple[float, float]]:
    """Where each split that has a share begins and ends in Megatron, as fractions of the sequences.

    Raises:
        ValueError: if ``--split`` is not one to three numbers, or all of them are 0.
    """
    numbers = [float(number) for number in re.findall(r"[.0-9]+", split or "")]
    if not 1 <= len(numbers) <= len(_SPLITS) or sum(numbers) == 0:
        raise ValueError(f"--split ({split}) must be up to three numbers, of train, valid and test, and not all 0")
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    return {name: share for name, share in zip(_SPLITS, matrix, strict=True) if share is not None}


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


def _missing_splits(args: argparse.Namespace, given: set[str]) -> Problems[None]:
    """Yield missing splits. Megatron would end silently without training data, by TypeError without validation data."""
    how = f"--split {args.split}" if args.split is not None else "no flag"
    trains = not args.skip_train and (args.train_iters or args.train_samples)
    if trains and "train" not in given:
        yield ValueError(f"{how} gives data to train: give the split a share, or add --train-data-path or --skip-train")
    if (args.full_validation or args.eval_iters) and "valid" not in given:
        yield ValueError(
            f"{how} gives data to valid, and --eval-iters ({args.eval_iters}) needs it: give the split a share, or add "
            "--valid-data-path or --eval-iters 0"
        )
    if args.full_validation and "test" in given:
        yield ValueError(
            "--full-validation excludes test data, which Megatron-Core 0.19 then reads as several sets: leave out "
            "--test-data-path, or give --split 99,1,0 (--mock-data always has a test split)"
        )


def _drawn_splits(args: argparse.Namespace) -> set[str]:
    """The splits from which Megatron draws samples."""
    trained = {"train"} if args.train_iters or args.train_samples else set()
    validated = {"valid"} if args.full_validation or args.eval_iters else set()
    return trained | validated | ({"test"} if args.eval_iters else set())


def _check_drawn(args: argparse.Namespace, blend: _Blend) -> None:
    """Refuse splits of a blend from which no sample is drawn. Megatron makes such splits of single data sets only."""
    unread = [split for split in blend.shares if split not in _drawn_splits(args)]
    if unread and (len(blend.prefixes) > 1 or blend.is_weighted):
        raise ValueError(
            f"{blend.name}: no sample is drawn from {', '.join(unread)}, and Megatron makes no such split of a blend: "
            "leave it out (as in --split 1,0,0 with --eval-iters 0)"
        )


def _check_splits(args: argparse.Namespace, blend: _Blend, dataset: IndexedTokens, name: str) -> None:
    """Refuse splits of a data set from which Megatron can draw no sample.

    Megatron splits by sequences, which are documents in most data sets. It repeats a split that holds too few samples;
    a split without tokens would be repeated forever.
    """
    num_sequences = len(dataset.lengths)
    drawn = _drawn_splits(args)
    remedy = "give it more data, or leave it out (as in --split 1,0,0 with --eval-iters 0)"
    for split, (start, end) in blend.shares.items():
        lengths = dataset.lengths[round(start * num_sequences) : round(end * num_sequences)]
        num_tokens = int(lengths.sum(dtype=numpy.int64))
        is_mixed_by_size = len(blend.prefixes) > 1 and not blend.is_weighted
        is_repeated = split in drawn and not is_mixed_by_size and not (split == "valid" and args.full_validation)
        needed = 1 if is_repeated else args.seq_length + 1
        if num_tokens < needed:
            given = f"--split {args.split} gives" if args.split is not None else "the data set gives"
            raise ValueError(
                f"{name}: {given} {len(lengths)} of {num_sequences} sequences (documents) with {num_tokens} tokens to "
                f"{split}, which needs at least {needed}: {remedy}"
            )
