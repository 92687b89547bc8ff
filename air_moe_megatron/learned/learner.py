"""The base of codebook and running norm, which learn from each global batch without gradients."""

import torch

from air_moe_megatron.learned.module_state import PreservedState


class Learner(PreservedState):
    """Statistics of one router that are summed over ranks and applied once per successful step.

    Life of a step: ``accumulate`` in the forward of each microbatch, ``discard`` when the step is attempted again,
    ``apply_update`` with the sums over all ranks after the step. Whatever the dtype of the model, all tensors are fp32
    or wider, or integer. Buffers are equal on all ranks.

    Args:
        shape: of the statistics.
    """

    title: str
    """Name of the learner in log lines."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("num_updates", torch.zeros(1, dtype=torch.int64))
        self.add_accumulator("statistics", torch.zeros(shape, dtype=torch.float32))

    def discard(self) -> None:
        """Forget what was accumulated since the last update."""
        self.statistics.zero_()

    def apply_update(self, statistics: torch.Tensor, is_finite: bool, has_tokens: bool = True) -> None:
        """Learn from the statistics of a global batch, if they are finite and hold a token.

        Args:
            statistics: summed over all ranks.
            is_finite: whether all of them are; the same on every rank.
            has_tokens: whether any token was counted; the same on every rank.
        """
        if not is_finite:
            self._drop()
        elif has_tokens:
            self._learn(statistics)

    def num_tokens(self, statistics: torch.Tensor) -> torch.Tensor:
        """[] tokens that the statistics hold."""
        raise NotImplementedError

    def drop_note(self) -> str:
        """Words that the log adds to the warning of a dropped update; waits for the device."""
        return ""

    def _learn(self, statistics: torch.Tensor) -> None:
        raise NotImplementedError

    def _drop(self) -> None:
        """Note that a global batch was lost; nothing is learned from it."""
