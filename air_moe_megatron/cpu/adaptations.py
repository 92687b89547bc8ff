"""The names that CPU mode replaces, their replacements, and the reasons. Nothing happens on import."""

import contextlib
import functools
import importlib.util
import logging
import os
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


def _names_cuda(device: Any) -> bool:
    """Whether ``device`` (None, index, name or torch.device) means a CUDA device."""
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return type(device) is int  # an index; a bool is not a device


# Replacements. Each builder takes the original and returns its replacement.


def _always(value: Any) -> Callable[[Any], Any]:
    """Builder of a function that always returns ``value``."""
    return lambda original: lambda *args, **kwargs: value


def _value(value: Any) -> Callable[[Any], Any]:
    """Builder of a plain value."""
    return lambda original: value


def _factory(original: Callable) -> Callable:
    """A tensor factory for which CUDA means CPU. It is called often, so it does nothing else."""

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        if "pin_memory" in kwargs:
            del kwargs["pin_memory"]  # pinning needs a driver
        return original(*args, **kwargs)

    return factory


def _tensor_to(original: Callable) -> Callable:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _names_cuda(args[0]):
            args = ("cpu", *args[1:])
        elif "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        return original(self, *args, **kwargs)

    return to


def _tensor_type(original: Callable) -> Callable:
    """Megatron's optimizers sort parameters by ``param.type() == "torch.cuda.FloatTensor"`` and the like."""

    @functools.wraps(original)
    def type_(
        self: torch.Tensor, dtype: torch.dtype | str | None = None, non_blocking: bool = False, **kwargs: Any
    ) -> torch.Tensor | str:
        if dtype is None:
            name = original(self)
            return name.replace("torch.", "torch.cuda.", 1) if self.device.type == "cpu" else name
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return original(self, dtype, non_blocking, **kwargs)

    return type_


def _itself(original: Callable) -> Callable:
    return lambda self, *args, **kwargs: self


def _load(original: Callable) -> Callable:
    @functools.wraps(original)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if map_location is None or _names_cuda(map_location):
            map_location = "cpu"  # also lets a checkpoint that holds CUDA tensors open
        return original(f, map_location, *args, **kwargs)

    return load


def _loader_iter(original: Callable) -> Callable:
    """Keep the random state while a data loader makes an iterator, which draws a seed from the CPU generator.

    In CPU mode CUDA's generator is the same one. A resumed run makes its iterators after it has restored the random
    state, so its dropout would differ from that of a run that never stopped.
    """

    @functools.wraps(original)
    def __iter__(self: torch.utils.data.DataLoader) -> Iterator:
        state = torch.get_rng_state()
        try:
            return original(self)
        finally:
            torch.set_rng_state(state)

    return __iter__


@functools.cache  # torch.distributed and its submodule must keep sharing one function: P2POp compares identities
def _isend(original: Callable) -> Callable:
    """Send an alias: gloo reads the memory after isend returns, when pipeline schedules may have emptied ``.data``.

    The alias shares the storage but not the ``.data`` slot. The returned work keeps the alias until it is done.
    """

    @functools.wraps(original)
    def isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.distributed.Work | None:
        return original(tensor.detach(), *args, **kwargs)

    return isend


