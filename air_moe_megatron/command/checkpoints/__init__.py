"""Check the checkpoint that a run will load, and the folder that it will save to.

Every rank reports what it sees, rank 0 reads and checks, and all ranks get the same verdict.
"""

import argparse
import contextlib
import dataclasses
import logging
import socket
from collections.abc import Iterator
from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.training.utils import print_rank_0

from air_moe_megatron.command.agreement import Ranks
from air_moe_megatron.command.arguments import NOT_GIVEN, RECOMMENDED, parse_flags, without_fields_of_others
from air_moe_megatron.command.checkpoints.checks import check_schedule, unfit_contents
from air_moe_megatron.command.checkpoints.reader import Damaged, Location, advice, locate, read
from air_moe_megatron.command.checkpoints.saving import (
    check_optimizer_resumes,
    check_room,
    checkpoint_write_problem,
    note_on_overwriting,
)
from air_moe_megatron.config import LAYOUT_FIELDS, AIRFields, Problems, is_plain_topk, problem_of, raise_first
from air_moe_megatron.diagnostics.files import diagnostics_write_problem
from air_moe_megatron.routers.missing_state import MissingState

__all__ = ["check_checkpoint", "fields_of_checkpoint", "parse_with_checkpoint", "saved_arguments", "unfit_checkpoint"]

logger = logging.getLogger(__name__)


def check_checkpoint(args: argparse.Namespace, config: TransformerConfig, ranks: Ranks) -> MissingState:
    """Check what the run will load and where it will save, and print what will become of the codebooks.

    Returns:
        as :func:`unfit_checkpoint`.
    Raises:
        ValueError: on every rank, with the message of the first problem of :func:`unfit_checkpoint`.
    """
    note = note_on_overwriting(args)
    if note is not None and ranks.rank == 0:
        logger.warning(note)
    report = _full_report(args)
    return MissingState(ranks.agree("checkpoint", report, lambda reports: raise_first(_unfit(args, config, reports))))


def unfit_checkpoint(args: argparse.Namespace, config: TransformerConfig) -> Problems[MissingState]:
    """Yield the problems of the checkpoint to load and the folder to save to, as this process sees them.

    Each is a ValueError: a checkpoint that is damaged, missing or unfit for the run, or a folder where nothing can be
    saved.

    Returns:
        as :func:`unfit_contents`; ``NOTHING`` if no checkpoint is loaded.
    """
    return (yield from _unfit(args, config, [_full_report(args)]))


def _unfit(
    args: argparse.Namespace, config: TransformerConfig, reports: list[dict[str, Any]]
) -> Problems[MissingState]:
    """Like :func:`unfit_checkpoint`, for the reports of all ranks."""
    location, checkpoint, missing = None, None, MissingState.NOTHING
    try:
        location = _agreed_location(args, reports)
    except ValueError as error:
        yield error
    for rank, report in enumerate(reports):
        if report["write problem"] is not None:
            yield ValueError(f"{report['write problem']}, on rank {rank} ({report['host']})")
    if location is not None and not args.moe_use_upcycling:
        try:
            with _naming(location):
                checkpoint = read(location)
                missing = yield from unfit_contents(checkpoint, args, config)
                yield from problem_of(check_schedule, checkpoint, args)
        except ValueError as error:
            yield error
    yield from problem_of(check_optimizer_resumes, args, checkpoint)
    yield from problem_of(check_room, args, config)
    return missing


def parse_with_checkpoint(args: argparse.Namespace, ranks: Ranks) -> argparse.Namespace:
    """Parse a command line with ``--use-checkpoint-args`` again, with :func:`fields_of_checkpoint` as defaults.

    A flag on the command line keeps its value. The later check of the checkpoint refuses it if it does not fit.

    Args:
        args: the command line, parsed without them.
        ranks: the ranks of this start.
    Raises:
        ValueError: on every rank, as :func:`fields_of_checkpoint`.
    """
    fields = without_fields_of_others(fields_of_checkpoint(args, ranks), parse_flags(NOT_GIVEN))
    if ranks.rank == 0 and fields:
        listed = ", ".join(f"{name} {value}" for name, value in fields.items())
        print_rank_0(f"> --use-checkpoint-args: from the checkpoint {listed}")
    return parse_flags(fields)


