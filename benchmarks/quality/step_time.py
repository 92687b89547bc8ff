"""Seconds of a training step of a study's models: `python -m benchmarks.quality.step_time CONFIG.toml --out TIMES.csv`.

All variants of one size are built in one process and step in turn, so a drift of the machine's speed meets them all
alike. They train on the study's own tokens. Whole refresh intervals of an old codebook are counted, so that the mean
contains a step's share of the rebuilds of the lists. On a CPU the CPU time of the one thread counts, which other work
on the machine disturbs little.
"""

import argparse
import logging
import math
import statistics
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pandas
import torch
from tqdm import tqdm

from benchmarks.arguments import positive, refused
from benchmarks.measure import environment, world
from benchmarks.quality.in_process import batches, begin, models, read_rows, replace_rows, trainer_of
from benchmarks.quality.report import MODEL, with_models
from benchmarks.quality.study import Run
from benchmarks.train import Trainer

logger = logging.getLogger("benchmarks.quality.step_time")


def air_routers(trainer: Trainer) -> list[torch.nn.Module]:
    """The AIR routers of a model."""
    from air_moe_megatron.routers import AIRRouter, find_routers

    return find_routers(trainer.model, AIRRouter)


def refresh_interval(trainers: dict[str, Trainer]) -> int:
    """Steps between two rebuilds of the lists of an old codebook, the same in all models; 1 if none has lists.

    Raises:
        ValueError: if models differ in it.
    """
    found = {router.index.refresh_interval for trainer in trainers.values() for router in air_routers(trainer)}
    if len(found) > 1:
        raise ValueError(f"moe-air-refresh-interval ({sorted(found)}) must be the same in all variants that are timed")
    return found.pop() if found else 1


def grow_old(trainer: Trainer, interval: int) -> None:
    """Set the number of updates of codebooks and norms beyond their early phase, in which they do more work.

    The codebook is then as old as that of :func:`benchmarks.models.warm_up_codebook`.
    """
    age = torch.full((1,), interval**2 + 1)
    for router in trainer.routers:
        learners = [*router.learners(), *([router.codebook] if router in air_routers(trainer) else [])]
        for learner in learners:
            learner.load_state_dict({**learner.state_dict(), "num_updates": age})


def codebook_age(trainer: Trainer) -> int | str:
    """Number of updates of a model's codebooks; empty if it has none."""
    routers = air_routers(trainer)
    return routers[0].codebook.updates_on_host if routers else ""


def time_steps(
    trainers: dict[str, Trainer], data: list[dict[str, torch.Tensor]], warmup: int, repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each counted step of each model: CPU time on a CPU, wall-clock time on a GPU.

    Args:
        trainers: variant -> trainer.
        data: global batches; all models see the same ones in the same order.
        warmup: uncounted steps of each model at its start. One refresh interval of the old codebook follows them.
        repetitions: counted steps of each model, rounded up to whole refresh intervals. The models take turns of one
            interval, with an uncounted step before it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    numbers = dict.fromkeys(trainers, 0)
    interval = refresh_interval(trainers)

    def step(name: str) -> float:
        batch = data[numbers[name] % len(data)]
        numbers[name] += 1
        before = time.process_time()
        by_clock = trainers[name].step(batch)["total"]
        return by_clock if batch["tokens"].is_cuda else time.process_time() - before

    for name, trainer in tqdm(trainers.items(), desc="warm-up", unit="model"):
        for _ in range(warmup):
            step(name)
        grow_old(trainer, interval)
        for _ in range(interval):
            step(name)
    for _ in tqdm(range(math.ceil(repetitions / interval)), unit="round"):
        for name in trainers:
            step(name)
            seconds[name] += [step(name) for _ in range(interval)]
    return seconds


def rows_of(
    runs: dict[str, Run],
    seconds: dict[str, list[float]],
    ages: dict[str, int | str],
    warmup: int,
    device: torch.device,
) -> list[dict]:
    """A row for each variant: its mean, least and largest step, and its mean relative to exact top-k's.

    ``ages`` are those of the codebooks after the last step.
    """
    means = {name: statistics.fmean(values) for name, values in seconds.items()}
    return [
        {
            **{column: getattr(run, column) for column in MODEL},
            "step_ms": round(1e3 * means[name], 1),
            "step_min_ms": round(1e3 * min(seconds[name]), 1),
            "step_max_ms": round(1e3 * max(seconds[name]), 1),
            "of_topk": round(means[name] / means["topk"], 3) if "topk" in means else "",
            "codebook_age": ages[name],
            "warmup": warmup,
            "repetitions": len(seconds[name]),
        }
        | environment(device)
        for name, run in runs.items()
    ]


def chosen(config: dict, experts: int, variants: Sequence[str] | None) -> dict[str, Run]:
    """The models of a size: all variants that the study has there, or those of the given names.

    Raises:
        ValueError: if the study has no such size or variant, or none of the variants at this size.
    """
    unknown = [name for name in variants or () if name not in config["variants"]]
    if unknown:
        raise ValueError(f"--variants ({unknown[0]!r}) must be among {', '.join(config['variants'])}")
    found = {name: run for name, run in models(config, experts).items() if variants is None or name in variants}
    if not found:
        raise ValueError(f"--variants: the study has none of them with {experts} experts")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Time the models of the given sizes. Rows of other models in the file are kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="TOML file of the study")
    parser.add_argument("--data", type=Path, required=True, help="a data set of the study, such as OUT/data/NAME/train")
    parser.add_argument("--out", type=Path, required=True, help="CSV file of the rows")
    parser.add_argument("--experts", type=positive, nargs="+", required=True, help="sizes of the study")
    parser.add_argument("--variants", nargs="+", help="of the study; those that a size lacks are left out there")
    parser.add_argument("--warmup", type=positive, default=20, help="uncounted steps of each model")
    parser.add_argument(
        "--repetitions", type=positive, default=20, help="counted steps of each model, in whole refresh intervals"
    )
    parser.add_argument("--threads", type=positive, default=1, help="of a CPU, as the study's runs have")
    args = parser.parse_args(argv)
    with refused(parser):
        config = tomllib.loads(args.config.read_text())
        of_size = {experts: chosen(config, experts, args.variants) for experts in args.experts}
        earlier = with_models(read_rows(args.out))
        if not Path(f"{args.data}.idx").is_file():
            raise ValueError(f"--data ({args.data}) must be the prefix of a data set, such as OUT/data/NAME/train")
    begin(args.threads)
    for runs in of_size.values():
        with world() as (device, pg_collection):
            data = batches(args.data, next(iter(runs.values())).flags, device)
            trainers = {name: trainer_of(run, pg_collection, device) for name, run in runs.items()}
            seconds = time_steps(trainers, data, args.warmup, args.repetitions)
            ages = {name: codebook_age(trainer) for name, trainer in trainers.items()}
            table = pandas.DataFrame(rows_of(runs, seconds, ages, args.warmup, device))
        logger.info("%s", table[["variant", "experts", "step_ms", "step_min_ms", "step_max_ms", "of_topk"]].to_string())
        earlier = replace_rows(earlier, table, MODEL)
        earlier.to_csv(args.out, index=False)


if __name__ == "__main__":
    main()
