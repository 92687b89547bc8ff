"""What a codebook should do when the data change: `python -m benchmarks.quality.drift STUDY.toml --data-dir CORPORA`.

A model of the study's variant `air` trains on the study's corpus. From its state, training goes on with Gutenberg, once
for each rule of the codebook below. Each step's loss is that of tokens which the model has not seen before.

| rule | what it does after the change |
|---|---|
| `as it is` | nothing |
| `frozen` | the codewords stay as they are; lists are still rebuilt |
| `reset` | at the change the codebook's age is set back to 8 updates: it is told what the others must notice |
| `drift` | the age falls to a tenth after a step whose quantization error is far above its running mean |

The age decides the decay and how often lists are rebuilt, as in ``window_decay`` and ``next_rebuild``.
"""

import argparse
import copy
import logging
import math
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas
import torch
from tqdm import tqdm

from air_moe_megatron.diagnostics.recall import recall
from air_moe_megatron.learned.codebook import Codebook, health_of, window_decay
from benchmarks import ROOT
from benchmarks.arguments import not_negative, positive, refused
from benchmarks.measure import environment, world
from benchmarks.quality.data import prepare
from benchmarks.quality.in_process import (
    CONSTANT_RATE,
    batches,
    begin,
    keys_of,
    model_of,
    read_rows,
    replace_rows,
    trainer_of,
)
from benchmarks.quality.study import BYTES, Run
from benchmarks.train import Trainer

logger = logging.getLogger("benchmarks.quality.drift")

RULES = ("as it is", "frozen", "reset", "drift")
SETTING = ("key", "experts", "steps_before", "steps_after")
"""The columns that say what was trained. Rows of older files lack them, and count as those of another setting."""
_OTHER = "gutenberg-100m"  # the corpus after the change
_RECALL_EVERY = 10  # steps
_RESET_AGE = 8  # updates


def _learn_nothing(codebooks: Sequence[Codebook], sums: torch.Tensor) -> None:
    """Replaces ``Codebook.learn`` while codebooks are frozen."""
    for codebook, own in zip(codebooks, sums, strict=True):
        codebook.last_health.copy_(health_of(own))
        codebook.count_update()


