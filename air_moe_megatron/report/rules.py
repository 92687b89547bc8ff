"""The warnings: each rule is a row of a table with its threshold, its reason and its remedy."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy
import pandas
from pandas.api.typing import DataFrameGroupBy

from air_moe_megatron.report.runs import Run

RECORDS = 3
"""Newest records, without a gap, in which a rule must hold: one sample of 64 tokens is noisy."""

FIRST_BY_HASH = "hash in first layers"
"""In place of a router type: layers of ``--moe-num-hash-layers``, in a run whose ``--moe-router-type`` is another."""

_BALANCE = "raise --moe-aux-loss-coeff"
_NO_FLAG = "no flag helps: report it with this page"


@dataclass(frozen=True)
class Rule:
    """A limit for one metric, with the warning and its remedies.

    Attributes:
        name: name of the metric for the reader.
        metric: column of ``Run.layers`` or, for a rule of the whole run, a derived metric of :func:`run_metrics`.
        above, below: the limit; exactly one is given.
        words: the warning, with the newest value in the worst layer.
        remedies: router type or ``FIRST_BY_HASH`` -> flag and direction; "" stands for all others.
        reason: why the limit has this value.
        of_run: whether the metric belongs to the run as a whole, not to its layers.
    """

    name: str
    metric: str
    words: str
    remedies: dict[str, str]
    reason: str
    above: float | None = None
    below: float | None = None
    percent: bool = True
    of_run: bool = False

    @property
    def threshold(self) -> str:
        """The limit in words.

        Example: above 25%.
        """
        limit = self.above if self.above is not None else self.below
        shown = f"{100 * limit:g}%" if self.percent else f"{limit:g}"
        return f"{'above' if self.above is not None else 'below'} {shown}"

    @property
    def meaning(self) -> str:
        """The warning with dots in place of the value."""
        return re.sub(r"{[^}]*}", "…", self.words)

    def holds(self, values: pandas.Series) -> pandas.Series:
        """[n] bool: where the metric is beyond the limit. A missing value is not."""
        return values > self.above if self.above is not None else values < self.below

    def worst(self, values: pandas.Series) -> float:
        """The value furthest beyond the limit."""
        return float(values.max() if self.above is not None else values.min())

    def remedy(self, router: str) -> str:
        """What to do about it with a router of this type; ``FIRST_BY_HASH`` without an entry has that of hash."""
        if router == FIRST_BY_HASH and router not in self.remedies:
            router = "hash"
        return self.remedies.get(router, self.remedies.get("", ""))


RULES = (
    Rule(
        name="experts unused",
        metric="unused",
        above=0.25,
        words="{:.0%} of the experts unused",
        remedies={
            "air": f"raise --moe-air-num-explored, or {_BALANCE}",
            "hash": "lower --num-experts: more experts than --moe-router-topk times the token ids stay unused",
            FIRST_BY_HASH: "lower --moe-num-hash-layers: more experts than --moe-router-topk times the token ids stay "
            "unused",
            "": _BALANCE,
        },
        reason="an expert learns only if the balancing loss sees it: of 16,384 experts 87% are in use with eight "
        "explored candidates, and 62% without",
    ),
    Rule(
        name="experts unlisted",
        metric="unlisted",
        above=0.01,
        words="{:.1%} of the experts are in no shortlist",
        remedies={"": "raise --moe-air-shortlist-size"},
        reason="an expert in no list cannot be chosen and gets no gradient; with the automatic sizes all are listed",
    ),
    Rule(
        name="top-k recall",
        metric="topk_recall",
        below=0.7,
        words="only {:.0%} of the exact top-k is found",
        remedies={"": "raise --moe-air-num-probes, then --moe-air-shortlist-size"},
        reason="in the study 84% was level with exact top-k, 79% was 4% behind it in perplexity",
    ),
    Rule(
        name="recall lost",
        metric="recall_lost",
        above=0.1,
        words="top-k recall is {:.0%} below its best: codebook and lists do not keep up with the tokens",
        remedies={"": "lower --moe-air-refresh-interval, then --moe-air-codebook-ema"},
        reason="a few points are noise of the sample of tokens; ten are not",
    ),
    Rule(
        name="list drift",
        metric="drift",
        above=0.5,
        words="{:.0%} of the lists' entries changed between two records",
        remedies={"": "lower --moe-air-refresh-interval"},
        reason="with the default intervals five rebuilds lie between two records, so each replaces a tenth or more",
    ),
    Rule(
        name="idle codewords",
        metric="idle",
        above=0.5,
        words="{:.0%} of the codewords got no token",
        remedies={"": "lower --moe-air-num-clusters"},
        reason="every codeword is scored for every token; a third is idle in a healthy run, half is waste",
    ),
    Rule(
        name="entropy of the codewords",
        metric="codeword_entropy",
        below=0.6,
        words="few codewords take most tokens (entropy {:.2f} of 1)",
        remedies={"": "set --moe-router-input-norm running; where it is set, raise --moe-air-num-clusters"},
        reason="at 0.6 the tokens of 512 codewords are spread as if there were 42",
        percent=False,
    ),
    Rule(
        name="quantization error",
        metric="quantization_error",
        below=0.02,
        words="nearly all tokens have one direction (quantization error {:.3f})",
        remedies={"": "set --moe-router-input-norm running"},
        reason="in the study the error was 0.01 where a few experts won every token",
        percent=False,
    ),
    Rule(
        name="quantization error",
        metric="quantization_error",
        above=0.6,
        words="codewords are far from their tokens (quantization error {:.2f})",
        remedies={"": "raise --moe-air-num-clusters"},
        reason="the demo has 0.15; random directions have 0.7 in the demo's 128 dimensions",
        percent=False,
    ),
    Rule(
        name="imbalance of experts",
        metric="imbalance_factor",
        above=10,
        words="the load is as uneven as if one expert in {:.0f} did all the work",
        remedies={
            "hash": "set --moe-hash-balance frequency; where it is set, choose another --moe-router-type",
            FIRST_BY_HASH: "set --moe-hash-balance frequency; where it is set, lower --moe-num-hash-layers",
            "": _BALANCE,
        },
        reason="balanced routers stayed below 9.7 in the study, at up to 65,536 experts",
        percent=False,
    ),
    Rule(
        name="imbalance of ranks",
        metric="rank_imbalance",
        above=1.25,
        words="the most loaded expert-parallel rank gets {:.2f} times the mean",
        remedies={"hash": "change --moe-hash-seed", "": _BALANCE},
        reason="all ranks wait for that one: the experts' part of the step takes a quarter longer",
        percent=False,
    ),
    Rule(
        name="broken bound",
        metric="bound_broken",
        above=0.001,
        words="a lower bound is {:.1%} above the measured mass recall",
        remedies={"": _NO_FLAG},
        reason="the bounds are proven, up to rounding",
    ),
    Rule(
        name="share of routing",
        metric="routing_share",
        above=0.5,
        words="routing takes {:.0%} of a step",
        remedies={
            "air": "lower --moe-air-num-probes, then --moe-air-num-clusters",
            "product_key": "lower --moe-product-key-heads",
            "hierarchical": "lower --moe-hierarchical-topk-groups",
            "": "set --moe-router-type air",
        },
        reason="the rest of the model then gets less than half of the time",
        of_run=True,
    ),
    Rule(
        name="loss",
        metric="loss_rise",
        above=0.5,
        words="the loss is {:.2f} nats above its best",
        remedies={"": "lower --lr, or lower --clip-grad"},
        reason="half a nat is 1.6 times the perplexity, far beyond the noise of a batch",
        percent=False,
        of_run=True,
    ),
    Rule(
        name="missing loss",
        metric="no_loss",
        above=0,
        words="the loss is no number, or steps are skipped",
        remedies={"": "lower --lr, or lower --clip-grad"},
        reason="no step should be lost; with fp16 a few are while the loss scale is found",
        of_run=True,
    ),
)


@dataclass(frozen=True)
class Finding:
    """A rule that currently holds in a run.

    Attributes:
        router: type of the layers' router or ``FIRST_BY_HASH``; for a rule of the whole run, the run's router type.
        layers: layer -> (newest value, iteration since); layer 0 is the run as a whole.
    """

    run: Run
    rule: Rule
    router: str
    layers: dict[int, tuple[float, int]] = field(default_factory=dict)

    @property
    def since(self) -> int:
        """The iteration since which it has held without a gap, in the layer where it began first."""
        return min(since for _, since in self.layers.values())

    @property
    def where(self) -> str:
        """The layers in words."""
        return ranges(list(self.layers))

    @property
    def text(self) -> str:
        """The warning in words.

        Example: layer 7: 31% of the experts unused, since step 4,000: raise --moe-aux-loss-coeff.
        """
        worst = self.rule.worst(pandas.Series([value for value, _ in self.layers.values()]))
        what = self.rule.words.format(worst)
        remedy = self.rule.remedy(self.router)
        if 0 in self.layers:
            return f"{what}, since step {self.since:,}: {remedy}"
        layer = next(layer for layer, (value, _) in self.layers.items() if value == worst)
        where = f"layers {self.where} (worst: {layer})" if len(self.layers) > 1 else f"layer {layer}"
        return f"{where}: {what}, since step {self.since:,}: {remedy}"


def findings(run: Run) -> list[Finding]:
    """The rules that hold in the newest records of a run, in the order of the table.

    Example: if layer 2 has experts used [0.9, 0.7, 0.6, 0.6] at steps 10, 20, 30, 40, there is a warning since step 20.
    """
    metrics = layer_metrics(run)
    found = []
    for rule in RULES:
        if rule.of_run:
            breach = _breach(rule, run_metrics(run)[rule.metric])
            if breach:
                found.append(Finding(run, rule, run.router_type, {0: breach}))
            continue
        of_router: dict[str, Finding] = {}
        for (layer, router), rows in metrics.groupby(["layer", "router"]):
            breach = _breach(rule, rows.set_index("iteration")[rule.metric])
            if breach:
                router = FIRST_BY_HASH if router == "hash" != run.router_type else router
                of_router.setdefault(router, Finding(run, rule, router)).layers[int(layer)] = breach
        found += of_router.values()
    return found


def layer_metrics(run: Run) -> pandas.DataFrame:
    """``Run.layers`` with further metrics that rules need: lost recall, broken bounds, and corrected unused shares.

    Experts count as unused, and codewords as idle, only as far as the tokens could have reached them: n tokens that are
    spread over E experts at random reach ``1 - exp(-n / E)`` of them.
    """
    frame = run.layers.sort_values(["layer", "iteration"]).copy()
    by_layer = frame.groupby("layer", group_keys=False)
    frame["recall_lost"] = by_layer["topk_recall"].transform(lambda recall: recall.cummax() - recall)
    bound = frame[["mass_bound", "paper_bound"]].max(axis=1)
    frame["bound_broken"] = bound - frame["mass_recall"]
    num_experts, topk, num_clusters = (_size_of(run, frame, name) for name in ("num_experts", "topk", "num_clusters"))
    frame["unused"] = _within_reach(frame["unused"], by_layer["tokens"].diff() * topk / num_experts)
    frame["idle"] = _within_reach(frame["idle"], _tokens_per_step(run, by_layer) / num_clusters)
    return frame


def _tokens_per_step(run: Run, by_layer: DataFrameGroupBy) -> pandas.Series | float:
    """Tokens of a global batch; NaN if they are unknown. With a schedule, the mean over the steps since a record."""
    if run.argument("step_batch_size_schedule") is not None:
        return by_layer["tokens"].diff() / by_layer["iteration"].diff()
    return run.argument("global_batch_size", math.nan) * run.argument("seq_length", math.nan)


def _size_of(run: Run, frame: pandas.DataFrame, name: str) -> pandas.Series:
    """For each row, a size of its layer; NaN if the layer's router has none."""
    return frame["layer"].map({layer: size.get(name) for layer, size in run.sizes.items()}).astype(float)


