"""Tables and plots of a study's results: `python benchmarks/quality/report.py RESULTS.jsonl --out FOLDER`."""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

_USED, _IMBALANCE, _RECALL, _TOPK_RECALL = "experts-used", "imbalance-factor", "mass-recall", "top-k-recall"


def groups(rows: list[dict]) -> dict[tuple, dict[str, list[dict]]]:
    """Rows that may be compared: (corpus, tokens, precision, E, K, F) -> variant -> rows of its seeds.

    Raises:
        ValueError: if two rows of a variant have one seed: they are runs with different flags, and no two seeds.
    """
    found: dict[tuple, dict[str, list[dict]]] = {}
    for row in sorted(rows, key=lambda row: (*_place(row), row["seed"])):
        of_variant = found.setdefault(_place(row), {}).setdefault(row["variant"], [])
        if of_variant and of_variant[-1]["seed"] == row["seed"]:
            raise ValueError(
                f"seed ({row['seed']}) of variant {row['variant']!r} occurs twice in {_title(*_place(row))}: runs with "
                "different flags need variants of different names, or files of their own"
            )
        of_variant.append(row)
    return found


def _place(row):
    return tuple(row[name] for name in ("corpus", "tokens", "precision", "experts", "topk", "ffn"))


def _title(corpus, tokens, precision, experts, topk, ffn):
    of_experts = f"E = {experts:,}, " if experts is not None else ""
    return f"{corpus}, {tokens / 1e6:.1f} M tokens, {precision}, {of_experts}K = {topk}, F = {ffn}"


def quality(row: dict) -> float:
    """The figure that a run is judged by: perplexity per word where the corpus has words, else bits per byte."""
    return row.get("word_perplexity", row["bits_per_byte"])


def quality_name(rows: list[dict]) -> str:
    """The name of that figure."""
    return "word perplexity" if "word_perplexity" in rows[0] else "bits per byte"


def last(row: dict, name: str) -> float | None:
    """A health figure at the end, over the last log interval; None where the router has no such figure."""
    values = row["health"].get(name)
    return values[-1][1] if values else None


def spread(values: list[float], form: str) -> str:
    """Mean and, of several values, standard deviation.

    Example: [1.0, 3.0] with ".1f" gives "2.0 +- 1.4".
    """
    mean = format(statistics.mean(values), form)
    return f"{mean} +- {format(statistics.stdev(values), form.lstrip('+'))}" if len(values) > 1 else mean