@dataclass
class Rule:
    """A rule applied to one router.

    Attributes:
        name: name of the rule in ``RULES``.
        router: router whose codebook the rule steers.
        age: number of updates by which decay and rebuilds are chosen.
    """

    name: str
    router: torch.nn.Module
    age: int
    errors: list[float] = field(default_factory=list)  # quantization errors since the run began

    def __post_init__(self) -> None:
        self.decay, self.interval = self.router.codebook.decay, self.router.index.refresh_interval

    def begin(self) -> None:
        """Act at the change of the data."""
        if self.name == "reset":
            self.age = _RESET_AGE
        if self.name == "frozen":
            self.router.codebook.learn = _learn_nothing
        self._steer()

    def after_step(self) -> None:
        """Act on the figures of the step."""
        error = self.router.codebook.health().quantization_error
        self.age += 1
        if self.name == "drift" and len(self.errors) >= 20:
            recent = self.errors[-100:]
            if error > statistics.fmean(recent) + 4 * statistics.stdev(recent):
                self.age = max(_RESET_AGE, self.age // 10)
        self.errors.append(error)
        self._steer()

    def _steer(self) -> None:
        if self.name in ("reset", "drift"):
            self.router.codebook.decay = window_decay(self.decay, self.age)
            self.router.index.refresh_interval = min(max(1, 2 * self.age // self.interval), self.interval)

    def end(self) -> None:
        """Undo all changes to the router."""
        self.router.codebook.decay, self.router.index.refresh_interval = self.decay, self.interval
        self.router.codebook.__dict__.pop("learn", None)


def other_corpus(own: Path, other: Path, out: Path, num_tokens: int) -> Path:
    """A data set of another prepared corpus in the ids of one's own; created if missing.

    Args:
        own: folder of the prepared corpus whose tokenizer makes the ids.
        other: folder of the other prepared corpus.
        out: folder of the data set.
        num_tokens: least number of tokens.
    Returns:
        the prefix of its files.
    """
    import numpy
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
    from tokenizers import Tokenizer

    prefix = out / f"drift-{other.name}-as-{own.name}-{num_tokens}"
    if not Path(f"{prefix}.idx").exists():
        theirs, ours = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (other, own))
        dtype = DType.optimal_dtype(ours.get_vocab_size() + 1)
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for document in IndexedDataset(str(other / "train")):
            text = theirs.decode(document[:-1].tolist(), skip_special_tokens=False)
            ids = numpy.array(ours.encode(text, add_special_tokens=False).ids, dtype=dtype)
            builder.add_document(ids, [len(ids)])
            num_tokens -= len(ids)
            if num_tokens <= 0:
                break
        builder.finalize(f"{prefix}.idx")
    return prefix


def train(trainer: Trainer, data: list, rules: list[Rule], label: dict, on_step: tqdm) -> list[dict]:
    """Train on every batch once; returns a row per step, every ten steps with recall as a mean over the layers."""
    rows = []
    for number, batch in enumerate(data):
        trainer.step(batch)
        for rule in rules:
            rule.after_step()
        row = label | {"step": number, "loss": float(trainer.loss), "age": rules[0].age}
        row["quantization_error"] = statistics.fmean(rule.errors[-1] for rule in rules)
        if number % _RECALL_EVERY == 0:
            mass, topk = zip(*(recall(rule.router) for rule in rules), strict=True)
            row |= {"mass_recall": statistics.fmean(mass), "topk_recall": statistics.fmean(topk)}
        rows.append(row)
        on_step.update()
    return rows


def rows_of_seed(run, first: list, second: list, seed: int, pg_collection, device: torch.device) -> list[dict]:
    """Train on the first corpus, then from its end on the second, once with every rule."""
    trainer = trainer_of(run, pg_collection, device, CONSTANT_RATE, seed=seed)
    with tqdm(total=len(first) + len(RULES) * len(second), unit="step", desc=f"seed {seed}") as on_step:
        before = [Rule("as it is", router, 0) for router in trainer.routers]
        rows = train(trainer, first, before, {"seed": seed, "rule": "before"}, on_step)
        state = copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()))
        for name in RULES:
            trainer.model.load_state_dict(copy.deepcopy(state[0]))
            trainer.optimizer.load_state_dict(copy.deepcopy(state[1]))
            rules = [Rule(name, rule.router, len(first), list(rule.errors)) for rule in before]
            for rule in rules:
                rule.begin()
            rows += train(trainer, second, rules, {"seed": seed, "rule": name}, on_step)
            for rule in rules:
                rule.end()
    return [row | environment(device) for row in rows]


def model_to_train(config: dict, experts: int) -> Run:
    """The run of the study's variant `air`.

    Raises:
        ValueError: if there is none, or the corpus has no tokenizer or does not change.
    """
    run = model_of(config, experts, "air")
    if run.vocabulary == BYTES:
        raise ValueError(f"vocabulary ({BYTES}): a study in bytes has no tokenizer, by which drift.py reads {_OTHER}")
    if run.corpus == _OTHER:
        raise ValueError(f"corpus ({run.corpus!r}) must be another one than {_OTHER}, which follows it")
    return run


