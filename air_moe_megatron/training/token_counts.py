"""Count token ids. ``--moe-hash-balance frequency`` balances the tables of hash routers by these counts."""

import argparse

import numpy
import torch
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.training.utils import get_blend_and_blend_per_split

from air_moe_megatron.command.agreement import Ranks
from air_moe_megatron.command.checkpoints.reader import locate
from air_moe_megatron.command.indexed_dataset import read_indexed_dataset
from air_moe_megatron.config import uses_hash
from air_moe_megatron.training.preflight import split_shares

COUNTED_TOKENS = 2**24
"""How many tokens are counted: the first ones of each training data set."""


def agreed_counts(args: argparse.Namespace, ranks: Ranks) -> list[float] | None:
    """Count the token ids on rank 0, and return the counts on all ranks; None if no table needs them.

    Raises:
        ValueError: on every rank, if :func:`count_token_ids` raises.
    """
    return ranks.agree("token counts", None, lambda _: counts_of(args))


def counts_of(args: argparse.Namespace) -> list[float] | None:
    """Return the counts that a start needs; None if no table needs them or a checkpoint brings its tables.

    Raises:
        ValueError: if :func:`count_token_ids` raises.
    """
    if not uses_hash(args) or args.moe_hash_balance != "frequency":
        return None
    if locate(args) is not None and not args.moe_use_upcycling:
        return None  # the checkpoint brings its tables
    return count_token_ids(args).tolist()


def count_token_ids(args: argparse.Namespace) -> torch.Tensor:
    """Count the token ids of the training data, or read the counts from ``--moe-hash-counts``.

    Several data sets count in the proportions in which Megatron blends them: by weight, or by size. Reads at most 2^24
    tokens of each. Does not communicate.

    Args:
        args: Megatron's validated arguments; ``moe_hash_vocab_size`` is set.
    Returns:
        [ids] fp64, number of tokens of each id, for at most ``moe_hash_vocab_size`` ids.
    Raises:
        ValueError: naming the flag, if the file is not a list of counts or the training data cannot be counted.
    """
    if args.moe_hash_counts is not None:
        return _read_counts(args.moe_hash_counts, args.moe_hash_vocab_size)
    prefixes, weights, (start, end) = _training_sets(args)
    counts, sizes = zip(*(_count(prefix, start, end, args.moe_hash_vocab_size) for prefix in prefixes), strict=True)
    if len(counts) == 1:
        return counts[0]
    weights = weights or sizes
    num_counted = sum(min(size, COUNTED_TOKENS) for size in sizes)
    shares = [one / one.sum().clamp_min(1.0) * (part / sum(weights)) for one, part in zip(counts, weights, strict=True)]
    return torch.stack(shares).sum(dim=0) * num_counted


def _count(prefix: str, start: float, end: float, num_ids: int) -> tuple[torch.Tensor, int]:
    """Counts [num_ids] fp64 of the first tokens of a data set's training split, and the split's number of tokens."""
    dataset = read_indexed_dataset(prefix, f"training data '{prefix}'")
    bounds = [round(share * len(dataset.lengths)) for share in (start, end)]
    first, last = (int(dataset.lengths[:bound].sum(dtype=numpy.int64)) for bound in bounds)
    tokens = torch.from_numpy(dataset.tokens[first : min(last, first + COUNTED_TOKENS)].astype(numpy.int64))
    counts = torch.bincount(tokens[tokens >= 0], minlength=num_ids)
    if counts.numel() > num_ids:
        raise ValueError(
            f"training data '{prefix}' holds the token id {counts.numel() - 1}, and --moe-hash-vocab-size "
            f"({num_ids}) has the ids up to {num_ids - 1}"
        )
    return counts.double(), last - first


def _training_sets(args: argparse.Namespace) -> tuple[list[str], list[float] | None, tuple[float, float]]:
    """Prefixes of the training data, their weights, and where the training split begins and ends, as fractions."""
    remedy = "give --moe-hash-counts FILE"
    for flag, given in (("--mock-data", args.mock_data), ("--sft", args.sft)):
        if given:
            raise ValueError(f"--moe-hash-balance (frequency) cannot count the tokens of {flag}: {remedy}")
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    share = (0.0, 1.0)
    if blend_per_split is not None:
        blend = blend_per_split[0]
    elif blend is not None:
        share = split_shares(args.split).get("train", (0.0, 0.0))
    if blend is None or share[0] == share[1]:
        raise ValueError(f"--moe-hash-balance (frequency) finds no training data to count: {remedy}")
    prefixes, weights = blend
    for prefix in prefixes:
        if is_object_storage_path(prefix):
            raise ValueError(f"--moe-hash-balance (frequency) cannot count '{prefix}', in object storage: {remedy}")
    return prefixes, weights, share


def _read_counts(path: str, num_ids: int) -> torch.Tensor:
    name = f"--moe-hash-counts '{path}'"
    try:
        with open(path) as file:
            counts = torch.tensor([float(line) for line in file], dtype=torch.float64)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{name} must hold one number per line, the tokens of ids 0, 1, ...: {error}") from error
    if not 0 < counts.numel() <= num_ids:
        raise ValueError(f"{name} has {counts.numel()} counts; it must have 1 to {num_ids}, one for each token id")
    if not bool(((counts >= 0) & counts.isfinite()).all()):
        raise ValueError(f"{name} holds a number that is negative or not finite; it must hold the tokens of each id")
    return counts
