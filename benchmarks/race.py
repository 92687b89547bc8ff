"""Contenders measured in turn, with the machine's ceilings among them, and the rows that come of it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.floor import CeilingProbe, Ceilings, Work, floor_columns
from benchmarks.measure import Timing, environment

logger = logging.getLogger(__name__)

_MATMUL, _COPY = "large matmul", "large copy"


@dataclass(frozen=True)
class Contender:
    """What is measured.

    Attributes:
        run: runs once and returns seconds per phase, the sum as "total".
        work: what a run cannot do without, per phase.
        tokens: tokens of a run; None where a run is not over tokens.
        is_slow: runs fewer times.
    """

    run: Callable[[], dict[str, float]]
    work: dict[str, Work]
    tokens: int | None = None
    is_slow: bool = False


@dataclass(frozen=True)
class Outcome:
    """Times of all contenders, and the ceilings between them."""

    contenders: dict[str, Contender]
    timings: dict[str, dict[str, Timing]]  # contender -> phase
    ceilings: Ceilings
    device: torch.device
    phases: tuple[str, ...]

    def median(self, name: str) -> float:
        """Median of a contender's total, in seconds."""
        return self.timings[name]["total"].median

    def row(self, name: str, sizes: dict, figures: dict, label: str | None = None) -> dict:
        """The contender's row: its sizes, times, figures, distance from its floor, and where it was measured."""
        contender, timings = self.contenders[name], self.timings[name]
        row = {"contender": label or name, **sizes}
        for phase in self.phases:
            empty = dict.fromkeys(Timing([0.0]).columns(phase), "")
            row |= timings[phase].columns(phase) if phase in timings else empty
        row |= figures | floor_columns(contender.work, self.ceilings, self.median(name), contender.tokens)
        return row | {"repetitions": len(timings["total"].seconds)} | environment(self.device)


def race(contenders: dict[str, Contender], args, device: torch.device, extra_phases: tuple[str, ...] = ()) -> Outcome:
    """Run the contenders and the ceilings in turn, so that a drift of the machine's speed meets them all alike.

    What is timed is the steady state: before every counted run come uncounted ones of the same contender, so that no
    contender pays for the caches and the memory that the one before it has left behind. The ceilings, each the best of
    a few runs, are measured so too.

    Args:
        args: ``repetitions`` counted runs of each, of slow contenders at most ``slow_repetitions``, and ``warmup``
            uncounted ones directly before each of them; ``dtype`` of the matmul.
        extra_phases: phases beside forward and backward that rows show.
    """
    probe = CeilingProbe(device, args.dtype)
    runs = {name: contender.run for name, contender in contenders.items()}
    runs |= {_MATMUL: probe.matmul, _COPY: probe.copy}
    seconds = {name: {} for name in runs}
    for repetition in range(args.repetitions):
        for name, run in runs.items():
            is_slow = name in contenders and contenders[name].is_slow
            if is_slow and repetition >= args.slow_repetitions:
                continue
            for _ in range(args.warmup):
                run()
            for phase, value in run().items():
                seconds[name].setdefault(phase, []).append(value)
        logger.info("repetition %d of %d done", repetition + 1, args.repetitions)
    timings = {name: {phase: Timing(runs) for phase, runs in phases.items()} for name, phases in seconds.items()}
    matmul, copy = (timings.pop(name)["total"].median for name in (_MATMUL, _COPY))
    phases = ("forward", "backward", *extra_phases, "total")
    return Outcome(contenders, timings, probe.ceilings(matmul, copy), device, phases)
