"""Module state that keeps its dtype and values when a model is cast, moved or wrapped."""

from collections.abc import Callable, Iterable
from itertools import islice

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
            moved = _with_dtype(fn(original), original)
            # ``to_empty`` leaves memory as it is, and no checkpoint fills accumulators.
            setattr(self, name, torch.zeros_like(moved) if original.is_meta and not moved.is_meta else moved)
        return self


class HostCopy:
    """A copy on the host of integer buffers of a module, so that reading them does not wait for the device.

    Other code may write the buffers: a loaded checkpoint, a broadcast, an averaged model. Not every such write can be
    noticed, so :func:`reread` reads them again at the start of each step, and :meth:`forget` when a module changes
    between training and evaluation. Buffers on the CPU are always read.

    Args:
        module: module that holds the buffers.
        names: names of the buffers.
    """

    def __init__(self, module: torch.nn.Module, *names: str) -> None:
        self._module, self._names = module, names
        self._written: tuple | None = None
        self._values: list[int] = []

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The buffers, in their order."""
        return [self._module._buffers[name] for name in self._names]

    def flat(self) -> torch.Tensor:
        """The values of all buffers, one after another, on their device."""
        return torch.cat([buffer.flatten() for buffer in self.buffers])

    def read(self) -> list[int]:
        """The values of all buffers, one after another."""
        if self.is_on_cpu() or self._written != self._writes():
            self.note(self.flat().tolist())
        return self._values

    def holds(self, values: list[int]) -> bool:
        """Whether the copy, as last read, has these values."""
        return values == self._values

    def note(self, values: list[int]) -> None:
        """Record that the buffers hold these values now."""
        self._written, self._values = self._writes(), values

    def forget(self) -> None:
        """Make the next read wait for the device."""
        self._written = None

    def is_on_cpu(self) -> bool:
        """Whether the buffers themselves are on the CPU."""
        return all(buffer.device.type == "cpu" for buffer in self.buffers)

    def _writes(self) -> tuple:
        """A value that changes when a buffer is replaced or written by most of torch's operations.

        Collectives and writes to ``.data`` do not count, nor any write to an inference tensor.
        """
        return tuple((one.data_ptr(), None if one.is_inference() else one._version) for one in self.buffers)


def reread(copies: Iterable[HostCopy]) -> None:
    """Read the buffers of several modules again; waits for the device once."""
    copies = [one for one in copies if not one.is_on_cpu()]
    if not copies:
        return
    flat = [one.flat() for one in copies]
    numbers = iter(torch.cat(flat).tolist())
    for one, values in zip(copies, flat, strict=True):
        one.note(list(islice(numbers, values.numel())))


def _with_dtype(value: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    return value if value.dtype == original.dtype else original.to(value.device)
