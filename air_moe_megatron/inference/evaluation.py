"""Measure a trained model on data: perplexity, bits per byte, and how its routers route."""

import argparse
import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import pandas
import torch
from megatron.core import mpu
from megatron.core.transformer.moe.router import TopKRouter
from tqdm import tqdm

from air_moe_megatron.command import console
from air_moe_megatron.command.checkpoints.saving import check_writable
from air_moe_megatron.diagnostics.health import listed_share_of, load_metrics_of
from air_moe_megatron.diagnostics.recall import recall
from air_moe_megatron.inference import restore
from air_moe_megatron.inference.data import TokenStream, Windows, microbatches, num_microbatches, read, require_paths
from air_moe_megatron.inference.forwards import run_forwards
from air_moe_megatron.inference.text import Tokenizer, tokenizer_of
from air_moe_megatron.process_groups import process_groups_released, sum_over_ranks
from air_moe_megatron.routers import AIRRouter, find_routers
from air_moe_megatron.routers.air import SAMPLE_SIZE, sample_step
from air_moe_megatron.routers.base import CompactRouter
from air_moe_megatron.routers.losses import layer_of
from air_moe_megatron.routers.sharded import ShardedRoutes

_MAX_SAMPLED = 4096
"""How many tokens of a data set get exact scores, per layer and rank."""


@dataclass(frozen=True)
class Metrics:
    """The measurements on one data set."""

    path: str
    tokens: int  # predicted ones that count
    loss: float  # nats per token
    perplexity: float
    bytes: int | None
    bits_per_byte: float | None
    layers: list[dict[str, Any]]  # see :meth:`RoutingMeter.metrics`


