"""The curves of a run, from its TensorBoard files: a folder for each start of the run, named by the iteration."""

import math
import shutil
from pathlib import Path

Curves = dict[str, list[list[float]]]
"""name -> [[iteration, value], ...]"""


def begin(folder: Path, iteration: int) -> None:
    """Remove the files of starts that a start at ``iteration`` supersedes.

    Args:
        folder: folder of the run's TensorBoard files. Earlier starts' values from ``iteration`` on are superseded.
        iteration: iteration of the checkpoint that the run loads, 0 without one.
    """
    for path in folder.iterdir() if folder.exists() else ():
        if int(path.name) >= iteration:
            shutil.rmtree(path)


def read(folder: Path) -> Curves:
    """TensorBoard's scalars of all starts; each start counts up to the iteration of the next one."""
    starts = sorted(int(path.name) for path in folder.iterdir())
    curves: Curves = {}
    for start, end in zip(starts, [*starts[1:], math.inf], strict=True):
        for name, values in _scalars(folder / str(start)).items():
            curves.setdefault(name, []).extend(value for value in values if value[0] <= end)
    return curves


def thin(values: list[list[float]], num_points: int) -> list[list[float]]:
    """Means over ``num_points`` equal stretches, each at its last iteration."""
    size = max(1, math.ceil(len(values) / num_points))
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    return [[part[-1][0], round(sum(value for _, value in part) / len(part), 5)] for part in parts]


def _scalars(folder: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [[event.step, event.value] for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
