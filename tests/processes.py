"""How tests start processes: one time limit for all of them, and one way to run the ranks of a distributed test."""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
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


def ranks_fixture(worker: Callable, *world_sizes: int, name: str = "{}-ranks"):
    """Make the fixture ``ranks`` of a module: what every rank saved, in the order of the ranks.

    Args:
        worker: as for ``run_ranks``.
        world_sizes: the tests that use the fixture run with each of them.
        name: id of a world size, with ``{}`` for the number.
    """
    params = [pytest.param(size, marks=pytest.mark.world_size(size), id=name.format(size)) for size in world_sizes]

    @pytest.fixture(scope="module", params=params)
    def ranks(request, tmp_path_factory):
        return run_ranks(worker, request.param, tmp_path_factory.mktemp("ranks"))

    return ranks


@contextlib.contextmanager
def gloo_rank(rank: int, world_size: int, directory: str) -> Iterator[torch.distributed.ProcessGroup]:
    """Be a rank with one thread, in gloo's group of all ranks, while entered; without Megatron."""
    torch.set_num_threads(1)
    store = f"file://{directory}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    try:
        yield torch.distributed.group.WORLD
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def parallel_groups(seed: int = 1, **sizes: int):
    """Have Megatron's parallel state in CPU mode while entered; yields the ProcessGroupCollection.

    The process stays in CPU mode.

    Args:
        seed: of Megatron's random states, which are made anew.
        sizes: of ``initialize_model_parallel``.
    """
    from air_moe_megatron import cpu

    cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(**sizes)
    try:
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def rank_of(rank: int, world_size: int, directory: str, seed: int = 1, **sizes: int):
    """Be a rank of ``gloo_rank`` with the ``parallel_groups`` of these sizes while entered; yields those."""
    with gloo_rank(rank, world_size, directory), parallel_groups(seed, **sizes) as groups:
        yield groups
