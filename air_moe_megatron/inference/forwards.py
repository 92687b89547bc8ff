"""Forwards of a restored model over batches of tokens, without gradients."""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from air_moe_megatron.command.forward_step import forward_step


def run_forwards(
    model: list[torch.nn.Module],
    batches: Iterator[dict[str, torch.Tensor]],
    args: argparse.Namespace,
    num_microbatches: int = 1,
) -> list[dict[str, Any]]:
    """Run a model on the next microbatches by Megatron's schedule. Every rank must call it; pipelines communicate.

    Args:
        model: Megatron's list of model chunks.
        batches: microbatches of this data-parallel rank, as ``forward_step`` takes them.
        args: Megatron's validated arguments.
        num_microbatches: how many to run.
    Returns:
        what the loss function returns for each microbatch; empty except on the last pipeline stage.
    """
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[batches] * len(model) if len(model) > 1 else batches,
        model=model,
        num_microbatches=num_microbatches,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.decoder_seq_length,
        forward_only=True,
    )
