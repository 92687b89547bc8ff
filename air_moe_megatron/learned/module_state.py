"""Statistics of a module that survive when a model is cast, moved or wrapped."""

from collections.abc import Callable

import torch


class PreservedState(torch.nn.Module):
    """A module whose statistics survive what frameworks do to a model.

    Buffers keep dtype and values in a cast. Megatron's ``Float16Module`` and ``model.bfloat16()`` round every floating
    buffer, and a rounded statistic cannot be restored.

    Accumulators (:meth:`add_accumulator`) hold what one rank has summed up. They are no buffers, because
    ``torch.nn.parallel.DistributedDataParallel`` overwrites every buffer with that of rank 0 in each forward. They move
    with the module and keep their dtype. Checkpoints do not hold them.
    """

    def add_accumulator(self, name: str, value: torch.Tensor) -> None:
        """Make a tensor an accumulator of the module; it replaces a buffer of the same name."""
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
    """Integer buffers of a module, known on the host.

    The device is waited for only where something else has written a buffer since: a loaded checkpoint, a broadcast, an
    averaged model.

    Args:
        names: of the buffers.
    """

    def __init__(self, *names: str) -> None:
        self._names = names
        self._written: tuple | None = None
        self._values: list[int] = []

    def read(self, module: torch.nn.Module) -> list[int]:
        """The numbers of all buffers, one after another."""
        if self._written != self._writes(module):
            self.note(module, [number for name in self._names for number in module._buffers[name].tolist()])
        return self._values

    def note(self, module: torch.nn.Module, values: list[int]) -> None:
        """Take it that the buffers hold these numbers now."""
        self._written, self._values = self._writes(module), values

    def _writes(self, module: torch.nn.Module) -> tuple:
        """Changes when a buffer is replaced or written in place. Tensors of inference mode do not count writes."""
        buffers = [module._buffers[name] for name in self._names]
        return tuple((buffer.data_ptr(), None if buffer.is_inference() else buffer._version) for buffer in buffers)


def _with_dtype(value: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    return value if value.dtype == original.dtype else original.to(value.device)
