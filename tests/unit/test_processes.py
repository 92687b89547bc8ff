"""A test that hangs is ended, and what it started with it; a rank that fails leaves no process groups."""

import subprocess
import sys
import time

import pytest
import torch

from tests import processes


def sleep(rank, num_ranks, directory):
    time.sleep(1000)


def test_ranks_that_hang_are_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "HANG_SECONDS", 1)
    with pytest.raises(TimeoutError, match="has not ended within 1 s"):
        processes.run_ranks(sleep, 2, tmp_path)


def fail(rank, num_ranks, directory):
    from megatron.core import parallel_state

    with pytest.raises(KeyError), processes.rank_of(rank, num_ranks, directory) as groups:
        assert torch.distributed.is_initialized() and groups.ep is parallel_state.get_expert_model_parallel_group()
        raise KeyError
    torch.save([torch.distributed.is_initialized(), parallel_state.is_initialized()], f"{directory}/{rank}.pt")


def test_a_rank_that_fails_leaves_no_groups(tmp_path):
    assert processes.run_ranks(fail, 2, tmp_path) == [[False, False]] * 2


def test_a_command_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr(processes, "HANG_SECONDS", 1)
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run([sys.executable, "-c", "import time; time.sleep(1000)"])
