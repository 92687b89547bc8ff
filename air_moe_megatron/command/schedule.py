"""Schedules of learning rate, weight decay and microbatches, as flags describe them, and which Megatron would refuse.

Megatron asserts the same rules when model and optimizer exist, or at the first step, and names no flag.
"""

import argparse
from typing import Any

from air_moe_megatron.command.console import flag_of
from air_moe_megatron.config import Problems


def invalid_schedules(args: argparse.Namespace) -> Problems[None]:
    """Yield a ValueError for each flag whose schedule Megatron would refuse, with its value and the rule."""
    if args.skip_train:
        return
    unit, length = _length(args)
    if length is None:
        yield ValueError("--train-iters or --train-samples must be given, or --skip-train to evaluate only")
        return
    if length < 1:
        yield ValueError(f"--train-{unit} ({length}) must be at least 1; to evaluate only there is --skip-train")
        return
    yield from _invalid_learning_rates(args)
    yield from _invalid_decay(args, unit, length)
    start, end = args.start_weight_decay, args.end_weight_decay  # the parser does not derive them from --weight-decay
    if start is not None and end is not None and not 0.0 <= start <= end:
        yield ValueError(
            f"--end-weight-decay ({end}) must be at least --start-weight-decay ({start}), and both at least 0; "
            f"--weight-decay ({args.weight_decay}) sets both if they are not given"
        )
    yield from _invalid_microbatches(args)


def _length(args: argparse.Namespace) -> tuple[str, int | None]:
    """The length of the run, and whether it is counted in iterations or samples."""
    unit = "iters" if getattr(args, "train_samples", None) is None else "samples"
    return unit, getattr(args, f"train_{unit}", None)


def _invalid_learning_rates(args: argparse.Namespace) -> Problems[None]:
    if args.lr is None:
        yield ValueError("--lr must be given")
        return
    if args.min_lr < 0.0:
        yield ValueError(f"--min-lr ({args.min_lr}) must not be negative")
    if not args.lr_warmup_init <= args.lr:
        yield ValueError(f"--lr-warmup-init ({args.lr_warmup_init}) must not exceed --lr ({args.lr})")


def _invalid_decay(args: argparse.Namespace, unit: str, length: int) -> Problems[None]:
    name = f"lr_decay_{unit}"
    given = getattr(args, name)
    flag, decay = (f"--train-{unit}", length) if given is None else (flag_of(name), given)
    if decay < 1:
        yield ValueError(f"{flag} ({decay}) must be at least 1")
        return
    fraction, warmup = args.lr_warmup_fraction, getattr(args, f"lr_warmup_{unit}")
    if fraction is not None and not fraction < 1.0:
        yield ValueError(f"--lr-warmup-fraction ({fraction}) must be below 1")
    elif fraction is None and not warmup < decay:
        yield ValueError(f"--lr-warmup-{unit} ({warmup}) must be below {flag} ({decay}), where the rate ends to decay")
    wsd = getattr(args, f"lr_wsd_decay_{unit}")
    if args.lr_decay_style == "WSD" and wsd is None:
        yield ValueError(f"--lr-decay-style (WSD) needs --lr-wsd-decay-{unit}, the length of its decay")


def _invalid_microbatches(args: argparse.Namespace) -> Problems[None]:
    """Yield an error if an interleaved pipeline has too few microbatches. Nothing before the arguments are complete."""
    is_interleaved = getattr(args, "virtual_pipeline_model_parallel_size", None) is not None
    if not is_interleaved or args.step_batch_size_schedule is not None:
        return
    stages = args.pipeline_model_parallel_size
    group = args.microbatch_group_size_per_vp_stage or stages
    number = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    if group < stages:
        yield ValueError(
            f"--microbatch-group-size-per-virtual-pipeline-stage ({group}) must be at least "
            f"--pipeline-model-parallel-size ({stages})"
        )
    elif number < group or 0 < number % group < stages:
        yield ValueError(
            f"--global-batch-size ({args.global_batch_size}) makes {number} microbatches: interleaved pipeline stages "
            f"take groups of {group}, and a last group of at least --pipeline-model-parallel-size ({stages})"
        )


def schedule_of(args: argparse.Namespace) -> dict[str, Any]:
    """The values by which Megatron compares schedules, as ``get_optimizer_param_scheduler`` makes them.

    Steps are counted in samples. Empty if the values cannot be determined.
    """
    unit, length = _length(args)
    batch = getattr(args, "global_batch_size", None)
    if length is None or batch is None:
        return {}
    step = batch if unit == "iters" else 1
    decay = getattr(args, f"lr_decay_{unit}", None)
    decay = step * (length if decay is None else decay)
    fraction = getattr(args, "lr_warmup_fraction", None)
    warmup = step * getattr(args, f"lr_warmup_{unit}", 0) if fraction is None else fraction * decay
    plain = ("lr", "min_lr", "lr_decay_style", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style")
    return {name: getattr(args, name, None) for name in plain} | {
        "length": step * length,
        "decay": decay,
        "warmup": warmup,
    }
