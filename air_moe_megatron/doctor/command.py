"""Check a command line before it runs: ``python -m air_moe_megatron.doctor [flags of air_moe_megatron.pretrain]``.

It prints versions, devices, and which path each operation takes and why. For a command line it lists all that would
stop it, in the words of a run's errors. No process group is made, nothing is written, and no other rank is needed:
``--world-size`` says how many there would be. The exit code is 0 if the command would start, otherwise 2.
"""

import argparse
import contextlib
import errno
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from air_moe_megatron.command import console
from air_moe_megatron.command.console import flag_of
from air_moe_megatron.doctor import machine

if TYPE_CHECKING:
    from air_moe_megatron.config import Problems


@dataclass
class Findings:
    """Problems that would stop a start, and topics that could not be checked because of them."""

    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def add(self, *problems: Exception | str) -> None:
        """Add problems in the words of a start, each once."""
        for words in (" ".join(str(problem).split()) for problem in problems):
            if words not in self.problems:
                self.problems.append(words)

    def walk[T](self, topic: str, problems: "Problems[T]") -> T | None:
        """Run a check to its end.

        After an earlier problem a check may fail because it lacks what it needs. Its topic is then listed as unchecked.

        Returns:
            what the check returns; None if it failed.
        """
        try:
            while True:
                self.add(next(problems))
        except StopIteration as end:
            return end.value
        except Exception:
            if not self.problems:
                raise
            self.unchecked.append(topic)
            return None


def examine(flags: Sequence[str]) -> tuple[argparse.Namespace | None, Findings]:
    """Run all checks of a start on a command line of ``air_moe_megatron.pretrain``.

    Without a GPU it turns on CPU mode, in which Megatron can parse the flags. Megatron's output is discarded.

    Returns:
        the arguments, None if they cannot be parsed or Megatron refuses them; all findings.
    """
    import torch

    from air_moe_megatron import cpu
    from air_moe_megatron.compat import require_entry_megatron

    found = Findings()
    try:
        require_entry_megatron()
    except ImportError as error:
        found.add(error)
        found.unchecked += ["flags", "data", "model", "memory", "checkpoint"]
        return None, found
    words, has_gpu = [console.PROGRAM, *flags], torch.cuda.is_available() and not cpu.is_enabled()
    if "--cpu" in words and has_gpu:
        found.add(console.CPU_ON_A_GPU)
    elif "--cpu" in words:
        words = cpu.with_required_flags(words)
    elif not has_gpu:
        found.add(console.NO_GPU)
    if not has_gpu:
        cpu.enable()
    argv, sys.argv = sys.argv, words
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return _examine(found), found
    finally:
        sys.argv = argv


def _examine(found: Findings) -> argparse.Namespace | None:
    """Run the checks in the order of ``training.run.train``."""
    from megatron.training.argument_utils import core_transformer_config_from_args

    from air_moe_megatron.command.agreement import Ranks
    from air_moe_megatron.command.arguments import complete, parse_flags, unfit_fields
    from air_moe_megatron.command.checkpoints import parse_with_checkpoint, unfit_checkpoint
    from air_moe_megatron.command.entry_refusals import refused_flags
    from air_moe_megatron.command.memory import check_memory
    from air_moe_megatron.command.model import model_config_from_args
    from air_moe_megatron.command.schedule import invalid_schedules
    from air_moe_megatron.config import problem_of, unused
    from air_moe_megatron.training.preflight import unfit_data
    from air_moe_megatron.training.token_counts import counts_of

    try:
        args = parse_flags()
    except ValueError as error:
        found.add(error)
        found.unchecked += ["data", "model", "memory", "checkpoint"]
        return None
    if args.log_file:
        found.walk("log file", problem_of(_check_log_file, args.log_file))
    try:
        if args.use_checkpoint_args:
            args = parse_with_checkpoint(args, Ranks(0, 1, None))
        complete(args)
        is_complete = True
    except ValueError as error:
        found.add(error)
        is_complete = False
    found.walk("flags", refused_flags(args))
    found.walk("schedules", invalid_schedules(args))
    found.walk("data", unfit_data(args))
    config = None
    if is_complete:
        try:
            config = core_transformer_config_from_args(args)
        except (ValueError, AssertionError) as error:
            found.add(console.megatrons_words(error))
    if config is None:
        found.walk("unused flags", unused(args))
        found.unchecked += ["model", "memory", "checkpoint"]
        return None
    num_problems = len(found.problems)
    found.walk("model", unfit_fields(args, config))
    is_valid = len(found.problems) == num_problems
    if is_valid:
        found.walk("model", problem_of(model_config_from_args, args))
    if console.NO_GPU in found.problems:
        found.unchecked.append("memory")
    else:
        found.walk("memory", problem_of(check_memory, args))
    found.walk("checkpoint", unfit_checkpoint(args, config))
    if is_valid:
        found.walk("token counts", problem_of(counts_of, args))
    return args if is_valid else None


