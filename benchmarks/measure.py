"""Measuring in benchmarks: seconds, memory, Megatron's process groups and gradient buffers, and the origin of a row."""

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import json
import logging
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

logger = logging.getLogger(__name__)

MIB = 2**20
"""Bytes of a MiB."""


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition of one phase of a case."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def columns(self, phase: str) -> dict[str, float]:
        """Median and spread as columns of a row, in milliseconds."""
        return {
            f"{phase}_ms": round(1e3 * self.median, 3),
            f"{phase}_min_ms": round(1e3 * min(self.seconds), 3),
            f"{phase}_max_ms": round(1e3 * max(self.seconds), 3),
        }


def clock(device: torch.device) -> float:
    """Current time in seconds, after waiting until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cpu_clock(device: torch.device) -> float:
    """CPU seconds of this process on a CPU, which depend little on other programs; on a GPU, :func:`clock`."""
    return time.process_time() if device.type == "cpu" else clock(device)


def is_by_clock(device: torch.device, ranks: int = 1) -> bool:
    """Whether seconds of :func:`cpu_clock` can be compared with those of a clock.

    On a CPU they cannot with several threads, whose seconds add up, nor with more ranks than cores, which share them.
    """
    if device.type != "cpu":
        return True
    return torch.get_num_threads() == 1 and ranks <= len(os.sched_getaffinity(0))


def over_ranks(
    run: Callable[[], dict[str, float]], device: torch.device, ranks: int, reduce: Literal["mean", "max"]
) -> dict[str, float]:
    """Seconds per phase of a run that all ranks start together: the mean over the ranks, or those of the slowest."""
    if ranks == 1:
        return run()
    torch.distributed.barrier()
    seconds = run()
    values = torch.tensor(list(seconds.values()), device=device, dtype=torch.float64)
    operations = {"mean": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}
    torch.distributed.all_reduce(values, operations[reduce])
    divisor = ranks if reduce == "mean" else 1
    return dict(zip(seconds, (values / divisor).tolist(), strict=True))


@contextlib.contextmanager
def world(rank: int = 0, ranks: int = 1, init_method: str | None = None, expert_parallel: int = 1):
    """Make Megatron's process groups, on the GPU if there is one, else in CPU mode; by default for this process alone.

    They are destroyed at the end. CPU mode stays on.

    Yields:
        the device and the ProcessGroupCollection.
    """
    warnings.filterwarnings("ignore", message="Using a large number of experts")
    warnings.filterwarnings("ignore", message="moe_ffn_hidden_size is not set")
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        from air_moe_megatron import cpu

        cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    where = {"store": torch.distributed.HashStore()} if init_method is None else {"init_method": init_method}
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=ranks, **where)
    try:
        parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_parallel)
        model_parallel_cuda_manual_seed(0)
        yield device, ProcessGroupCollection.use_mpu_process_groups()
    finally:
        get_cuda_rng_tracker().reset()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def run_on_ranks(measure: Callable[..., list[dict]], args: argparse.Namespace) -> list[dict]:
    """Run a benchmark in ``--ranks`` expert-parallel processes, on GPUs at most one for each.

    Args:
        measure: a function of a module, called as ``measure(args, rank, ranks, pg_collection, device)`` on each rank.
    Returns:
        what it returns on rank 0.
    """
    on_gpu = torch.cuda.is_available()
    ranks = min(args.ranks, torch.cuda.device_count()) if on_gpu else args.ranks
    if ranks < args.ranks:
        logger.info("%d rank(s), one for each GPU", ranks)
    with tempfile.TemporaryDirectory() as directory:
        if ranks == 1:
            return _run_rank(0, 1, measure, args, directory)
        # A fork of a process that has imported torch, but not used it, starts in less than a second.
        start = "spawn" if on_gpu else "forkserver"
        if start == "forkserver":
            torch.multiprocessing.get_context(start).set_forkserver_preload(["air_moe_megatron.sync"])
        torch.multiprocessing.start_processes(
            _run_rank, args=(ranks, measure, args, directory), nprocs=ranks, start_method=start
        )
        return json.loads(Path(directory, "rows.json").read_text())


def _run_rank(rank, ranks, measure, args, directory):
    if ranks > 1:
        logging.basicConfig(format="%(message)s", force=True)
        logging.getLogger("benchmarks").setLevel(logging.INFO if rank == 0 else logging.WARNING)
        if not torch.cuda.is_available():
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    init_method = None if ranks == 1 else f"file://{directory}/store"
    with world(rank, ranks, init_method, expert_parallel=ranks) as (device, pg_collection):
        rows = measure(args, rank, ranks, pg_collection, device)
    if rank == 0 and ranks > 1:
        Path(directory, "rows.json").write_text(json.dumps(rows))
    return rows


def give_main_grad(module: torch.nn.Module) -> None:
    """Give every parameter the buffer that Megatron's data-parallel wrapper gives it."""
    for parameter in module.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False


