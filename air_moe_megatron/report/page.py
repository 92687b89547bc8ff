"""The page: its layout, and how much detail fits."""

import re
from collections import Counter
from collections.abc import Sequence

import jinja2
import numpy
from markupsafe import Markup, escape

from air_moe_megatron.report import figures, tables
from air_moe_megatron.report.panels import PANELS, Budget, Builder
from air_moe_megatron.report.rules import RECORDS, RULES, findings, ranges
from air_moe_megatron.report.runs import Run

MOST_BYTES = 5_000_000
# Totals over all figures of single layers, at the page's full detail.
_POINTS = 45_000  # of curves, at about 14 bytes
_CELLS = 250_000  # of heat maps, at about 2 bytes
_DISCS = 2_500  # discs with a text of their own, on maps of codebooks, at about 210 bytes
_LAYERS = 48  # layers with figures of their own
_STYLE = re.compile(r' style="((?:fill|stroke|font)[^"]*)"')  # of the elements of pictures


def render(runs: Sequence[Run]) -> str:
    """The page of one or several runs, below ``MOST_BYTES``.

    Raises:
        ValueError: if even without figures of single layers it is larger, which takes thousands of layers.
    """
    num_layers = min(len({layer for run in runs for layer in run.sizes}), _LAYERS)
    detail = 1.0
    while True:
        text = with_classes(_render(runs, budget_of(runs, num_layers, detail)))
        if len(text.encode()) < MOST_BYTES:
            return text
        if num_layers == 0:
            raise ValueError(f"the page of {len(runs)} runs would exceed {MOST_BYTES / 1e6:.0f} MB; give fewer runs")
        if detail < 1:
            num_layers //= 2
        detail = 0.5


def with_classes(text: str) -> str:
    """Replace each style that occurs often in the page's pictures by a class, which saves a tenth of the bytes.

    Example: 30 times style="fill: none" become class="s0", and the page's style gets ".s0 { fill: none }".
    """
    styles = Counter(_STYLE.findall(text))
    names = {style: f"s{index}" for index, (style, count) in enumerate(styles.items()) if count >= 20}
    text = _STYLE.sub(lambda found: f' class="{names[found[1]]}"' if found[1] in names else found[0], text)
    rules = "\n".join(f".{name} {{ {style} }}" for style, name in names.items())
    return text.replace("</style>", f"{rules}\n</style>", 1)


def budget_of(runs: Sequence[Run], num_layers: int, detail: float = 1.0) -> Budget:
    """The detail that fits if ``num_layers`` layers have figures of their own.

    Example: one run of 48 layers gets 62 points per curve, 40 columns per heat map and 52 discs per map.
    """
    maps = max(num_layers * len(runs), 1) / detail
    curves = maps * sum(len(panel.series) for panel in PANELS)
    return Budget(
        num_layers,
        round(min(max(_POINTS / curves, 20), 250)),
        round(min(max(_CELLS / (128 * maps), 12), 120)),
        round(min(max(_DISCS / maps, 12), 1000)),
    )


def _render(runs: Sequence[Run], budget: Budget) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("air_moe_megatron.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["flags"] = flags
    found = [findings(run) for run in runs]
    layers = sorted({layer for run in runs for layer in run.sizes})
    detailed = _detailed(layers, {layer for of_run in found for finding in of_run for layer in finding.layers}, budget)
    builder = Builder(runs, budget)
    return environment.get_template("page.html").render(
        runs=runs,
        colors=figures.COLORS,
        summary=[tables.summary(run) for run in runs],
        notes=list(zip(runs, map(tables.notes, runs), strict=True)),
        different_routers=len({tuple(run.routers) for run in runs}) > 1,
        findings=list(zip(runs, found, strict=True)),
        few_records=[run for run in runs if run.totals.shape[0] < RECORDS],
        records=RECORDS,
        loss=builder.loss(),
        glance=builder.glance(),
        last=[(run, *tables.last_metrics(run)) for run in runs],
        layers=builder.layers(detailed),
        token_notes=builder.token_notes,
        num_layers=len(layers),
        shown_layers=ranges(detailed),
        cost=tables.cost_rows(runs),
        cost_figures=builder.cost(),
        rules=[
            (
                rule,
                [
                    (finding, run)
                    for run, of_run in zip(runs, found, strict=True)
                    for finding in of_run
                    if finding.rule is rule
                ],
            )
            for rule in RULES
        ],
        settings=tables.settings(runs),
    )


def flags(text: str) -> Markup:
    """Mark flags in a text as code, so that no line breaks at their hyphens."""
    return Markup(re.sub(r"--[a-z0-9-]+", r"<code>\g<0></code>", str(escape(text))))


def _detailed(layers: list[int], flagged: set[int], budget: Budget) -> list[int]:
    """The layers with figures of their own: those with warnings first, then evenly spaced ones."""
    if len(layers) <= budget.layers:
        return layers
    chosen = [layer for layer in layers if layer in flagged][: budget.layers]
    others = [layer for layer in layers if layer not in chosen]
    indices = numpy.linspace(0, len(others) - 1, budget.layers - len(chosen)).round().astype(int)
    return sorted({*chosen, *(others[index] for index in indices)})
