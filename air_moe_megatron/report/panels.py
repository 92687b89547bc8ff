"""Which figures the page has, drawn for all runs on the same axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy
import pandas

from air_moe_megatron.report import figures
from air_moe_megatron.report.runs import Run
from air_moe_megatron.report.tables import number, router_flops
from air_moe_megatron.report.tokens import texts_of

_ROWS = 12  # rows of a table of codewords
_POINTS = 250  # points of a curve of all layers


class Panel(NamedTuple):
    """A panel of figures over tokens."""

    title: str
    caption: str
    series: tuple[tuple[str, str], ...]  # column of Run.layers, name in the legend
    y_label: str
    limits: tuple[float, float | None] | None = (0, 1.02)
    scale: float = 1.0


PANELS = (
    Panel(
        "Top-k recall",
        "Share of the exact top-k that is found, and share of tokens whose top-k is proven to be the exact one.",
        (("topk_recall", "found"), ("certified", "proven exact")),
        "share of top-k, of tokens",
    ),
    Panel(
        "Mass recall and its lower bounds",
        "Share of the exact softmax mass that the shortlists hold. It cannot lie below a bound.",
        (("mass_recall", "measured"), ("mass_bound", "our bound"), ("paper_bound", "paper's bound")),
        "share of softmax mass",
    ),
    Panel(
        "Experts used and listed",
        "Share of experts that got a token since the last record, and that are in any shortlist.",
        (("experts_used", "used"), ("experts_listed", "listed")),
        "share of experts",
    ),
    Panel(
        "Load imbalance",
        "1 is even. Experts: at f the load is as uneven as if one expert in f did all the work. Ranks: the most loaded "
        "expert-parallel rank over the mean.",
        (("imbalance_factor", "experts"), ("rank_imbalance", "ranks")),
        "times the even load",
        None,
    ),
    Panel(
        "Use of the codewords",
        "Share of codewords without a token in the measured step, and entropy of the loads: 1 if all get the same.",
        (("idle", "idle"), ("codeword_entropy", "entropy")),
        "share of codewords, of log C",
    ),
    Panel(
        "Quantization error and list drift",
        "One minus the cosine between a token and its codeword; share of the lists' entries that changed since the "
        "last record.",
        (("quantization_error", "error"), ("drift", "drift")),
        "1 - cosine, share of entries",
    ),
    Panel(
        "Time of routing",
        "Time of the layer's router in the forwards of a step.",
        (("routing_seconds", "routing"),),
        "ms per step",
        (0, None),
        1e3,
    ),
)
"""Panels of a layer."""

GLANCE = tuple(
    Panel(title, caption, ((column, title),), y_label, limits)
    for title, caption, column, y_label, limits in (
        ("Top-k recall", "Share of the exact top-k that is found.", "topk_recall", "share of top-k", (0, 1.02)),
        ("Mass recall", "Softmax mass that the shortlists hold.", "mass_recall", "share of softmax mass", (0, 1.02)),
        (
            "Experts used",
            "Share that got a token since the last record.",
            "experts_used",
            "share of experts",
            (0, 1.02),
        ),
        ("Imbalance of experts", "1 is even.", "imbalance_factor", "times the even load", None),
        ("Imbalance of ranks", "Most loaded rank over the mean.", "rank_imbalance", "times the even load", None),
        ("Idle codewords", "Share without a token.", "idle", "share of codewords", (0, 1.02)),
        ("Quantization error", "Tokens against their codewords.", "quantization_error", "1 - cosine", None),
        ("List drift", "Entries changed since the last record.", "drift", "share of entries", (0, 1.02)),
    )
)
"""Panels of all layers together."""


@dataclass(frozen=True)
class Budget:
    """How much fits: layers with own figures, points of a curve, columns of a heat map, discs of a map."""

    layers: int
    points: int
    columns: int
    discs: int


class Drawn(NamedTuple):
    """A figure with its texts; ``svg`` is None if no run has it."""

    title: str
    caption: str
    svg: str | None


class Builder:
    """Draws the figures of all runs."""

    def __init__(self, runs: Sequence[Run], budget: Budget) -> None:
        self.runs, self.budget = runs, budget
        self.marks = [(resume.tokens, index) for index, run in enumerate(runs) for resume in run.resumes]
        decoded = [texts_of(run, _ids(run)) for run in runs]
        self.texts = [texts for texts, _ in decoded]
        self.token_notes = sorted({note for _, note in decoded if note})

    def loss(self) -> list[Drawn]:
        """Loss and perplexity over tokens and over time."""
        return [
            self._loss("tokens", "tokens", "Loss over tokens", ""),
            self._loss(
                "seconds",
                "training time in seconds",
                "Loss over time",
                " Time counts training steps alone, without pauses, evaluation and saving.",
            ),
        ]

    def _loss(self, x: str, x_label: str, title: str, more: str) -> Drawn:
        caption = (
            "Language model loss; on the right perplexity, which is e to the power of the loss. A band shows least and "
            "largest where several records make one point." + more
        )
        curves, marks = [], []
        for index, run in enumerate(self.runs):
            steps = run.steps.dropna(subset=[x])
            if not len(steps):
                continue
            points = figures.thinned(steps[x].to_numpy(), steps["loss"].to_numpy(), 2 * _POINTS)
            curves.append(figures.Curve(*points[:2], index, 0, *points[2:]))
            resumed = [resume.tokens for resume in run.resumes]
            marks += [(float(where), index) for where in numpy.interp(resumed, steps["tokens"], steps[x])]
        if not curves:
            return Drawn(title, caption, None)
        axis = figures.Axis(x_label, "nats per token", right_label="perplexity per token")
        (svg,) = figures.panels([(title, curves)], ["training"], axis, len(self.runs), marks)
        return Drawn(title, caption, svg)

    def glance(self) -> list[Drawn]:
        """Figures of all layers together: their mean, with a band from the lowest to the highest layer."""
        drawn = []
        for panel in GLANCE:
            column = panel.series[0][0]
            curves = []
            for index, run in enumerate(self.runs):
                rows = run.layers.dropna(subset=[column])
                if len(rows):
                    of_all = rows.groupby("tokens")[column].agg(["mean", "min", "max"]).reset_index()
                    parts = (of_all[name].to_numpy() for name in ("mean", "min", "max"))
                    mean, low, high = (figures.thinned(of_all["tokens"].to_numpy(), part, _POINTS) for part in parts)
                    curves.append(figures.Curve(mean[0], mean[1], index, 0, low[1], high[1]))
            drawn += self._panels(panel, [("all layers", curves)])
        return drawn

    def layers(self, layers: Sequence[int]) -> list[dict[str, Any]]:
        """All figures of single layers."""
        frames = {layer: [run.layers[run.layers["layer"] == layer] for run in self.runs] for layer in layers}
        over_tokens = [
            self._panels(panel, [(f"layer {layer}", self._curves(panel, frames[layer])) for layer in layers])
            for panel in PANELS
        ]
        loads = self._loads(layers)
        return [
            {
                "number": layer,
                "routers": sorted({run.sizes[layer]["router"] for run in self.runs if layer in run.sizes}),
                "panels": [of_layers[index] for of_layers in over_tokens],
                "loads": loads[layer],
                "maps": [self._map(number, layer) for number, run in enumerate(self.runs) if layer in run.codebooks],
            }
            for index, layer in enumerate(layers)
        ]

    def _curves(self, panel: Panel, frames: list[pandas.DataFrame]) -> list[figures.Curve]:
        curves = []
        for index, frame in enumerate(frames):
            for series, (column, _) in enumerate(panel.series):
                rows = frame.dropna(subset=[column])
                if len(rows):
                    values = panel.scale * rows[column].to_numpy()
                    x, y, _, _ = figures.thinned(rows["tokens"].to_numpy(), values, self.budget.points)
                    curves.append(figures.Curve(x, y, index, series))
        return curves

    def _panels(self, panel: Panel, drawn: list[tuple[str, list[figures.Curve]]]) -> list[Drawn]:
        """A figure for each title and its curves; series that no run has are left out."""
        present = sorted({curve.series for _, curves in drawn for curve in curves})
        renumbered = [
            (f"{panel.title}, {where}", [replace(curve, series=present.index(curve.series)) for curve in curves])
            for where, curves in drawn
            if curves
        ]
        names = [panel.series[series][1] for series in present] if len(panel.series) > 1 else []
        axis = figures.Axis("tokens", panel.y_label, panel.limits)
        svgs = iter(figures.panels(renumbered, names, axis, len(self.runs), self.marks) if renumbered else [])
        return [Drawn(panel.title, panel.caption, next(svgs) if curves else None) for _, curves in drawn]

    def _loads(self, layers: Sequence[int]) -> dict[int, list[Drawn]]:
        """Layer -> its heat maps. All maps of a kind share one color scale."""
        drawn: dict[int, list[Drawn]] = {layer: [] for layer in layers}
        for name, title in (
            ("load_bins", "Mean load of ranges of experts"),
            ("max_bins", "Most loaded expert of a range"),
        ):
            kept = [
                (layer, run, run.bins[layer][name], run.bins[layer][f"{name}_tokens"])
                for layer in layers
                for run in self.runs
                if name in run.bins.get(layer, {})
            ]
            # Almost the largest load, so that a few hot ranges do not darken all others.
            most = max([2, *(math.ceil(numpy.nanquantile(loads, 0.98)) for _, _, loads, _ in kept)])
            for num_experts in sorted({self._num_experts(run, layer) for layer, run, _, _ in kept}):
                same = [entry for entry in kept if self._num_experts(entry[1], entry[0]) == num_experts]
                labels = [f"{title}, layer {layer}, {run.name}" for layer, run, _, _ in same]
                arrays = [(label, *entry[2:]) for label, entry in zip(labels, same, strict=True)]
                svgs = figures.heat_maps(arrays, num_experts, most, self.budget.columns)
                for (layer, run, loads, _), svg in zip(same, svgs, strict=True):
                    rows = math.ceil(num_experts / loads.shape[1])
                    caption = f"Load over the mean of all: 1 is even. Each row stands for {_plural(rows, 'expert')}."
                    drawn[layer].append(Drawn(self._named(title, run), caption, svg))
        return drawn

    def _num_experts(self, run: Run, layer: int) -> int:
        return run.sizes.get(layer, {}).get("num_experts") or run.bins[layer]["load_bins"].shape[1]

    def _named(self, title: str, run: Run) -> str:
        return title if len(self.runs) == 1 else f"{title}: {run.name}"

    def _map(self, index: int, layer: int) -> tuple[Drawn, list[tuple[str, str, str, str]]]:
        """The map of a codebook, and the rows of the codewords with the largest load."""
        run, texts = self.runs[index], self.texts[index]
        book = run.codebooks[layer]
        order = numpy.argsort(-book.load, kind="stable")[: max(self.budget.discs, _ROWS)].tolist()
        total = max(float(book.load.sum()), 1.0)
        rows = [
            (
                str(code),
                f"{book.load[code] / total:.2%}",
                number(float(book.recall[code]), ".0%"),
                ", ".join(f"{texts[token]} ({count:,})" for token, count in book.tokens[code]) if book.tokens else "",
            )
            for code in order
        ]
        hovers = {
            code: f"codeword {name}: {load} of the tokens, recall {recall}" + (f"\n{words}" if words else "")
            for code, (name, load, recall, words) in zip(order[: self.budget.discs], rows, strict=False)
        }
        label = f"Map of the codebook, layer {layer}, {run.name}"
        svg = figures.codebook_map(book.x, book.y, book.load, book.recall, hovers, label)
        those = "Each shows" if len(hovers) == len(book.x) else f"The {len(hovers):,} with the largest load show"
        caption = (
            f"{len(book.x):,} codewords at step {run.codebook_iteration:,}. Area: its tokens. Color: top-k recall. "
            f"{those} the most frequent tokens under the pointer."
        )
        return Drawn(self._named("Map of the codebook", run), caption, svg), rows[:_ROWS]

    def cost(self) -> list[Drawn]:
        """FLOPs of the routers against exact ones, routing's share of the steps, and the time of a step."""
        pairs = [router_flops(run) for run in self.runs]
        svg = None
        if all(own is not None and exact is not None for own, exact in pairs):
            rows = [run.name for run in self.runs] if len(self.runs) > 1 else [", ".join(self.runs[0].routers)]
            rows = [row if len(row) < 15 else f"…{row[-13:]}" for row in rows]
            columns = [list(column) for column in zip(*pairs, strict=True)]
            svg = figures.bars(columns, rows, ["this router", "exact"], "FLOPs per token, all layers", "Router FLOPs")
        drawn = [
            Drawn(
                "FLOPs of routing",
                "Forward and backward of all layers' routers, per token; rebuilds of lists included.",
                svg,
            )
        ]
        for column, title, caption, y_label in (
            ("routing_share", "Share of routing", "Time of all routers over that of the step.", "share of the step"),
            ("step_seconds", "Time of a step", "Mean since the last log line.", "seconds per step"),
        ):
            curves = []
            for index, run in enumerate(self.runs):
                frame = (run.totals if column == "routing_share" else run.steps).dropna(subset=[column])
                if len(frame):
                    x, y, _, _ = figures.thinned(frame["tokens"].to_numpy(), frame[column].to_numpy(), _POINTS)
                    curves.append(figures.Curve(x, y, index, 0))
            panel = Panel(title, caption, ((column, title),), y_label, (0, None))
            drawn += self._panels(panel, [("the run", curves)])
        return drawn


def _ids(run: Run) -> list[int]:
    """The token ids of all codewords."""
    books = (book for book in run.codebooks.values() if book.tokens)
    return [token for book in books for pairs in book.tokens for token, _ in pairs]


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' if count != 1 else ''}"