class RoutingMeter:
    """Measures a router of any type while a model is evaluated. The router does not change.

    It counts the tokens of each expert. For AIR routers it also samples tokens and measures their recall against exact
    scores of all experts: ``4 * tokens * E * H`` FLOPs, for up to 64 tokens of a microbatch and 4,096 in all.

    Args:
        router: Megatron's or ours.
    """

    def __init__(self, router: TopKRouter) -> None:
        self.router = router
        self.num_experts = router.config.num_moe_experts
        self.num_windows: int | None = None
        """How many windows of the current microbatch count, the first ones; None means all."""
        self.loads: torch.Tensor | None = None  # [E] int64
        self.recalls: list[tuple[float, float, int]] = []  # means over a sample of tokens, and how many it stands for
        self.num_sampled = 0
        self._hook = router.register_forward_hook(self._measure)

    def remove(self) -> None:
        """Take the meter off the router."""
        self._hook.remove()

    @torch.no_grad()
    def _measure(self, router: TopKRouter, args: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        probs, chosen = output  # [T, K] probs and ids with compact dispatch, otherwise [T, E] probs and routing map
        if isinstance(chosen, ShardedRoutes):
            chosen = chosen.topk_ids
        elif chosen.dtype == torch.bool:  # a map may also have experts that only fill up a token's K, with prob 0
            chosen = chosen & (probs > 0)
        num_windows = args[0].shape[1]  # tokens are [sequence, windows, H]
        counted = num_windows if self.num_windows is None else self.num_windows
        chosen = chosen.unflatten(0, (-1, num_windows))[:, :counted].flatten(0, 1)
        if chosen.dtype == torch.bool:
            loads = chosen.sum(dim=0)
        else:
            loads = torch.bincount(chosen[chosen >= 0].long(), minlength=self.num_experts)
        self.loads = loads if self.loads is None else self.loads + loads
        # This depends on the number of forwards only, because the ranks of a sharded router must sample together.
        if isinstance(router, AIRRouter) and self.num_sampled < _MAX_SAMPLED:
            self._sample(router, args[0][:, :counted] if counted else args[0], counted > 0)

    def _sample(self, router: AIRRouter, hidden: torch.Tensor, is_counted: bool) -> None:
        """Measure some of a microbatch's tokens, which stand for all of them in the mean."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        sampled = tokens[:: sample_step(tokens.shape[0], hidden.shape[1])]
        self.recalls.append((*recall(router, router.sample_of(sampled)), tokens.shape[0] * is_counted))
        self.num_sampled += SAMPLE_SIZE

    def metrics(self) -> dict[str, Any]:
        """Metrics over all ranks of the pipeline stage. Communicates within it, and waits for the device.

        Returns:
            layer, as :func:`layer_of` numbers it; router (its type), experts, topk; experts_used, a share;
            imbalance_factor, 1 if all experts get the same; rank_imbalance, the load of the most loaded expert-parallel
            rank over the mean; for AIR routers also the shares experts_listed, mass_recall and topk_recall.
        """
        router, group = self.router, self.router.tp_dp_cp_group
        loads = sum_over_ranks(self.loads, group)
        metrics = {
            "layer": layer_of(router),
            "router": router.router_type if isinstance(router, CompactRouter) else "topk",
            "experts": self.num_experts,
            "topk": router.topk,
            **load_metrics_of(loads, router.config.expert_model_parallel_size),
        }
        if isinstance(router, AIRRouter):
            mass, topk, counts = torch.tensor(self.recalls, dtype=torch.float64, device=self.loads.device).unbind(dim=1)
            sums = torch.stack(((mass * counts).sum(), (topk * counts).sum(), counts.sum()))
            mass, topk, count = sum_over_ranks(sums, group).tolist()
            metrics |= {
                "experts_listed": float(listed_share_of(router)),
                "mass_recall": mass / count,
                "topk_recall": topk / count,
            }
        return metrics


def meters_of(model: Sequence[torch.nn.Module]) -> list[RoutingMeter]:
    """Put a meter on each router of a model."""
    return [RoutingMeter(router) for router in find_routers(model, TopKRouter)]


@torch.no_grad()
def evaluate(
    model: list[torch.nn.Module],
    stream: TokenStream,
    eod: int,
    args: argparse.Namespace,
    progress: Callable[[Iterator], Iterator] = iter,
) -> Metrics:
    """Measure a model on a data set; each token but the first is predicted once.

    The loss is that of training without the balancing losses and ``eod_mask_loss``. Communicates; every rank must call
    it.

    Args:
        model: in evaluation mode, as ``restore.build_and_load`` returns it.
        stream: the data set.
        eod: id of the end of a document.
        args: as ``restore.complete_arguments`` returns them.
        progress: wraps the loop over microbatches, such as tqdm.
    Returns:
        the metrics, the same on all ranks.
    """
    windows = Windows(stream.tokens, eod, args)
    rank, num_ranks = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    batches = microbatches(windows, args.micro_batch_size, rank, num_ranks)
    meters = meters_of(model)
    sums = torch.zeros(2, dtype=torch.float64, device=next(model[0].parameters()).device)  # nats, tokens
    for number in progress(range(num_microbatches(windows, args.micro_batch_size, num_ranks))):
        for meter in meters:  # microbatches beyond the last window repeat windows, which do not count
            first = (number * num_ranks + rank) * args.micro_batch_size
            meter.num_windows = min(max(len(windows) - first, 0), args.micro_batch_size)
        for loss in run_forwards(model, batches, args):  # only the last pipeline stage has any
            sums += loss["lm loss"].double()
    if mpu.get_tensor_model_parallel_rank() != 0:
        sums.zero_()  # it is the same loss as on tensor-parallel rank 0
    nats, count = sum_over_ranks(sums, torch.distributed.group.WORLD).tolist()
    layers = _gather([meter.metrics() for meter in meters])
    for meter in meters:
        meter.remove()
    loss = nats / count
    return Metrics(
        stream.path,
        int(count),
        loss,
        math.exp(min(loss, 700.0)),
        stream.num_bytes,
        nats / math.log(2) / stream.num_bytes if stream.num_bytes else None,
        layers,
    )


def _gather(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers of all pipeline stages, in their order."""
    every_rank = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every_rank, layers)
    found = {layer["layer"]: layer for layers_of_rank in every_rank for layer in layers_of_rank}
    return [found[number] for number in sorted(found)]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``python -m air_moe_megatron.evaluate``."""
    group = parser.add_argument_group(title="evaluate")
    group.add_argument("--json", metavar="FILE", help="Also write the metrics to this file.")
    group.add_argument("--max-tokens", type=int, help="Largest number of tokens to read of each data set.")


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before the model is built.

    Raises:
        ValueError: naming the flag, its value and the rule.
    """
    require_paths(args)
    for flag, given in (
        ("--sft", args.sft),
        ("--dataloader-inter-document-masking", args.dataloader_inter_document_masking),
    ):
        if given:
            raise ValueError(f"{flag} of the checkpoint is not supported: its samples are documents, not windows")
    if args.eod_mask_loss:
        raise ValueError("--eod-mask-loss must be left out: every token but the first of the data counts")
    if args.max_tokens is not None and args.max_tokens < 2:
        raise ValueError(f"--max-tokens ({args.max_tokens}) must be at least 2")
    if args.json:
        folder = Path(args.json).absolute().parent
        if not folder.is_dir():
            raise ValueError(f"--json '{args.json}': the folder does not exist")
        if os.path.isdir(args.json):
            raise ValueError(f"--json '{args.json}' must name a file: it is a folder")
        check_writable(f"--json '{args.json}'", str(folder))


