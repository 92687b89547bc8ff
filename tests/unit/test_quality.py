"""The quality study: its runs, what it reads from them, and its tables."""

import json
import math
import re
import tomllib
from pathlib import Path

import numpy
import pandas
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from benchmarks.quality import copying, curves, data, overview, report, study
from benchmarks.quality.flops import flops_per_token

FOLDER = Path(study.__file__).parent
RESULTS = study.ROOT / "docs/results"
CONFIG = {
    "corpus": "stdlib",
    "vocabulary": 300,
    "seeds": [1, 2],
    "flags": {"train-iters": 10, "hidden-size": 8, "cpu": False, "disable-bias-linear": True},
    "variants": {"topk": {"moe-router-type": "topk"}, "air": {"moe-router-type": "air", "train-iters": 5}},
    "runs": [{"experts": [16, 64], "shapes": [[4, 1]], "variants": ["topk", "air"]}],
}


SIZES = {
    **CONFIG["flags"],
    **{"num-layers": 3, "num-attention-heads": 2, "num-experts": 64, "moe-router-topk": 4, "moe-ffn-hidden-size": 1},
    **{"global-batch-size": 2, "seq-length": 4},
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_study_of_the_folder_loads_and_its_flops_are_known(path):
    runs = study.load_runs(tomllib.loads(path.read_text()))
    assert len({run.key for run in runs}) == len(runs)
    for run in runs:
        flops = flops_per_token(run.flags, run.vocabulary)
        assert flops["total"] == pytest.approx(flops["router"] + flops["experts"] + flops["other"])
        assert (flops["router"] == 0) == (run.flags["moe-router-type"] == "hash")
        assert (flops["rebuilds"] > 0) == (run.flags["moe-router-type"] == "air")


@pytest.mark.parametrize("variant", ("topk", "air"))
def test_first_layers_by_hash_cost_no_routing(variant):
    (plain, hashed) = (
        flops_per_token({**SIZES, **CONFIG["variants"][variant], "moe-num-hash-layers": number}, 300)
        for number in (0, 1)
    )
    for name in ("router", "rebuilds", "router_with_dispatch"):
        assert hashed[name] == pytest.approx(plain[name] * 2 / 3)
    for name in ("experts", "other"):
        assert hashed[name] == plain[name]
    assert hashed["total"] == pytest.approx(hashed["router"] + hashed["experts"] + hashed["other"])


def test_runs_are_all_combinations_one_seed_after_the_other():
    runs = study.load_runs(CONFIG)
    assert [run.name for run in runs[:4]] == [
        "topk E=16 K=4 F=1 seed=1 stdlib 10 steps", "air E=16 K=4 F=1 seed=1 stdlib 5 steps",
        "topk E=64 K=4 F=1 seed=1 stdlib 10 steps", "air E=64 K=4 F=1 seed=1 stdlib 5 steps",
    ]  # fmt: skip
    assert [run.seed for run in runs] == [1] * 4 + [2] * 4
    assert runs[1].flags["train-iters"] == 5 and runs[0].flags["train-iters"] == 10
    assert "cpu" not in runs[0].flags
    repeated = study.load_runs(CONFIG | {"runs": CONFIG["runs"] * 2})
    assert [run.key for run in repeated] == [run.key for run in runs]


def test_a_block_may_differ_from_the_study():
    longer = CONFIG["runs"][0] | {"corpus": "wikitext-2", "vocabulary": 500, "seeds": [3], "flags": {"train-iters": 20}}
    runs = study.load_runs(CONFIG | {"runs": [*CONFIG["runs"], longer]})
    assert len(runs) == 12 and {run.prepared for run in runs[:8]} == {"stdlib-300"}
    assert {(run.prepared, run.seed) for run in runs[8:]} == {("wikitext-2-500", 3)}
    assert [run.flags["train-iters"] for run in runs[8:]] == [20, 5, 20, 5]  # a variant's own flag is the last word


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": [CONFIG["runs"][0] | {"steps": 3}]}, "'steps' is not among the entries"),
        ({"runs": [{"experts": [16], "shapes": [[4, 1]], "variants": ["other"]}]}, r"variants \('other'\)"),
        ({"seeds": None}, "seeds is missing"),
        ({"runs": [{"experts": [16], "variants": ["air"]}]}, "runs: shapes is missing in a block"),
        ({"runs": {}}, r"runs \(\{\}\) must be a list of blocks"),
        ({"vocabulary": "/../../../victim"}, r"vocabulary \('/../../../victim'\) must be a whole number"),
        ({"vocabulary": True}, r"vocabulary \(True\) must be a whole number"),
        ({"corpus": "../victim"}, r"corpus \('../victim'\) must be a name"),
        ({"seeds": ["1"]}, r"seeds \(\['1'\]\) must be a list of whole numbers"),
        ({"flags": {"lr": [1]}}, r"flags \(\{'lr': \[1\]\}\) must be a table"),
        ({"variants": {"air": "air"}}, r"variants.air \('air'\) must be a table"),
        ({"variants": ["air"]}, r"variants \(\['air'\]\) must be a table"),
        ({"runs": [CONFIG["runs"][0] | {"vocabulary": "../x"}]}, r"runs: vocabulary \('../x'\) must be a whole number"),
        ({"runs": [CONFIG["runs"][0] | {"experts": [0]}]}, r"runs: experts \(\[0\]\) must be"),
        ({"runs": [CONFIG["runs"][0] | {"shapes": [[4]]}]}, r"runs: shapes \(\[\[4\]\]\) must be a list of pairs"),
    ],
    ids=[
        *("unknown-entry", "unknown-variant", "missing-entry", "missing-in-a-block", "no-blocks"),
        *("vocabulary-is-a-path", "vocabulary-is-a-boolean", "corpus-is-a-path", "seed-is-a-text", "flag-is-a-list"),
        *("variant-is-a-text", "variants-are-a-list", "vocabulary-of-a-block", "no-experts", "half-a-shape"),
    ],
)
def test_a_bad_study_is_refused(change, message):
    config = {name: value for name, value in (CONFIG | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        study.load_runs(config)


def test_the_command_has_every_flag_and_the_study_may_override_the_evaluation(tmp_path):
    run = study.load_runs(CONFIG)[1]
    words = study.command(run, tmp_path, tmp_path, eval_iters=7, on_gpu=False)
    assert "--cpu" in words and "--disable-bias-linear" in words
    assert words[words.index("--moe-router-type") + 1] == "air"
    assert words[words.index("--eval-iters") + 1] == "7"
    run.flags["eval-iters"] = 3
    words = study.command(run, tmp_path, tmp_path, eval_iters=7, on_gpu=True)
    assert words[words.index("--eval-iters") + 1] == "3" and words.count("--eval-iters") == 1
    assert "--cpu" not in words and "--bf16" in words


def test_a_run_with_a_result_is_not_repeated(tmp_path):
    runs = study.load_runs(CONFIG)
    results, made = tmp_path / "results.jsonl", study.Study(runs, tmp_path, tmp_path, tmp_path / "results.jsonl", 1)
    other = {"fp32": "bf16", "bf16": "fp32"}[made.precision]
    given = zip(runs[:4], (made.precision, made.precision, other, made.precision), strict=True)
    rows = [{"key": run.key, "precision": precision} for run, precision in given]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert made.pending() == [runs[2], *runs[4:]]
    results.write_text(results.read_text() + "{broken\n")
    with pytest.raises(ValueError, match="line 5"):
        made.pending()


def test_a_pattern_that_matches_no_run_is_refused(capsys):
    with pytest.raises(SystemExit):
        study.main([str(FOLDER / "small.toml"), "--list", "--only", "other*"])
    assert "--only ('other*') must match the name of a run" in capsys.readouterr().err


def test_losses_and_health_are_read_from_tensorboard(tmp_path, monkeypatch):
    """Megatron writes the last two evaluations, of the validation and of the test split, under the same name."""
    from torch.utils.tensorboard import SummaryWriter

    from benchmarks.quality import flops

    monkeypatch.setattr(flops, "flops_per_token", lambda *_: {})
    run = study.load_runs(CONFIG)[0]
    run.flags.update({"global-batch-size": 2, "seq-length": 4})
    with SummaryWriter(tmp_path / "tensorboard/0") as writer:
        for step, loss in ((5, 2.5), (10, 2.25), (10, 2.0), (10, 1.5)):
            writer.add_scalar("lm loss validation", loss, step)
        for step in (1, 2):
            writer.add_scalar("lm loss", 4.0 - step, step)
            writer.add_scalar("air/experts-used", 0.5, step)
            writer.add_scalar("air/layer_1/experts-used", 0.5, step)
    meta = data.Meta("stdlib", 300, {"test": 100}, {"test": 200}, None)
    row = study.Study([run], tmp_path, tmp_path, tmp_path / "results.jsonl", 1)._result(run, meta, tmp_path, 1.0)
    assert (row["valid_loss"], row["test_loss"]) == (2.0, 1.5)
    assert row["valid_losses"] == [[5, 2.5], [10, 2.25]]
    assert row["train_losses"] == [[1, 3.0], [2, 2.0]]
    assert row["health"] == {"experts-used": [[1, 0.5], [2, 0.5]]}
    assert row["bits_per_byte"] == pytest.approx(1.5 * 100 / 200 / math.log(2))


def test_a_corpus_becomes_data_sets_whose_text_comes_back(tmp_path):
    from tokenizers import Tokenizer

    articles = [f" \n = Title {i} = \n \n Some <unk> words , number {i * 7919} .\n" for i in range(50)]
    source = tmp_path / "corpora"
    (source / "wikitext-2").mkdir(parents=True)
    for split in data.SPLITS:
        (source / "wikitext-2" / f"wiki.{split}.tokens").write_text("".join(articles))
    meta = data.prepare("wikitext-2", 300, source, tmp_path / "out")
    text = "".join(articles)
    assert meta.bytes["test"] == len(text)
    assert meta.words["test"] == len(text.replace("\n", " <eos> ").split())
    tokens = IndexedDataset(str(tmp_path / "out" / "test"))
    assert len(tokens) == 1 and meta.tokens["test"] == len(tokens[0])
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.decode(tokens[0].tolist(), skip_special_tokens=False) == text
    train = IndexedDataset(str(tmp_path / "out" / "train"))
    assert all(document[-1] == 299 for document in train) and meta.tokens["train"] == sum(map(len, train))
    assert data.prepare("wikitext-2", 300, tmp_path / "gone", tmp_path / "out") == meta  # made once


def test_a_vocabulary_of_bytes_needs_no_tokenizer(tmp_path):
    (tmp_path / "gutenberg-100m").mkdir()
    books = ["Zoe went out.", "Zo\u00eb came home."]
    for split in data.SPLITS:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in books)
        (tmp_path / "gutenberg-100m" / f"{split}.jsonl").write_text(lines)
    meta = data.prepare("gutenberg-100m", data.BYTES, tmp_path, tmp_path / "out")
    documents = IndexedDataset(str(tmp_path / "out/train"))
    assert [bytes(document[:-1].tolist()).decode() for document in documents] == books
    assert all(document[-1] == 256 for document in documents)
    assert meta.bytes["train"] == len("".join(books).encode()) == meta.tokens["train"] - 2
    assert meta.words is None and not (tmp_path / "out/tokenizer.json").exists()


def test_what_a_run_repeats_after_its_checkpoint_counts_once(tmp_path):
    """It wrote steps up to 5, went on from its checkpoint of step 3, stopped at once, and went on from there again."""
    from torch.utils.tensorboard import SummaryWriter

    def write(start, steps, loss):
        curves.begin(tmp_path, start)
        with SummaryWriter(tmp_path / str(start)) as writer:
            for step in steps:
                writer.add_scalar("lm loss", loss, step)

    write(0, range(1, 6), 3.0)
    write(3, range(4, 6), 2.0)
    write(3, range(4, 8), 1.0)
    assert curves.read(tmp_path) == {"lm loss": [[1, 3.0], [2, 3.0], [3, 3.0], [4, 1.0], [5, 1.0], [6, 1.0], [7, 1.0]]}
    write(0, range(1, 3), 4.0)
    assert curves.read(tmp_path) == {"lm loss": [[1, 4.0], [2, 4.0]]}


def test_a_long_run_saves_and_goes_on_from_its_checkpoint(tmp_path):
    run = study.load_runs(CONFIG)[0]
    words = study.command(run, tmp_path, tmp_path, 1, False, checkpoint_interval=10)
    assert "--save" not in words and "--load" not in words  # 10 steps
    words = study.command(run, tmp_path, tmp_path, 1, False, checkpoint_interval=4)
    assert words[words.index("--save-interval") + 1] == "4" and words[words.index("--save-retain-interval") + 1] == "12"
    assert "--load" not in words and words[words.index("--tensorboard-dir") + 1] == str(tmp_path / "tensorboard/0")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/latest_checkpointed_iteration.txt").write_text("8")
    words = study.command(run, tmp_path, tmp_path, 1, False, checkpoint_interval=4)
    assert words[words.index("--load") + 1] == words[words.index("--save") + 1] == str(tmp_path / "checkpoint")
    assert words[words.index("--tensorboard-dir") + 1] == str(tmp_path / "tensorboard/8")
    words = study.command(run, tmp_path, tmp_path, 1, False, checkpoint_interval=4, keeps_checkpoints=True)
    assert words[words.index("--save-retain-interval") + 1] == words[words.index("--save-interval") + 1] == "4"


def test_a_missing_corpus_is_named(tmp_path):
    with pytest.raises(ValueError, match="unpack wikitext-2 there"):
        data.prepare("wikitext-2", 300, tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"corpus \('other'\)"):
        data.prepare("other", 300, tmp_path, tmp_path / "out")


@pytest.mark.parametrize("vocabulary", ["/../../victim", "300", 1, True])
def test_a_vocabulary_that_is_no_number_is_refused_before_a_folder_is_touched(tmp_path, vocabulary):
    victim = tmp_path / "victim"
    victim.mkdir()
    with pytest.raises(ValueError, match="vocabulary .* must be a whole number of at least 2"):
        data.prepare("stdlib", vocabulary, tmp_path, tmp_path / f"out/stdlib-{vocabulary}")
    assert victim.is_dir() and not (tmp_path / "out").exists()


def test_only_what_a_corpus_is_made_of_is_replaced(tmp_path):
    (tmp_path / "meta.json").write_text('{"corpus": "", "vocabulary": 0, "tokens": {}, "bytes": {}, "words": null}')
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds thesis.txt, which is no part of a prepared corpus"):
        data.prepare("stdlib", 300, tmp_path, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "thesis.txt"]


def result(variant, seed, perplexity, **health):
    return {
        "variant": variant, "corpus": "wikitext-2", "experts": 64, "topk": 4, "ffn": 1, "seed": seed,
        "word_perplexity": perplexity, "bits_per_byte": 1.0, "tokens": 1000, "seconds": 36.0, "precision": "fp32",
        "flops_per_token": {"router": 2e6, "router_with_dispatch": 4e6, "total": 5e6, "total_with_dispatch": 7e6},
        "health": {name: [[5, value / 2], [10, value]] for name, value in health.items()},
        "train_losses": [[5, 3.0], [10, 2.0]], "device": "d", "torch": "t", "megatron_core": "m", "commit": "c",
        "flags": {"moe-router-type": variant.split("-")[0]},
    }  # fmt: skip


def test_the_table_compares_runs_of_the_same_seed_and_puts_the_best_first():
    rows = [
        result("topk", 1, 100.0), result("topk", 2, 120.0),
        result("air", 1, 90.0, **{"experts-used": 0.5, "mass-recall": 0.25}),
        result("air", 2, 114.0, **{"experts-used": 0.7, "mass-recall": 0.75}),
    ]  # fmt: skip
    lines = report.table(report.groups(rows)["wikitext-2", 1000, "fp32", 64, 4, 1]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| air", "| topk"]
    assert "102.00 +- 16.97" in lines[2]
    assert "-7.50 +- 3.54 %" in lines[2]
    assert "60.0 +- 14.1 %" in lines[2] and "50.0 +- 35.4 %" in lines[2]
    assert "110.00 +- 14.14" in lines[3]


def test_the_table_shows_step_times_where_the_group_was_timed(tmp_path):
    rows = [result("topk", 1, 100.0), result("air", 1, 90.0), result("air", 1, 80.0) | {"experts": 256}]
    path = tmp_path / "times.csv"
    path.write_text("corpus,variant,experts,topk,ffn,step_ms\nwikitext-2,air,64,4,1,12.6\n")
    first, second = (report.table(variants, report.read_step_times(path)) for variants in report.groups(rows).values())
    of_air, of_topk = first.splitlines()[2:]
    assert "| total | ms per step |" in first and "| 5.00 | 13 |" in of_air and "| 5.00 |  |" in of_topk
    assert "ms per step" not in second


def test_steps_of_every_variant_are_timed_in_turn_on_the_data_of_the_study(tmp_path, megatron_cpu):
    from benchmarks.quality import in_process, step_time

    builder = IndexedDatasetBuilder(str(tmp_path / "train.bin"), dtype=numpy.uint16)
    builder.add_document(numpy.arange(200) % 50, [200])
    builder.finalize(str(tmp_path / "train.idx"))
    flags = {
        "num-layers": 1, "hidden-size": 8, "num-attention-heads": 2, "seq-length": 4, "global-batch-size": 2,
        "train-iters": 10, "position-embedding-type": "rope", "disable-bias-linear": True,
        "moe-granular-experts": True, "moe-dispatch": "compact", "moe-router-dtype": "fp32",
    }  # fmt: skip
    names = ("topk", "air", "hash")
    config = CONFIG | {"vocabulary": 50, "flags": flags, "variants": {n: {"moe-router-type": n} for n in names}}
    config["runs"] = [{"experts": [64], "shapes": [[4, 1]], "variants": list(names)}]
    runs, device = in_process.models(config, 64), torch.device("cpu")
    batches = in_process.batches(tmp_path / "train", flags, device)
    assert len(batches) == 20 and batches[1]["tokens"].tolist()[0] == [10, 11, 12, 13]
    assert (batches[0]["labels"][:, :-1] == batches[0]["tokens"][:, 1:]).all()
    trainers = {name: in_process.trainer_of(run, megatron_cpu, device) for name, run in runs.items()}
    assert [router.router_type for trainer in trainers.values() for router in trainer.routers] == list(names)
    seconds = step_time.time_steps(trainers, batches, warmup=2, repetitions=3)
    rows = step_time.rows_of(runs, seconds, 2, device)
    assert [row["variant"] for row in rows] == list(names) and rows[0]["of_topk"] == 1.0
    assert all(row["repetitions"] == 3 and row["step_ms"] > 0 for row in rows)
    with pytest.raises(ValueError, match=r"--experts \(32\) must be a size of the study"):
        in_process.models(config, 32)


def test_runs_with_different_flags_are_not_taken_for_seeds():
    with pytest.raises(ValueError, match=r"seed \(1\) of variant 'air' occurs twice"):
        report.groups([result("air", 1, 90.0), result("topk", 1, 90.0), result("air", 1, 80.0)])


def test_the_plots_are_drawn(tmp_path):
    rows = [result("topk", 1, 100.0), result("air", 1, 90.0, **{"experts-used": 0.5, "imbalance-factor": 3.0})]
    files = report.plots(rows, tmp_path)
    assert len(files) == 3 and all(file.stat().st_size > 10_000 for file in files)


def test_the_reference_is_black_and_variants_of_a_router_share_their_colour():
    styles = report.styles_of([result(name, 1, 1.0) for name in ("vq", "air-8-probes", "topk", "air", "topk-raw")])
    assert list(styles) == ["topk", "topk-raw", "air", "air-8-probes", "vq"]
    colors = [style["color"] for style in styles.values()]
    assert colors[0] == colors[1] == "black" and colors[2] == colors[3] != colors[4]
    variants = report.styles_of([result(name, 1, 1.0) for name in ("air", "air-b", "air-c", "air-d", "air-e")]).values()
    assert len({style["marker"] for style in variants}) == len({style["linestyle"] for style in variants}) == 5


def test_numbers_of_experts_are_joined_where_nothing_else_differs(tmp_path):
    larger = result("topk", 1, 80.0) | {"experts": 256}
    rows = [result("topk", 1, 100.0), larger, result("air", 1, 90.0), larger | {"ffn": 2}]
    joined = report._over_experts(report.groups(rows))
    assert {place: {experts: set(of) for experts, of in found.items()} for place, found in joined.items()} == {
        ("wikitext-2", 1000, "fp32", None, 4, 1): {64: {"topk", "air"}, 256: {"topk"}}
    }
    assert "experts.png" in {file.name for file in report.plots(rows, tmp_path)}


def test_the_overview_compares_one_router_with_the_others_where_there_are_three_seeds(tmp_path):
    dear = {"flops_per_token": {"router": 3e7, "router_with_dispatch": 3e7, "total": 4e7, "total_with_dispatch": 4e7}}
    rows = [result("topk", seed, 100.0) | {"topk": 16} | dear for seed in (1, 2, 3)]
    rows += [result("air", seed, 100.0 + seed) | {"topk": 16} for seed in (1, 2, 3)]
    rows += [result("hash", 2, 204.0) | {"topk": 16}, result("vq", 1, 1.0) | {"topk": 16}]
    elsewhere = [row | {"corpus": "books", "word_perplexity": 300 - row["word_perplexity"]} for row in rows[:-1]]
    two_seeds = [row | {"experts": 16} for row in rows if row["seed"] < 3]
    lines = overview.comparison(rows + elsewhere + two_seeds).splitlines()
    assert lines == [
        "| air against | books, E = 64 | wikitext-2, E = 64 |",
        "|---|---|---|",
        "| topk | 1.0 +- 0.5% better, at 0.12 | 2.0 +- 1.0% worse, at 0.12 |",
        "| hash | 106.2% worse, at 1.00 (1 seed) | 50.0% better, at 1.00 (1 seed) |",
    ]
    assert overview.plot(rows + elsewhere, tmp_path / "overview.png").stat().st_size > 10_000
    assert not overview.regimes([row | {"topk": 8} for row in rows], "air")


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
    assert overview.comparison(rows) in text, "overview.py makes another table of the results"
    for table in copying.table(pandas.read_csv(RESULTS / "quality/copying.csv")).split("\n\n"):
        assert table in text, f"copying.py makes another table of the results:\n{table}"


def test_every_rule_of_the_drift_study_does_what_it_says(tmp_path, megatron_cpu):
    from benchmarks.quality import drift, in_process

    flags = {
        "num-layers": 1, "hidden-size": 8, "num-attention-heads": 2, "seq-length": 4, "global-batch-size": 2,
        "train-iters": 10, "position-embedding-type": "rope", "disable-bias-linear": True,
        "moe-granular-experts": True, "moe-dispatch": "compact", "moe-router-dtype": "fp32",
        "attention-dropout": 0, "hidden-dropout": 0,
        "moe-router-type": "air", "num-experts": 64, "moe-router-topk": 4, "moe-ffn-hidden-size": 1,
    }  # fmt: skip
    run = study.Run("air", 64, 4, 1, 1, "wikitext-2", 50, flags)
    device = torch.device("cpu")
    text = torch.arange(25 * 2 * 5).remainder(50).view(25, 2, 5)
    positions, mask = torch.arange(4).expand(2, 4), torch.ones(1, 1, 4, 4, dtype=torch.bool).triu(1)
    data = [{"tokens": b[:, :-1], "labels": b[:, 1:], "positions": positions, "mask": mask} for b in text]
    rows = pandas.DataFrame(drift.rows_of_seed(run, data, data[:12], 1, megatron_cpu, device))
    after = {name: rows[rows.rule == name] for name in drift.RULES}
    assert (rows.rule == "before").sum() == 25 and all(len(part) == 12 for part in after.values())
    first = {part.loss.iloc[0] for part in after.values()}
    assert len(first) == 1  # all go on from one state
    assert after["as it is"].age.tolist() == list(range(26, 38))
    assert after["reset"].age.tolist() == list(range(9, 21))
    assert len({part.quantization_error.iloc[-1] for part in after.values()}) >= 3  # 'drift' may do nothing
    assert drift.table(rows).count("\n") == 1 + len(drift.RULES)
    router = in_process.trainer_of(run, megatron_cpu, device).routers[0]
    frozen = drift.Rule("frozen", router, 400)
    frozen.begin()
    assert router.codebook.learn is not type(router.codebook).learn
    frozen.end()
    assert router.codebook.learn is type(router.codebook).learn
    rule = drift.Rule("drift", router, 400, [0.1, 0.2] * 10)
    rule.begin()
    assert (router.codebook.decay, router.index.refresh_interval) == (0.99, 20)
    router.codebook.last_health.copy_(torch.tensor([0.1, 8.0]))  # an error of 0.9
    rule.after_step()
    assert rule.age == 40 and router.codebook.decay == 41 / 43
    rule.after_step()
    assert rule.age == 8 and router.codebook.decay == 9 / 11
    for _ in range(10):
        rule.after_step()  # such errors are soon no longer unusual
    assert rule.age > 8
    rule.end()
    assert (router.codebook.decay, router.index.refresh_interval) == (0.99, 20)


def test_information_is_one_where_the_id_fixes_the_expert_and_none_where_it_tells_nothing():
    from benchmarks.quality.context import Counts

    ids = torch.arange(2).repeat(50_000)
    one, none = Counts(2, 2), Counts(2, 2)
    one.add(ids, ids.unsqueeze(1), torch.ones(100_000, 1))
    none.add(ids, torch.arange(2).repeat_interleave(50_000).unsqueeze(1), torch.ones(100_000, 1))
    assert one.information(1) == pytest.approx(1.0, abs=1e-4) and none.information(1) == pytest.approx(0.0, abs=1e-4)


def test_the_most_frequent_experts_of_an_id_come_with_their_mean_probs():
    from benchmarks.quality.context import Counts

    counts = Counts(2, 4)
    topk_ids = torch.tensor([[0, 1], [0, 2], [0, 2], [3, 1]], dtype=torch.int32)
    counts.add(torch.tensor([1, 1, 1, 0]), topk_ids, torch.tensor([[0.5, 0.5], [0.2, 0.8], [0.2, 0.4], [0.7, 0.3]]))
    experts, probs = counts.most_frequent(2)
    assert experts[1].tolist() == [0, 2] and sorted(experts[0].tolist()) == [1, 3]
    assert probs[1].tolist() == pytest.approx([0.3, 0.6])


def test_a_layer_that_routes_by_the_id_loses_nothing_without_context(megatron_cpu):
    """Of two layers the first is by hash: its table comes back from the counts, and its loss stays."""
    from benchmarks.quality import context, in_process

    flags = {
        "num-layers": 2, "hidden-size": 8, "num-attention-heads": 2, "seq-length": 8, "global-batch-size": 4,
        "train-iters": 4, "position-embedding-type": "rope", "disable-bias-linear": True,
        "moe-granular-experts": True, "moe-dispatch": "compact", "moe-router-dtype": "fp32",
        "attention-dropout": 0, "hidden-dropout": 0, "moe-num-hash-layers": 1,
        "moe-router-type": "air", "num-experts": 64, "moe-router-topk": 4, "moe-ffn-hidden-size": 1,
    }  # fmt: skip
    run = study.Run("hash-air", 64, 4, 1, 1, "stdlib", 50, flags)
    text = torch.arange(60 * 4 * 9).mul(7).remainder(47).view(60, 4, 9)
    positions, mask = torch.arange(8).expand(4, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
    data = [{"tokens": b[:, :-1], "labels": b[:, 1:], "positions": positions, "mask": mask} for b in text]
    batches = context.shuffled(data, 1)
    assert len(batches) == 60 and batches[0]["tokens"].shape == (4, 8)
    assert sum(int(batch["labels"].sum()) for batch in batches) == sum(int(batch["labels"].sum()) for batch in data)
    trainer = in_process.trainer_of(run, megatron_cpu, torch.device("cpu"))
    by_id, in_context = context.rows_of(trainer, batches[:30], batches[30:50], batches[50:], 50, "hash-air")
    assert by_id["fixed_by_id"] == 1.0 and by_id["rise_alone"] == pytest.approx(0.0, abs=1e-6)
    assert by_id["information"] == pytest.approx(1.0, abs=0.03) and in_context["information"] < by_id["information"]
    assert 0.0 < in_context["fixed_by_id"] < 1.0 and in_context["rise_alone"] != 0.0
    assert in_context["rise_with_earlier"] == pytest.approx(in_context["rise_alone"], abs=1e-6)
    assert "| hash-air | 1 | 100.0% |" in context.table(pandas.DataFrame([by_id, in_context]))


class Copier(torch.nn.Module):
    """Knows a token, at 1 bit, where the token before has occurred in the sequence, and else takes 8 bits."""

    def forward(self, tokens, positions, mask, labels):
        seen = (tokens.unsqueeze(2) == tokens.unsqueeze(1)).tril(-1).any(dim=2)
        return math.log(2) * torch.where(seen, 1.0, 8.0)


def test_a_model_that_copies_pays_for_a_passage_once():
    tokens = torch.randperm(4 * 12, generator=torch.Generator().manual_seed(1)).view(4, 12)
    batch = {"tokens": tokens, "labels": tokens + 1, "positions": None, "mask": None}
    assert (copying.twice(batch)["tokens"][:, 6:] == tokens[:, :6]).all()
    assert (copying.twice(batch)["labels"] == copying.twice(batch)["tokens"].roll(-1, dims=1)).all()
    batch["tokens"][:, 6:9] = batch["tokens"][:, :3]
    figures = copying.measure(Copier(), [batch])
    assert figures == pytest.approx(
        {
            "loss": 8.0 - 7.0 * 3 / 12, "where_seen": 1.0, "elsewhere": 8.0 - 7.0 * 2 / 11, "share_seen": 1 / 12,
            "first": 8.0, "again": 1.0, "copied": 7.0,
        }
    )  # fmt: skip
    assert copying.seen_before(torch.tensor([[5, 1, 2, 1, 2]]), 2).tolist() == [[False] * 4 + [True]]
    assert copying.seen_before(torch.tensor([[2, 1, 2]]), 1).tolist() == [[False, False, True]]


def test_the_checkpoints_of_a_study_are_measured(tmp_path, megatron_cpu):
    """The weights that are measured are those of the checkpoint, not those that the model begins with."""
    from megatron.core import dist_checkpointing

    from benchmarks.quality import in_process

    flags = {
        "num-layers": 1, "hidden-size": 8, "num-attention-heads": 2, "seq-length": 8, "global-batch-size": 2,
        "train-iters": 4, "position-embedding-type": "rope", "disable-bias-linear": True,
        "moe-granular-experts": True, "moe-dispatch": "compact", "moe-router-dtype": "fp32",
        "attention-dropout": 0, "hidden-dropout": 0,
        "moe-router-type": "air", "num-experts": 64, "moe-router-topk": 4, "moe-ffn-hidden-size": 1,
    }  # fmt: skip
    run, device = study.Run("air", 64, 4, 1, 1, "stdlib", 50, flags), torch.device("cpu")
    text = torch.arange(2 * 9).remainder(4).view(2, 9)
    positions, mask = torch.arange(8).expand(2, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
    data = [{"tokens": text[:, :-1], "labels": text[:, 1:], "positions": positions, "mask": mask}]
    trainer = in_process.trainer_of(run, megatron_cpu, device, seed=1)
    for step in range(1, 3):
        trainer.step(data[0])
        folder = tmp_path / f"checkpoint/iter_{step:07d}"
        folder.mkdir(parents=True)
        dist_checkpointing.save({"model": trainer.model.module.sharded_state_dict()}, str(folder))
    checkpoints = copying.kept_checkpoints(tmp_path)
    assert list(checkpoints) == [1, 2]
    rows = pandas.DataFrame(copying.rows_of(run, checkpoints, data, megatron_cpu, device))
    expected = copying.measure_routing(trainer.model.module.eval(), trainer.routers, data)
    assert 0.25 < expected["best_1"] < 1.0  # of 4 experts
    assert dict(rows.iloc[1][list(expected)]) == pytest.approx(expected)
    assert rows.loss[0] != rows.loss[1]
    shown = copying.table(rows).splitlines()
    assert shown[0] == "| copied, at step | seed | 1 | 2 |"
    assert shown[2] == f"| air | 1 | {rows.copied[0]:.3f} | {rows.copied[1]:.3f} |"
    assert shown[6] == f"| air | 1 | {rows.elsewhere[0]:.3f} | {rows.elsewhere[1]:.3f} |"
    assert shown[-1] == f"| air | 1 | {rows.best_1[0]:.3f} | {rows.best_1[1]:.3f} |"
    copying.plot(rows, tmp_path / "copying.png")
    assert (tmp_path / "copying.png").stat().st_size > 10_000
