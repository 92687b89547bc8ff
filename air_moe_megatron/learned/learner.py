"""Learner, the base class of codebook and norms, which learn from each global batch without gradients.

Learners of the same kind in several layers are updated as one batch. So one kernel launch serves several layers, and
the time hardly depends on their number.
"""

from collections.abc import Iterable, Sequence
from itertools import batched
from typing import Any, Self

import torch

from air_moe_megatron.learned.module_state import HostCopy, PreservedState

_NUMBERS_OF_BATCH = 2**23  # most statistics in a batch of several learners: 32 MiB for each copy


class Learner(PreservedState):
    """Statistics of one router that are summed over ranks and applied once per successful step.

    In a step, ``accumulate`` runs in the forward of each microbatch, ``discard`` when the step is attempted again, and
    :func:`apply_updates` after the step, with the sums over all ranks. All tensors are fp32 or wider, or integer,
    whatever the dtype of the model. Buffers are equal on all ranks.

    Args:
        shape: shape of the statistics.
    """

    title: str
    """Name of the learner in log lines."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("num_updates", torch.zeros(1, dtype=torch.int64))
        self.add_accumulator("statistics", torch.zeros(shape, dtype=torch.float32))
        self.on_host = HostCopy(self, "num_updates")
        self.on_host.note([0])

    @property
    def updates_on_host(self) -> int:
        """Number of updates so far; waits for the device only after other code has written the buffer."""
        return self.on_host.read()[0]

    def count_update(self) -> None:
        """Add one to the number of updates."""
        num_updates = self.updates_on_host + 1
        self.num_updates += 1
        self.on_host.note([num_updates])

    def discard(self) -> None:
        """Forget what was accumulated since the last update."""
        self.statistics.zero_()

    def batch_key(self) -> tuple:
        """Key of this learner, the same on every rank; learners with equal keys may learn as one batch.

        Raises:
            ValueError: if other code has put a narrower buffer in the place of one in fp32.
        """
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.is_floating_point() and buffer.dtype.itemsize < 4:
                raise ValueError(
                    f"{self.title}: {name} is {buffer.dtype}, and what is learned must be fp32 or wider: FSDP's "
                    "MixedPrecision needs buffer_dtype None, and load_state_dict must not assign other dtypes"
                )
        return type(self), self.statistics.shape, self.updates_on_host

    def drop_note(self) -> str:
        """Text that the log appends to the warning about a dropped update; may wait for the device."""
        return ""

    @staticmethod
    def num_tokens(statistics: torch.Tensor) -> torch.Tensor:
        """[N] number of tokens in the statistics [N, ...] of N learners."""
        raise NotImplementedError

    @staticmethod
    def learn(learners: Sequence[Self], statistics: torch.Tensor) -> None:
        """Update N learners with the same key from statistics [N, ...], all finite and with a token or more each."""
        raise NotImplementedError

    def drop(self) -> None:
        """Handle a global batch whose statistics are not finite: nothing is learned from it."""

    def apply_update(self, statistics: torch.Tensor, is_finite: bool, has_tokens: bool = True) -> None:
        """Call :func:`apply_updates` for this learner alone."""
        apply_updates([self], [statistics], [(is_finite, has_tokens)])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.discard()  # what was accumulated belongs to the state before loading


def batches_of(learners: Iterable[Learner]) -> list[list[Learner]]:
    """Group learners by key; the grouping is the same on every rank."""
    batches = {}
    for learner in learners:
        batches.setdefault(learner.batch_key(), []).append(learner)
    return list(batches.values())


def apply_updates(
    learners: Sequence[Learner], statistics: Sequence[torch.Tensor], states: Sequence[tuple[bool, bool]]
) -> list[Learner]:
    """Update learners of one key from a global batch, each if its statistics are finite and have at least one token.

    Args:
        learners: N learners with the same ``batch_key``.
        statistics: N tensors of statistics, summed over all ranks.
        states: for each learner, whether its statistics are finite and whether they have a token; the same on every
            rank.
    Returns:
        the learners that lost the batch because a statistic is not finite.
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
    """Stack the buffers of N learners: for each name, one tensor [N, ...]."""
    return [torch.stack([getattr(learner, name) for learner in learners]) for name in names]


def store(learners: Sequence[Learner], **values: torch.Tensor) -> None:
    """Write values [N, ...] into the buffers of N learners."""
    for name, value in values.items():
        for learner, own in zip(learners, value, strict=True):
            getattr(learner, name).copy_(own)
