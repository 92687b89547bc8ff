"""The quality study: its files, its runs, and the corpora it makes."""

import json
import math
import tomllib
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from benchmarks.quality import curves, data, study
from benchmarks.quality.flops import flops_per_token

FOLDER = Path(study.__file__).parent
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


def test_a_row_that_a_kill_cut_is_left_out_and_the_next_row_takes_its_place(tmp_path, caplog):
    results = tmp_path / "results.jsonl"
    rows = [{"key": run.key, "precision": "fp32", "bits_per_byte": 2.0} for run in study.load_runs(CONFIG)[:3]]
    texts = [json.dumps(row) for row in rows]
    for cut in ("{", '{"key"', texts[1][:-1], texts[1][: len(texts[1]) // 2]):
        results.write_text(f"{texts[0]}\n{cut}")
        caplog.clear()
        assert study.read_results(results) == rows[:1]
        (record,) = caplog.records
        assert record.getMessage() == f"{results}: the last line was cut short when a study was killed, and is left out"
        study.append_result(results, rows[1])
        study.append_result(results, rows[2])
        assert results.read_text() == "".join(f"{text}\n" for text in texts)
    results.write_text("\n".join(texts[:2]))  # killed before the last end of line
    study.append_result(results, rows[2])
    assert study.read_results(results) == rows
    study.append_result(tmp_path / "new.jsonl", rows[0])
    assert study.read_results(tmp_path / "new.jsonl") == rows[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"key": "a", "precision": "fp32"}\n{"key": "b"', None),
        ('{"key": "b", \n{"key": "a", "precision": "fp32"}\n', "line 1: not a result"),
        ('{"key": "a", "precision": "fp32"}\n{"key": "b"\n', "line 2: not a result"),
        ("years of work", "line 1: not a result"),
        ('{"key": "a"}\n', "line 1: not a result (key and precision must be texts)"),
        ("[1]\n", "line 1: not a result (key and precision must be texts)"),
        ('{"key": "a", "precision": "fp32"}\n' * 2, "line 2: key ('a') occurs twice in precision fp32, before in "),
    ],
    ids=["cut", "damaged-within", "damaged-at-the-end", "text", "no-precision", "no-object", "twice"],
)
def test_damaged_results_end_the_command_with_file_and_line(tmp_path, capsys, text, message):
    results = tmp_path / "results.jsonl"
    results.write_text(text)
    words = [str(FOLDER / "small.toml"), "--list", "--results", str(results)]
    if message is None:
        study.main(words)
        assert "to be made" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as stopped:
        study.main(words)
    assert stopped.value.code.startswith(f"{results}, {message}")
    assert results.read_text() == text


def test_a_bad_study_ends_the_command_with_its_file(tmp_path, capsys):
    path = tmp_path / "bad.toml"
    for text, message in (("corpus = ", "Invalid value"), ('corpus = "stdlib"', "vocabulary is missing")):
        path.write_text(text)
        with pytest.raises(SystemExit):
            study.main([str(path), "--list"])
        assert f"{path}: {message}" in capsys.readouterr().err


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