def fields_of_checkpoint(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Read what ``--use-checkpoint-args`` restores beyond Megatron's own list, from the checkpoint's arguments.

    These are our fields and all that ``--air-moe`` sets. Megatron restores neither the dtype of the router nor the
    balancing loss, which every router of ours uses.

    Args:
        args: Megatron's parsed arguments, not yet validated.
        ranks: the ranks of this start.
    Returns:
        argument -> value, on every rank; empty if there is no checkpoint, it holds no arguments, or it is of Megatron's
        own router with Megatron's own experts.
    Raises:
        ValueError: on every rank, if no checkpoint is named or local ones are used, or if it is damaged or not seen by
            some rank.
    """
    if args.load is None and args.pretrained_checkpoint is None:
        raise ValueError("--use-checkpoint-args needs --load (or --pretrained-checkpoint), the folder of a checkpoint")
    if args.non_persistent_ckpt_type == "local":
        raise ValueError(
            "--non-persistent-ckpt-type ('local') is not supported with --use-checkpoint-args: Megatron needs all "
            "arguments before it can find local checkpoints"
        )

    def judge(reports: list[dict[str, Any]]) -> dict[str, Any]:
        location = _agreed_location(args, reports)
        if location is None:
            return {}
        with _naming(location):
            saved_by = read(location).args
        if is_plain_topk(saved_by):
            return {}
        ours = [field.name for field in dataclasses.fields(AIRFields) if field.name not in LAYOUT_FIELDS]
        names = dict.fromkeys([*ours, *RECOMMENDED])
        return {name: getattr(saved_by, name) for name in names if hasattr(saved_by, name)}

    return ranks.agree("arguments of the checkpoint", _report(args), judge)


def saved_arguments(args: argparse.Namespace, ranks: Ranks) -> argparse.Namespace:
    """Read all arguments that a checkpoint was saved with.

    Args:
        args: Megatron's parsed arguments, not yet validated; they must name a checkpoint.
        ranks: the ranks of this start.
    Raises:
        ValueError: on every rank, if the checkpoint is damaged, not seen by some rank, or has no arguments.
    """

    def judge(reports: list[dict[str, Any]]) -> None:
        location = _agreed_location(args, reports)
        if location is None:
            raise ValueError(f"--load '{args.load}' holds no checkpoint that can be read here")
        with _naming(location):
            if read(location).args is None:
                raise ValueError(f"{location} holds no arguments of the run that saved it, or unsafe ones")

    ranks.agree("arguments of the checkpoint", _report(args), judge)
    return read(locate(args)).args  # as rank 0 found them: every rank sees the same iteration


def _report(args: argparse.Namespace) -> dict[str, Any]:
    """What this rank sees of the checkpoint: its iteration, or what is wrong."""
    report = {"host": socket.gethostname(), "iteration": None, "problem": None}
    try:
        location = locate(args)
        if location is not None:
            report["iteration"] = location.name
            if not location.directory.is_dir():
                report["problem"] = f"'{location.directory}' is missing"
    except (ValueError, OSError) as error:
        report["problem"] = str(error)
    return report


def _agreed_location(args: argparse.Namespace, reports: list[dict[str, Any]]) -> Location | None:
    """The checkpoint's location. Raises unless every rank sees the same one as rank 0."""
    location = locate(args)
    if location is not None and reports[0]["problem"] is not None:
        with _naming(location):
            raise Damaged(reports[0]["problem"])
    for rank, report in enumerate(reports):
        if report["problem"] is not None or report["iteration"] != reports[0]["iteration"]:
            seen = report["problem"] or f"it finds {report['iteration'] or 'no checkpoint'}"
            raise ValueError(
                f"every rank must see the same checkpoint: rank 0 ({reports[0]['host']}) finds "
                f"{location or 'no checkpoint'}, but on rank {rank} ({report['host']}) {seen}"
            )
    return location


def _full_report(args: argparse.Namespace) -> dict[str, Any]:
    """Like :func:`_report`, with what keeps this rank from writing its checkpoints or the diagnostics, if anything."""
    return _report(args) | {"write problem": checkpoint_write_problem(args) or diagnostics_write_problem(args)}


@contextlib.contextmanager
def _naming(location: Location) -> Iterator[None]:
    """Within this context, :class:`Damaged` becomes a ValueError that names the checkpoint and what to load instead."""
    try:
        yield
    except Damaged as error:
        message = f"{location} is damaged: {error}; {advice(location.folder, location.name)}"
        raise ValueError(message) from error
