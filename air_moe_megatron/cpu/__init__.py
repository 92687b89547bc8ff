"""Runs the real Megatron-Core and ``megatron.training.pretrain`` on CPU with gloo, only when asked.

Megatron addresses the device through ``torch.cuda``. While CPU mode is on, ``enable()`` has put stand-ins there: every
CUDA device name or index means the CPU, streams and events are empty, and CUDA's random generator is torch's default
CPU generator. ``ADAPTATIONS`` names every attribute that changes; nothing else does. ``disable()`` restores each one.

    python -m air_moe_megatron.cpu pretrain_gpt.py ARGS...
    torchrun --nproc-per-node 2 -m air_moe_megatron.cpu pretrain_gpt.py ARGS...

Not changed:
- ``torch.cuda.is_available()`` and ``Tensor.is_cuda`` stay False, and ``tensor.device`` stays ``cpu``.
- No flag is added to the command line. ``REQUIRED_FLAGS`` lists the flags that a CPU run needs, and
  ``with_required_flags`` adds them on request.
- No kernel is emulated: Transformer Engine, Apex, fused kernels, CUDA graphs, grouped GEMM, Megatron-FSDP and
  everything that needs them (context parallelism, for one) stay unavailable.
- What Megatron cannot do without Transformer Engine or Apex it cannot do here either: resume with the distributed
  optimizer, recompute layer norms alone. Experts on a single rank need --disable-bias-linear, as on a GPU.
- Functions that Megatron compiles with ``torch.compile`` run uncompiled. If their module was first imported in CPU
  mode, they stay uncompiled after ``disable()``.
"""

import importlib
import importlib.metadata
import logging
import os
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch

from air_moe_megatron.compat import SUPPORTED_MEGATRON, version_range
from air_moe_megatron.cpu.adaptations import ADAPTATIONS, Adaptation

logger = logging.getLogger(__name__)

REQUIRED_FLAGS: tuple[str, ...] = (
    *("--transformer-impl", "local"),
    *("--distributed-backend", "gloo"),
    "--use-cpu-initialization",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-dropout-fusion",
    "--no-bias-gelu-fusion",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
    *("--num-workers", "0"),
)
"""Megatron's flags and values that select code paths which exist on a CPU."""

_MISSING = object()


class MissingNameError(ImportError):
    """A name that CPU mode adapts does not exist in the installed torch or megatron-core."""


def _resolve(name: str) -> tuple[Any, str]:
    """The object that holds a dotted name, imported if necessary, and the name's last part."""
    first, *middle, last = name.split(".")
    path, owner = first, importlib.import_module(first)
    for part in middle:
        path = f"{path}.{part}"
        owner = getattr(owner, part) if hasattr(owner, part) else importlib.import_module(path)
    return owner, last


def _get(owner: Any, key: str) -> Any:
    return owner.get(key, _MISSING) if isinstance(owner, MutableMapping) else getattr(owner, key, _MISSING)


def _set(owner: Any, key: str, value: Any) -> None:
    if isinstance(owner, MutableMapping):
        if value is _MISSING:
            owner.pop(key, None)
        else:
            owner[key] = value
    elif value is _MISSING:
        delattr(owner, key)
    else:
        setattr(owner, key, value)


def _missing(name: str) -> MissingNameError:
    package, supported = "megatron-core", version_range(SUPPORTED_MEGATRON)
    if name.startswith("torch."):
        package, supported = "torch", ">= 2.11"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return MissingNameError(f"{name}, which CPU mode adapts, cannot be found: {package} is not installed")
    return MissingNameError(
        f"{name}, which CPU mode adapts, does not exist in {package} {version}; "
        f"air_moe_megatron supports {package} {supported}"
    )


class CPUMode:
    """The handle that ``enable()`` returns. As a context manager it ends CPU mode if that call began it.

    Attributes:
        names: the dotted names that are replaced, in the order of ``ADAPTATIONS``.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []
        self.names: tuple[str, ...] = ()

    def _apply(self, adaptations: Sequence[Adaptation]) -> None:
        try:
            for adaptation in adaptations:
                self._replace(adaptation)
        except BaseException:
            self._restore()
            raise
        self.names = tuple(adaptation.name for adaptation in adaptations)

    def _replace(self, adaptation: Adaptation) -> None:
        try:
            owner, key = _resolve(adaptation.name)
        except ImportError as error:
            raise _missing(adaptation.name) from error
        original = _get(owner, key)
        if original is _MISSING and not adaptation.optional:
            raise _missing(adaptation.name)
        # An attribute that a class inherits is restored by removal. A staticmethod is put back as a staticmethod.
        own = vars(owner).get(key, _MISSING) if isinstance(owner, type) else original
        replacement = adaptation.build(original)
        self._undo.append((owner, key, own))
        _set(owner, key, replacement)

    def _restore(self) -> None:
        while self._undo:
            owner, key, own = self._undo.pop()
            _set(owner, key, own)
        self.names = ()

    def __enter__(self) -> "CPUMode":
        return self

    def __exit__(self, *exc: Any) -> None:
        if _active is self:
            disable()


_active: CPUMode | None = None  # the marker that makes a second enable() harmless


def is_enabled() -> bool:
    """Whether CPU mode is on in this process."""
    return _active is not None


def enable(force: bool = False) -> CPUMode:
    """Turn CPU mode on for this process. A second call changes nothing.

    Imports megatron.core and megatron.training. Not safe while other threads use torch.

    Args:
        force: turn it on even if CUDA is available.
    Returns:
        A handle that may be used in a ``with`` statement, which turns CPU mode off at its end. If CPU mode was already
        on, the handle leaves it on.
    Raises:
        RuntimeError: if CUDA is available and ``force`` is False.
        MissingNameError: if a name in ``ADAPTATIONS`` does not exist; nothing is changed then.
    """
    global _active
    if _active is not None:
        return CPUMode()
    if torch.cuda.is_available() and not force:
        raise RuntimeError(
            "CPU mode replaces torch.cuda for the whole process, and CUDA is available here; "
            "hide the devices (CUDA_VISIBLE_DEVICES=) or call enable(force=True)"
        )
    # At the first use of such a context torch looks up which functions it changes: the original ones.
    with torch.device("cpu"):
        torch.empty(0)
    mode = CPUMode()
    mode._apply(ADAPTATIONS)
    _active = mode
    logger.info("CPU mode is on: %d names adapted", len(mode.names))
    return mode


def disable() -> None:
    """Turn CPU mode off: every name in ``ADAPTATIONS`` is restored. Harmless if CPU mode is off."""
    global _active
    if _active is not None:
        _active._restore()
        _active = None


def with_required_flags(argv: Sequence[str]) -> list[str]:
    """Return ``argv`` with all missing ``REQUIRED_FLAGS`` appended.

    A flag that the user gave, as ``--flag value`` or ``--flag=value``, is kept whatever its value.

    Args:
        argv: Megatron's arguments, without the program's name.
    """
    given = {argument.split("=", 1)[0] for argument in argv}
    added: list[str] = []
    keep = False
    for token in REQUIRED_FLAGS:
        if token.startswith("--"):
            keep = token not in given
        if keep:
            added.append(token)
    return [*argv, *added]


def set_rendezvous_defaults() -> None:
    """Let a process that no launcher started form a world of one rank.

    Megatron reads its rendezvous from the environment, where torchrun writes it. If MASTER_ADDR is absent, it is set,
    and MASTER_PORT is set to 0, so that the system chooses the port when the store begins to listen. A port chosen here
    could be taken by another process before that.
    """
    if "MASTER_ADDR" not in os.environ:
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
