"""Tables and plots of a study's results: `python -m benchmarks.quality.report RESULTS.jsonl --out FOLDER`."""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas

from benchmarks.arguments import refused
from benchmarks.quality.study import BYTES, read_results

REFERENCE = "topk"
MODEL = ("corpus", "vocabulary", "layers", "variant", "experts", "topk", "ffn")
"""What names a model in a file of step times: its columns."""
_EARLIER = {"vocabulary": 4096, "layers": 2}
"""Columns that step times did not have at first: only models of full.toml were timed then."""
# The variants of one type of router.
_DASHES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (1, 3)), (0, (8, 2, 1, 2, 1, 2)), (0, (3, 4)))
_MARKERS = "os^DvpP*"
# The 97.5% quantile of Student's t with n - 1 degrees of freedom, for n values; those of more than ten are smaller.
_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
_USED, _IMBALANCE, _RECALL, _TOPK_RECALL = "experts-used", "imbalance-factor", "mass-recall", "top-k-recall"


class Regime(NamedTuple):
    """What comparable runs have in common."""

    corpus: str
    vocabulary: int
    tokens: int  # that a run trains on
    precision: str
    experts: int | None  # None: of several numbers
    topk: int
    ffn: int

    @classmethod
    def of(cls, row: dict) -> "Regime":
        """The regime of a result."""
        return cls(*(row[name] for name in cls._fields))

    @property
    def title(self) -> str:
        """The regime in words."""
        corpus = f"{self.corpus} in bytes" if self.vocabulary == BYTES and self.corpus != "stdlib" else self.corpus
        of_experts = f"E = {self.experts:,}, " if self.experts is not None else ""
        return (
            f"{corpus}, {self.tokens / 1e6:.1f} M tokens, {self.precision}, {of_experts}K = {self.topk}, F = {self.ffn}"
        )


def groups(rows: list[dict]) -> dict[Regime, dict[str, list[dict]]]:
    """Group comparable rows: regime -> variant -> rows of its seeds.

    Raises:
        ValueError: naming seed and keys, if two rows of a variant have the same seed: they are runs with other flags.
    """
    found: dict[Regime, dict[str, list[dict]]] = {}
    for row in sorted(rows, key=lambda row: (*Regime.of(row), row["seed"])):
        of_variant = found.setdefault(Regime.of(row), {}).setdefault(row["variant"], [])
        if of_variant and of_variant[-1]["seed"] == row["seed"]:
            raise ValueError(
                f"seed ({row['seed']}) of variant {row['variant']!r} occurs twice in {Regime.of(row).title}, with keys "
                f"{of_variant[-1]['key']} and {row['key']}: runs with different flags need variants of different "
                "names, or files of their own"
            )
        of_variant.append(row)
    return found


def _model(row):
    given = {**row, "layers": row["flags"]["num-layers"]}
    return tuple(given[name] for name in MODEL)


def quality(row: dict) -> float:
    """The figure by which a run is judged: perplexity per word if the corpus has words, else bits per byte."""
    return row.get("word_perplexity", row["bits_per_byte"])


def quality_name(rows: list[dict]) -> str:
    """The name of that figure."""
    return "word perplexity" if "word_perplexity" in rows[0] else "bits per byte"


def last(row: dict, name: str) -> float | None:
    """A health figure over the last log interval; None if the router has no such figure."""
    values = row["health"].get(name)
    return values[-1][1] if values else None


def spread(values: list[float], form: str) -> str:
    """Mean and, if there are several values, standard deviation.

    Example: [1.0, 3.0] with ".1f" gives "2.0 +- 1.4".
    """
    mean = format(statistics.mean(values), form)
    return f"{mean} +- {format(statistics.stdev(values), form.lstrip('+'))}" if len(values) > 1 else mean


def changes(rows: list[dict], reference: list[dict]) -> list[float]:
    """Differences in percent of the quality figures of runs from those of the reference's runs with the same seed.

    Example: 99 against a reference of 90 gives [10.0].
    """
    by_seed = {row["seed"]: quality(row) for row in reference}
    return [100 * (quality(row) / by_seed[row["seed"]] - 1) for row in rows if row["seed"] in by_seed]


