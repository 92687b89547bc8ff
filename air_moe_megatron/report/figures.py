"""The figures of the page, drawn by matplotlib as SVG within HTML."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from air_moe_megatron.report.svg import svg_of

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Colors of Okabe and Ito, distinguishable by color-blind people; without yellow, which is too light for lines."""
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
MAP = "cividis"
UNKNOWN = "#c8c8c8"
"""Color of a codeword of which no token was sampled."""

_WIDTH, _HEIGHT = 3.7, 2.45  # inches; 355 pixels wide, so that text keeps its size in a narrow window
_MAP_HEIGHT = 3.3
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "legend.handlelength": 2.0,
    "legend.columnspacing": 1.0,
    "legend.borderaxespad": 0.1,
    "axes.axisbelow": True,
}
_SIZE_STEPS = 8


@dataclass(frozen=True)
class Curve:
    """A line of a panel.

    Attributes:
        x, y: [n]; a NaN in y is a gap.
        run: index of the run, which determines the color if there are several runs.
        series: index of the series in the panel, which determines the dashes.
        low, high: [n] a band around the line, or None.
    """

    x: numpy.ndarray
    y: numpy.ndarray
    run: int
    series: int
    low: numpy.ndarray | None = None
    high: numpy.ndarray | None = None


def thinned(x: numpy.ndarray, y: numpy.ndarray, most: int) -> tuple[numpy.ndarray, ...]:
    """Reduce to at most ``most`` points: means of x and y over groups of neighbors, least and largest y of each group.

    Example: x [1, 2, 3, 4], y [1, 3, 5, 5] and 2 points give [1.5, 3.5], [2, 5], [1, 5], [3, 5].
    """
    if len(x) <= most:
        return x, y, y, y
    parts = numpy.array_split(numpy.arange(len(x)), most)
    firsts = numpy.array([part[0] for part in parts])
    counts = numpy.diff([*firsts, len(x)])
    sums = [numpy.add.reduceat(values, firsts) / counts for values in (x, y)]
    return *sums, numpy.minimum.reduceat(y, firsts), numpy.maximum.reduceat(y, firsts)


@dataclass(frozen=True)
class Axis:
    """Axis labels and limits that panels share.

    Attributes:
        limits: limits of the y axis; None takes them from the curves.
        right_label: label of a second axis on the right that shows exp(y), or None.
    """

    x_label: str
    y_label: str
    limits: tuple[float, float | None] | None = None
    right_label: str | None = None


