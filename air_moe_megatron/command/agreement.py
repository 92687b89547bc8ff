"""Agreement of the ranks before process groups exist: all ranks report, rank 0 judges, all get the verdict."""

import argparse
import enum
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from megatron.core.package_info import __version__ as megatron_core_version

_PER_RANK = ("rank", "local_rank", "load", "save", "pretrained_checkpoint", "ict_load", "bert_load", "tokenizer_model")
"""Arguments that may differ between ranks: rank numbers, and paths that ``_PATH_ENDINGS`` does not match."""

_PATH_ENDINGS = ("_path", "_paths", "_dir", "_file", "_filename")
"""Endings of arguments that name files, which may differ from node to node."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that start together and communicate through the store of their rendezvous.

    Keep it for the whole run: rank 0 may host the store, and Megatron's process groups then use the same server.
    """

    rank: int
    world_size: int
    store: torch.distributed.Store | None  # None in a world of one

    def agree(self, topic: str, report: Any, judge: Callable[[list[Any]], Any]) -> Any:
        """Have rank 0 judge what all ranks report.

        Args:
            topic: key in the store; each is used once per start.
            report: what this rank has found, serializable as JSON.
            judge: called on rank 0 with the reports in rank order; its result must be serializable as JSON too.
        Returns:
            the judge's result, on every rank.
        Raises:
            ValueError: on every other rank, if the judge raises; rank 0 re-raises the judge's own error.
        """
        if self.world_size == 1:
            return judge([report])
        own, verdict = f"{topic}/{self.rank}", f"{topic}/verdict"
        if self.rank > 0:
            self.store.set(own, json.dumps(report))
            answer = json.loads(self.store.get(verdict))
            self.store.set(f"{own}/read", "")
            if "error" in answer:
                raise ValueError(answer["error"])
            return answer["result"]
        others = [f"{topic}/{rank}" for rank in range(1, self.world_size)]
        try:
            result = judge([report, *(json.loads(self.store.get(other)) for other in others)])
        except Exception as error:  # the others must not wait for a verdict that never comes
            message = str(error) if isinstance(error, ValueError) else f"rank 0 failed: {error!r}"
            self.store.set(verdict, json.dumps({"error": message}))
            self.store.wait([f"{other}/read" for other in others])  # the store may end with this rank
            raise
        self.store.set(verdict, json.dumps({"result": result}))
        return result

    def check(self, topic: str, check: Callable[[], None]) -> None:
        """Run a check on every rank, because files and memory may differ. An error on one rank ends all of them.

        Args:
            topic: key in the store; each is used once per start.
            check: raises a ValueError or an OSError if something is wrong.
        Raises:
            ValueError: on every rank, with the message of the first rank whose check failed.
        """
        try:
            check()
            found = None
        except (ValueError, OSError) as error:
            found = str(error)
        self.agree(topic, found, _raise_first)


def meet(args: argparse.Namespace) -> Ranks:
    """Join the rendezvous of this start. With fake process groups there is only one rank."""
    if args.world_size == 1 or args.fake_process_group:
        return Ranks(args.rank, 1, None)
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    return Ranks(rank, world_size, torch.distributed.PrefixStore("air_moe_megatron", store))


def check_agreement(args: argparse.Namespace, ranks: Ranks) -> None:
    """Refuse a start in which ranks have different flags or software: it would hang, or train different models.

    Call it before Megatron makes process groups, because their sizes come from flags too. It compares all of
    :func:`software` and every argument, given or default. Paths and file names may differ between nodes.

    Raises:
        ValueError: on every rank, naming what differs, with the values and ranks.
    """
    own = {name: repr(value) for name, value in vars(args).items() if _must_agree(name, value)}
    ranks.agree("arguments", own | software(), _compare)


def software() -> dict[str, str]:
    """Return the versions that all ranks must share, and a hash of our sources: checkouts of one version may differ."""
    found = {"version of Python": platform.python_version(), "version of megatron.core": megatron_core_version}
    for name in ("torch", "triton", "transformer_engine"):
        try:
            found[f"version of {name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[f"version of {name}"] = "none"
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return found | {"hash of our sources": digest.hexdigest()[:12]}


def _raise_first(found: list[str | None]) -> None:
    for rank, message in enumerate(found):
        if message is not None:
            where = "" if rank == 0 else f"rank {rank}: "
            raise ValueError(f"{where}{message}")


def _must_agree(name: str, value: Any) -> bool:
    if name in _PER_RANK or name.endswith(_PATH_ENDINGS):
        return False
    # The repr of any other value may hold an address, which differs in every process.
    return isinstance(value, (bool, int, float, str, list, tuple, enum.Enum, torch.dtype, type(None)))


def _compare(arguments: list[dict[str, str]]) -> None:
    """Raise if the arguments or the software of a rank differ from those of rank 0."""
    first = arguments[0]
    differences: dict[str, dict[str, list[int]]] = {}  # name -> value -> ranks that were given it
    for rank, given in enumerate(arguments):
        for name in first.keys() | given.keys():
            value = given.get(name, "unset")
            if value != first.get(name, "unset"):
                differences.setdefault(name, {}).setdefault(value, []).append(rank)
    if differences:
        described = (
            f"{name} is {first.get(name, 'unset')} on rank 0, "
            + ", ".join(f"{value} on rank {_abbreviate(ranks)}" for value, ranks in differences[name].items())
            for name in sorted(differences)
        )
        raise ValueError("all ranks must be started with the same flags and versions: " + "; ".join(described))


def _abbreviate(ranks: list[int]) -> str:
    """List the first eight ranks, and how many others there are."""
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"
