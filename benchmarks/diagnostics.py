"""The cost of diagnostics: a measured step of a layer against one that is not measured, spread over an interval."""

import argparse
import contextlib
import tempfile

import torch

from benchmarks import checks, roofline
from benchmarks.arguments import positive
from benchmarks.layer import layer_work
from benchmarks.measure import cpu_clock, is_by_clock, world
from benchmarks.models import (
    Sizes,
    add_sizes,
    air_columns,
    layer_inputs,
    layer_step,
    make_layer,
    warm_up_codebook,
)
from benchmarks.roofline import Work
from benchmarks.timing import Case, time_interleaved


def add_arguments(parser) -> None:
    add_sizes(parser, experts=65_536, hidden=512, tokens=8192, topk=64, ffn=1)
    parser.add_argument("--interval", type=positive, default=100, help="steps between two, as the flag of training")


def run(args) -> list[dict]:
    """Time a step of the whole layer without and with diagnostics, file and snapshot included.

    On a CPU, CPU seconds count. The share refers to the layer's step alone, without attention, optimizer and
    dense layers, so it is larger than the share of a training step.
    """
    from air_moe_megatron.routers.air import SAMPLE_SIZE

    with world() as (device, pg_collection), tempfile.TemporaryDirectory() as folder:
        checks.check_router(pg_collection, device)
        checks.check_layer("AIRMoELayer", pg_collection, device)
        sizes = Sizes.of(args)
        layer = make_layer("AIRMoELayer", sizes, pg_collection, device)
        hidden, grad = layer_inputs(sizes, device)
        warm_up_codebook(layer.router, hidden)
        checks.check_at_size(layer.router, hidden)
        checks.check_lists(layer.router)
        layer.router.keeps_sample = False
        work = layer_work(layer, hidden, sizes)
        scored = Work(4 * SAMPLE_SIZE * args.experts * args.hidden, args.experts * args.hidden * sizes.dtype.itemsize)
        plain, measured = "AIRMoELayer", "AIRMoELayer, measured"
        with _one_microbatch():
            diagnostics = _diagnostics(layer, args, folder)
            cases = {
                plain: Case(lambda: _timed(device, lambda: layer_step(layer, hidden, grad)), work, args.tokens),
                measured: Case(
                    lambda: _timed(device, lambda: _measured_step(diagnostics, layer, hidden, grad)),
                    roofline.together(work, {"diagnostics": scored}),
                    args.tokens,
                ),
            }
            outcome = time_interleaved(cases, args, device)
        extra = outcome.median(measured) - outcome.median(plain)
        share = 100 * extra / args.interval / outcome.median(plain)
        figures = {
            plain: dict.fromkeys(("every_steps", "per_step_ms", "percent_of_step"), ""),
            measured: {
                "every_steps": args.interval,
                "per_step_ms": round(1e3 * extra / args.interval, 3),
                "percent_of_step": round(share, 3),
            },
        }
        columns = sizes.columns() | {"ffn": args.ffn} | air_columns(layer.router)
        return [outcome.row(name, columns, figures[name], by_clock=is_by_clock(device)) for name in cases]


def _timed(device, work) -> dict[str, float]:
    """Seconds of ``work``, which has no phases: on a CPU CPU seconds."""
    start = cpu_clock(device)
    work()
    return {"total": cpu_clock(device) - start}


def _diagnostics(layer, args, folder: str):
    """Diagnostics at every step, for a model that consists of this layer only."""
    from air_moe_megatron.diagnostics import Diagnostics

    of_megatron = dict(
        moe_air_diagnostics_interval=1, train_iters=1, log_interval=2**62, save=folder, tensorboard_dir=None,
        global_batch_size=1, micro_batch_size=1, data_parallel_size=1, seq_length=args.tokens,
        consumed_train_samples=0, skipped_train_samples=0, decrease_batch_size_if_needed=False,
        tokenizer_type=None, tokenizer_model=None, vocab_size=None, padded_vocab_size=None,
    )  # fmt: skip
    return Diagnostics([torch.nn.ModuleList([layer])], argparse.Namespace(**of_megatron), 1)


def _measured_step(diagnostics, layer, hidden, grad) -> None:
    diagnostics.begin_step(1)
    layer_step(layer, hidden, grad)
    diagnostics.finish_step(1, None, None, None)
    if diagnostics.take_unlogged().keys() != {"mass-recall", "top-k-recall"}:
        raise AssertionError("the step was not measured")


@contextlib.contextmanager
def _one_microbatch():
    """Within this context Megatron's number of microbatches, which the count of trained tokens uses, is one."""
    from megatron.core import num_microbatches_calculator as module

    name = "_GLOBAL_NUM_MICROBATCHES_CALCULATOR"  # if the process has parsed flags, it already exists
    before = getattr(module, name)
    setattr(module, name, None)
    module.init_num_microbatches_calculator(0, None, 1, 1, 1)
    try:
        yield
    finally:
        setattr(module, name, before)