def _all_to_all_single(original: Callable) -> Callable:
    """Turn split sizes into lists: Megatron converts sizes on CUDA to numpy, but leaves those on the CPU as tensors."""

    def as_list(sizes: torch.Tensor | list[int] | None) -> list[int] | None:
        return sizes.tolist() if hasattr(sizes, "tolist") else sizes

    @functools.wraps(original)
    def all_to_all_single(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: torch.Tensor | list[int] | None = None,
        input_split_sizes: torch.Tensor | list[int] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.distributed.Work | None:
        return original(output, input, as_list(output_split_sizes), as_list(input_split_sizes), *args, **kwargs)

    return all_to_all_single


def _nothing(*args: Any, **kwargs: Any) -> None:
    """All work on a CPU is done when the call returns, so there is nothing to wait for."""


class _Event:
    """An event that has happened once it is recorded, by the host's clock."""

    wait = synchronize = _nothing

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        return (end._time - self._time) * 1e3


class _Stream:
    """A stream whose work is always done."""

    cuda_stream = 0
    wait_event = wait_stream = synchronize = __exit__ = _nothing

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device, self.priority = torch.device("cpu"), priority

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def query(self) -> bool:
        return True

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record(self)
        return event

    def __enter__(self) -> "_Stream":
        return self


_CURRENT_STREAM = _Stream()
_DEVICE_PROPERTIES = types.SimpleNamespace(
    name="cpu",
    major=10,  # for older architectures Megatron requires CUDA_DEVICE_MAX_CONNECTIONS=1, which is meaningless here
    minor=0,
    total_memory=0,
    multi_processor_count=os.cpu_count() or 1,
)


def _get_rng_state(device: Any = "cuda") -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _generator(original: type[torch.Generator]) -> type:
    """``torch.Generator`` for which CUDA means CPU. It makes torch's own generators."""

    class OfGenerators(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, original)

    class Generator(metaclass=OfGenerators):
        def __new__(cls, device: Any = "cpu") -> torch.Generator:
            return original("cpu" if _names_cuda(device) else device)

    return Generator


def _without_warnings(original: types.ModuleType) -> types.SimpleNamespace:
    """``logging`` for a module whose only warning is expected here: the CPU's generator advances in a CUDA RNG fork."""
    silent = logging.Logger(f"{__name__}.silent", level=logging.CRITICAL + 1)
    return types.SimpleNamespace(**{**vars(original), "getLogger": lambda name=None: silent})


def _without_cuda_check(original: tuple) -> tuple:
    """Defaults of ``initialize_megatron`` with ``allow_no_cuda`` True. Its position differs between versions."""
    from megatron.training.initialize import initialize_megatron

    parameters = initialize_megatron.__code__.co_varnames[: initialize_megatron.__code__.co_argcount]
    names = parameters[-len(original) :]
    return tuple(name == "allow_no_cuda" or value for name, value in zip(names, original, strict=True))


def unless_compiled(compile_helpers: Callable[[], None]) -> Callable[[], None]:
    """Wrap Megatron's ``compile_helpers`` so that it does nothing if the module that it compiles exists.

    Megatron runs ``make`` at every start. The wheel ships the compiled module but no Makefile, so this would end every
    run. A checkout has a Makefile but no compiled module.
    """

    @functools.wraps(compile_helpers)
    def compile_missing_helpers() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            compile_helpers()

    return compile_missing_helpers


def _torch_norm(original: Callable) -> Callable:
    """torch's norms with sequence parallelism: each rank normalizes its own tokens, gradients are summed over ranks.

    Megatron sums the gradients of every parameter marked ``sequence_parallel``. Its own fused norm sets the mark; its
    wrapper of torch's norm refuses instead. The computation needs no change.
    """

    def __new__(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        sequence_parallel = config.sequence_parallel
        config.sequence_parallel = False
        try:
            norm = original(cls, config, *args, **kwargs)
        finally:
            config.sequence_parallel = sequence_parallel
        for parameter in norm.parameters():
            parameter.sequence_parallel = sequence_parallel
        return norm

    return __new__


@dataclass(frozen=True)
class Adaptation:
    """One attribute that CPU mode replaces.

    Args:
        name: dotted name; if the object before the last part is a mapping, the last part is its key.
        build: makes the replacement from the original.
        why: one line.
        optional: the name may be absent and is then created (and removed again).
    """

    name: str
    build: Callable[[Any], Any]
    why: str
    optional: bool = False


# In order of application, which imports Megatron: it must find the compiler off and torch not yet changed.
ADAPTATIONS: tuple[Adaptation, ...] = (
    Adaptation("os.environ.TORCHDYNAMO_DISABLE", _value("1"), "child processes do not compile either", optional=True),
    Adaptation("torch._dynamo.config.disable", _value(True), "torch.compile of fused functions costs minutes on CPU"),
    Adaptation(
        "megatron.training.initialize.initialize_megatron.__defaults__",
        _without_cuda_check,
        "pretrain() insists on CUDA and passes no allow_no_cuda",
    ),
    Adaptation(
        "megatron.training.initialize._warmup_jit_function",
        _always(None),
        "nothing is compiled, and its draws would make the CPU-initialized weights depend on the layout",
    ),
    Adaptation("megatron.core.datasets.utils.compile_helpers", unless_compiled, "the wheel has no Makefile"),
    Adaptation(
        "megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__", _torch_norm, "allows sequence parallelism"
    ),
    *(
        Adaptation(f"megatron.core.tensor_parallel.random.{name}", build, why)
        for name, build, why in (
            ("_lazy_init", _always(None), "there is no CUDA context to make"),
            ("_lazy_call", lambda original: lambda call, **kwargs: call(), "would wait for a CUDA context for ever"),
            ("logging", _without_warnings, "warns at every fork that the CPU's generator moved"),
        )
    ),
    *(
        Adaptation(f"torch.{name}", _factory, "device='cuda' or an index means the CPU")
        for name in (
            *("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like"),
            *("tensor", "as_tensor", "asarray", "scalar_tensor", "arange", "linspace", "logspace", "eye"),
            *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "normal"),
            *("tril_indices", "triu_indices"),
            *("Tensor.new_tensor", "Tensor.new_empty", "Tensor.new_zeros", "Tensor.new_ones", "Tensor.new_full"),
        )
    ),
    Adaptation("torch.Generator", _generator, "Megatron's inference samples with one on the current device"),
    Adaptation("torch.load", _load, "map_location='cuda' means the CPU"),
    Adaptation("torch.Tensor.to", _tensor_to, "to('cuda') means the CPU"),
    Adaptation("torch.Tensor.cuda", _itself, "already there"),
    Adaptation("torch.Tensor.type", _tensor_type, "Megatron compares with the names of CUDA's types"),
    Adaptation("torch.Tensor.pin_memory", _itself, "needs a driver"),
    Adaptation("torch.Tensor.record_stream", _always(None), "no memory is reused across streams"),
    Adaptation("torch.utils.data.DataLoader.__iter__", _loader_iter, "its seed must not come from CUDA's generator"),
    Adaptation("torch.distributed.all_to_all_single", _all_to_all_single, "split sizes must be lists"),
    Adaptation("torch.distributed.isend", _isend, "the sender may drop the data before gloo has read it"),
    Adaptation("torch.distributed.distributed_c10d.isend", _isend, "batch_isend_irecv looks here"),
    Adaptation("torch.accelerator.current_accelerator", _always(None), "a CUDA build answers cuda without a GPU"),
    Adaptation("torch.accelerator.synchronize", _always(None), "nothing to wait for"),
    Adaptation("torch.cuda.Stream", _value(_Stream), "empty streams"),
    Adaptation("torch.cuda.Event", _value(_Event), "events by the host's clock"),
    Adaptation("torch.cuda.stream", lambda original: contextlib.nullcontext, "one stream"),
    Adaptation("torch.cuda.device", lambda original: contextlib.nullcontext, "one device"),
    *(
        Adaptation(f"torch.cuda.{name}", build, why)
        for name, build, why in (
            ("current_device", _always(0), "the CPU has index 0"),
            ("device_count", _always(1), "Megatron sets up its groups and generators only where this is not 0"),
            ("set_device", _always(None), "one device"),
            ("synchronize", _always(None), "nothing to wait for"),
            ("current_stream", _always(_CURRENT_STREAM), "one stream"),
            ("default_stream", _always(_CURRENT_STREAM), "one stream"),
            ("set_stream", _always(None), "one stream"),
            ("is_current_stream_capturing", _always(False), "no graphs"),
            ("get_device_properties", _always(_DEVICE_PROPERTIES), "needs a driver"),
            ("get_device_capability", _always((0, 0)), "needs a driver; no grouped GEMM"),
            ("get_device_name", _always("cpu"), "needs a driver"),
            ("memory_stats", lambda original: lambda device=None: defaultdict(int), "empty where Megatron indexes it"),
            ("reset_peak_memory_stats", _always(None), "needs a driver"),
            ("mem_get_info", _always((0, 0)), "needs a driver"),
            ("nvtx.range_push", _always(0), "absent from CPU builds"),
            ("nvtx.range_pop", _always(0), "absent from CPU builds"),
            ("default_generators", lambda original: (torch.default_generator,), "the CPU's generator"),
            ("get_rng_state", _value(_get_rng_state), "the CPU's generator"),
            ("random.get_rng_state", _value(_get_rng_state), "the CPU's generator, where the RNG tracker looks"),
            ("set_rng_state", _value(_set_rng_state), "the CPU's generator"),
            ("manual_seed", _value(_manual_seed), "the CPU's generator"),
            ("manual_seed_all", _value(_manual_seed), "the CPU's generator"),
        )
    ),
    *(
        Adaptation(f"torch.cuda.{name}", lambda original, name=name: getattr(torch, name), "constructors")
        for name in ("FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor")
    ),
)
"""Everything that CPU mode changes; no other place lists these names."""