def is_significant(differences: list[float]) -> bool:
    """Whether the mean of paired differences differs from zero at 95%, by Student's t; a single one never does.

    Example: of [1.0, 2.0, 3.0] the 95% interval is 2.0 +- 2.5, which holds zero; of [2.0, 3.0, 4.0] it is 3.0 +- 2.5.
    """
    if len(differences) < 2:
        return False
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return abs(statistics.mean(differences)) > _QUANTILES[min(len(differences), 10)] * error


def emphasized(text: str, differences: list[float]) -> str:
    """The text, in bold type if the differences are significant."""
    return f"**{text}**" if is_significant(differences) else text


def table(variants: dict[str, list[dict]], step_ms: dict[tuple, float] | None = None) -> str:
    """A table of one group, best first. Differences from the reference are between runs of the same seed, and bold if
    they are significant.

    Args:
        variants: variants of a group, with the rows of their seeds.
        step_ms: milliseconds of a step by :func:`_model`; the column is left out if this group has none.
    """
    times = {name: (step_ms or {}).get(_model(rows[0])) for name, rows in variants.items()}
    is_timed = any(times.values())
    rows = [row for of_variant in variants.values() for row in of_variant]
    digits = ".2f" if "word_perplexity" in rows[0] else ".4f"
    columns = (
        "router", "seeds", quality_name(rows), f"against {REFERENCE}", "router MFLOPs per token", "total",
        *(["ms per step"] if is_timed else []), "experts used", "imbalance factor", "mass recall", "top-k recall",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, of_variant in sorted(variants.items(), key=lambda item: statistics.mean(map(quality, item[1]))):
        differences = changes(of_variant, variants.get(REFERENCE, [])) if name != REFERENCE else []
        flops = of_variant[0]["flops_per_token"]
        cells = (
            name,
            str(len(of_variant)),
            spread([quality(row) for row in of_variant], digits),
            emphasized(f"{spread(differences, '+.2f')} %", differences) if differences else "",
            f"{flops['router'] / 1e6:.3f}",
            f"{flops['total'] / 1e6:.2f}",
            *([f"{times[name]:.0f}" if times[name] else ""] if is_timed else []),
            _percent(of_variant, _USED),
            _mean(of_variant, _IMBALANCE, ".2f"),
            _percent(of_variant, _RECALL),
            _percent(of_variant, _TOPK_RECALL),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def read_step_times(path: Path) -> dict[tuple, float]:
    """Milliseconds of a step of each model, by its values of ``MODEL``, from a CSV file of step_time.py."""
    rows = with_models(pandas.read_csv(path))
    return {tuple(row[name] for name in MODEL): row["step_ms"] for row in rows.to_dict("records")}


def with_models(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Rows of step times with all columns of ``MODEL``, which older files lack."""
    given = {name: rows[name].fillna(value).astype(int) if name in rows else value for name, value in _EARLIER.items()}
    return rows.assign(**given)


def _values(rows, name):
    return [value for row in rows if (value := last(row, name)) is not None]


def _mean(rows, name, form):
    values = _values(rows, name)
    return spread(values, form) if values else ""


def _percent(rows, name):
    values = [100 * value for value in _values(rows, name)]
    return f"{spread(values, '.1f')} %" if values else ""


def tables(rows: list[dict], step_ms: dict[tuple, float] | None = None) -> str:
    """All tables, with the hardware and versions that they were measured on; ``step_ms`` as in :func:`table`."""
    parts = []
    for regime, variants in groups(rows).items():
        of_group = [row for of_variant in variants.values() for row in of_variant]
        origins: dict[tuple, set[str]] = {}
        for row in of_group:
            origins.setdefault((row["device"], row["torch"], row["megatron_core"]), set()).add(row["commit"])
        parts.append(f"### {regime.title}\n")
        parts.append(table(variants, step_ms) + "\n")
        for (device, torch, core), commits in sorted(origins.items()):
            parts.append(f"Measured on {device}, torch {torch}, megatron-core {core}.\n")
            parts.append(f"Commits: {', '.join(sorted(commits))}.\n")
    return "\n".join(parts)


def plots(rows: list[dict], out: Path) -> list[Path]:
    """Draw every plot into the folder; returns the files."""
    from matplotlib import pyplot

    files = []
    for name, figure in draw(rows).items():
        files.append(out / f"{name}.png")
        figure.savefig(files[-1], dpi=110)
        pyplot.close(figure)
    return files


def draw(rows: list[dict]) -> "dict[str, Figure]":  # noqa: F821
    """The plots by their names.

    Quality against router FLOPs and total FLOPs, both with and without dispatch; over training: loss, experts used,
    imbalance factor, mass recall; and, where there are several, over the number of experts: quality, router FLOPs.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found, styles = groups(rows), styles_of(rows)
    drawn = {}
    for what, label in (("router", "router"), ("total", "all")):
        kinds = ((what, label), (f"{what}_with_dispatch", f"{label} with dispatch"))
        drawn[f"quality_flops_{what}"] = _grid(pyplot, found, 2, partial(_draw_against_flops, styles, kinds), styles)
    drawn["training"] = _grid(pyplot, found, 4, partial(_draw_training, styles), styles)
    over_experts = _over_experts(found)
    if over_experts:
        drawn["experts"] = _grid(pyplot, over_experts, 2, partial(_draw_over_experts, styles), styles)
    return drawn


def styles_of(rows):
    """Style of each variant: a color per router type, black for exact top-k; markers and dashes tell variants apart."""
    types = {row["variant"]: row["flags"]["moe-router-type"] for row in rows}
    names = sorted(types, key=lambda name: (types[name] != "topk", types[name], len(name), name))
    families = list(dict.fromkeys(types[name] for name in names if types[name] != "topk"))
    styles = {}
    for name in names:
        color = "black" if types[name] == "topk" else f"C{families.index(types[name])}"
        index = sum(types[other] == types[name] for other in styles)
        styles[name] = {"color": color, "marker": _MARKERS[index % 8], "linestyle": _DASHES[index % 8]}
    return styles


def _over_experts(found):
    """Join groups that differ in E only: regime without E -> E -> variant -> rows."""
    joined: dict[Regime, dict] = {}
    for regime, variants in found.items():
        joined.setdefault(regime._replace(experts=None), {})[regime.experts] = variants
    return {regime: by_experts for regime, by_experts in joined.items() if len(by_experts) > 1}


def _draw_against_flops(styles, kinds, axis, variants, column):
    kind, label = kinds[column]
    for name, of_variant in variants.items():
        values = [quality(row) for row in of_variant]
        points(axis, styles[name], [of_variant[0]["flops_per_token"][kind] / 1e6], [values], joined=False)
    if axis.dataLim.x0 > 0:
        axis.set_xscale("log")
    else:  # a router without cost gets a narrow linear part beside the logarithmic one
        costs = [cost for rows in variants.values() if (cost := rows[0]["flops_per_token"][kind] / 1e6) > 0]
        axis.set_xscale("symlog", linthresh=min(costs, default=1.0) / 1.5, linscale=0.15)
        axis.set_xlim(-min(costs, default=1.0) / 6, 1.5 * max(costs, default=1.0))
    number_ticks(axis.xaxis)
    axis.set_xlabel(f"training MFLOPs per token, {label}")
    axis.set_ylabel(quality_name_of(variants))


def _draw_over_experts(styles, axis, by_experts, column):
    for index, (name, style) in enumerate(styles.items()):
        of_name = {experts: variants[name] for experts, variants in by_experts.items() if name in variants}
        if column == 0:
            values = {
                experts: changes(rows, by_experts[experts].get(REFERENCE, [])) for experts, rows in of_name.items()
            }
            values = {experts: figures for experts, figures in values.items() if figures}
            beside = 1.02 ** (index - len(styles) / 2)  # so that bars do not cover each other
            points(axis, style, [experts * beside for experts in values], list(values.values()), joined=True)
            continue
        flops = [rows[0]["flops_per_token"]["router"] / 1e6 for rows in of_name.values()]
        if all(flops):
            axis.plot(list(of_name), flops, **style)
        else:  # it cannot be shown on a logarithmic axis
            axis.annotate(f"{name}: 0", (0.98, 0.03), xycoords="axes fraction", horizontalalignment="right")
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(by_experts), [f"{experts:,}" for experts in by_experts])
    axis.set_xlabel("experts E")
    name = quality_name_of(next(iter(by_experts.values())))
    axis.set_ylabel("router, training MFLOPs per token" if column else f"{name} against {REFERENCE}, %")
    if column == 1:
        axis.set_yscale("log")
        number_ticks(axis.yaxis)


def points(axis, style, positions, values, joined):
    """Draw mean and standard deviation of the values at each position; the marker is hollow for a single value."""
    means = [statistics.mean(figures) for figures in values]
    errors = [statistics.stdev(figures) if len(figures) > 1 else math.nan for figures in values]  # NaN draws no bar
    line = style | ({} if joined else {"linestyle": "none"})
    axis.errorbar(positions, means, errors, capsize=3, markersize=5, **line)
    single = [index for index, figures in enumerate(values) if len(figures) == 1]
    face = {"marker": style["marker"], "color": style["color"], "markerfacecolor": "white", "linestyle": "none"}
    axis.plot(
        [positions[index] for index in single], [means[index] for index in single], markersize=5, zorder=3, **face
    )


def _draw_training(styles, axis, variants, column):
    what = (None, _USED, _IMBALANCE, _RECALL)[column]
    losses = {row["seed"]: dict(row["train_losses"]) for row in variants.get(REFERENCE, [])}
    for name, of_variant in variants.items():
        if what is not None:
            series = [dict(row["health"].get(what, [])) for row in of_variant]
        else:  # relative to the reference of the same seed: otherwise the fall of both would hide small differences
            series = [
                {
                    step: loss - losses[row["seed"]][step]
                    for step, loss in row["train_losses"]
                    if step in losses[row["seed"]]
                }
                for row in of_variant
                if row["seed"] in losses
            ]
            series = [{step: one[step] for step in list(one)[len(one) // 8 :]} for one in series]
        steps = [step for step in (series[0] if series else ()) if all(step in one for one in series)]
        means = [statistics.mean(one[step] for one in series) for step in steps]
        if not steps:  # no such figure
            continue
        axis.plot(steps, means, color=styles[name]["color"], linestyle=styles[name]["linestyle"])
    axis.set_xlabel("step")
    labels = (f"training loss - {REFERENCE}'s, nats", "share of experts used", "imbalance factor", "mass recall")
    axis.set_ylabel(labels[column])
    if column == 2:
        axis.set_yscale("log")
        number_ticks(axis.yaxis)


def quality_name_of(variants):
    return quality_name(next(iter(variants.values())))


def number_ticks(axis):
    """Put plain numbers at 1, 2, 5 of each decade of a logarithmic axis, and at zero; powers would be too sparse."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

    low, high = axis.get_view_interval()
    positive = low if low > 0 else axis.get_transform().linthresh
    ticks = [tick for tick in LogLocator(subs=(1, 2, 5)).tick_values(positive, high) if positive <= tick <= high]
    axis.set_major_locator(FixedLocator(ticks if low > 0 else [0.0, *ticks]))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _grid(pyplot, found, columns: int, draw_axis: Callable, styles: dict) -> "Figure":  # noqa: F821
    """Draw one row of axes per group, with the group as title and one legend for all above them."""
    from matplotlib.lines import Line2D

    figure, axes = pyplot.subplots(
        len(found), columns, figsize=(4.6 * columns, 3.4 * len(found) + 1), squeeze=False, layout="constrained"
    )
    for (regime, variants), line in zip(found.items(), axes, strict=True):
        line[0].set_title(regime.title, fontsize=10, loc="left")
        for column, axis in enumerate(line):
            draw_axis(axis, variants, column)
            axis.grid(alpha=0.3)
            if not axis.has_data():
                axis.set_axis_off()
    handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=2 * columns - (columns == 2), fontsize=9)
    return figure


def rows_of(files: Sequence[Path]) -> list[dict]:
    """The rows of one or more files of results, for a command.

    Raises:
        SystemExit: with a message that names the file, if a line is no row or two rows are those of one seed.
    """
    try:
        rows = read_results(*files)
    except ValueError as error:
        sys.exit(str(error))
    try:
        groups(rows)
    except ValueError as error:
        sys.exit(f"{', '.join(map(str, files))}: {error}")
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Write tables.md and the plots of one or more files of results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="files of JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables.md and the plots")
    parser.add_argument("--step-times", type=Path, help="CSV file of step_time.py, for the column of step times")
    args = parser.parse_args(argv)
    rows = rows_of(args.results)
    if not rows:
        sys.exit(f"{', '.join(map(str, args.results))}: no results")
    with refused(parser):
        step_ms = None if args.step_times is None else read_step_times(args.step_times)
    args.out.mkdir(parents=True, exist_ok=True)
    text = tables(rows, step_ms)
    (args.out / "tables.md").write_text(text)
    files = plots(rows, args.out)
    sys.stdout.write(f"{text}\n{args.out / 'tables.md'}\n" + "".join(f"{file}\n" for file in files))


if __name__ == "__main__":
    main()