def _within_reach(unused: pandas.Series, mean: pandas.Series) -> pandas.Series:
    """The unused share of those that random tokens would reach, with ``mean`` tokens per expert or codeword.

    If the mean is unknown, all count as reachable. Example: 0.7 tokens on each reach half, so if half are unused, the
    result is 0.
    """
    reached = (1 - numpy.exp(-mean)).fillna(1.0)
    return 1 - (1 - unused) / reached


def run_metrics(run: Run) -> dict[str, pandas.Series]:
    """Metrics of the whole run by iteration: share of routing, loss above its best, and steps without a loss."""
    loss = run.steps.set_index("iteration")["loss"].replace([numpy.inf, -numpy.inf], math.nan)
    return {
        "routing_share": run.totals.set_index("iteration")["routing_share"],
        "loss_rise": loss - loss.cummin(),
        "no_loss": loss.isna().astype(float),
    }


def _breach(rule: Rule, values: pandas.Series) -> tuple[float, int] | None:
    """Newest value, and first iteration of the unbroken tail in which the rule holds; None if the tail is too short."""
    values = values.dropna()
    holds = rule.holds(values).to_numpy()
    if len(holds) < RECORDS or not holds[-RECORDS:].all():
        return None
    breaks = numpy.flatnonzero(~holds)
    return float(values.iloc[-1]), int(values.index[breaks[-1] + 1 if len(breaks) else 0])


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in words.

    Example: [1, 2, 3, 7] is "1 to 3, 7".
    """
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    words = [f"{part[0]} to {part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts]
    return ", ".join(words)
