"""Seconds of a training step of a study's models: `python -m benchmarks.quality.step_time CONFIG.toml --out TIMES.csv`.

All variants of one size are built in one process and step in turn, so a drift of the machine's speed meets them all
alike. They train on the study's own tokens. A step of AIR contains its share of the rebuilds of the lists. On a CPU the
CPU time of the one thread counts, which other work on the machine disturbs little.
"""

import argparse
import logging
import statistics
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pandas
import torch
from tqdm import tqdm

from benchmarks.measure import environment, world
from benchmarks.quality.in_process import batches, begin, models, trainer_of
from benchmarks.quality.study import Run
from benchmarks.train import Trainer

logger = logging.getLogger("benchmarks.quality.step_time")

KEY = ["corpus", "variant", "experts", "topk", "ffn"]
"""The columns that name a model of a study."""


def time_steps(
    trainers: dict[str, Trainer], data: list[dict[str, torch.Tensor]], warmup: int, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each counted step of each model: CPU time on a CPU, wall-clock time on a GPU.

    Args:
        trainers: variant -> trainer.
        data: global batches; all models see the same ones in the same order.
        warmup: uncounted steps of each model before the first counted one. They also age the codebooks.
        repetitions: counted steps of each model. The models take turns, with an uncounted step before each counted one.
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
    """A row for each variant: its median, least and largest step, and its median relative to exact top-k's."""
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
    """Time the models of the given sizes. Rows of other sizes in the file are kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="TOML file of the study")
    parser.add_argument("--data", type=Path, required=True, help="a data set of the study, such as OUT/data/NAME/train")
    parser.add_argument("--out", type=Path, required=True, help="CSV file of the rows")
    parser.add_argument("--experts", type=int, nargs="+", required=True, help="sizes of the study")
    parser.add_argument("--warmup", type=int, default=40, help="uncounted steps of each model")
    parser.add_argument("--repetitions", type=int, default=10, help="counted steps of each model")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU, as the study's runs have")
    args = parser.parse_args(argv)
    begin(args.threads)
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
