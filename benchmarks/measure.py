"""How benchmarks measure: interleaved repetitions after a warm-up, medians with spread, rows that say where they come
from."""

import csv
import importlib.metadata
import logging
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timing:
    """Seconds of the repetitions of one contender's phase."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def columns(self, phase: str) -> dict[str, float]:
        """Median and spread as columns of a row, in milliseconds."""
        return {
            f"{phase}_ms": round(1e3 * self.median, 2),
            f"{phase}_min_ms": round(1e3 * min(self.seconds), 2),
            f"{phase}_max_ms": round(1e3 * max(self.seconds), 2),
        }


def interleave(contenders: dict[str, Callable[[], dict[str, float]]], repetitions: int, warmup: int):
    """Run the contenders in turn, so that a drift of the machine's speed meets them all alike.

    Args:
        contenders: name -> function that runs once and returns seconds per phase.
        repetitions: counted runs of each.
        warmup: uncounted runs of each, first.
    Returns:
        name -> phase -> Timing.
    """
    seconds = {name: {} for name in contenders}
    for repetition in range(-warmup, repetitions):
        for name, run in contenders.items():
            phases = run()
            if repetition >= 0:
                for phase, value in phases.items():
                    seconds[name].setdefault(phase, []).append(value)
        logger.info("repetition %d of %d done", max(repetition + 1, 0), repetitions)
    return {name: {phase: Timing(runs) for phase, runs in phases.items()} for name, phases in seconds.items()}


def clock(device: torch.device) -> float:
    """Seconds; waits until the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def environment(device: torch.device) -> dict[str, str]:
    """What every row carries: device, threads, versions and commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "megatron_core": importlib.metadata.version("megatron-core"),
        "commit": commit or "unknown",
    }


def write_rows(rows: list[dict], path: Path) -> None:
    """Write the rows as CSV, replacing the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
