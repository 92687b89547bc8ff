"""How tight the bounds and how common the certificates are over a training: `python -m benchmarks.quality.bounds`.

Trains the study's default AIR model at each number of experts, measures larger samples of its tokens at some steps, and
writes one row per step and layer, and the figure. Derivations: docs/theory.md.
"""

import argparse
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT
from benchmarks.arguments import positive, refused
from benchmarks.quality.data import prepare
from benchmarks.quality.study import CPU_ENVIRONMENT, Run, command, load_runs, origin

STEPS = (1, 10, 20, 40, 80, 120, 160, 200, 300, 400)
KEPT_STEPS = (40, 200, 400)  # only a few, because constants of all codewords take longer to make
NUM_TOKENS = 512  # at most; as the samples of training, they are spread evenly over a batch and its sequences
ENTRY = "air_moe_megatron.pretrain"


def find_run(experts: int) -> Run:
    """The study's default AIR run of a size, with its first seed."""
    runs = load_runs(tomllib.loads((ROOT / "benchmarks/quality/full.toml").read_text()))
    found = [
        run for run in runs if (run.variant, run.experts, run.topk, run.corpus) == ("air", experts, 16, "wikitext-2")
    ]
    if not found:
        raise ValueError(f"experts ({experts}) must be a size of the air runs on WikiText-2 in full.toml")
    return found[0]


