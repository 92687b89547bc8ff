"""A test that hangs is ended, and what it started with it."""

import subprocess
import sys
import time

import pytest

from tests import processes


def sleep(rank, num_ranks, directory):
    time.sleep(1000)


def test_ranks_that_hang_are_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "HANG_SECONDS", 1)
    with pytest.raises(TimeoutError, match="has not ended within 1 s"):
        processes.run_ranks(sleep, 2, tmp_path)


def test_a_command_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr(processes, "HANG_SECONDS", 1)
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run([sys.executable, "-c", "import time; time.sleep(1000)"])
