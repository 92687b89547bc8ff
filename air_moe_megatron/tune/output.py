"""CSV file and plot of the measurements."""

from pathlib import Path

import matplotlib
import pandas

from air_moe_megatron.tune.measured import Measured
from air_moe_megatron.tune.search import frontier

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

_COLORS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00")  # Okabe and Ito: distinguishable by the color-blind


_SIZES = ("num_clusters", "shortlist_size", "num_probes", "num_candidates")


def rows_of(measured: Measured) -> pandas.DataFrame:
    """One row per result and layer, for the CSV file."""
    return pandas.DataFrame(
        {
            "name": result.name,
            **{name: getattr(result.setting, name, None) for name in _SIZES},
            "flops_per_token": result.flops,
            "layer": layer.name,
            "topk_recall": topk,
            "mass_recall": mass,
        }
        for result in measured.results
        for layer, topk, mass in zip(measured.layers, result.topk, result.mass, strict=True)
    )


def plot(path: Path, measured: Measured) -> None:
    """Recall of the worst layer over FLOPs per token, of AIR's settings and of the other structures, as a PNG file."""
    air, metric, chosen = measured.found.results, measured.metric, measured.chosen
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for color, num_probes in zip(_COLORS, sorted({one.setting.num_probes for one in air}), strict=False):
        chunk = [one for one in air if one.setting.num_probes == num_probes]
        axes.scatter(
            [one.flops for one in chunk],
            [one.recall(metric) for one in chunk],
            s=14,
            color=color,
            label=f"AIR, {num_probes} {'probe' if num_probes == 1 else 'probes'}",
        )
    line = frontier(air, metric)
    axes.plot(
        [one.flops for one in line],
        [one.recall(metric) for one in line],
        color="black",
        linewidth=1,
        label="AIR, best at its cost",
    )
    others = {
        "groups": ("s", "#cc79a7", "groups of the same centers"),
        "product keys": ("*", "#999999", "product keys fitted to them"),
    }
    for name, (marker, color, label) in others.items():
        chunk = [one for one in measured.others if one.name.startswith(name)]
        if chunk:
            axes.plot(
                [one.flops for one in chunk],
                [one.recall(metric) for one in chunk],
                marker=marker,
                color=color,
                label=label,
            )
    axes.axhline(measured.target, color="black", linestyle=":", linewidth=1)
    axes.axvline(measured.exact_flops, color="black", linestyle="--", linewidth=1, label="exact top-k")
    if chosen is not None:
        axes.scatter(
            [chosen.flops],
            [chosen.recall(metric)],
            s=160,
            facecolors="none",
            edgecolors="black",
            linewidths=1.5,
            label="chosen",
        )
    axes.set_xscale("log")
    axes.set_xlabel("router FLOPs per token and layer: forward, backward, rebuilds")
    axes.set_ylabel(f"{'top-k' if metric == 'topk' else 'mass'} recall of the worst layer")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