def train(run: Run, out: Path, threads: int) -> Path:
    """Train one model in a process of its own on prepared data; returns the path of the CSV file with its rows."""
    folder = out / f"bounds-{run.experts}"
    folder.mkdir(parents=True, exist_ok=True)
    line = command(run, out / "data" / run.prepared, folder, 1, on_gpu=False)
    words = line[line.index(ENTRY) + 1 :]
    rows = folder / "rows.csv"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), **CPU_ENVIRONMENT}
    with (folder / "log.txt").open("w") as log:
        given = [sys.executable, "-W", "ignore", __file__, "--inside", str(rows), *words]
        subprocess.run(given, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    return rows


def train_inside(rows: Path, words: list[str]) -> None:
    """Train in this process, and measure after some of the steps."""
    sys.argv = [ENTRY, *words, "--moe-air-diagnostics-interval", "0"]  # diagnostics would consume the samples
    from air_moe_megatron import cpu

    cpu.enable()  # before Megatron is imported
    import pandas

    from air_moe_megatron import pretrain, step_hooks
    from air_moe_megatron.routers import AIRRouter, find_routers

    set_sample_size(NUM_TOKENS)
    begin_step, finish_step, found = step_hooks.begin_step, step_hooks._finish_step, []

    def keep_samples(model: list, iteration: int) -> None:
        begin_step(model, iteration)
        for router in find_routers(model, AIRRouter):
            router.keeps_sample = iteration in STEPS

    def measure_and_finish(model: list, iteration: int, *results: object) -> None:
        finish_step(model, iteration, *results)
        if iteration in STEPS:
            found.extend(measure_step(router, iteration) for router in find_routers(model, AIRRouter))
            pandas.DataFrame(found).to_csv(rows, index=False)

    step_hooks.begin_step, step_hooks._finish_step = keep_samples, measure_and_finish
    pretrain.main()


def set_sample_size(num_tokens: int) -> None:
    """Let routers keep samples of this many tokens at most.

    Raises:
        AttributeError: if the plugin has no such constant any more.
    """
    from air_moe_megatron.routers import air

    air.SAMPLE_SIZE  # noqa: B018  # an assignment alone would make a name that nothing reads
    air.SAMPLE_SIZE = num_tokens


def measure_step(router: "air.AIRRouter", iteration: int) -> dict[str, float]:  # noqa: F821
    """One row: means over the sampled tokens."""
    from air_moe_megatron.diagnostics.bounds import FrozenBounds
    from air_moe_megatron.diagnostics.recall import measure

    figures, size = measure(router), router.sizes.shortlist_size
    row = {"experts": router.num_experts, "layer": router.layer_number, "iteration": iteration}
    row["tokens"] = figures.mass_recall.numel()
    for name in ("mass_recall", "paper_bound", "mass_bound"):
        values = getattr(figures, name)
        row |= {name: float(values.mean()), f"{name}_median": float(values.median())}
    row |= {"topk_recall": float(figures.topk_recall.mean()), "exact": float((figures.topk_recall == 1).float().mean())}
    for label, num_verified in (("0", 0), ("L", size), ("4L", 4 * size)):
        row[f"certified_{label}"] = float(measure(router, num_verified).certified.float().mean())
    row["violations"] = int((figures.mass_bound > figures.mass_recall).sum())
    row["violations"] += int((figures.paper_bound > figures.mass_recall).sum())
    row["violations"] += int((figures.certified & (figures.topk_recall < 1)).sum())
    if iteration in KEPT_STEPS:
        bounds, tokens = FrozenBounds(router), (router.sample.hidden, router.sample.probed)
        kept, certified = bounds.mass_bound(*tokens), bounds.certified(*tokens)
        row |= {"kept_bound": float(kept.mean()), "kept_certified": float(certified.float().mean())}
        row["violations"] += int((kept > figures.mass_recall).sum() + (certified & (figures.topk_recall < 1)).sum())
    return row


def table(rows: "pandas.DataFrame") -> str:  # noqa: F821
    """The rows of the steps at which all constants were made, as a table in Markdown."""
    shown = rows[rows.iteration.isin(KEPT_STEPS)].sort_values(["experts", "layer", "iteration"])
    formats = {
        **{"E": "{experts:,}", "layer": "{layer}", "step": "{iteration}", "mass recall": "{mass_recall:.3f}"},
        **{"paper's bound": "{paper_bound:.4f}", "our bound": "{mass_bound:.3f}"},
        **{"from kept constants": "{kept_bound:.3f}", "top-k is exact": "{exact:.1%}"},
        **{"certified by constants alone": "{certified_0:.1%}", "L verified": "{certified_L:.1%}"},
        **{"4L verified": "{certified_4L:.1%}", "L verified, kept": "{kept_certified:.1%}"},
    }
    lines = [f"| {' | '.join(formats)} |", "|---" * len(formats) + "|"]
    lines += [f"| {' | '.join(formats.values())} |".format(**row) for row in shown.to_dict("records")]
    return "\n".join(lines)


def plot(table: "pandas.DataFrame", path: Path) -> "Figure":  # noqa: F821
    """Plot recall, bounds and certified share over the steps: a column per size, a line style per layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    masses = {"mass_recall": ("measured", "#000000"), "mass_bound": ("our bound", "#0072B2")}
    masses["paper_bound"] = ("paper's bound", "#D55E00")
    shares = {"exact": ("top-k is exact", "#000000"), "certified_L": ("certified, L verified", "#0072B2")}
    shares["certified_0"] = ("certified, constants alone", "#D55E00")
    sizes = sorted(table.experts.unique())
    layout = dict(figsize=(5.5 * len(sizes) + 1, 7), sharex=True, sharey="row", squeeze=False)
    figure, axes = pyplot.subplots(2, len(sizes), **layout)
    for column, experts in enumerate(sizes):
        for row, lines in enumerate((masses, shares)):
            axis = axes[row, column]
            for layer, style in zip(sorted(table.layer.unique()), ("-", "--", ":", "-."), strict=False):
                part = table[(table.experts == experts) & (table.layer == layer)]
                for name, (label, color) in lines.items():
                    axis.plot(part.iteration, part[name], style, color=color, label=f"{label}, layer {layer}")
            axis.grid(alpha=0.3)
        axes[0, column].set_title(f"E = {experts:,}")
        axes[1, column].set_xlabel("training step")
    for row, what in enumerate(("softmax mass in the lists", "share of the tokens")):
        axes[row, 0].set_ylabel(what)
        axes[row, -1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, and write the table and the figure."""
    import pandas

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--experts", type=positive, nargs="+", default=[4096, 16384], help="of the study's air runs")
    parser.add_argument("--data-dir", type=Path, required=True, help="where the corpora are")
    parser.add_argument("--out", type=Path, default=ROOT / "out/quality", help="for data sets and logs")
    parser.add_argument("--threads", type=positive, default=1, help="of a CPU, as the study's runs have")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "docs/results/bounds.csv", help="CSV; the figure is beside it"
    )
    args = parser.parse_args(argv)
    with refused(parser):
        runs = [find_run(size) for size in args.experts]
        for run in runs:
            prepare(run.corpus, run.vocabulary, args.data_dir, args.out / "data" / run.prepared)
    parts = [pandas.read_csv(train(run, args.out, args.threads)) for run in runs]
    rows = pandas.concat(parts, ignore_index=True).assign(**origin(on_gpu=False)).round(5)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(args.results, index=False)
    plot(rows, args.results.with_suffix(".png"))
    sys.stdout.write(f"{table(rows)}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        train_inside(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