def panels(
    drawn: Sequence[tuple[str, Sequence[Curve]]],
    names: Sequence[str],
    axis: Axis,
    num_runs: int,
    marks: Sequence[tuple[float, int]] = (),
) -> list[str]:
    """Draw figures of curves on the same axes, so that they are comparable.

    Args:
        drawn: for each figure the text for screen readers, unique on the page, and its curves.
        names: names of the series; a single series has no legend.
        num_runs: number of runs on the page. With one, colors show the series; with several, they show the runs.
        marks: (x, run) of resumes, drawn as vertical lines.
    Returns:
        a figure for each of ``drawn``.
    """
    every = [curve for _, curves in drawn for curve in curves]
    with _figure(_HEIGHT, right=0.96 if axis.right_label is None else 0.84) as (figure, axes):
        low, high = _range([curve.x for curve in every])
        axes.set_xlim(low, high)
        low, high = _range([values for curve in every for values in (curve.y, curve.low, curve.high)])
        axes.set_ylim(*(axis.limits or (low, high)))
        if axis.limits and axis.limits[1] is None:
            axes.set_ylim(axis.limits[0], high)
        axes.xaxis.set_major_locator(_ticks(5))
        axes.yaxis.set_major_locator(_ticks(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.set_xlabel(axis.x_label)
        axes.set_ylabel(axis.y_label)
        if len(names) > 1:
            _legend(axes, [_handle(series, num_runs) for series in range(len(names))], names)
        if axis.right_label:
            right = axes.secondary_yaxis("right")
            right.yaxis.set_major_locator(_ticks(5))
            right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{numpy.exp(value):.3g}"))
            right.set_ylabel(axis.right_label)
        for x, run in marks:
            axes.axvline(x, color=COLORS[run] if num_runs > 1 else "#555555", linewidth=0.8, linestyle=(0, (2, 2)))
        texts = []
        for label, curves in drawn:
            artists = [artist for curve in curves for artist in _draw(axes, curve, num_runs)]
            texts.append(svg_of(figure, label))
            for artist in artists:
                artist.remove()
        return texts


def _draw(axes: Axes, curve: Curve, num_runs: int) -> list[Artist]:
    color = COLORS[curve.run] if num_runs > 1 else COLORS[curve.series]
    drawn: list[Artist] = []
    if curve.low is not None and curve.high is not None:
        drawn.append(axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.18, linewidth=0))
    marker = "o" if len(curve.x) == 1 else None
    drawn += axes.plot(curve.x, curve.y, linestyle=_DASHES[curve.series], color=color, marker=marker, markersize=3)
    return drawn


def _handle(series: int, num_runs: int) -> Line2D:
    """Legend handle of a series."""
    color = "#333333" if num_runs > 1 else COLORS[series]
    return Line2D([], [], linestyle=_DASHES[series], color=color)


def _range(parts: Sequence[numpy.ndarray | None]) -> tuple[float, float]:
    """Limits of an axis: the range of all finite values, and a twentieth more at each end."""
    values = numpy.concatenate([part[numpy.isfinite(part)] for part in parts if part is not None] or [numpy.zeros(1)])
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return low - margin, high + margin


def heat_maps(
    drawn: Sequence[tuple[str, numpy.ndarray, numpy.ndarray]], num_experts: int, most: float, columns: int
) -> list[str]:
    """Load of ranges of experts over tokens, in figures with the same axes and colors.

    Args:
        drawn: for each figure the text for screen readers, unique on the page; [records, bins] load over the mean of
            all; [records] tokens.
        num_experts: experts of a layer.
        most: load from which on the color is the brightest.
        columns: number of columns of equally many tokens, see :func:`binned`.
    """
    first, last = (edge(float(edge(tokens)) for _, _, tokens in drawn) for edge in (min, max))
    with _figure(_HEIGHT) as (figure, axes):
        axes.grid(visible=False)
        axes.set_xlim(first, last if last > first else first + 1)
        axes.set_ylim(0, num_experts)
        axes.xaxis.set_major_locator(_ticks(5))
        axes.yaxis.set_major_locator(_ticks(4))
        for direction in (axes.xaxis, axes.yaxis):
            direction.set_major_formatter(EngFormatter(sep=" "))
        axes.set_xlabel("tokens")
        axes.set_ylabel("expert id")
        scale = numpy.linspace(0, most, 5)
        words = [f"{value:.3g}" for value in scale]
        _swatches(axes, matplotlib.colormaps[MAP](scale / most), [*words[:-1], f"{words[-1]} and more"])
        texts = []
        for label, loads, tokens in drawn:
            cells = binned(loads, tokens, columns)
            extent = (float(tokens[0]), float(max(tokens[-1], tokens[0] + 1)), 0, num_experts)
            shown = {"aspect": "auto", "origin": "lower", "interpolation": "none"}
            image = axes.imshow(cells.T, extent=extent, cmap=MAP, norm=Normalize(0, most), **shown)
            axes.set_xlim(first, last if last > first else first + 1)
            texts.append(svg_of(figure, label))
            image.remove()
        return texts


def binned(loads: numpy.ndarray, tokens: numpy.ndarray, columns: int) -> numpy.ndarray:
    """[columns, bins] loads averaged over equal numbers of tokens; a column without a record repeats the last.

    Example: loads [[0], [2], [5]] at tokens [0, 1, 4] and 2 columns give [[1], [5]].
    """
    count = max(1, min(columns, len(tokens)))
    edges = numpy.linspace(tokens[0], tokens[-1], count + 1)
    column_of = numpy.clip(numpy.searchsorted(edges, tokens, side="right") - 1, 0, count - 1)
    cells = numpy.empty((count, loads.shape[1]), dtype=numpy.float32)
    for column in range(count):
        here = column_of == column
        cells[column] = loads[here].mean(axis=0) if here.any() else cells[column - 1]
    return cells


def codebook_map(
    x: numpy.ndarray,
    y: numpy.ndarray,
    load: numpy.ndarray,
    recall: numpy.ndarray,
    hovers: dict[int, str],
    label: str,
) -> str:
    """Draw codewords as discs, sized by load and colored by recall.

    Those in ``hovers`` are vector graphics with a text under the pointer; the others form one bitmap beneath them.

    Args:
        x, y, load, recall: [C], as in ``runs.Codebook``.
        hovers: codeword -> text.
        label: text for screen readers, unique on the page.
    """
    with _figure(_MAP_HEIGHT, bottom=0.13, top=0.84) as (figure, axes):
        axes.grid(axis="x")
        largest = max(float(load.max(initial=0)), 1.0)
        steps = numpy.ceil(_SIZE_STEPS * load / largest).clip(0, _SIZE_STEPS).astype(int)
        areas = 5 + 75 * numpy.arange(_SIZE_STEPS + 1) / _SIZE_STEPS
        colors = matplotlib.colormaps[MAP]
        fills = colors(numpy.nan_to_num(recall))
        fills[numpy.isnan(recall)] = matplotlib.colors.to_rgba(UNKNOWN)
        shown = numpy.zeros(len(x), dtype=bool)
        shown[list(hovers)] = True
        rest, shown = ~shown, shown & numpy.isfinite(x + y)  # matplotlib draws no disc without finite coordinates
        if rest.any():
            few = colors(numpy.round(4 * numpy.nan_to_num(recall[rest])) / 4)  # few colors make a small picture
            few[numpy.isnan(recall[rest])] = matplotlib.colors.to_rgba(UNKNOWN)
            style = {"linewidths": 0, "antialiased": False, "rasterized": True}
            axes.scatter(x[rest], y[rest], s=areas[steps[rest]], c=few, **style)
        texts: dict[str, list[str]] = {}
        for step in range(_SIZE_STEPS, -1, -1):  # large ones first, so that small ones are on top
            members = numpy.flatnonzero(shown & (steps == step))
            if len(members):
                discs = axes.scatter(
                    x[members], y[members], s=areas[step], c=fills[members], linewidths=0, clip_on=False
                )
                discs.set_gid(f"discs{step}")
                texts[f"discs{step}"] = [hovers[member] for member in members]
        axes.set_xlim(*_range([x]))
        axes.set_ylim(*_range([y]))
        axes.xaxis.set_major_locator(_ticks(5))
        axes.yaxis.set_major_locator(_ticks(5))
        axes.set_xlabel("first principal component, no unit")
        axes.set_ylabel("second principal component, no unit")
        sizes = numpy.sqrt(areas[[0, _SIZE_STEPS // 2, _SIZE_STEPS]])
        handles = [Line2D([], [], linestyle="", marker="o", markersize=size, color="#888888") for size in sizes]
        words = ["no token", f"{_count(largest / 2)} tokens", f"{_count(largest)} tokens"]
        axes.add_artist(_legend(axes, handles, words, row=1))
        scale = numpy.linspace(0, 1, 5)
        _swatches(axes, [*colors(scale), UNKNOWN], [*(f"{value:.0%}" for value in scale), "unseen"])
        return svg_of(figure, label, texts)


def _swatches(axes: Axes, colors: Sequence[Any], words: Sequence[str]) -> None:
    """Draw the color scale above the axes, which takes less time and bytes than a color bar in many figures."""
    handles = [Line2D([], [], linestyle="", marker="s", markersize=6, color=color) for color in colors]
    _legend(axes, handles, words)


def _legend(axes: Axes, handles: Sequence[Line2D], words: Sequence[str], row: int = 0) -> Legend:
    """A legend in a row above the axes."""
    corner = (-0.17, 1.0 + 0.085 * row)
    return axes.legend(handles, words, loc="lower left", bbox_to_anchor=corner, ncols=len(words), handletextpad=0.3)


def _ticks(count: int) -> MaxNLocator:
    return MaxNLocator(count, steps=[1, 2, 2.5, 5, 10])


def bars(values: Sequence[Sequence[float]], rows: Sequence[str], names: Sequence[str], x_label: str, label: str) -> str:
    """Draw horizontal bars with their values, one group per row.

    Args:
        values: [series][rows].
        rows: names of the groups.
        names: names of the series.
        label: text for screen readers, unique on the page.
    """
    with _figure(0.72 + 0.45 * len(rows), bottom=None, left=0.3, right=0.8) as (figure, axes):
        height = 0.8 / len(values)
        positions = numpy.arange(len(rows))[::-1]
        for series, column in enumerate(values):
            drawn = axes.barh(
                positions + 0.4 - height * (series + 0.5), column, height, color=COLORS[series], label=names[series]
            )
            axes.bar_label(drawn, [_count(value) for value in column], padding=3, fontsize=7.5)
        axes.set_yticks(positions, rows)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(_ticks(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.set_xlabel(x_label)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.5, 1.0), ncols=len(names))
        return svg_of(figure, label)


def _count(value: float) -> str:
    return EngFormatter(places=0 if value < 1000 else 1, sep=" ")(round(value))


@contextlib.contextmanager
def _figure(
    height: float, *, left: float = 0.17, right: float = 0.97, bottom: float | None = 0.17, top: float | None = None
) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one pair of axes. Margins that are not given as shares are constant in inches."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height))
        FigureCanvasSVG(figure)
        low = 0.42 / height if bottom is None else bottom
        high = top if top is not None else 1 - 0.27 / height
        yield figure, figure.add_axes((left, low, right - left, high - low))
