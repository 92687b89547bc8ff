"""Seconds of a training step of a study's models: `python benchmarks/quality/step_time.py CONFIG.toml --out TIMES.csv`.

All variants of one size are built in one process and step in turn, so a drift of the machine's speed meets them all
alike. They train on the study's own tokens. A step of AIR contains its share of the rebuilds of the lists. On a CPU the
processor time of the one thread counts, which other work on the machine disturbs little.
"""

import argparse
import dataclasses
import logging
import os
import statistics
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pandas
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.measure import environment, world  # noqa: E402
from benchmarks.quality.flops import config_of  # noqa: E402
from benchmarks.quality.study import CPU_ENVIRONMENT, Run, load_runs  # noqa: E402
from benchmarks.train import Trainer  # noqa: E402

logger = logging.getLogger(__name__)

KEY = ["corpus", "variant", "experts", "topk", "ffn"]
"""The columns that name a model of a study."""


def models(config: dict, experts: int) -> dict[str, Run]:
    """The first run of each variant with so many experts, in the study's main shape."""
    shape = tuple(config["runs"][0]["shapes"][0])
    found: dict[str, Run] = {}
    for run in load_runs(config):
        is_main = run.corpus == config["corpus"] and (run.topk, run.ffn) == shape
        if run.experts == experts and is_main:
            found.setdefault(run.variant, run)
    if not found:
        raise ValueError(f"--experts ({experts}) must be a size of the study")
    return found


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
    """The model of a run and its optimizer, with the plugin's layers in Megatron's own; others as Trainer's."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from air_moe_megatron.routers.hashing import hand_over_token_ids
    from air_moe_megatron.specs import with_air_layers

    flags = run.flags
    config = config_of({**flags, "moe-hash-vocab-size": run.vocabulary} if run.variant == "hash" else flags)
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


def time_steps(
    trainers: dict[str, Trainer], data: list[dict[str, torch.Tensor]], warmup: int, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each counted step of each model: of the processor on a CPU, by the clock on a GPU.

    Args:
        trainers: by variant.
        data: global batches; all models see the same ones in the same order.
        warmup: uncounted steps of each model before the first counted one. They also age the codebooks.
        repetitions: counted steps of each; the models take turns, each with an uncounted step before a counted one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    numbers = dict.fromkeys(trainers, 0)

    def step(name: str) -> float:
        batch = data[numbers[name] % len(data)]
        numbers[name] += 1
        before = time.process_time()
        by_clock = trainers[name].step(batch)["total"]
        return by_clock if batch["tokens"].is_cuda else time.process_time() - before

    for name in tqdm(trainers, desc="warm-up", unit="model"):
        for _ in range(warmup):
            step(name)
    for _ in tqdm(range(repetitions), unit="round"):
        for name in trainers:
            step(name)
            seconds[name].append(step(name))
    return seconds


def rows_of(runs: dict[str, Run], seconds: dict[str, list[float]], warmup: int, device: torch.device) -> list[dict]:
    """A row for each variant: its median, least and largest step, and how many times exact top-k's median it is."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            **{column: getattr(run, column) for column in KEY},
            "step_ms": round(1e3 * medians[name], 1),
            "step_min_ms": round(1e3 * min(seconds[name]), 1),
            "step_max_ms": round(1e3 * max(seconds[name]), 1),
            "of_topk": round(medians[name] / medians["topk"], 3) if "topk" in medians else "",
            "warmup": warmup,
            "repetitions": len(seconds[name]),
        }
        | environment(device)
        for name, run in runs.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Time the models of the sizes asked for; rows of other sizes in the file are kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="TOML file of the study")
    parser.add_argument("--data", type=Path, required=True, help="a data set of the study, such as OUT/data/NAME/train")
    parser.add_argument("--out", type=Path, required=True, help="CSV file of the rows")
    parser.add_argument("--experts", type=int, nargs="+", required=True, help="sizes of the study")
    parser.add_argument("--warmup", type=int, default=40, help="uncounted steps of each model")
    parser.add_argument("--repetitions", type=int, default=10, help="counted steps of each model")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU, as the study's runs have")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and not CPU_ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **CPU_ENVIRONMENT})  # read when a process starts
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    torch.set_num_threads(args.threads)
    config = tomllib.loads(args.config.read_text())
    for experts in args.experts:
        runs = models(config, experts)
        with world() as (device, pg_collection):
            data = batches(args.data, next(iter(runs.values())).flags, device)
            trainers = {name: trainer_of(run, pg_collection, device) for name, run in runs.items()}
            rows = rows_of(runs, time_steps(trainers, data, args.warmup, args.repetitions), args.warmup, device)
        table = pandas.DataFrame(rows)
        logger.info("%s", table[["variant", "experts", "step_ms", "step_min_ms", "step_max_ms", "of_topk"]].to_string())
        if args.out.is_file():
            earlier = pandas.read_csv(args.out)
            earlier = earlier[~earlier[KEY].apply(tuple, axis=1).isin(table[KEY].apply(tuple, axis=1))]
            table = pandas.concat((earlier, table))
        table.to_csv(args.out, index=False)


if __name__ == "__main__":
    main()
