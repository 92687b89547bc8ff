"""Where the time of a step goes, by torch's profiler: a GPU's kernels, or torch's operations on a CPU."""

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import checks
from benchmarks.arguments import positive
from benchmarks.measure import Timing, environment, world
from benchmarks.models import ROUTE, PreparedStep, Sizes, add_sizes, check_square, prepare_step

_CASES = (ROUTE, "AIRMoELayer", "HierarchicalMoELayer", "PEERLayer")


def add_arguments(parser) -> None:
    add_sizes(parser, experts=65_536, hidden=512, tokens=4096, topk=64, ffn=1)
    parser.add_argument("--shown", type=positive, default=12, help="kernels of each case, the slowest first")


def check_arguments(args) -> None:
    """Raise ValueError if PEER cannot have the sizes."""
    if args.ffn != 1:
        raise ValueError(f"--ffn ({args.ffn}) must be 1 for PEER")
    check_square(args.experts)


def run(args) -> list[dict]:
    """Time steps of a router and of layers, forward and backward, and profile the same number of steps.

    The first row of a case is the wall-clock time of the step, the second the sum of its kernels. The difference is
    time in which the device waited for the host.
    """
    sizes, rows = Sizes.of(args), []
    with world() as (device, pg_collection):
        checks.check_router(pg_collection, device)
        checks.check_peer(pg_collection, device)
        for kind in ("AIRMoELayer", "HierarchicalMoELayer"):
            checks.check_layer(kind, pg_collection, device)
        for case in _CASES:
            rows += _rows(case, _checked_step(case, sizes, pg_collection, device).run, args, device)
    return [row | sizes.columns() | {"ffn": sizes.ffn} | environment(device) for row in rows]


def _checked_step(case: str, sizes: Sizes, pg_collection, device: torch.device) -> PreparedStep:
    prepared = prepare_step(case, sizes, pg_collection, device)
    if prepared.air is not None:
        checks.check_lists(prepared.air)
        checks.check_at_size(prepared.air, prepared.hidden)
    return prepared


def _rows(case: str, run: Callable[[], dict[str, float]], args, device: torch.device) -> list[dict]:
    for _ in range(args.warmup):
        run()
    timing = Timing([run()["total"] for _ in range(args.repetitions)])
    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=activities) as found:
        for _ in range(args.repetitions):
            run()
    events = [event for event in found.key_averages() if (event.device_type == DeviceType.CUDA) == is_gpu]
    milliseconds = {
        event.key: (event.self_device_time_total if is_gpu else event.self_cpu_time_total) / 1e3 / args.repetitions
        for event in events
    }
    launches = {event.key: event.count / args.repetitions for event in events}
    slowest = sorted(milliseconds, key=milliseconds.get, reverse=True)[: args.shown]
    return [
        {"case": case, **timing.columns("total"), "launches": "", "repetitions": args.repetitions},
        _row(f"{case}: all kernels", sum(milliseconds.values()), sum(launches.values()), args),
        *(_row(f"{case}: {name[:60]}", milliseconds[name], launches[name], args) for name in slowest),
    ]


def _row(case: str, milliseconds: float, launches: float, args) -> dict:
    figures = {
        "total_ms": round(milliseconds, 3),
        "total_min_ms": "",
        "total_max_ms": "",
        "launches": round(launches, 1),
    }
    return {"case": case, **figures, "repetitions": args.repetitions}
