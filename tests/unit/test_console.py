"""A refused start is one line; with a log file the screen gets little and the file everything."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from air_moe_megatron.command import console

ROOT = Path(console.__file__).parents[2]
LOGGING_SCRIPT = """
import ctypes, logging, sys, warnings
from air_moe_megatron.command import console
screen = console.write_log_file(sys.argv[1])
logging.basicConfig(level=logging.ERROR)  # as a library that sets up logging later
print("printed")
ctypes.CDLL(None).puts(b"printed in C")
ctypes.CDLL(None).fflush(None)
screen.write("for the screen\\n")
logging.getLogger("air_moe_megatron.sync").info("ours")
logging.getLogger("air_moe_megatron.sync").debug("detail")
logging.getLogger("megatron.core").info("theirs")
logging.getLogger("megatron.core").warning("their warning")
warnings.warn("a warning of Python")
sys.stderr.write("written to stderr\\n")
assert sys.stderr.fileno() == 2
raise RuntimeError("crashed")
"""
ON_SCREEN = ("for the screen", "ours", "their warning", "written to stderr", "RuntimeError: crashed", "Traceback")
ONLY_IN_FILE = ("printed", "printed in C", "theirs", "a warning of Python")


def run_script(script, *arguments, **environment):
    own = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **own, **environment})


@pytest.mark.parametrize("encoding, shown", [("utf-8", b"a\xff\xef\xbf\xbd"), ("ascii", rb"a\udcff\ufffd")])
def test_the_screen_takes_any_text(tmp_path, encoding, shown):
    """Bytes of a prompt that are no text, and what a model says, must not end a command after its work."""
    script = "import sys\nfrom air_moe_megatron.command import console\n"
    script += "console.write_log_file(sys.argv[1]).write('a\\udcff\\ufffd\\n')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", script, str(tmp_path / "log")]
    assert subprocess.run(command, capture_output=True, env=environment, check=True).stdout == shown + b"\n"


def test_the_file_gets_everything_and_the_screen_what_matters(tmp_path):
    log = tmp_path / "new" / "train.log"
    result = run_script(LOGGING_SCRIPT, log)
    screen, file = result.stdout + result.stderr, log.read_text()
    assert result.returncode == 1
    assert result.stdout == "for the screen\n"
    for text in ON_SCREEN:
        assert screen.count(text) == 1, text
    for text in set(ON_SCREEN) - {"for the screen"}:
        assert file.count(text) == 1, text
    for text in ONLY_IN_FILE:
        assert text in file and text not in screen, text
    assert "detail" not in screen + file
    assert "INFO:megatron.core:theirs" in file


def test_another_rank_appends_and_shows_warnings_only(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("from before\n")
    result = run_script(LOGGING_SCRIPT, log, RANK="1")
    assert "ours" not in result.stderr and "their warning" in result.stderr
    assert log.read_text().startswith("from before\n") and "ours" in log.read_text()


REFUSING_SCRIPT = """
import sys
from air_moe_megatron.command import console
console._PATIENCE = 0.5
with console.refusals():
    raise {}
"""


@pytest.mark.parametrize("error", ["ValueError", "AssertionError", "FileNotFoundError"])
def test_a_refusal_is_one_line_and_code_2(error):
    result = run_script(REFUSING_SCRIPT.format(f"{error}('--flag (3)\\n   must be 4')"))
    assert result.stderr == "air_moe_megatron.pretrain: error: --flag (3) must be 4\n"
    assert (result.returncode, result.stdout) == (2, "")


@pytest.mark.parametrize("error", ["AssertionError()", "RuntimeError('x')", "KeyError('x')"])
def test_what_explains_nothing_or_is_unexpected_keeps_its_traceback(error):
    result = run_script(REFUSING_SCRIPT.format(error))
    assert "Traceback" in result.stderr and "error:" not in result.stderr and result.returncode == 1


def test_the_traceback_is_shown_on_request():
    result = run_script(REFUSING_SCRIPT.format("ValueError('x')"), AIR_MOE_TRACEBACK="1")
    assert "Traceback" in result.stderr and result.stderr.endswith("ValueError: x\n")


def test_another_rank_waits_for_the_first_before_it_speaks():
    start = time.monotonic()
    result = run_script(REFUSING_SCRIPT.format("ValueError('x')"), RANK="3", LOCAL_RANK="1")
    assert time.monotonic() - start > 1.5
    assert result.stderr == "air_moe_megatron.pretrain: error on rank 3: x\n"
    assert result.returncode == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cpu"], None),
        (["--cpu", "--log-file", "x.log", "--lr", "1"], "x.log"),
        (["--log-file=x.log"], "x.log"),
        (["--log-interval", "3", "--log"], None),
    ],
    ids=["absent", "two-words", "one-word", "another-flag"],
)
def test_the_log_file_is_found_among_flags_that_are_not_known_yet(arguments, expected):
    assert console.log_file_of(arguments) == expected


@pytest.mark.parametrize(
    ("started", "named"),
    [
        ("/x/air_moe_megatron/doctor/__main__.py", "doctor"),
        ("/x/air_moe_megatron/generate.py", "generate"),
        ("air_moe_megatron.tune.__main__", "tune"),
        ("/x/train.py", "pretrain"),
        ("-c", "pretrain"),
        ("", "pretrain"),
    ],
)
def test_an_error_names_the_command_that_was_started(monkeypatch, started, named):
    monkeypatch.setattr(sys, "argv", [started])
    assert console._program() == f"air_moe_megatron.{named}"