def accumulate_gradient(module: torch.nn.Module) -> None:
    """Add gradients to ``main_grad``, as that wrapper's hook does, unless this has been done already."""
    for parameter in module.parameters():
        if parameter.grad is not None and not parameter.grad_added_to_main_grad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None


def take_gradients(module: torch.nn.Module) -> list[torch.Tensor]:
    """Return copies of the gradients accumulated so far, and reset them to zero."""
    accumulate_gradient(module)
    gradients = [parameter.main_grad.clone() for parameter in module.parameters()]
    for parameter in module.parameters():
        parameter.main_grad.zero_()
        parameter.grad_added_to_main_grad = False
    return gradients


def measure_memory(measure: Callable, args: tuple, device: torch.device, pg_collection) -> Any:
    """Call ``measure(*args, device, pg_collection)``, a module-level function that uses :func:`peak_memory`.

    On a GPU it is called here; on a CPU in a process and world of its own.
    """
    if device.type == "cuda":
        peaks = measure(*args, device, pg_collection)
        torch.cuda.empty_cache()
        return peaks
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_in_world, (measure, args))


def _measure_in_world(measure, args):
    with world() as place:
        return measure(*args, *place)


def peak_memory(work: Callable[[], None], device: torch.device) -> int:
    """Bytes that ``work`` needs at its peak beyond what is in use before it.

    On a GPU, torch's allocator counts them. On a CPU, the kernel does, after the allocator has returned its free
    memory; this needs Linux and is reliable only for the first run of ``work`` in a process.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def environment(device: torch.device) -> dict[str, str]:
    """Columns of every row: device, threads, large pages, versions and commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "large_pages": large_pages(),
        "torch": str(torch.__version__),
        "triton": importlib.metadata.version("triton"),
        "megatron_core": importlib.metadata.version("megatron-core"),
        "commit": commit(),
    }


def commit() -> str:
    """This tree's commit, with "-dirty" if a tracked file differs from it.

    AIR_MOE_COMMIT takes precedence, for copies of the files without git. Without either it is "unknown". Files of
    results are ignored: a benchmark that writes them does not make the next one's rows dirty.
    """

    def git(*words: str) -> str:
        command = ["git", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent).stdout.strip()

    if "AIR_MOE_COMMIT" in os.environ:
        return os.environ["AIR_MOE_COMMIT"]
    name = git("rev-parse", "--short", "HEAD")
    is_dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/results")
    return f"{name}-dirty" if is_dirty else name or "unknown"


def large_pages() -> str:
    """The kernel's mode of transparent huge pages, and whether torch's CPU allocator was told to ask for them."""
    try:
        mode = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "unknown"
    return f"{mode}, {'asked for' if os.environ.get('THP_MEM_ALLOC_ENABLE') == '1' else 'not asked for'}"


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
