"""How much of a layer's routing the token ids fix: `python -m benchmarks.quality.context CONFIG.toml`.

Trains models of a study, and counts which experts each layer gives to each token id. Then, on other text:

- *fixed by the id*: share of a token's experts that are among the K most frequent ones of its id
- *loss without context*: how much the loss rises when a layer gives every token those K experts, with the mean
  probabilities that they had there. It is measured for each layer alone, and for the first layers together
- *information*: mutual information of token id and expert, as a share of the most that it can be; of the counts, with
  the Miller-Madow correction

The rise says how many first layers a hash can take. It is an upper bound: the model was trained with its own router.
"""

import argparse
import logging
import math
import statistics
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
from benchmarks.quality.in_process import (
    CONSTANT_RATE,
    batches,
    begin,
    model_of,
    observed,
    read_rows,
    replace_rows,
    replaced,
    trainer_of,
)
from benchmarks.train import Trainer

logger = logging.getLogger(__name__)

KEY = ("model", "experts", "corpus")
"""The columns that name a trained model."""


def shuffled(data: list[dict[str, torch.Tensor]], seed: int) -> list[dict[str, torch.Tensor]]:
    """Batches of the same sequences in random order. In the order of the text, a batch would be one passage."""
    generator = torch.Generator().manual_seed(seed)
    size = data[0]["tokens"].shape[0]
    order = torch.randperm(len(data) * size, generator=generator).split(size)
    tokens, labels = (torch.cat([batch[name] for batch in data]) for name in ("tokens", "labels"))
    return [batch | {"tokens": tokens[ids], "labels": labels[ids]} for batch, ids in zip(data, order, strict=True)]