def with_setting(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Rows with the columns of ``SETTING``, empty where they lack them."""
    return rows.reindex(columns=list(dict.fromkeys((*rows.columns, *SETTING))))


def of_setting(rows: pandas.DataFrame, setting: dict[str, object]) -> pandas.DataFrame:
    """The rows of one setting."""
    if not len(rows):
        return rows
    wanted = tuple(setting[name] for name in SETTING)
    return rows[[key == wanted for key in keys_of(rows, SETTING)]]


def table(rows: pandas.DataFrame) -> str:
    """Perplexity and recall after the change, by rule. Differences are between runs of the same seed."""
    after = rows[rows.rule != "before"]
    parts = ((0, 20), (20, 60), (60, 120), (120, 10**9))
    last = int(after.step.max()) + 1
    columns = [f"{first} to {min(end, last)}" for first, end in parts if first < last]
    lines = [f"| rule | {' | '.join(f'perplexity, steps {c}' for c in columns)} | top-k recall, first 20 | last 60 |"]
    lines.append(f"|{'---|' * (len(columns) + 3)}")
    for name in RULES:
        cells = []
        for first, end in parts[: len(columns)]:
            part = after[(after.step >= first) & (after.step < end)]
            loss = part.groupby(["rule", "seed"]).loss.mean()
            if name == "as it is":
                cells.append(f"{math.exp(loss[name].mean()):.1f}")
                continue
            change = 100 * ((loss[name] - loss["as it is"]).apply(math.exp) - 1)
            spread = f" +- {change.std():.2f}" if len(change) > 1 else ""
            cells.append(f"{change.mean():+.2f}{spread}%")
        of_rule = after[after.rule == name]
        early, late = of_rule[of_rule.step < 20], of_rule[of_rule.step >= last - 60]
        cells += [f"{early.topk_recall.mean():.3f}", f"{late.topk_recall.mean():.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: pandas.DataFrame, file: Path) -> "Figure":  # noqa: F821
    """Plot loss relative to `as it is`, top-k recall and quantization error over the steps after the change."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 3.8), layout="constrained")
    means = rows[rows.rule != "before"].groupby(["rule", "step"])[["loss", "topk_recall", "quantization_error"]].mean()
    for color, name in zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7"), RULES, strict=True):
        of_rule = means.loc[name]
        loss = (of_rule.loss - means.loc["as it is"].loss).rolling(10, min_periods=1).mean()
        axes[0].plot(loss, color=color, label=name)
        axes[1].plot(of_rule.topk_recall.dropna(), color=color)
        axes[2].plot(of_rule.quantization_error, color=color)
    for axis, label in zip(
        axes, ("loss - that of `as it is`, nats", "top-k recall", "quantization error"), strict=True
    ):
        axis.set_xlabel("steps since the data changed")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(RULES))
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Run the missing seeds of the setting one after the other; then make the table and the plot of the setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="TOML file of the study")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the unpacked corpora")
    parser.add_argument("--work", type=Path, default=ROOT / "out/quality/data", help="folder of the prepared corpora")
    parser.add_argument("--out", type=Path, required=True, help="CSV file of the rows; the plot is beside it")
    parser.add_argument("--experts", type=positive, default=4096, help="a size of the study")
    parser.add_argument("--seeds", type=not_negative, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=positive, nargs=2, default=[400, 200], help="before and after the change")
    parser.add_argument("--threads", type=positive, default=1, help="of a CPU, as the study's runs have")
    args = parser.parse_args(argv)
    with refused(parser):
        run = model_to_train(tomllib.loads(args.config.read_text()), args.experts)
        rows = with_setting(read_rows(args.out))
    begin(args.threads)
    own, other = (args.work / f"{name}-{run.vocabulary}" for name in (run.corpus, _OTHER))
    with refused(parser):
        for name, folder in ((run.corpus, own), (_OTHER, other)):
            prepare(name, run.vocabulary, args.data_dir, folder)
    per_step = run.flags["global-batch-size"] * (run.flags["seq-length"] + 1)
    new_text = other_corpus(own, other, args.work, args.steps[1] * per_step)
    steps = dict(zip(("steps_before", "steps_after"), args.steps, strict=True))
    setting = {"key": run.key, "experts": run.experts} | steps
    for seed in args.seeds:
        done = of_setting(rows, setting)
        if len(done) and (done.seed == seed).any():
            continue
        with world() as (device, pg_collection):
            first = batches(own / "train", run.flags, device)[: args.steps[0]]
            second = batches(new_text, run.flags, device)[: args.steps[1]]
            made = rows_of_seed(run, first, second, seed, pg_collection, device)
        rows = replace_rows(rows, pandas.DataFrame(made).assign(**setting), (*SETTING, "seed"))
        rows.to_csv(args.out, index=False)
    shown = of_setting(rows, setting)
    logger.info("%s", table(shown))
    plot(shown, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
