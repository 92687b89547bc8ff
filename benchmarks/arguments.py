"""What the command lines share: names of benchmarks, types of numbers, and refusals in one line."""

import argparse
import contextlib
from collections.abc import Iterator

BENCHMARKS = {
    "router": "AIRRouter against TopKRouter and product keys, forward and backward",
    "growth": "AIRRouter at growing numbers of experts",
    "recall": "the top-k recall of AIR",
    "scaling": "time of a routing step against the number of experts, with a plot",
    "layer": "the whole layer against PEER and against Megatron's: time and peak memory",
    "dispatch": "dispatch and combine over expert-parallel processes: time and bytes",
    "sharding": "sharded routing against the replicated router over expert-parallel processes: time, bytes, memory",
    "refresh": "the rebuild of the shortlists as a share of a step",
    "diagnostics": "a measured step against another one, as a share of a step",
    "kernels": "where the time of a routing step and of layers goes: their kernels, by torch's profiler",
    "train": "a training step of a small GPT, AIR against TopKRouter",
}
"""Name of each benchmark of `run.py`, which is that of its module -> what it measures."""


def positive(text: str) -> int:
    """A whole number from 1, as the type of an argument."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """A whole number from 0, as the type of an argument."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
    return number


@contextlib.contextmanager
def refused(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Within this context a ValueError or OSError ends the command as argparse does: one line, exit status 2.

    It is for reading and preparing what the arguments name, before any work.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