class Counts:
    """Which experts a layer gives to each token id.

    Args:
        vocabulary: V token ids.
        experts: E.
    """

    def __init__(self, vocabulary: int, experts: int) -> None:
        self.tokens = torch.zeros(vocabulary, experts)  # [V, E] tokens of the id that have the expert
        self.probs = torch.zeros(vocabulary, experts)  # [V, E] sums of their probs

    def add(self, token_ids: torch.Tensor, topk_ids: torch.Tensor, probs: torch.Tensor) -> None:
        """Count tokens: [T] ids, [T, K] experts and their [T, K] probs."""
        positions = token_ids.unsqueeze(1) * self.tokens.shape[1] + topk_ids.long()
        for table, values in ((self.tokens, torch.ones_like(probs)), (self.probs, probs)):
            table.view(-1).index_add_(0, positions.flatten(), values.flatten().to(table.dtype))

    def most_frequent(self, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[V, K] experts of each id, int32, and the mean probs that they had with it."""
        tokens, experts = self.tokens.topk(topk, dim=1)
        return experts.int(), self.probs.gather(1, experts) / tokens.clamp(min=1.0)

    def information(self, topk: int) -> float:
        """Mutual information of token id and expert, as a share of its largest possible value.

        With K experts per token, log K of the experts' entropy remains even if the id determines the experts.

        Example: with K = 1 and two equally frequent ids, one expert for each id gives 1, and both experts equally
        often for both ids give 0.
        """
        total = self.tokens.sum()
        joint, of_ids, of_experts = (
            _entropy(counts, total)
            for counts in (self.tokens.flatten(), self.tokens.sum(dim=1), self.tokens.sum(dim=0))
        )
        return (of_ids + of_experts - joint) / (of_experts - math.log(topk))


def _entropy(counts: torch.Tensor, total: torch.Tensor) -> float:
    """Entropy in nats, with the Miller-Madow correction."""
    counts = counts[counts > 0].double()
    shares = counts / total
    return float(-(shares * shares.log()).sum() + (counts.numel() - 1) / (2 * total))


class Meter:
    """Losses of a trained model on batches, in which the routing of some layers may be observed or replaced."""

    def __init__(self, trainer: Trainer, data: list[dict[str, torch.Tensor]]) -> None:
        self.model, self.routers, self.data = trainer.model, trainer.routers, data
        self.token_ids: torch.Tensor | None = None  # [T], of the current batch, in the order of the hidden states

    @torch.no_grad()
    def loss(self) -> float:
        """Mean nats per token over all batches."""
        total = 0.0
        for batch in self.data:
            self.token_ids = batch["tokens"].t().flatten()
            arguments = batch["tokens"], batch["positions"], batch["mask"]
            total += float(self.model(*arguments, labels=batch["labels"]).mean())
        return total / len(self.data)

    def by_id(self, router: torch.nn.Module, experts: torch.Tensor, probs: torch.Tensor):
        """A context in which the router gives a token the experts of its id."""
        from air_moe_megatron.routers.base import Routes

        return replaced(router, lambda *args: Routes(experts[self.token_ids], probs[self.token_ids]))


def train(trainer: Trainer, data: list[dict[str, torch.Tensor]], label: str) -> None:
    """Train a model on each batch once, and set it to evaluation."""
    for batch in tqdm(data, unit="step", desc=label):
        trainer.step(batch)
    trainer.model.eval()


def counts_of(trainer: Trainer, data: list[dict[str, torch.Tensor]], vocabulary: int) -> list[Counts]:
    """The counts of each layer over the batches."""
    meter = Meter(trainer, data)
    counts = [Counts(vocabulary, router.num_experts) for router in trainer.routers]
    with ExitStack() as stack:
        for router, of_router in zip(trainer.routers, counts, strict=True):
            see = partial(_add_routes, meter, of_router)
            stack.enter_context(observed(router, see))
        meter.loss()
    return counts


def _add_routes(meter, counts, routes):
    counts.add(meter.token_ids, routes.topk_ids, routes.probs)


def shares_fixed(meter: Meter, tables: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, list[float]]:
    """Loss with the layers' own routing, and for each layer the share of its experts that are among those of the ids.

    ``tables`` are the experts and probs of each id, for each layer.
    """
    shares = [[] for _ in tables]
    with ExitStack() as stack:
        for router, (experts, _), of_router in zip(meter.routers, tables, shares, strict=True):
            see = partial(_add_share, meter, experts, of_router)
            stack.enter_context(observed(router, see))
        loss = meter.loss()
    return loss, [statistics.fmean(of_router) for of_router in shares]


def _add_share(meter, experts, shares, routes):
    found = (routes.topk_ids.unsqueeze(2) == experts[meter.token_ids].unsqueeze(1)).any(dim=2)
    shares.append(float(found.float().mean()))


def losses_by_id(meter: Meter, tables: list[tuple[torch.Tensor, torch.Tensor]], layer: int) -> tuple[float, float]:
    """Losses with the experts of the ids in one layer alone, and in it and all layers before; ``layer`` is from 0."""
    with meter.by_id(meter.routers[layer], *tables[layer]):
        alone = meter.loss()
    with ExitStack() as stack:
        for router, of_ids in zip(meter.routers[: layer + 1], tables, strict=False):
            stack.enter_context(meter.by_id(router, *of_ids))
        return alone, meter.loss()


def rows_of(
    trainer: Trainer, count: list[dict[str, torch.Tensor]], test: list[dict[str, torch.Tensor]], vocabulary: int
) -> list[dict]:
    """Count the routes of a trained model on some batches, and measure it on others; returns a row for each layer."""
    topk = trainer.routers[0].topk
    counts = counts_of(trainer, count, vocabulary)
    tables = [of_router.most_frequent(topk) for of_router in counts]
    meter = Meter(trainer, test)
    loss, shares = shares_fixed(meter, tables)
    rows = []
    for layer, (of_router, share) in enumerate(zip(counts, shares, strict=True)):
        alone, together = losses_by_id(meter, tables, layer)
        rises = {"rise_alone": alone - loss, "rise_with_earlier": together - loss}
        figures = {"fixed_by_id": share, "information": of_router.information(topk)}
        rows.append({"layer": layer + 1, "loss": loss} | rises | figures)
    return rows


def table(rows: pandas.DataFrame) -> str:
    """The rows as a table, in bits per token."""
    lines = ["| model | layer | fixed by the id | information | loss without context | with all layers before |"]
    lines.append(f"|{'---|' * 6}")
    for row in rows.itertuples():
        rises = (f"{rise / math.log(2):+.3f}" for rise in (row.rise_alone, row.rise_with_earlier))
        cells = row.model, row.layer, f"{row.fixed_by_id:.1%}", f"{row.information:.2f}", *rises
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, count, measure; write the rows and print them. Rows of other models in the file are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="TOML file of the study")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--work", type=Path, default=ROOT / "out/quality/data", help="folder of the prepared corpora")
    parser.add_argument("--out", type=Path, required=True, help="CSV file of the rows")
    parser.add_argument("--experts", type=positive, default=4096, help="a size of the study")
    parser.add_argument("--variants", nargs="+", default=["air", "topk"], help="of the study")
    parser.add_argument("--count", type=positive, default=100, help="batches that are counted, after the training's")
    parser.add_argument("--test", type=positive, default=30, help="batches that are measured")
    parser.add_argument("--threads", type=positive, default=1, help="of a CPU, as the study's runs have")
    args = parser.parse_args(argv)
    with refused(parser):
        config = tomllib.loads(args.config.read_text())
        runs = [model_of(config, args.experts, variant) for variant in args.variants]
        earlier = read_rows(args.out)
    begin(args.threads)
    with refused(parser):
        for run in runs:
            prepare(run.corpus, run.vocabulary, args.data_dir, args.work / run.prepared)
    made = []
    for run in runs:
        folder, steps = args.work / run.prepared, run.flags["train-iters"]
        with world() as (device, pg_collection):
            text = shuffled(batches(folder / "train", run.flags, device), run.seed)[: steps + args.count]
            test = shuffled(batches(folder / "test", run.flags, device), run.seed)[: args.test]
            trainer = trainer_of(run, pg_collection, device, CONSTANT_RATE, seed=run.seed)
            train(trainer, text[:steps], run.variant)
            rows = pandas.DataFrame(rows_of(trainer, text[steps:], test, run.vocabulary))
            rows.insert(0, "model", run.variant)
            made.append(rows.assign(corpus=run.corpus, experts=run.experts, **environment(device)))
        replace_rows(earlier, pandas.concat(made, ignore_index=True), KEY).to_csv(args.out, index=False)
    logger.info("%s", table(pandas.concat(made, ignore_index=True)))


if __name__ == "__main__":
    main()