def table(variants: dict[str, list[dict]], reference: str = "topk") -> str:
    """A table of one group, best first; differences to the reference are of runs of the same seed."""
    rows = [row for of_variant in variants.values() for row in of_variant]
    by_seed = {row["seed"]: quality(row) for row in variants.get(reference, [])}
    digits = ".2f" if "word_perplexity" in rows[0] else ".4f"
    columns = (
        "router", "seeds", quality_name(rows), f"against {reference}", "router MFLOPs per token", "total",
        "experts used", "imbalance factor", "mass recall", "top-k recall",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, of_variant in sorted(variants.items(), key=lambda item: statistics.mean(map(quality, item[1]))):
        changes = [
            100 * (quality(row) / by_seed[row["seed"]] - 1)
            for row in of_variant
            if row["seed"] in by_seed and name != reference
        ]
        flops = of_variant[0]["flops_per_token"]
        cells = (
            name,
            str(len(of_variant)),
            spread([quality(row) for row in of_variant], digits),
            f"{spread(changes, '+.2f')} %" if changes else "",
            f"{flops['router'] / 1e6:.3f}",
            f"{flops['total'] / 1e6:.2f}",
            _percent(of_variant, _USED),
            _mean(of_variant, _IMBALANCE, ".2f"),
            _percent(of_variant, _RECALL),
            _percent(of_variant, _TOPK_RECALL),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _values(rows, name):
    return [value for row in rows if (value := last(row, name)) is not None]


def _mean(rows, name, form):
    values = _values(rows, name)
    return spread(values, form) if values else ""


def _percent(rows, name):
    values = [100 * value for value in _values(rows, name)]
    return f"{spread(values, '.1f')} %" if values else ""


def tables(rows: list[dict]) -> str:
    """All tables, with what they were measured on."""
    parts = []
    for place, variants in groups(rows).items():
        of_group = [row for of_variant in variants.values() for row in of_variant]
        origins = sorted({(row["device"], row["torch"], row["megatron_core"], row["commit"]) for row in of_group})
        parts.append(f"### {_title(*place)}\n")
        parts.append(table(variants) + "\n")
        measured = "; ".join(
            f"{device}, torch {torch}, megatron-core {core}, commit {commit}" for device, torch, core, commit in origins
        )
        parts.append(f"Measured on: {measured}.\n")
    return "\n".join(parts)


def plots(rows: list[dict], out: Path) -> list[Path]:
    """Draw every plot into the folder; returns the files.

    Quality against router FLOPs and total FLOPs, both with and without dispatch; over training: loss, experts used,
    imbalance factor, mass recall; and, where there are several, over the number of experts: quality, router FLOPs.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = groups(rows)
    names = sorted({row["variant"] for row in rows})
    palette = pyplot.cm.tab10 if len(names) <= 10 else pyplot.cm.tab20
    colours = {name: palette(index % 20) for index, name in enumerate(names)}
    files = []
    for what, label in (("router", "router"), ("total", "all")):
        kinds = ((what, label), (f"{what}_with_dispatch", f"{label} with dispatch"))
        draw = partial(_draw_against_flops, colours, kinds)
        files.append(_grid(pyplot, found, 2, draw, out / f"quality_flops_{what}.png"))
    files.append(_grid(pyplot, found, 4, partial(_draw_training, colours), out / "training.png"))
    over_experts = _over_experts(found)
    if over_experts:
        files.append(_grid(pyplot, over_experts, 2, partial(_draw_over_experts, colours), out / "experts.png"))
    return files


def _over_experts(found):
    """Groups that differ in nothing but E, joined: (corpus, tokens, precision, None, K, F) -> E -> variant -> rows."""
    joined: dict[tuple, dict] = {}
    for (corpus, tokens, precision, experts, topk, ffn), variants in found.items():
        joined.setdefault((corpus, tokens, precision, None, topk, ffn), {})[experts] = variants
    return {place: by_experts for place, by_experts in joined.items() if len(by_experts) > 1}


def _draw_against_flops(colours, kinds, axis, variants, column):
    kind, label = kinds[column]
    for name, of_variant in variants.items():
        place = (of_variant[0]["flops_per_token"][kind] / 1e6, *_mean_and_error(of_variant))
        axis.errorbar(*place, fmt="o", capsize=3, color=colours[name], label=name)
    if axis.dataLim.x0 > 0:
        axis.set_xscale("log")
        _number_ticks(axis.xaxis)
    else:  # a router that costs nothing
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set_xlim(left=-0.02)
    axis.set_xlabel(f"MFLOPs per token, {label}")
    axis.set_ylabel(_quality_name_of(variants))


def _draw_over_experts(colours, axis, by_experts, column):
    for name in sorted({name for variants in by_experts.values() for name in variants}):
        of_name = {experts: variants[name] for experts, variants in by_experts.items() if name in variants}
        if column == 0:
            values = zip(*map(_mean_and_error, of_name.values()), strict=True)
        else:
            flops = [of_variant[0]["flops_per_token"]["router"] / 1e6 for of_variant in of_name.values()]
            if not all(flops):  # has no place on a logarithmic axis
                continue
            values = (flops, None)
        axis.errorbar(list(of_name), *values, fmt="o-", capsize=3, color=colours[name], label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(by_experts), [f"{experts:,}" for experts in by_experts])
    axis.set_xlabel("experts E")
    axis.set_ylabel("router MFLOPs per token" if column else _quality_name_of(next(iter(by_experts.values()))))
    if column == 1:
        axis.set_yscale("log")
        _number_ticks(axis.yaxis)


def _draw_training(colours, axis, variants, column):
    what = (None, _USED, _IMBALANCE, _RECALL)[column]
    for name, of_variant in variants.items():
        series = [row["health"].get(what, []) for row in of_variant]
        if what is None:  # without the first steps, whose fall hides the rest
            series = [row["train_losses"][len(row["train_losses"]) // 8 :] for row in of_variant]
        if not all(series):
            continue
        steps = [step for step, _ in series[0]]
        means = [
            statistics.mean(values) for values in zip(*([value for _, value in one] for one in series), strict=False)
        ]
        axis.plot(steps[: len(means)], means, color=colours[name], label=name)
    axis.set_xlabel("step")
    axis.set_ylabel(
        ("training loss, nats per token", "share of experts used", "imbalance factor", "mass recall")[column]
    )
    if column == 2:
        axis.set_yscale("log")
        _number_ticks(axis.yaxis)


def _quality_name_of(variants):
    return quality_name(next(iter(variants.values())))


def _mean_and_error(of_variant):
    """Mean quality of the seeds, and standard deviation; NaN, which draws no bar, of one seed."""
    values = [quality(row) for row in of_variant]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def _number_ticks(axis):
    """Plain numbers at 1, 2 and 5 of each decade of a logarithmic axis: few decades leave no room for powers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _grid(pyplot, found, columns: int, draw: Callable, file: Path) -> Path:
    """One row of axes per group, titled by its place, one legend for all."""
    figure, axes = pyplot.subplots(
        len(found), columns, figsize=(4.6 * columns, 3.6 * len(found)), squeeze=False, layout="constrained"
    )
    handles = {}
    for (place, variants), line in zip(found.items(), axes, strict=True):
        for column, axis in enumerate(line):
            draw(axis, variants, column)
            axis.set_title(_title(*place), fontsize=8)
            axis.grid(alpha=0.3)
            found_handles, labels = axis.get_legend_handles_labels()
            handles |= dict(zip(labels, found_handles, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return file


def main(argv: Sequence[str] | None = None) -> None:
    """Write tables.md and the plots of one or more files of results."""
    from benchmarks.quality.study import read_results

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="files of JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables.md and the plots")
    args = parser.parse_args(argv)
    rows = [row for path in args.results for row in read_results(path)]
    if not rows:
        sys.exit(f"{', '.join(map(str, args.results))}: no results")
    args.out.mkdir(parents=True, exist_ok=True)
    text = tables(rows)
    (args.out / "tables.md").write_text(text)
    files = plots(rows, args.out)
    sys.stdout.write(f"{text}\n{args.out / 'tables.md'}\n" + "".join(f"{file}\n" for file in files))


if __name__ == "__main__":
    main()
