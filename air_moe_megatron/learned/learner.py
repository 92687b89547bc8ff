"""The base of codebook and norms, which learn from each global batch without gradients.

The layers' learners of one kind learn as a batch: a kernel then serves several layers, and their number hardly counts.
"""

from collections.abc import Iterable, Sequence
from itertools import batched
from typing import Any, Self

import torch

from air_moe_megatron.learned.module_state import HostCopy, PreservedState

_NUMBERS_OF_BATCH = 2**23  # of the statistics of a batch at most, but one learner at least: 32 MiB for each copy


class Learner(PreservedState):
    """Statistics of one router that are summed over ranks and applied once per successful step.

    Life of a step: ``accumulate`` in the forward of each microbatch, ``discard`` when the step is attempted again,
    :func:`apply_updates` with the sums over all ranks after the step. Whatever the dtype of the model, all tensors are
    fp32 or wider, or integer. Buffers are equal on all ranks.

    Args:
        shape: of the statistics.
    """

    title: str
    """Name of the learner in log lines."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("num_updates", torch.zeros(1, dtype=torch.int64))
        self.add_accumulator("statistics", torch.zeros(shape, dtype=torch.float32))
        self._on_host = HostCopy("num_updates")
        self._on_host.note(self, [0])

    @property
    def updates_on_host(self) -> int:
        """Number of updates so far; waits for the device only where another has written it."""
        return self._on_host.read(self)[0]

    def count_update(self) -> None:
        """Note that a global batch has passed."""
        num_updates = self.updates_on_host + 1
        self.num_updates += 1
        self._on_host.note(self, [num_updates])

    def discard(self) -> None:
        """Forget what was accumulated since the last update."""
        self.statistics.zero_()

    def batch_key(self) -> tuple:
        """Learners with the same key may learn as one batch; the same on every rank."""
        return type(self), self.statistics.shape, self.updates_on_host

    def drop_note(self) -> str:
        """Words that the log adds to the warning of a dropped update; waits for the device."""
        return ""

    @staticmethod
    def num_tokens(statistics: torch.Tensor) -> torch.Tensor:
        """[N] tokens that the statistics [N, ...] of N learners hold."""
        raise NotImplementedError

    @staticmethod
    def learn(learners: Sequence[Self], statistics: torch.Tensor) -> None:
        """Learn from the statistics [N, ...] of N learners with the same key: finite, and of a token or more."""
        raise NotImplementedError

    def drop(self) -> None:
        """Note that a global batch was lost; nothing is learned from it."""

    def apply_update(self, statistics: torch.Tensor, is_finite: bool, has_tokens: bool = True) -> None:
        """As :func:`apply_updates`, of this learner alone."""
        apply_updates([self], [statistics], [(is_finite, has_tokens)])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.discard()  # what was accumulated belongs to the state before


def batches_of(learners: Iterable[Learner]) -> list[list[Learner]]:
    """The learners, those with the same key together; the same on every rank."""
    batches = {}
    for learner in learners:
        batches.setdefault(learner.batch_key(), []).append(learner)
    return list(batches.values())


def apply_updates(
    learners: Sequence[Learner], statistics: Sequence[torch.Tensor], states: Sequence[tuple[bool, bool]]
) -> list[Learner]:
    """Have learners with the same key learn from a global batch, each if its statistics are finite and hold a token.

    Args:
        learners: N, all with the same ``batch_key``.
        statistics: of each, summed over all ranks.
        states: for each whether its statistics are finite, and whether they hold a token; the same on every rank.
    Returns:
        the learners for which the batch was lost, as a statistic is not finite.
    """
    learning, lost = [], []
    for learner, sums, (is_finite, has_tokens) in zip(learners, statistics, states, strict=True):
        if not is_finite:
            learner.drop()
            lost.append(learner)
        elif has_tokens:
            learning.append((learner, sums))
    for batch in batched(learning, max(1, _NUMBERS_OF_BATCH // statistics[0].numel())):
        together, sums = zip(*batch, strict=True)
        together[0].learn(together, torch.stack(sums))
    return lost


def stacked(learners: Sequence[Learner], *names: str) -> list[torch.Tensor]:
    """Of each name, the buffers of N learners as one tensor [N, ...]."""
    return [torch.stack([getattr(learner, name) for learner in learners]) for name in names]


def store(learners: Sequence[Learner], **values: torch.Tensor) -> None:
    """Write values [N, ...] into the buffers of N learners."""
    for name, value in values.items():
        for learner, own in zip(learners, value, strict=True):
            getattr(learner, name).copy_(own)
