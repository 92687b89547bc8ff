"""How much a model copies from its context: `python -m benchmarks.quality.copying CONFIG.toml`.

Reads the checkpoints of a study's runs that were made with `study.py --keep-checkpoints`. A model sees passages of the
test split twice in a row, each of half a sequence:

- *first*: its loss on the first time
- *again*: its loss on the second time
- *copied*: the difference. A model that only knows what usually follows the last few tokens has none

It also sees the test split as it is:

- *loss*: of all tokens
- *where seen*: of the tokens after three that occurred in the sequence before, in this order: a model can copy there
- *elsewhere*: of the others, on which models are compared whether they have learned to copy or not
- *best's share*: which part of a token's weight its best expert has, by layer; 1/K where all have the same

Models learn to copy within few steps (Olsson et al. 2022, arXiv 2209.11895, "In-context learning and induction heads").
So the comparison of two runs depends on whether one has learned it and the other has not.
"""

import argparse
import fnmatch
import logging
import math
import tomllib
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pandas
import torch
from tqdm import tqdm

from benchmarks import ROOT
from benchmarks.arguments import positive, refused
from benchmarks.measure import environment, world
from benchmarks.quality.data import prepare
from benchmarks.quality.in_process import batches, begin, keys_of, observed, read_rows, replace_rows, trainer_of
from benchmarks.quality.study import Run, load_runs

logger = logging.getLogger(__name__)

_EARLIER_BATCHES = 12
"""The batches of rows that do not say it: those of docs/results/quality/copying.csv, see its command in bytes.md."""