def _check_log_file(path: str) -> None:
    """Refuse a log file that cannot be written, in the words of the start. Leaves nothing behind."""
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    try:
        if os.path.exists(path):
            open(path, "a").close()
        elif path.endswith(os.sep):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        else:
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise console.log_file_error(path, error) from error


def report(flags: Sequence[str], world_size: int) -> tuple[str, bool]:
    """Write all that the command prints, and say whether the command line would start; True if none is given."""
    args, found = examine(flags) if flags else (None, Findings())
    chosen = {}
    try:
        chosen = machine.backends(args)
    except ValueError as error:  # AIR_MOE_BACKEND is invalid
        found.add(error)
    lines = ["Versions", *(f"  {name:20}{version}" for name, version in machine.versions().items())]
    lines += ["", "Devices", *(f"  {line}" for line in machine.devices())]
    lines += ["", "Operations" + ("" if args is None else ", with the sizes of the command line")]
    lines += [
        f"  {name:20}{backend:8}{reason} ({machine.OPERATIONS[name]})" for name, (backend, reason) in chosen.items()
    ]
    if flags:
        lines += ["", f"Command line, as rank 0 of {world_size}"]
        if found.problems:
            lines.append(f"  It would not start. Problems: {len(found.problems)}")
            lines += [f"  {number}. {problem}" for number, problem in enumerate(found.problems, 1)]
        else:
            lines.append("  Nothing here would stop it.")
        if found.unchecked:
            topics = ", ".join(dict.fromkeys(found.unchecked))
            lines.append(f"  Not checked until these are fixed: {topics}")
    return "\n".join(lines) + "\n", not found.problems


def _check_megatron(path: Path) -> NoReturn:
    from air_moe_megatron.doctor.mismatches import report as report_on
    from air_moe_megatron.patch import UnknownTreeError

    try:
        text, fits = report_on(path.absolute())
    except UnknownTreeError as error:
        text, fits = f"refused: {error}\n", False
    sys.stdout.write(text)
    sys.exit(0 if fits else 2)


def own_parser() -> argparse.ArgumentParser:
    """Parser of the doctor's own flags. Flags unknown to it form the command line to check."""
    words = __doc__.replace("``", "`")
    parser = argparse.ArgumentParser(prog="python -m air_moe_megatron.doctor", description=words, allow_abbrev=False)
    parser.add_argument(
        "--world-size", type=int, default=int(os.environ.get("WORLD_SIZE", "1")), help="number of ranks"
    )
    parser.add_argument(
        "--megatron",
        type=Path,
        metavar="PATH",
        help="only check this checkout or wheel for every name and signature of Megatron that we use",
    )
    parser.add_argument("--nproc-per-node", type=int, help="ranks on this host, which share its memory; default: all")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the report.

    Raises:
        SystemExit: with code 2 if the command line would not start or the Megatron of ``--megatron`` does not fit;
            otherwise with 0.
    """
    parser = own_parser()
    own, flags = parser.parse_known_args(argv)
    if own.megatron is not None:
        if flags:
            parser.error(f"--megatron ({own.megatron}) checks no command line: leave out {flags[0]}")
        _check_megatron(own.megatron)
    for name in ("world_size", "nproc_per_node"):
        if getattr(own, name) is not None and getattr(own, name) < 1:
            parser.error(f"{flag_of(name)} ({getattr(own, name)}) must be at least 1")
    on_host = own.nproc_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", own.world_size))
    world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": own.world_size, "LOCAL_WORLD_SIZE": on_host}
    os.environ.update({name: str(value) for name, value in world.items()})
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    text, would_start = report(flags, own.world_size)
    sys.stdout.write(text)
    sys.exit(0 if would_start else 2)
