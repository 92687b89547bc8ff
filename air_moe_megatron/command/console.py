"""Output of a run: a refused start prints one line, and with ``--log-file`` little reaches the screen.

This module imports nothing heavy, because it is used before torch and Megatron are imported.
"""

import argparse
import contextlib
import errno
import importlib
import linecache
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

PROGRAM = "air_moe_megatron.pretrain"
"""The command that errors name if another program calls this package."""
TRACEBACK_VARIABLE = "AIR_MOE_TRACEBACK"
"""Environment variable. If it is set, a refused start shows its traceback on every rank."""

CPU_ON_A_GPU = (
    "--cpu is for machines without a CUDA GPU, and this one has one; leave it out, or hide the GPU with "
    "CUDA_VISIBLE_DEVICES="
)
NO_GPU = "no CUDA GPU is visible; give --cpu to run on CPU with gloo"

_PACKAGE = Path(__file__).parents[1]

_PATIENCE = 10.0
"""Seconds that other ranks give rank 0 to say why the start is refused, before they do so. A launcher such as torchrun
ends all ranks as soon as one has exited."""

_PRINTERS = ("megatron.training", "megatron.training.training")
"""Modules whose ``print_rank_last`` prints losses (Megatron's loop) and health (ours)."""


def flag_of(name: str) -> str:
    """The command-line flag of an argument. Example: --num-layers is that of num_layers."""
    return "--" + name.replace("_", "-")


def refuse(message: str) -> NoReturn:
    """Print an error in one line and exit. Other ranks wait first, so that normally only rank 0 prints.

    Raises:
        SystemExit: with code 2, on every rank.
    """
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    if rank:
        time.sleep(_PATIENCE + local_rank)
    where = f" on rank {rank}" if rank else ""
    sys.stderr.write(f"{_program()}: error{where}: {' '.join(message.split())}\n")
    sys.stderr.flush()
    raise SystemExit(2)


def _program() -> str:
    """The command that was started, as it is named after ``python -m``."""
    words = [word for word in re.split(r"[/.]", sys.argv[0].removesuffix(".py")) if word]
    if words[-1:] == ["__main__"]:
        words.pop()
    name = words[-1] if words else ""
    is_ours = (_PACKAGE / f"{name}.py").is_file() or (_PACKAGE / name / "__main__.py").is_file()
    return f"{_PACKAGE.name}.{name}" if is_ours else PROGRAM


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Within this context a failed check ends the program with one line. It is used before a run starts.

    A failed check raises ValueError, OSError or, in Megatron, AssertionError. Other errors keep their traceback, and so
    does an assertion of ours that has no message. If the environment variable AIR_MOE_TRACEBACK is set, all do.
    """
    try:
        yield
    except (ValueError, OSError, AssertionError) as error:
        message = str(error) if str(error).strip() else _code_of_megatron(error)
        if os.environ.get(TRACEBACK_VARIABLE) or message is None:
            raise
        refuse(message)


def megatrons_words(error: BaseException) -> str:
    """The words of an error of Megatron in one line, marked as Megatron's.

    Many of its assertions have no message, so their code is quoted. Example: Megatron: assert args.lr is not None
    """
    if str(error).strip():
        return f"Megatron: {error}"
    return _code_of_megatron(error) or f"Megatron: {type(error).__name__}"


def _code_of_megatron(error: BaseException) -> str | None:
    """The statement of Megatron that raised an error; None if the error is not Megatron's."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if "megatron" not in Path(frame.filename).parts:
        return None
    lines = (linecache.getline(frame.filename, number) for number in range(frame.lineno, frame.end_lineno + 1))
    return "Megatron: " + " ".join(line.strip() for line in lines)


def log_file_of(arguments: Sequence[str]) -> str | None:
    """The value of ``--log-file``. It is needed before Megatron is imported, because the import prints."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--log-file", nargs="?")
    return parser.parse_known_args(arguments)[0].log_file


def write_log_file(path: str) -> TextIO:
    """Append the output of this process to a file, and leave warnings, errors and our own lines on the screen.

    Standard output, that of C libraries included, goes to the file only. Standard error stays on the screen; the file
    gets a copy of what Python writes there, such as tracebacks. The file gets all records of the ``logging`` module;
    the screen gets warnings and, from rank 0, our records. Python's warnings go to the file. Several ranks may append
    to one file.

    Args:
        path: the file; its folder is created if missing.
    Returns:
        A stream to the screen, which was standard output before.
    Raises:
        OSError: if the file cannot be written; its message names the flag ``--log-file``.
    """
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        file = open(path, "a", buffering=1)  # open as long as the process lives
    except OSError as error:
        raise log_file_error(path, error) from error
    sys.stdout.flush()
    # A prompt or a path may hold bytes that are no text, and a model may write what the screen cannot show.
    encoding = sys.stdout.encoding
    errors = "surrogateescape" if encoding.lower().replace("-", "") == "utf8" else "backslashreplace"
    screen = os.fdopen(os.dup(1), "w", buffering=1, encoding=encoding, errors=errors)
    os.dup2(file.fileno(), 1)
    sys.stdout.reconfigure(line_buffering=True)

    to_screen, to_file = logging.StreamHandler(sys.stderr), logging.StreamHandler(file)
    to_screen.addFilter(_belongs_on_screen)
    # Megatron would configure the root logger in the same way, but does nothing if it already has handlers.
    logging.basicConfig(level=logging.INFO, handlers=[to_screen, to_file])
    logging.captureWarnings(True)
    sys.stderr = _Tee(sys.stderr, file)
    return screen


def log_file_error(path: str, error: OSError) -> OSError:
    """The error of a log file that cannot be written, for the error of the file system."""
    # Python says that the "folder" exists if it is a file.
    reason = os.strerror(errno.ENOTDIR) if isinstance(error, FileExistsError) else error.strerror
    return OSError(f"--log-file '{path}' cannot be written: {reason}")


@contextlib.contextmanager
def losses_on(screen: TextIO) -> Iterator[None]:
    """Within this context, losses and routing health go to the screen too. The last rank prints them.

    It replaces one function of Megatron, ``print_rank_last``, in the two modules that call it, and restores it at the
    end.

    Args:
        screen: as :func:`write_log_file` returns it.
    """
    from megatron.training.utils import is_last_rank, print_rank_last

    def print_on_both(message: str) -> None:
        print_rank_last(message)
        if is_last_rank():
            screen.write(f"{message}\n")

    modules = [importlib.import_module(name) for name in _PRINTERS]
    for module in modules:
        module.print_rank_last = print_on_both
    try:
        yield
    finally:
        for module in modules:
            module.print_rank_last = print_rank_last


def _belongs_on_screen(record: logging.LogRecord) -> bool:
    if record.name.partition(".")[0] == _PACKAGE.name:
        return record.levelno >= logging.WARNING or os.environ.get("RANK", "0") == "0"
    return record.levelno >= logging.WARNING and record.name != "py.warnings"


class _Tee:
    """A stream that also writes to a file."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        self._file.write(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