def kept_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of a run by their iteration, in order."""
    return {int(path.name.removeprefix("iter_")): path for path in sorted(folder.glob("checkpoint/iter_*"))}


def twice(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with the second half of each sequence replaced by its first half, and with labels to match."""
    half = batch["tokens"][:, : batch["tokens"].shape[1] // 2]
    text = torch.cat((half, half, half[:, :1]), dim=1)
    return batch | {"tokens": text[:, :-1], "labels": text[:, 1:]}


def seen_before(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """[B, S] bool: whether the last ``length`` tokens up to each position have occurred before in its sequence.

    Example: with ``length`` 2, in 5 1 2 1 2 this holds at the last position only.
    """
    ends = tokens.unfold(1, length, 1)  # [B, S - length + 1, length]
    equal = (ends.unsqueeze(2) == ends.unsqueeze(1)).all(dim=3)
    return torch.nn.functional.pad(equal.tril(-1).any(dim=2), (length - 1, 0))


@torch.no_grad()
def measure(model: torch.nn.Module, data: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Losses of a model in bits per token (see above), and the share of tokens whose last three were seen before.

    The first tokens of a passage and of its repetition do not count, because nothing predicts that one begins.
    """
    parts = {name: [] for name in ("loss", "where_seen", "elsewhere", "first", "again", "share_seen")}
    for batch in data:
        plain, repeated = (
            model(part["tokens"], part["positions"], part["mask"], labels=part["labels"]).float() / math.log(2)
            for part in (batch, twice(batch))
        )
        half = repeated.shape[1] // 2  # the label at half - 1 is the first token again
        seen = seen_before(batch["tokens"], 3)
        for name, values in (
            ("loss", plain), ("where_seen", plain[seen]), ("elsewhere", plain[~seen]), ("share_seen", seen.float()),
            ("first", repeated[:, : half - 1]), ("again", repeated[:, half : 2 * half - 1]),
        ):  # fmt: skip
            parts[name].append(values.flatten())
    figures = {name: float(torch.cat(values).mean()) for name, values in parts.items()}
    return figures | {"copied": figures["first"] - figures["again"]}


def measure_routing(model: torch.nn.Module, routers: list, data: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Figures of :func:`measure`, and the best expert's share in each layer, as "best_1" and so on."""
    shares = [[] for _ in routers]  # [T] share of each token's best expert, for each forward
    with ExitStack() as stack:
        for router, of_router in zip(routers, shares, strict=True):
            keep = partial(_keep_best_share, of_router)
            stack.enter_context(observed(router, keep))
        figures = measure(model, data)
    return figures | {f"best_{layer}": float(torch.cat(of).mean()) for layer, of in enumerate(shares, 1)}


def _keep_best_share(shares, routes):
    shares.append(routes.probs.amax(dim=1) / routes.probs.sum(dim=1))


def rows_of(
    run: Run, checkpoints: dict[int, Path], data: list, pg_collection, device: torch.device
) -> list[dict[str, object]]:
    """A row for each checkpoint of a run."""
    from megatron.core import dist_checkpointing

    trainer = trainer_of(run, pg_collection, device)
    model = trainer.model.module.eval()
    rows = []
    for step, path in tqdm(checkpoints.items(), unit="checkpoint", desc=run.name):
        model.load_state_dict(dist_checkpointing.load({"model": model.sharded_state_dict()}, str(path))["model"])
        of_run = {"key": run.key, "variant": run.variant, "experts": run.experts, "topk": run.topk, "seed": run.seed}
        figures = measure_routing(model, trainer.routers, data)
        rows.append(of_run | {"step": step} | figures | environment(device))
    return rows


def chosen_runs(config: dict, pattern: str) -> list[Run]:
    """The runs of a study whose names match the pattern. They differ in variant and seed only, as a table's lines do.

    Raises:
        ValueError: if there are none, or those of several sizes.
    """
    runs = [run for run in load_runs(config) if fnmatch.fnmatch(run.name, pattern)]
    if not runs:
        raise ValueError(f"--only ({pattern!r}) must match the name of a run, as `study.py --list` shows it")
    sizes = list(dict.fromkeys(_size(run) for run in runs))
    if len(sizes) > 1:
        raise ValueError(f"--only ({pattern!r}) must select runs of one size, not {sizes[0]} and {sizes[1]}")
    return runs


def _size(run):
    steps = run.flags["train-iters"]
    return f"E={run.experts} K={run.topk} F={run.ffn} {run.corpus} vocabulary={run.vocabulary} {steps} steps"


def with_batches(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Rows with the column "batches", which older files lack."""
    known = rows["batches"].fillna(_EARLIER_BATCHES).astype(int) if "batches" in rows else _EARLIER_BATCHES
    return rows.assign(batches=known)


def rows_of_runs(rows: pandas.DataFrame, runs: Sequence[Run], num_batches: int) -> pandas.DataFrame:
    """Those rows that belong to the runs and were measured on this number of batches."""
    if not len(rows):
        return rows
    wanted = {(run.key, num_batches) for run in runs}
    return rows[[key in wanted for key in keys_of(rows, ("key", "batches"))]]


def table(rows: pandas.DataFrame) -> str:
    """A table of *copied* and *elsewhere* in bits per token, and of the best expert's share in the last layer.

    It has a line for each run and a column for each step.
    """
    steps = sorted(rows.step.unique())
    last = f"best_{max(int(name.removeprefix('best_')) for name in rows if name.startswith('best_'))}"
    tables = []
    for figure, name in (("copied", "copied"), ("elsewhere", "elsewhere"), (last, "best's share, last layer")):
        lines = [f"| {name}, at step | seed | {' | '.join(f'{step:,}' for step in steps)} |"]
        lines.append(f"|{'---|' * (len(steps) + 2)}")
        for (variant, seed), of_run in rows.groupby(["variant", "seed"], sort=True):
            values = of_run.set_index("step")[figure]
            cells = (f"{values[step]:.3f}" if step in values else "" for step in steps)
            lines.append(f"| {variant} | {seed} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def plot(rows: pandas.DataFrame, file: Path) -> "Figure":  # noqa: F821
    """Plot *copied*, and the losses where a model can copy and elsewhere, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    titles = {"copied": "copied", "where_seen": "loss where seen", "elsewhere": "loss elsewhere"}
    variants = list(dict.fromkeys(rows.variant))
    for (variant, seed), of_run in rows.sort_values("step").groupby(["variant", "seed"], sort=False):
        look = {
            "color": f"C{variants.index(variant)}",
            "marker": "osv^Dxp*"[seed % 8],
            "label": f"{variant}, seed {seed}",
        }
        for axis, column in zip(axes, titles, strict=True):
            axis.plot(of_run.step, of_run[column], **look)
    for axis, title in zip(axes, titles.values(), strict=True):
        axis.set_xlabel("step")
        axis.set_ylabel(f"{title}, bits per token")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return figure


def missing_checkpoints(runs: Sequence[Run], rows: pandas.DataFrame, folder: Path) -> dict[str, dict[int, Path]]:
    """The checkpoints of the runs that have no row: key of the run -> iteration -> path."""
    done = set(keys_of(rows, ("key", "step"))) if len(rows) else set()
    missing = {}
    for run in runs:
        for step, path in kept_checkpoints(folder / run.key).items():
            if (run.key, step) not in done:
                missing.setdefault(run.key, {})[step] = path
    return missing


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the checkpoints of the chosen runs that have no row yet; then the tables and the plot of these runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="TOML file of the study")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--study", type=Path, default=ROOT / "out/quality", help="folder of the study's --out")
    parser.add_argument("--out", type=Path, required=True, help="CSV file of the rows; the plot is beside it")
    parser.add_argument("--only", default="*", help="pattern of the names of runs of one size")
    parser.add_argument("--batches", type=positive, default=24, help="of the test split, evenly over it")
    parser.add_argument("--threads", type=positive, default=1, help="of a CPU, as the study's runs have")
    args = parser.parse_args(argv)
    data = args.study / "data"
    with refused(parser):
        runs = chosen_runs(tomllib.loads(args.config.read_text()), args.only)
        rows = with_batches(read_rows(args.out))
        missing = missing_checkpoints(runs, rows_of_runs(rows, runs, args.batches), args.study / "runs")
        if not missing and not len(rows_of_runs(rows, runs, args.batches)):
            raise ValueError(
                f"--only ({args.only!r}): no checkpoint of such a run in {args.study}/runs; make the runs with "
                "`study.py --keep-checkpoints`"
            )
    begin(args.threads)
    runs_to_measure = [run for run in runs if run.key in missing]
    with refused(parser):
        for run in runs_to_measure:
            prepare(run.corpus, run.vocabulary, args.data_dir, data / run.prepared)
    for run in runs_to_measure:
        with world() as (device, pg_collection):
            text = batches(data / run.prepared / "test", run.flags, device)
            text = text[:: max(1, len(text) // args.batches)][: args.batches]
            made = pandas.DataFrame(rows_of(run, missing[run.key], text, pg_collection, device))
        rows = replace_rows(rows, made.assign(batches=args.batches), ("key", "batches", "step"))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        rows.to_csv(args.out, index=False)
    shown = rows_of_runs(rows, runs, args.batches)
    logger.info("%s", table(shown))
    plot(shown, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
