"""Interleaved timing: the cases and the machine's ceilings run in turn, and each case becomes a row."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.measure import Timing, environment
from benchmarks.roofline import OF_CLOCK, CeilingProbe, Ceilings, Work, bound_columns

logger = logging.getLogger(__name__)

_MATMUL, _COPY = "large matmul", "large copy"


@dataclass(frozen=True)
class Case:
    """A computation to be timed, and a row of the results.

    Attributes:
        run: runs once and returns seconds per phase, with their sum as "total".
        work: least work of a run, per phase.
        tokens: tokens of a run; None if it does not process tokens.
        is_slow: whether it is run fewer times.
    """

    run: Callable[[], dict[str, float]]
    work: dict[str, Work]
    tokens: int | None = None
    is_slow: bool = False


@dataclass(frozen=True)
class Outcome:
    """Times of all cases, and the ceilings measured in between."""

    cases: dict[str, Case]
    timings: dict[str, dict[str, Timing]]  # case -> phase
    ceilings: Ceilings
    device: torch.device
    phases: tuple[str, ...]

    def median(self, name: str) -> float:
        """Median of a case's total, in seconds."""
        return self.timings[name]["total"].median

    def row(self, name: str, sizes: dict, figures: dict, by_clock: bool = True) -> dict:
        """The case's row: sizes, times, figures, distance from its roofline bound, and where it was measured.

        ``by_clock`` says whether the times are those of a clock, as the ceilings are. Processor seconds of several
        threads are not: then the row has no rates, and no distance from the bound.
        """
        case, timings = self.cases[name], self.timings[name]
        row = {"case": name, **sizes}
        for phase in self.phases:
            empty = dict.fromkeys(Timing([0.0]).columns(phase), "")
            row |= timings[phase].columns(phase) if phase in timings else empty
        row |= figures | bound_columns(case.work, self.ceilings, self.median(name), case.tokens)
        row |= {} if by_clock else dict.fromkeys(OF_CLOCK, "")
        return row | {"repetitions": len(timings["total"].seconds)} | environment(self.device)


def time_interleaved(cases: dict[str, Case], args, device: torch.device, extra_phases: tuple[str, ...] = ()) -> Outcome:
    """Run the cases and the ceilings in turn, so that a drift of the machine's speed affects all of them equally.

    The steady state is timed: uncounted runs of the same case precede every counted one. So no case depends on the
    state of caches and memory that the previous case has left. The ceilings, each the best of a few runs, are measured
    in the same way.

    Args:
        args: ``repetitions``, the counted runs per case (at most ``slow_repetitions`` for slow cases); ``warmup``, the
            uncounted runs directly before each of them; ``dtype`` of the matmul.
        extra_phases: phases beside forward and backward that rows show.
    """
    probe = CeilingProbe(device, args.dtype)
    runs = {name: case.run for name, case in cases.items()}
    runs |= {_MATMUL: probe.matmul, _COPY: probe.copy}
    seconds = {name: {} for name in runs}
    for repetition in range(args.repetitions):
        for name, run in runs.items():
            is_slow = name in cases and cases[name].is_slow
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
    return Outcome(cases, timings, probe.ceilings(matmul, copy), device, phases)