def run(screen: TextIO) -> None:
    """Parse the command line, load the checkpoint, and print what was measured.

    Args:
        screen: where rank 0 prints it.
    Raises:
        SystemExit: if the command line, the checkpoint or the data cannot work; one line says why.
    """
    with contextlib.ExitStack() as stack:
        with console.refusals():
            command = restore.read_command_line(add_flags)
            args, ranks = restore.complete_arguments(command), command.ranks
            check(args)
            tokenizer: Tokenizer = tokenizer_of(args)
            streams: list[TokenStream] = []
            ranks.check(
                "data", lambda: streams.extend(read(path, tokenizer, args, args.max_tokens) for path in args.data_path)
            )
            stack.enter_context(process_groups_released())
            model = restore.build_and_load(args, ranks)
        found = []
        for stream in streams:
            bar = tqdm if ranks.rank == 0 else iter
            found.append(evaluate(model, stream, tokenizer.eod, args, bar))
        if ranks.rank == 0:
            screen.write(format_metrics(args.load, args.iteration, found))
            screen.flush()
            if args.json:
                content = {"checkpoint": args.load, "iteration": args.iteration, "data": [asdict(one) for one in found]}
                Path(args.json).write_text(json.dumps(content, indent=2) + "\n")


_SHARES = ("experts_used", "experts_listed", "mass_recall", "topk_recall")


def format_metrics(checkpoint: str, iteration: int, found: Sequence[Metrics]) -> str:
    """Format tables: one row per data set, then for each data set one row per layer with experts."""
    rows = [
        {
            "data": one.path,
            "tokens": f"{one.tokens:,}",
            "nats per token": f"{one.loss:.4f}",
            "perplexity": f"{one.perplexity:.3f}",
            "bytes": "-" if one.bytes is None else f"{one.bytes:,}",
            "bits per byte": "-" if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}",
        }
        for one in found
    ]
    parts = [f"{checkpoint}, iteration {iteration}", pandas.DataFrame(rows).to_string(index=False)]
    for one in found:
        if one.layers:
            table = pandas.DataFrame(one.layers)
            for name in table.columns:
                kind = "{:.1%}" if name in _SHARES else "{:.3f}" if name.endswith(("factor", "imbalance")) else "{}"
                table[name] = ["-" if pandas.isna(value) else kind.format(value) for value in table[name]]
            table.columns = [name.replace("topk_recall", "top-k recall").replace("_", " ") for name in table.columns]
            parts += [f"routing on {one.path}", table.to_string(index=False)]
    return "\n\n".join(parts) + "\n"
