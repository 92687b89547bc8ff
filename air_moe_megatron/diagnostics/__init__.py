"""Diagnostics of a training run: metrics of every layer in some steps, for log, TensorBoard, W&B and a file.

``watch.py`` watches the routers during a step, ``metrics.py`` computes metrics from what was seen, ``files.py`` writes
them. docs/health.md documents the metrics and the files.

Communication depends on the step's number only, so it is the same on all ranks. That of the health line is listed in
``health.py``. The diagnostics add:

- after a measured step, over ``tp_dp_cp`` of each pipeline stage: an all-reduce of the expert loads (E int64 for each
  router; shared with the health line if both are due), an all-reduce of fp64 sums (``3 * C + 7`` for each AIR router,
  one for any other), and if token ids are known a gather of them (512 KiB for each AIR router);
- after a measured step, for each sharded AIR router, over its D expert-parallel ranks: all-gathers of at most
  ``64 * D`` tokens, each with P codewords and one number, all-to-alls of ``4 * K + 7`` fp64 numbers for each of these
  tokens, and all-reduces of ``H + 3`` fp32 numbers (``diagnostics.recall.measure``);
- after a measured step and before the first step, with several pipeline stages: an all-gather of Python objects over
  the pipeline of the last rank, which writes.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

from air_moe_megatron.diagnostics.files import LINES, RunFiles, folder_of, run_line
from air_moe_megatron.diagnostics.health import expert_loads, scalar_name, write_scalars
from air_moe_megatron.diagnostics.metrics import RouterSums, describe, layer_metrics, reduce_stage
from air_moe_megatron.diagnostics.observation import CodewordCounter
from air_moe_megatron.diagnostics.snapshot import CodewordRecall, codebook_snapshot, gather_pairs
from air_moe_megatron.diagnostics.watch import StepWatch
from air_moe_megatron.process_groups import gather_from_stages, is_in_writers_pipeline
from air_moe_megatron.routers import AIRRouter, find_routers
from air_moe_megatron.routers.base import CompactRouter
from air_moe_megatron.routers.losses import layer_of

_ATTRIBUTE = "_air_diagnostics"
"""Attribute of the first model chunk that holds its Diagnostics, so that a training loop passes the model only."""


class Diagnostics:
    """Measures the routers of a training run, step by step.

    Every rank must call :meth:`begin_step` and :meth:`finish_step`, even if its pipeline stage has no router. The last
    rank writes: it is in the last pipeline stage, prints Megatron's lines, and has Megatron's writers.

    Args:
        model: Megatron's list of model chunks.
        args: Megatron's arguments, with our fields.
        iteration: number of the first step, counted from 1.
    """

    def __init__(self, model: Sequence[torch.nn.Module], args: argparse.Namespace, iteration: int) -> None:
        self._model, self._args = model, args
        self._routers = sorted(find_routers(model), key=layer_of)
        self._is_writer = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        self._watch: StepWatch | None = None
        self._measured = iteration - 1  # the last step that was measured
        # [E] tokens of each expert that health lines have read since the last diagnostics.
        self._loads = [torch.zeros_like(router.expert_load) for router in self._routers]
        self._lists: dict[CompactRouter, torch.Tensor] = {}  # at the last diagnostics
        self._recall = {router: CodewordRecall(router.sizes.num_clusters) for router in self._air()}
        self._unlogged: dict[str, float] = {}
        self._began, self._seconds, self._losses = 0.0, [], []  # of the steps since the last line
        for router in self._air():
            router.keeps_sample, router.sample = False, None
        self._files = self._open_files()
        layers = _by_layer(gather_from_stages([describe(one, self._tokens_per_batch()) for one in self._routers]))
        if self._files is not None:
            self._files.append(run_line(args, time.time(), iteration - 1, layers))

    @classmethod
    def of(cls, model: Sequence[torch.nn.Module], iteration: int) -> "Diagnostics | None":
        """Return a model's diagnostics, made in the process's first step; None if they are turned off."""
        from megatron.training import get_args

        args = get_args()
        if not args.moe_air_diagnostics_interval:
            return None
        if not hasattr(model[0], _ATTRIBUTE):
            setattr(model[0], _ATTRIBUTE, cls(model, args, iteration))
        return getattr(model[0], _ATTRIBUTE)

    def is_due(self, iteration: int) -> bool:
        """Whether a step, counted from 1, is measured: the last of each interval, and of the training.

        If ``--iterations-to-skip`` skips it, the next step is.
        """
        interval = self._args.moe_air_diagnostics_interval
        return iteration // interval > self._measured // interval or iteration == self._args.train_iters

    def begin_step(self, iteration: int) -> None:
        """Start to watch the routers if the step is measured. Call it before the first attempt at a step."""
        self._began = time.perf_counter()
        if self.is_due(iteration):
            self._watch = StepWatch(self._model, self._routers)

    def finish_step(
        self,
        iteration: int,
        losses: dict[str, torch.Tensor] | None,
        grad_norm: float | None,
        logged_loads: Sequence[torch.Tensor] | None,
    ) -> None:
        """Measure and write what is due. Call it after a step and its updates.

        Args:
            iteration: number of the step, counted from 1.
            losses: means over the global batch, on the last pipeline stage; None or empty if the step was skipped.
            grad_norm: gradient norm before clipping; None if it is unknown.
            logged_loads: for each router the [E] loads that the health line has read; None if no line is due.
        """
        self._seconds.append(time.perf_counter() - self._began)
        if losses and "lm loss" in losses:
            self._losses.append(losses["lm loss"].detach().reshape(()))
        if iteration % self._args.log_interval == 0:
            self._write_step(iteration, grad_norm)
        if logged_loads is not None:
            self._loads = [read + load for read, load in zip(self._loads, logged_loads, strict=True)]
        if self._watch is not None:
            self._measure(iteration, has_read_loads=logged_loads is not None)

    def take_unlogged(self) -> dict[str, float]:
        """Return the recall measured since the last call, if any: means over the AIR layers of all pipeline stages.

        Ranks outside the last rank's pipeline get the means of their own stage.
        """
        taken, self._unlogged = self._unlogged, {}
        return taken

    def _air(self) -> list[AIRRouter]:
        return [router for router in self._routers if isinstance(router, AIRRouter)]

    def _open_files(self) -> RunFiles | None:
        """Print where the files are, and return them on the rank that writes; None elsewhere."""
        from megatron.training import print_rank_last

        folder, interval = folder_of(self._args), self._args.moe_air_diagnostics_interval
        if folder is None:
            print_rank_last(
                f"> routing diagnostics every {interval} steps go into no file: neither --save nor --tensorboard-dir "
                "names a folder"
            )
            return None
        print_rank_last(f"> routing diagnostics every {interval} steps go to '{folder}/{LINES}'")
        return RunFiles(folder) if self._is_writer else None

    def _write_step(self, iteration: int, grad_norm: float | None) -> None:
        """Write a line on the training itself. Waits for the device on the rank that writes."""
        if self._files is not None:
            line: dict[str, Any] = {"kind": "step", "iteration": iteration, "tokens": self._consumed_tokens()}
            line |= {"time": time.time(), "step_seconds": sum(self._seconds) / len(self._seconds)}
            if self._losses:
                line["loss"] = float(torch.stack(self._losses).double().mean())
            if grad_norm is not None:
                line["grad_norm"] = float(grad_norm)
            self._files.append(line)
        self._seconds, self._losses = [], []

    def _measure(self, iteration: int, has_read_loads: bool) -> None:
        """Stop watching a step, and report what was seen and what the routers have counted."""
        step_seconds, seconds, counters = self._watch.end()
        self._watch, self._measured = None, iteration
        layers, codebooks = [], []
        if self._routers:
            loads, self._loads = self._loads, [torch.zeros_like(load) for load in self._loads]
            if not has_read_loads:
                unread = expert_loads(self._routers, reset=False)[0]
                loads = [read + load for read, load in zip(loads, unread, strict=True)]
                self._loads = [-load for load in unread]  # the next health line reads them again
            sums = reduce_stage(self._routers, seconds, counters)
            for router, total, load in zip(self._routers, sums, loads, strict=True):
                layers.append(layer_metrics(router, total, load, self._lists.get(router)))
            codebooks = self._snapshots(dict(zip(self._routers, sums, strict=True)), counters)
            self._lists = {router: router.index.shortlist.clone() for router in self._air()}
        layers, codebooks = (_by_layer(gather_from_stages(found)) for found in (layers, codebooks))
        self._unlogged = _recall_of(layers)
        if self._is_writer:
            self._report(iteration, step_seconds, layers, codebooks)

    def _snapshots(
        self, sums: dict[CompactRouter, RouterSums], counters: dict[CompactRouter, CodewordCounter]
    ) -> list[dict[str, Any]]:
        """Snapshots of this stage's codebooks, for the rank that writes. Every rank of the stage must call it."""
        writer, group = torch.distributed.get_world_size() - 1, self._routers[0].tp_dp_cp_group
        pairs = gather_pairs(counters, writer, group)
        for router, recall in self._recall.items():
            recall.add(sums[router].codeword_recall)
        if not is_in_writers_pipeline():
            return []
        return [
            codebook_snapshot(router, sums[router], recall, pairs.get(router))
            for router, recall in self._recall.items()
        ]

    def _report(
        self, iteration: int, step_seconds: float, layers: list[dict[str, Any]], codebooks: list[dict[str, Any]]
    ) -> None:
        """Write the metrics of all stages, on the rank that writes."""
        from megatron.core import parallel_state

        seconds = sum(layer["routing_seconds"] for layer in layers)
        share = seconds / parallel_state.get_pipeline_model_parallel_world_size() / step_seconds
        for layer in layers:
            scalars = {scalar_name(name): value for name, value in layer.items() if isinstance(value, int | float)}
            del scalars["layer"]
            write_scalars(scalars, f"air/layer_{layer['layer']}", iteration)
        write_scalars({"routing-share": share}, "air", iteration)
        if self._files is None:
            return
        line = {"kind": "diagnostics", "iteration": iteration, "tokens": self._consumed_tokens(), "time": time.time()}
        line |= {"routing_seconds": seconds, "routing_share": share, "layers": layers}
        self._files.append(line)
        if codebooks:
            self._files.replace_snapshot({"iteration": iteration, "layers": codebooks})

    def _tokens_per_batch(self) -> int:
        """Tokens of the current step's global batch, which need not be ``--global-batch-size`` long."""
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        args = self._args
        return args.data_parallel_size * args.micro_batch_size * get_num_microbatches() * args.seq_length

    def _consumed_tokens(self) -> int:
        """Tokens trained on so far, this step included. Megatron adds a step's tokens only after it.

        Samples of ``--iterations-to-skip`` are both consumed and skipped. What ``--decrease-batch-size-if-needed``
        leaves out of a batch is skipped but never consumed.
        """
        args = self._args
        skipped = 0 if args.decrease_batch_size_if_needed else args.skipped_train_samples
        return (args.consumed_train_samples - skipped) * args.seq_length + self._tokens_per_batch()


def _by_layer(stages: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The entries of all pipeline stages, in the order of their layers."""
    return sorted((one for stage in stages for one in stage), key=lambda one: one["layer"])


def _recall_of(layers: list[dict[str, Any]]) -> dict[str, float]:
    """Recall for the health line: means over the layers that have it."""
    measured = [(layer["mass_recall"], layer["topk_recall"]) for layer in layers if "mass_recall" in layer]
    if not measured:
        return {}
    mass, topk = (sum(values) / len(values) for values in zip(*measured, strict=True))
    return {"mass-recall": mass, "top-k-recall": topk}
