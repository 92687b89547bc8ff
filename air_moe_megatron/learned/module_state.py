"""Module state that keeps its dtype and values when a model is cast, moved or wrapped."""

from collections.abc import Callable

import torch


class PreservedState(torch.nn.Module):
    """A module whose buffers and accumulators keep dtype and values when the model is cast or wrapped.

    Megatron's ``Float16Module`` and ``model.bfloat16()`` would round every floating-point buffer, and a rounded
    statistic cannot be restored. Here a cast leaves the buffers as they are.

    Accumulators (:meth:`add_accumulator`) hold sums of this rank alone. They are not buffers, because
    ``torch.nn.parallel.DistributedDataParallel`` overwrites every buffer with that of rank 0 in each forward. They move
    with the module and keep their dtype. Checkpoints do not hold them.
    """

    def add_accumulator(self, name: str, value: torch.Tensor) -> None:
        """Register a tensor as an accumulator of the module; it replaces a buffer of the same name."""
        self._buffers.pop(name, None)
        self._non_persistent_buffers_set.discard(name)
        self.__dict__.setdefault("_accumulators", []).append(name)
        setattr(self, name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> torch.nn.Module:
        buffers = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, original in buffers.items():
            self._buffers[name] = _with_dtype(self._buffers[name], original)
        for name in self.__dict__.get("_accumulators", ()):
            original = getattr(self, name)
            setattr(self, name, _with_dtype(fn(original), original))
        return self


class HostCopy:
    """A copy on the host of integer buffers of a module.

    :meth:`read` waits for the device only if other code has written a buffer since the last :meth:`note`: a loaded
    checkpoint, a broadcast, an averaged model.

    Args:
        names: names of the buffers.
    """

    def __init__(self, *names: str) -> None:
        self._names = names
        self._written: tuple | None = None
        self._values: list[int] = []

    def read(self, module: torch.nn.Module) -> list[int]:
        """The values of all buffers, one after another."""
        if self._written != self._writes(module):
            self.note(module, [number for name in self._names for number in module._buffers[name].tolist()])
        return self._values

    def note(self, module: torch.nn.Module, values: list[int]) -> None:
        """Record that the buffers hold these values now."""
        self._written, self._values = self._writes(module), values

    def _writes(self, module: torch.nn.Module) -> tuple:
        """A value that changes when a buffer is replaced or written in place; inference tensors do not count writes."""
        buffers = [module._buffers[name] for name in self._names]
        return tuple((buffer.data_ptr(), None if buffer.is_inference() else buffer._version) for buffer in buffers)


def _with_dtype(value: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    return value if value.dtype == original.dtype else original.to(value.device)
