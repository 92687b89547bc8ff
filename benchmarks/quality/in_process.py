"""What the studies share that train or measure models in their own process: models, data, observed routers, rows."""

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas
import torch

from benchmarks.quality.flops import config_of
from benchmarks.quality.study import CPU_ENVIRONMENT, Run, load_runs
from benchmarks.train import Trainer

CONSTANT_RATE = {"lr": 2e-3, "weight_decay": 0.1, "adam_beta2": 0.95}
"""Fields of an optimizer. The learning rate lies between the study's highest and lowest, without a schedule, whose
effect would mix in."""


def begin(threads: int) -> None:
    """Set up memory, threads and logging of a process that trains a study's models.

    On a CPU the process restarts itself with the environment of the study's runs, which glibc reads at the start.
    """
    if not torch.cuda.is_available() and not CPU_ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **CPU_ENVIRONMENT})
    logging.basicConfig(format="%(message)s")
    for name in ("benchmarks", "__main__"):  # the command's own module has the latter name
        logging.getLogger(name).setLevel(logging.INFO)
    torch.set_num_threads(threads)


def models(config: dict, experts: int) -> dict[str, Run]:
    """The first run of each variant with ``experts`` experts, in the study's main shape."""
    shape = tuple(config["runs"][0]["shapes"][0])
    found: dict[str, Run] = {}
    for run in load_runs(config):
        is_main = run.corpus == config["corpus"] and (run.topk, run.ffn) == shape
        if run.experts == experts and is_main:
            found.setdefault(run.variant, run)
    if not found:
        raise ValueError(f"--experts ({experts}) must be a size of the study")
    return found


def model_of(config: dict, experts: int, variant: str) -> Run:
    """The run of :func:`models` that a variant has.

    Raises:
        ValueError: if the study has no such size or variant.
    """
    found = models(config, experts)
    if variant not in found:
        raise ValueError(f"variant ({variant!r}) must be one of those with {experts} experts: {', '.join(found)}")
    return found[variant]


def batches(prefix: Path, flags: dict, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """All global batches of a data set, in order: tokens, labels, positions and attention mask."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    num_samples, length = flags["global-batch-size"], flags["seq-length"]
    text = torch.cat([torch.from_numpy(document.astype("int64")) for document in IndexedDataset(str(prefix))])
    text = text[: text.numel() // (num_samples * (length + 1)) * num_samples * (length + 1)]
    positions = torch.arange(length, device=device).expand(num_samples, length)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu(1)  # True: not attended to
    return [
        {"tokens": part[:, :-1], "labels": part[:, 1:], "positions": positions, "mask": mask}
        for part in text.to(device).view(-1, num_samples, length + 1)
    ]


def trainer_of(run: Run, pg_collection, device: torch.device, optimizer: dict | None = None, seed: int = 0) -> Trainer:
    """The model of a run, which has the plugin's layers, and its optimizer; other arguments as those of Trainer."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from air_moe_megatron.routers.hashing import hand_over_token_ids
    from air_moe_megatron.specs import with_air_layers

    flags = run.flags
    by_hash = flags.get("moe-router-type") == "hash" or flags.get("moe-num-hash-layers")
    config = config_of({**flags, "moe-hash-vocab-size": run.vocabulary} if by_hash else flags)
    config = dataclasses.replace(
        config,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        moe_token_dispatcher_type="allgather",
    )
    spec = get_gpt_layer_local_spec(num_experts=run.experts, moe_grouped_gemm=False, normalization="RMSNorm")
    trainer = Trainer(
        config,
        with_air_layers(spec, config),
        (run.vocabulary, flags["seq-length"]),
        pg_collection,
        device,
        optimizer,
        seed,
        position_embedding_type=flags["position-embedding-type"],
        share_embeddings_and_output_weights=not flags.get("untie-embeddings-and-output-weights", False),
    )
    hand_over_token_ids([trainer.model])
    return trainer


@contextmanager
def replaced(router: torch.nn.Module, choose: Callable) -> Iterator[None]:
    """Within this context the router chooses by ``choose`` instead."""
    router._choose = choose
    try:
        yield
    finally:
        del router._choose


@contextmanager
def observed(router: torch.nn.Module, see: Callable[["Routes"], None]) -> Iterator[None]:  # noqa: F821
    """Within this context ``see`` is called with the routes of each of the router's forwards."""
    choose = router._choose

    def choose_and_show(*args):
        routes = choose(*args)
        see(routes)
        return routes

    with replaced(router, choose_and_show):
        yield


def read_rows(path: Path) -> pandas.DataFrame:
    """The rows of a CSV file; none if there is no file."""
    return pandas.read_csv(path) if path.is_file() else pandas.DataFrame()


def replace_rows(earlier: pandas.DataFrame, rows: pandas.DataFrame, key: Sequence[str]) -> pandas.DataFrame:
    """The earlier rows whose key no new row has, and then the new ones. ``key`` names the columns of the key."""
    if not len(earlier):
        return rows
    replaced_keys = set(keys_of(rows, key))
    is_kept = [one not in replaced_keys for one in keys_of(earlier, key)]
    return pandas.concat((earlier[is_kept], rows), ignore_index=True)


def keys_of(rows: pandas.DataFrame, key: Sequence[str]) -> list[tuple]:
    """The key of each row, in their order."""
    return list(rows[list(key)].itertuples(index=False, name=None))
