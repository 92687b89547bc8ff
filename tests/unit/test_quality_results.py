"""Tables and plots of the quality study, and those of its results that are committed."""

import json
import math
import re
import statistics
import tomllib
from pathlib import Path

import pandas
import pytest

from benchmarks.quality import context, copying, drift, overview, report, study
from benchmarks.quality.flops import flops_per_token

FOLDER = Path(study.__file__).parent
RESULTS = study.ROOT / "docs/results"


def result(variant, seed, perplexity, **health):
    return {
        "key": f"{variant}-{seed}",
        "variant": variant, "experts": 64, "topk": 4, "ffn": 1, "seed": seed,
        "corpus": "wikitext-2", "vocabulary": 4096,
        "word_perplexity": perplexity, "bits_per_byte": 1.0, "tokens": 1000, "seconds": 36.0, "precision": "fp32",
        "flops_per_token": {"router": 2e6, "router_with_dispatch": 4e6, "total": 5e6, "total_with_dispatch": 7e6},
        "health": {name: [[5, value / 2], [10, value]] for name, value in health.items()},
        "train_losses": [[5, 3.0], [10, 2.0]], "device": "d", "torch": "t", "megatron_core": "m", "commit": "c",
        "flags": {"moe-router-type": variant.split("-")[0], "num-layers": 2},
    }  # fmt: skip


