"""The diagnostics files of a run: where they are, their first line, and writing that survives a failing disk."""

import argparse
import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.object_storage_utils import is_object_storage_path

from air_moe_megatron.config import AIRFields, is_plain_topk

logger = logging.getLogger(__name__)

FORMAT = 1
LINES = "air_diagnostics.jsonl"
"""File with a JSON object per line, to which a resumed run appends."""
SNAPSHOT = "air_codebook.json"
"""File with the newest state of the codebooks."""

_ARGUMENTS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "seq_length"),
    *("hybrid_layer_pattern", "mtp_num_layers", "swiglu", "num_experts", "moe_layer_freq", "moe_ffn_hidden_size"),
    *("moe_shared_expert_intermediate_size", "moe_router_topk", "moe_router_score_function", "moe_router_dtype"),
    *("moe_router_pre_softmax", "moe_router_topk_scaling_factor", "moe_router_enable_expert_bias"),
    *("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_expert_capacity_factor"),
    *("micro_batch_size", "global_batch_size", "train_iters", "train_samples", "log_interval", "seed", "bf16", "fp16"),
    *("world_size", "data_parallel_size", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "context_parallel_size", "sequence_parallel"),
    *("optimizer", "lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "weight_decay", "clip_grad"),
)
"""Megatron's arguments in the first line of a run, beside all our fields."""


def folder_of(args: argparse.Namespace) -> str | None:
    """The folder of ``--save``, else of ``--tensorboard-dir``, if not in object storage; None without either."""
    folders = (args.save, args.tensorboard_dir)
    return next((folder for folder in folders if folder is not None and not is_object_storage_path(folder)), None)


def is_written(args: argparse.Namespace) -> bool:
    """Whether a run makes diagnostics."""
    return bool(args.moe_air_diagnostics_interval) and not args.skip_train and not is_plain_topk(args)


def diagnostics_write_problem(args: argparse.Namespace) -> str | None:
    """Say what keeps this rank from writing the diagnostics, or None. Leaves nothing behind.

    The folder is checked with the checkpoints.
    """
    folder = folder_of(args)
    if not is_written(args) or folder is None or args.rank != args.world_size - 1:
        return None
    path = Path(folder) / LINES
    flag = "--save" if folder == args.save else "--tensorboard-dir"
    remedy = "choose another folder, or add --moe-air-diagnostics-interval 0"
    try:
        if path.exists():
            path.open("ab").close()
    except OSError as error:
        return f"{flag} '{folder}': the diagnostics '{path}' cannot be written: {error.strerror}; {remedy}"
    return None


def run_line(args: argparse.Namespace, now: float, iteration: int, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The first line of a run.

    Args:
        args: Megatron's arguments, with our fields.
        now: seconds since the epoch.
        iteration: the last one before the first step of this process.
        layers: those of all pipeline stages, see ``metrics.describe``.
    """
    names = (*_ARGUMENTS, *(field.name for field in dataclasses.fields(AIRFields)))
    return {
        "kind": "run",
        "format": FORMAT,
        "time": now,
        "iteration": iteration,
        "arguments": {name: getattr(args, name) for name in names if hasattr(args, name)},
        "versions": {
            "air_moe_megatron": _version("air_moe_megatron"),
            "megatron_core": _version("megatron-core"),
            "torch": str(torch.__version__),
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
        "tokenizer": {
            "type": args.tokenizer_type,
            "model": args.tokenizer_model,
            "vocab_size": args.vocab_size or args.padded_vocab_size,
        },
        "layers": layers,
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


class RunFiles:
    """Writes the files of one run, on one rank. If the disk fails, writing ends with one warning; the run goes on.

    Args:
        folder: created if missing.
    """

    def __init__(self, folder: str) -> None:
        self.lines, self.snapshot = Path(folder) / LINES, Path(folder) / SNAPSHOT
        self._is_open = False
        self._has_failed = False

    def append(self, line: dict[str, Any]) -> None:
        """Append a line; numbers that are not finite are left out."""
        self._try(self._append, json.dumps(rounded(line), default=str) + "\n")

    def replace_snapshot(self, content: dict[str, Any]) -> None:
        """Replace the snapshot at once, so that a reader never sees half of one."""
        self._try(self._replace_snapshot, json.dumps(rounded(content)))

    def _try(self, write: Any, text: str) -> None:
        if self._has_failed:
            return
        try:
            write(text)
        except OSError as error:
            self._has_failed = True
            logger.warning(
                "diagnostics are no longer written to '%s': %s; the training goes on", self.lines.parent, error
            )

    def _append(self, text: str) -> None:
        if not self._is_open:
            self.lines.parent.mkdir(parents=True, exist_ok=True)
            if _ends_within_a_line(self.lines):
                text = "\n" + text
            self._is_open = True
        with self.lines.open("a") as file:  # opened anew each time: the folder may be on a network
            file.write(text)

    def _replace_snapshot(self, text: str) -> None:
        draft = self.snapshot.with_suffix(".tmp")
        draft.write_text(text)
        draft.replace(self.snapshot)


def _ends_within_a_line(path: Path) -> bool:
    """Whether the last line is incomplete, because a run was killed while writing it."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def rounded(value: Any) -> Any:
    """Round numbers to six significant digits. Those that are not finite are left out, or None within a list.

    Numbers from 1e6 on are not rounded: times in seconds since the epoch need more digits.
    """
    if isinstance(value, dict):
        kept = {key: rounded(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if not (item is None and isinstance(value[key], float))}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if abs(value) >= 1e6 else float(f"{value:.6g}")
    return value
