"""A router against the others in every regime: `python -m benchmarks.quality.overview RESULTS.jsonl ... --out FILE`."""

import argparse
import math
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.report import (
    REFERENCE,
    Regime,
    changes,
    emphasized,
    groups,
    number_ticks,
    points,
    quality_name_of,
    rows_of,
    spread,
    styles_of,
)
from benchmarks.quality.study import BYTES

_CORPORA = {"stdlib": "code", "wikitext-2": "WikiText-2", "gutenberg-100m": "Gutenberg"}
_CORPORA_IN_BYTES = {"stdlib": "bytes", "wikitext-2": "WikiText-2 in bytes", "gutenberg-100m": "Gutenberg in bytes"}


def regimes(rows: list[dict], subject: str) -> dict[Regime, dict[str, list[dict]]]:
    """The groups with K = 16 in which ``subject`` and the reference have three seeds or more. Of several groups, only
    the variants that two of them have are kept.
    """
    found = {
        regime: variants
        for regime, variants in groups(rows).items()
        if regime.topk == 16 and all(len(variants.get(name, ())) >= 3 for name in (subject, REFERENCE))
    }
    counts = Counter(name for variants in found.values() for name in variants)
    least = min(2, len(found))
    return {
        regime: {name: of_variant for name, of_variant in variants.items() if counts[name] >= least}
        for regime, variants in found.items()
    }


def comparison(rows: list[dict], subject: str = "air") -> str:
    """A table of one variant against the others, a column for each of its :func:`regimes`.

    A cell says by how much the subject is better or worse, and its share of the other's FLOPs: "1.2 +- 1.1% worse, at
    0.17". Differences are between runs of the same seed, and bold if they are significant; their number follows if it
    is not three.
    """
    found = regimes(rows, subject)
    names = list(dict.fromkeys(name for variants in found.values() for name in variants if name != subject))
    lines = [f"| {subject} against | {' | '.join(map(title, found))} |", f"|{'---|' * (len(found) + 1)}"]
    for name in sorted(names, key=lambda name: (name != REFERENCE, name)):
        cells = [compared(variants, subject, name) for variants in found.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def compared(variants: dict[str, list[dict]], subject: str, name: str) -> str:
    """A cell of :func:`comparison`; empty if the two variants have no seed in common."""
    differences = changes(variants[subject], variants.get(name, []))
    if not differences:
        return ""
    seeds = "" if len(differences) == 3 else f" ({len(differences)} seed{'s' * (len(differences) > 1)})"
    return f"{difference(differences)}, at {share_of_flops(variants, subject, name):.2f}{seeds}"


def difference(differences: list[float]) -> str:
    """Differences in words, bold if they are significant. Example: [1.0, 2.0, 3.0] gives "2.0 +- 1.0% worse"."""
    mean = statistics.mean(differences)
    size = spread([math.copysign(1, mean) * value for value in differences], ".1f")
    return emphasized(f"{size}% {'worse' if mean > 0 else 'better'}", differences)


def share_of_flops(variants: dict[str, list[dict]], subject: str, name: str, which: str = "total") -> float:
    """The subject's training FLOPs per token over those of another variant."""
    return variants[subject][0]["flops_per_token"][which] / variants[name][0]["flops_per_token"][which]


def title(regime: Regime) -> str:
    """Data and number of experts of a regime in words, as tables and plots name it."""
    names = _CORPORA_IN_BYTES if regime.vocabulary == BYTES else _CORPORA
    return f"{names.get(regime.corpus, regime.corpus)}, E = {regime.experts:,}"


def plot(rows: list[dict], file: Path, subject: str = "air") -> "Figure":  # noqa: F821
    """Draw all :func:`regimes`: quality relative to exact top-k over all training FLOPs, with error bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    found = regimes(rows, subject)
    drawn = {name for variants in found.values() for name in variants}
    styles = styles_of([row for row in rows if row["variant"] in drawn])
    columns = min(3, len(found))
    height = math.ceil(len(found) / columns)
    figure, axes = pyplot.subplots(
        height, columns, figsize=(4.6 * columns, 3.4 * height + 0.6), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for (regime, variants), axis in zip(found.items(), axes.flat, strict=False):
        for name, of_variant in variants.items():
            flops = of_variant[0]["flops_per_token"]["total"] / 1e6
            points(axis, styles[name], [flops], [changes(of_variant, variants[REFERENCE])], joined=False)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        number_ticks(axis.xaxis)
        axis.set_title(title(regime), fontsize=10, loc="left")
        axis.set_xlabel("training MFLOPs per token, all")
        axis.set_ylabel(f"{quality_name_of(variants)} against {REFERENCE}, %")
        axis.grid(alpha=0.3)
    handles = [Line2D([], [], label=name, **style | {"linestyle": "none"}) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=math.ceil(len(handles) / 2), fontsize=9)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of each subject, and draw the plot of the first, of one or more files of results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="files of JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="file of the plot")
    parser.add_argument("--subjects", nargs="+", default=["air"], help="variants to compare with the others")
    args = parser.parse_args(argv)
    rows = rows_of(args.results)
    for subject in args.subjects:
        if not regimes(rows, subject):
            files = ", ".join(map(str, args.results))
            sys.exit(f"{files}: no regime with three seeds of {subject} and {REFERENCE} at K = 16")
    plot(rows, args.out, args.subjects[0])
    tables = [comparison(rows, subject) for subject in args.subjects]
    sys.stdout.write("\n\n".join((*tables, f"{args.out}\n")))


if __name__ == "__main__":
    main()