def test_the_table_compares_runs_of_the_same_seed_and_puts_the_best_first():
    rows = [
        result("topk", 1, 100.0), result("topk", 2, 120.0),
        result("air", 1, 90.0, **{"experts-used": 0.5, "mass-recall": 0.25}),
        result("air", 2, 114.0, **{"experts-used": 0.7, "mass-recall": 0.75}),
    ]  # fmt: skip
    lines = report.table(report.groups(rows)["wikitext-2", 4096, 1000, "fp32", 64, 4, 1]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| air", "| topk"]
    assert "102.00 +- 16.97" in lines[2]
    assert "-7.50 +- 3.54 %" in lines[2]
    assert "60.0 +- 14.1 %" in lines[2] and "50.0 +- 35.4 %" in lines[2]
    assert "110.00 +- 14.14" in lines[3]


def test_a_mean_of_paired_differences_is_significant_beyond_its_interval_of_95_percent():
    quantiles = {2: 12.706, 3: 4.303, 5: 2.776}  # of tables of Student's t
    for number, quantile in quantiles.items():
        values = [float(value) for value in range(number)]
        half = quantile * statistics.stdev(values) / number**0.5
        for shift, expected in ((1.01 * half, True), (0.99 * half, False)):
            shifted = [value - statistics.mean(values) - shift for value in values]
            assert report.is_significant(shifted) == expected
    assert not report.is_significant([5.0])
    assert report.is_significant([5.0, 6.0] * 10)
    assert overview.difference([2.0, 3.0, 4.0]) == "**3.0 +- 1.0% worse**"
    assert overview.difference([-1.0, -2.0, -3.0]) == "2.0 +- 1.0% better"


def test_the_table_shows_step_times_where_the_group_was_timed(tmp_path):
    rows = [result("topk", 1, 100.0), result("air", 1, 90.0), result("air", 1, 80.0) | {"experts": 256}]
    path = tmp_path / "times.csv"
    path.write_text("corpus,variant,experts,topk,ffn,step_ms\nwikitext-2,air,64,4,1,12.6\n")
    first, second = (report.table(variants, report.read_step_times(path)) for variants in report.groups(rows).values())
    of_air, of_topk = first.splitlines()[2:]
    assert "| total | ms per step |" in first and "| 5.00 | 13 |" in of_air and "| 5.00 |  |" in of_topk
    assert "ms per step" not in second
    path.write_text("corpus,vocabulary,layers,variant,experts,topk,ffn,step_ms\nwikitext-2,4096,6,air,64,4,1,12.6\n")
    assert "ms per step" not in report.tables(rows, report.read_step_times(path))  # of a model with more layers


def test_runs_with_different_flags_are_not_taken_for_seeds():
    other = result("air", 1, 80.0) | {"key": "other"}
    with pytest.raises(ValueError, match=r"seed \(1\) of variant 'air' occurs twice .*, with keys air-1 and other: "):
        report.groups([result("air", 1, 90.0), result("topk", 1, 90.0), other])


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_repeated_seed_or_row_ends_the_commands_with_file_key_and_rule(tmp_path, capsys):
    first, again = result("air", 1, 90.0), result("air", 1, 80.0)
    one, two = written(tmp_path / "one.jsonl", first), written(tmp_path / "two.jsonl", again | {"key": "other"})
    three = written(tmp_path / "three.jsonl", first, again)
    for main, out in ((report.main, tmp_path), (overview.main, tmp_path / "plot.png")):
        with pytest.raises(SystemExit) as stopped:
            main([str(one), str(two), "--out", str(out)])
        for words in (f"{one}, {two}: seed (1) of variant 'air' occurs twice", "keys air-1 and other", "need variants"):
            assert words in stopped.value.code
        for files, where in (((one, one), f"{one}, line 1"), ((three,), f"{three}, line 2")):
            with pytest.raises(SystemExit) as stopped:
                main([*map(str, files), "--out", str(out)])
            assert stopped.value.code.startswith(f"{where}: key ('air-1') occurs twice in precision fp32, before in ")


def test_the_same_text_in_bytes_is_another_regime():
    words = [result(name, 1, 90.0) | {"corpus": "gutenberg-100m"} for name in ("air", "topk")]
    in_bytes = [row | {"vocabulary": 257} for row in words]
    found = report.groups([*words, *in_bytes])
    assert [regime.title.split(", ")[0] for regime in found] == ["gutenberg-100m in bytes", "gutenberg-100m"]
    assert [overview.title(regime) for regime in found] == ["Gutenberg in bytes, E = 64", "Gutenberg, E = 64"]


def lines_of(axis):
    """The data of an axis' lines."""
    return [
        tuple([round(float(value), 6) for value in values] for values in line.get_data()) for line in axis.get_lines()
    ]


def points_of(axis):
    """All points of an axis' lines. A run without repetition is drawn twice, the second time without error bar."""
    return {point for values in lines_of(axis) for point in zip(*values, strict=True) if not math.isnan(sum(point))}


def close(figures):
    from matplotlib import pyplot

    for figure in figures.values():
        pyplot.close(figure)


def test_the_plots_are_drawn(tmp_path):
    rows = [result("topk", 1, 100.0), result("air", 1, 90.0, **{"experts-used": 0.5, "imbalance-factor": 3.0})]
    files = report.plots(rows, tmp_path)
    assert [file.name for file in files] == ["quality_flops_router.png", "quality_flops_total.png", "training.png"]
    assert all(file.is_file() for file in files)
    drawn = report.draw(rows)
    with_flops, with_dispatch = drawn["quality_flops_router"].axes
    assert points_of(with_flops) == {(2.0, 100.0), (2.0, 90.0)} and points_of(with_dispatch) == {(4.0, 100), (4.0, 90)}
    assert points_of(drawn["quality_flops_total"].axes[0]) == {(5.0, 100.0), (5.0, 90.0)}
    of_training = [lines_of(axis) for axis in drawn["training"].axes]
    assert of_training == [
        [([5, 10], [0.0, 0.0])] * 2, [([5, 10], [0.25, 0.5])], [([5, 10], [1.5, 3.0])], [],
    ]  # fmt: skip
    close(drawn)


def test_the_reference_is_black_and_variants_of_a_router_share_their_colour():
    styles = report.styles_of([result(name, 1, 1.0) for name in ("vq", "air-8-probes", "topk", "air", "topk-raw")])
    assert list(styles) == ["topk", "topk-raw", "air", "air-8-probes", "vq"]
    colors = [style["color"] for style in styles.values()]
    assert colors[0] == colors[1] == "black" and colors[2] == colors[3] != colors[4]
    variants = report.styles_of([result(name, 1, 1.0) for name in ("air", "air-b", "air-c", "air-d", "air-e")]).values()
    assert len({style["marker"] for style in variants}) == len({style["linestyle"] for style in variants}) == 5


def test_numbers_of_experts_are_joined_where_nothing_else_differs():
    larger = result("topk", 1, 80.0) | {"experts": 256}
    rows = [result("topk", 1, 100.0), larger, result("air", 1, 90.0), larger | {"ffn": 2}]
    joined = report._over_experts(report.groups(rows))
    assert {place: {experts: set(of) for experts, of in found.items()} for place, found in joined.items()} == {
        ("wikitext-2", 4096, 1000, "fp32", None, 4, 1): {64: {"topk", "air"}, 256: {"topk"}}
    }
    drawn = report.draw(rows)
    against_topk, flops = drawn["experts"].axes
    assert sorted(value for _, value in points_of(against_topk)) == [-10.0, 0.0, 0.0]  # topk itself at both sizes
    assert points_of(flops) == {(64.0, 2.0), (256.0, 2.0)}
    close(drawn)


def test_the_overview_compares_one_router_with_the_others_where_there_are_three_seeds(tmp_path):
    dear = {"flops_per_token": {"router": 3e7, "router_with_dispatch": 3e7, "total": 4e7, "total_with_dispatch": 4e7}}
    rows = [result("topk", seed, 100.0) | {"topk": 16} | dear for seed in (1, 2, 3)]
    rows += [result("air", seed, 101.0 + seed) | {"topk": 16} for seed in (1, 2, 3)]
    rows += [result("hash", 2, 204.0) | {"topk": 16}, result("vq", 1, 1.0) | {"topk": 16}]
    elsewhere = [row | {"corpus": "books", "word_perplexity": 300 - row["word_perplexity"]} for row in rows[:-1]]
    two_seeds = [row | {"experts": 16} for row in rows if row["seed"] < 3]
    lines = overview.comparison(rows + elsewhere + two_seeds).splitlines()
    assert lines == [
        "| air against | books, E = 64 | WikiText-2, E = 64 |",
        "|---|---|---|",
        "| topk | **1.5 +- 0.5% better**, at 0.12 | **3.0 +- 1.0% worse**, at 0.12 |",
        "| hash | 105.2% worse, at 1.00 (1 seed) | 49.5% better, at 1.00 (1 seed) |",
    ]
    figure = overview.plot(rows + elsewhere, tmp_path / "overview.png")
    assert (tmp_path / "overview.png").is_file()
    better, worse = (points_of(axis) for axis in figure.axes[:2])
    assert {(5.0, -1.5), (40.0, 0.0)} <= better and {(5.0, 3.0), (40.0, 0.0)} <= worse
    assert not overview.regimes([row | {"topk": 8} for row in rows], "air")


def test_the_overview_of_one_regime_has_all_its_variants(tmp_path):
    rows = [
        result(name, seed, perplexity + seed) | {"topk": 16}
        for seed in (1, 2, 3)
        for name, perplexity in (("topk", 100.0), ("air", 105.0), ("vq", 110.0))
    ]
    assert [set(variants) for variants in overview.regimes(rows, "air").values()] == [{"topk", "air", "vq"}]
    lines = overview.comparison(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| air against", "|---|---|", "| topk", "| vq"]
    (axis,) = overview.plot(rows, tmp_path / "overview.png").axes
    assert {round(value) for _, value in points_of(axis)} == {0, 5, 10}


@pytest.mark.parametrize("name", ["small", "full", "bytes", "deep"])
def test_committed_results_are_those_of_the_studies(name):
    runs = {run.key: run for run in study.load_runs(tomllib.loads((FOLDER / f"{name}.toml").read_text()))}
    rows = study.read_results(RESULTS / f"quality/{name}.jsonl")
    assert rows and len({row["key"] for row in rows}) == len(rows)
    for row in rows:
        assert (row["variant"], row["flags"]) == (runs[row["key"]].variant, runs[row["key"]].flags)
        assert row["flops_per_token"] == flops_per_token(row["flags"], row["vocabulary"])


def test_tables_in_the_documents_are_those_of_the_results():
    step_ms = report.read_step_times(RESULTS / "quality/step_time.csv")
    full = report.tables(study.read_results(RESULTS / "quality/full.jsonl"), step_ms)
    small = report.tables(study.read_results(RESULTS / "quality/small.jsonl"))
    assert (RESULTS / "quality/tables.md").read_text() == full
    of_bytes = report.tables(study.read_results(RESULTS / "quality/bytes.jsonl"))
    of_books = report.tables(study.read_results(RESULTS / "quality/deep.jsonl"))
    text = "\n\n".join((RESULTS / f"quality{page}.md").read_text() for page in ("", "/words", "/bytes", "/deep"))
    shown = re.findall(r"^\| router \| seeds \|.*(?:\n\|.*)+", text, re.MULTILINE)
    assert len(shown) >= 8
    for table in shown:
        assert table in full + small + of_bytes + of_books, f"report.py makes another table of the results:\n{table}"
    rows = [row for name in ("full", "bytes") for row in study.read_results(RESULTS / f"quality/{name}.jsonl")]
    for subject in ("air", "air-low-rank-whitening", "hash-air"):
        assert overview.comparison(rows, subject) in text, "overview.py makes another table of the results"
    for maker in (copying, drift, context):
        name = maker.__name__.rpartition(".")[2]
        for table in maker.table(pandas.read_csv(RESULTS / f"quality/{name}.csv")).split("\n\n"):
            assert table in text, f"{name}.py makes another table of the results:\n{table}"


# What the README calls the variants.
SUBJECTS = {"default": "air", "low-rank whitening": "air-low-rank-whitening", "first layer by hash": "hash-air"}
OTHERS = {
    "exact top-k": "topk",
    "PEER": "product-key",
    "product keys on the tokens": "product-key-on-tokens",
    "hierarchical, four groups": "hierarchical-4-groups",
    "hash of token ids": "hash",
}


def test_the_quality_in_the_readme_is_that_of_the_results():
    rows = [row for name in ("full", "bytes") for row in study.read_results(RESULTS / f"quality/{name}.jsonl")]
    regimes = {overview.title(regime): variants for regime, variants in overview.regimes(rows, "air").items()}
    text = (study.ROOT / "README.md").read_text().partition("### Quality")[2]
    table = [line.strip("| ").split(" | ") for line in text.partition("\n\n#")[0].splitlines() if line.startswith("|")]
    assert len(table) > 12
    for regime, subject, other, better, router, total in table[2:]:
        variants, one, two = regimes[regime], SUBJECTS[subject], OTHERS[other]
        differences = report.changes(variants[one], variants[two])
        assert len(differences) == 3 and overview.difference(differences) == better, (regime, one, two)
        assert f"{overview.share_of_flops(variants, one, two):.2f}" == total
        if two != "hash":
            share = overview.share_of_flops(variants, one, two, "router")
            assert router == f"{share:.2f}"


# What the goals in quality.md call regimes and variants: (corpus, vocabulary, E, K, steps).
REGIMES = {
    **{f"bytes, E = {experts:,}": ("stdlib", 257, experts, 16, 600) for experts in (4096, 16_384)},
    "the same, 4,800 steps": ("stdlib", 257, 4096, 16, 4800),
    "Gutenberg in bytes, E = 4,096": ("gutenberg-100m", 257, 4096, 16, 600),
    **{f"WikiText-2, E = {experts:,}": ("wikitext-2", 4096, experts, 16, 400) for experts in (4096, 16_384, 65_536)},
    "six layers on Gutenberg": ("gutenberg-100m", 2048, 4096, 16, 4000),
    **{f"bytes, E = 16,384, K = {topk}": ("stdlib", 257, 16_384, topk, 600) for topk in (64, 128)},
    "bytes, E = 65,536, K = 64": ("stdlib", 257, 65_536, 64, 600),
}
AIRS = {
    "default": "air",
    "whitened": "air-low-rank-whitening",
    "whitened along all directions": "air-whitening",
    "one layer by hash": "hash-air",
}


def below(differences):
    """Differences in percent, in the words of the goals."""
    way = "below" if statistics.mean(differences) < 0 else "above"
    if len(differences) < 3:
        count = "one seed" if len(differences) == 1 else "two seeds"
        shown = " and ".join(f"{abs(value):.1f}%" for value in differences)
        return f"equal ({count})" if shown == "0.0%" else f"{shown} {way} ({count})"
    text = f"{abs(statistics.mean(differences)):.1f} +- {statistics.stdev(differences):.1f}% {way}"
    return report.emphasized(text, differences)


def test_the_goals_are_compared_with_the_results():
    by_place = {}
    for name in ("full", "bytes", "deep"):
        for row in study.read_results(RESULTS / f"quality/{name}.jsonl"):
            place = row["corpus"], row["vocabulary"], row["experts"], row["topk"], row["flags"]["train-iters"]
            by_place.setdefault(place, {}).setdefault(row["variant"], []).append(row)
    others = OTHERS | {"four groups": "hierarchical-4-groups"}
    sections = (RESULTS / "quality.md").read_text().partition("## The goals")[2].split("\n### ")
    implied = {"At or below exact": "exact top-k", "5% below a hash": "hash of token ids", "10% below PEER": "PEER"}
    checked = 0
    for section in sections:
        table = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
        table = [[cell.strip() for cell in line] for line in table]
        if not table or "found" not in table[0] or section.startswith("At most"):
            continue
        regime = subject = None
        for cells in table[2:]:
            line = dict(zip(table[0], cells, strict=True))
            regime, subject = line["regime"] or regime, line["AIR"] or subject
            against = line.get("against") or line.get("the best other")
            against = against or next(name for start, name in implied.items() if section.startswith(start))
            first, *more = regime.split("; ")
            names = [first, *(f"{first.partition(' = ')[0]} = {experts}" for experts in more)]
            for name, found in zip(names, line["found"].split("; "), strict=True):
                place = REGIMES[name]
                other = others[against]
                if other == "product-key" and place[3] > 16:  # its probabilities sum to K / 2 too
                    other = f"product-key-sum-{place[3] // 2}"
                runs = by_place[place]
                ordered = [sorted(runs[one], key=lambda row: row["seed"]) for one in (AIRS[subject], other)]
                assert found == below(report.changes(*ordered)), (name, subject, against)
                checked += 1
    assert checked > 50
