"""How tests start processes: one time limit for all of them, and one way to run the ranks of a distributed test."""

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

HANG_SECONDS = 1800
"""Limit for every process that a test starts.

It ends a hang. The slowest process, the scaling run of examples/, takes half a minute on two quiet cores and a few
minutes where other work shares them; the limit is far beyond ten times its quiet time.
"""


def run(command: Sequence[str | Path], **settings) -> subprocess.CompletedProcess:
    """Run a command to its end.

    Args:
        command: words of the command line.
        settings: of ``subprocess.run``; text, with stdout and stderr kept apart where nothing else is said.
    """
    kept = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": HANG_SECONDS}
    return subprocess.run(list(map(str, command)), **{**kept, **settings})


def run_ranks(worker: Callable, num_ranks: int, directory: Path) -> list:
    """Run ``worker(rank, num_ranks, directory)`` in a process for each rank.

    The processes are forked from a server that imports Megatron once for all of them.

    Args:
        worker: saves what it found as ``directory/<rank>.pt``.
    Returns:
        What each rank saved, in the order of the ranks.
    Raises:
        TimeoutError: if some rank has not ended within the limit; all are stopped then.
    """
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(["air_moe_megatron.sync"])
    context = torch.multiprocessing.start_processes(
        worker, args=(num_ranks, str(directory)), nprocs=num_ranks, start_method="forkserver", join=False
    )
    deadline = time.monotonic() + HANG_SECONDS
    while not context.join(timeout=max(0.0, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"a rank has not ended within {HANG_SECONDS} s")
    return [torch.load(directory / f"{rank}.pt") for rank in range(num_ranks)]
