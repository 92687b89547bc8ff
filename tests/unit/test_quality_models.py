"""What the quality study measures on models in its own process: step times, drift, context, copying."""

import math
import tomllib

import numpy
import pandas
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from benchmarks.quality import bounds, context, copying, drift, in_process, step_time, study

DEVICE = torch.device("cpu")
FLAGS = {
    "num-layers": 1, "hidden-size": 8, "num-attention-heads": 2, "seq-length": 4, "global-batch-size": 2,
    "train-iters": 10, "position-embedding-type": "rope", "disable-bias-linear": True,
    "moe-granular-experts": True, "moe-dispatch": "compact", "moe-router-dtype": "fp32",
    "attention-dropout": 0, "hidden-dropout": 0,
}  # fmt: skip
SIZES = {"num-experts": 64, "moe-router-topk": 4, "moe-ffn-hidden-size": 1}
VOCABULARY = 50


def run_of(variant, corpus="stdlib", **flags):
    """A run with AIR routing; ``flags`` have underscores in place of dashes."""
    given = {name.replace("_", "-"): value for name, value in flags.items()}
    return study.Run(
        variant, 64, 4, 1, 1, corpus, VOCABULARY, FLAGS | SIZES | {"moe-router-type": "air", "seed": 1} | given
    )


def batches_of(text, length):
    """Global batches of a text [batches, sequences, length + 1]."""
    positions = torch.arange(length).expand(text.shape[1], length)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    return [{"tokens": part[:, :-1], "labels": part[:, 1:], "positions": positions, "mask": mask} for part in text]


def study_of(*variants, **more):
    """The parsed file of a study with one size."""
    block = {"experts": [64], "shapes": [[4, 1]], "variants": list(variants)}
    given = {"corpus": "stdlib", "vocabulary": VOCABULARY, "seeds": [1], "flags": FLAGS, "runs": [block]}
    return given | {"variants": {name: {"moe-router-type": name} for name in variants}} | more


# Step times.


def test_batches_of_a_data_set_are_in_its_order(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "train.bin"), dtype=numpy.uint16)
    builder.add_document(numpy.arange(200) % 50, [200])
    builder.finalize(str(tmp_path / "train.idx"))
    batches = in_process.batches(tmp_path / "train", FLAGS, DEVICE)
    (expected,) = batches_of((torch.arange(200) % 50).view(20, 2, 5)[1:2], 4)
    assert len(batches) == 20 and all(torch.equal(batches[1][name], expected[name]) for name in expected)


def test_steps_of_every_variant_are_timed_in_turn_over_whole_refresh_intervals(megatron_cpu):
    names = ("topk", "air", "hash")
    config = study_of(*names)
    config["variants"]["air"]["moe-air-refresh-interval"] = 4
    runs = in_process.models(config, 64)
    trainers = {name: in_process.trainer_of(run, megatron_cpu, DEVICE) for name, run in runs.items()}
    assert [router.router_type for trainer in trainers.values() for router in trainer.routers] == list(names)
    made, index = [], trainers["air"].routers[0].index
    for name, trainer in trainers.items():
        trainer.step = noted(made, name, trainer, index)
    data = batches_of((torch.arange(200) % 50).view(20, 2, 5), 4)
    seconds = step_time.time_steps(trainers, data, warmup=2, repetitions=5)
    steps = [name for name, _ in made]
    assert steps == [name for number in (6, 5, 5) for name in names for _ in range(number)]
    rebuilt = [built_at for name, built_at in made if name == "air"]
    for first in (6, 11):  # each turn has an uncounted step, and then an interval with one rebuild
        counted = rebuilt[first : first + 5]
        assert sum(one != other for one, other in zip(counted, counted[1:], strict=False)) == 1
    ages = {name: step_time.codebook_age(trainer) for name, trainer in trainers.items()}
    assert ages == {"topk": "", "air": 4**2 + 1 + 4 + 2 * 5, "hash": ""}
    rows = step_time.rows_of(runs, seconds, ages, 2, DEVICE)
    assert [row["variant"] for row in rows] == list(names) and rows[0]["of_topk"] == 1.0
    for row in rows:
        assert row["repetitions"] == 8 and row["vocabulary"] == VOCABULARY and row["layers"] == 1
        mean = 1e3 * sum(seconds[row["variant"]]) / 8
        assert row["step_ms"] == round(mean, 1) and row["step_min_ms"] <= row["step_ms"] <= row["step_max_ms"]


def noted(made, name, trainer, index):
    """The trainer's step, which also notes its model and when the lists were built."""
    step = trainer.step

    def note(batch):
        seconds = step(batch)
        made.append((name, int(index.built_at)))
        return seconds

    return note


def test_variants_to_be_timed_are_chosen_by_name():
    config = study_of("topk", "air")
    assert list(step_time.chosen(config, 64, None)) == ["topk", "air"]
    assert list(step_time.chosen(config, 64, ["air"])) == ["air"]
    with pytest.raises(ValueError, match=r"--variants \('x'\) must be among topk, air"):
        step_time.chosen(config, 64, ["x"])
    with pytest.raises(ValueError, match=r"--experts \(32\) must be a size of the study"):
        step_time.chosen(config, 32, None)


def test_new_rows_take_the_place_of_those_of_the_same_model():
    earlier = pandas.DataFrame({"model": ["air", "topk", "air"], "experts": [64, 64, 32], "loss": [1.0, 2.0, 3.0]})
    rows = pandas.DataFrame({"model": ["air", "air"], "experts": [64, 64], "loss": [4.0, 5.0]})
    found = in_process.replace_rows(earlier, rows, ("model", "experts"))
    assert found.loss.tolist() == [2.0, 3.0, 4.0, 5.0]
    none = pandas.DataFrame(columns=["experts"])
    assert in_process.replace_rows(none, rows, ("model", "experts")) is rows  # whose whole numbers stay such


# Drift.


@pytest.fixture(scope="module")
def drift_rows(megatron_cpu):
    """Rows of 25 steps before the change, and of 12 after it with each rule."""
    data = batches_of(torch.arange(25 * 2 * 5).remainder(50).view(25, 2, 5), 4)
    return pandas.DataFrame(drift.rows_of_seed(run_of("air", "wikitext-2"), data, data[:12], 1, megatron_cpu, DEVICE))


@pytest.fixture
def router(megatron_cpu):
    return in_process.trainer_of(run_of("air", "wikitext-2"), megatron_cpu, DEVICE).routers[0]


def test_every_rule_goes_on_from_one_state(drift_rows):
    after = {name: drift_rows[drift_rows.rule == name] for name in drift.RULES}
    assert (drift_rows.rule == "before").sum() == 25 and all(len(part) == 12 for part in after.values())
    assert len({part.loss.iloc[0] for part in after.values()}) == 1
    assert len({part.quantization_error.iloc[-1] for part in after.values()}) >= 3  # 'drift' may do nothing
    assert drift.table(drift_rows).count("\n") == 1 + len(drift.RULES)


def test_as_it_is_the_codebook_grows_older(drift_rows):
    assert drift_rows[drift_rows.rule == "as it is"].age.tolist() == list(range(26, 38))


def test_a_reset_makes_the_codebook_young(drift_rows, router):
    assert drift_rows[drift_rows.rule == "reset"].age.tolist() == list(range(9, 21))
    rule = drift.Rule("reset", router, 400)
    rule.begin()
    assert (router.codebook.decay, router.index.refresh_interval) == (9 / 11, 1)
    rule.end()
    assert (router.codebook.decay, router.index.refresh_interval) == (0.99, 20)


def test_a_frozen_codebook_does_not_learn(router):
    frozen = drift.Rule("frozen", router, 400)
    frozen.begin()
    assert router.codebook.learn is not type(router.codebook).learn
    frozen.end()
    assert router.codebook.learn is type(router.codebook).learn


def test_an_unusual_error_makes_the_codebook_younger(router):
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


def test_the_plot_of_drift_has_every_rule(drift_rows, tmp_path):
    figure = drift.plot(drift_rows, tmp_path / "drift.png")
    loss, recall, error = figure.axes
    assert (tmp_path / "drift.png").is_file()
    for name, line, of_recall in zip(drift.RULES, error.get_lines(), recall.get_lines(), strict=True):
        part = drift_rows[drift_rows.rule == name]
        assert list(line.get_ydata()) == part.quantization_error.tolist()
        assert list(of_recall.get_ydata()) == part.topk_recall.dropna().tolist()
    assert set(loss.get_lines()[0].get_ydata()) == {0.0}  # `as it is` against itself


def test_only_rows_of_the_same_setting_are_done_and_shown(drift_rows):
    setting = {"key": "k", "experts": 64, "steps_before": 25, "steps_after": 12}
    others = [drift_rows.assign(**setting | {name: 1}) for name in setting]
    rows = pandas.concat((drift_rows, *others, drift_rows.assign(**setting)))  # the first have no such columns
    assert len(drift.of_setting(drift.with_setting(rows), setting)) == len(drift_rows)
    for earlier in (drift_rows, pandas.DataFrame()):
        assert not len(drift.of_setting(drift.with_setting(earlier), setting))


def test_the_other_corpus_is_kept_for_each_corpus_and_vocabulary(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    other = tmp_path / "gutenberg-100m-256"
    owns = [tmp_path / name for name in ("wikitext-2-256", "stdlib-256")]
    for folder in (other, *owns):
        folder.mkdir()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        ids = {letter: number for number, letter in enumerate(alphabet[::-1] if folder == owns[1] else alphabet)}
        tokenizer = Tokenizer(models.BPE(ids, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(folder / "tokenizer.json"))
    builder = IndexedDatasetBuilder(str(other / "train.bin"), dtype=numpy.uint16)
    builder.add_document(numpy.arange(60, 90), [30])
    builder.finalize(str(other / "train.idx"))
    prefixes = [drift.other_corpus(own, other, tmp_path, 20) for own in owns]
    assert [prefix.name for prefix in prefixes] == [f"drift-{other.name}-as-{own.name}-20" for own in owns]
    assert prefixes[0].with_suffix(".bin").read_bytes() != prefixes[1].with_suffix(".bin").read_bytes()


# Context.


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
    sizes = {"num_layers": 2, "seq_length": 8, "global_batch_size": 4, "moe_num_hash_layers": 1}
    run = run_of("hash-air", **sizes)
    data = batches_of(torch.arange(60 * 4 * 9).mul(7).remainder(47).view(60, 4, 9), 8)
    batches = context.shuffled(data, 1)
    assert len(batches) == 60 and batches[0]["tokens"].shape == (4, 8)
    assert sum(int(batch["labels"].sum()) for batch in batches) == sum(int(batch["labels"].sum()) for batch in data)
    trainer = in_process.trainer_of(run, megatron_cpu, DEVICE)
    context.train(trainer, batches[:30], "hash-air")
    rows = context.rows_of(trainer, batches[30:50], batches[50:], VOCABULARY)
    by_id, in_context = rows
    assert by_id["fixed_by_id"] == 1.0 and by_id["rise_alone"] == pytest.approx(0.0, abs=1e-6)
    assert by_id["information"] == pytest.approx(1.0, abs=0.03) and in_context["information"] < by_id["information"]
    assert 0.0 < in_context["fixed_by_id"] < 1.0 and in_context["rise_alone"] != 0.0
    assert in_context["rise_with_earlier"] == pytest.approx(in_context["rise_alone"], abs=1e-6)
    assert "| hash-air | 1 | 100.0% |" in context.table(pandas.DataFrame(rows).assign(model="hash-air"))


def test_an_observed_router_shows_its_routes_and_is_as_before(router):
    seen, choose = [], router._choose
    with in_process.observed(router, seen.append):
        routes = router.route(torch.randn(5, 8))
    assert len(seen) == 1 and torch.equal(seen[0].topk_ids, routes.topk_ids)
    assert router._choose == choose and "_choose" not in router.__dict__


# Copying.


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

    run = run_of("air", seq_length=8)
    data = batches_of(torch.arange(2 * 9).remainder(4).view(1, 2, 9), 8)
    trainer = in_process.trainer_of(run, megatron_cpu, DEVICE, seed=1)
    for step in range(1, 3):
        trainer.step(data[0])
        folder = tmp_path / f"checkpoint/iter_{step:07d}"
        folder.mkdir(parents=True)
        dist_checkpointing.save({"model": trainer.model.module.sharded_state_dict()}, str(folder))
    checkpoints = copying.kept_checkpoints(tmp_path)
    assert list(checkpoints) == [1, 2]
    rows = pandas.DataFrame(copying.rows_of(run, checkpoints, data, megatron_cpu, DEVICE))
    expected = copying.measure_routing(trainer.model.module.eval(), trainer.routers, data)
    assert 0.25 < expected["best_1"] < 1.0  # of 4 experts
    assert dict(rows.iloc[1][list(expected)]) == pytest.approx(expected)
    assert rows.loss[0] != rows.loss[1]
    shown = copying.table(rows).splitlines()
    assert shown[0] == "| copied, at step | seed | 1 | 2 |"
    assert shown[2] == f"| air | 1 | {rows.copied[0]:.3f} | {rows.copied[1]:.3f} |"
    assert shown[6] == f"| air | 1 | {rows.elsewhere[0]:.3f} | {rows.elsewhere[1]:.3f} |"
    assert shown[-1] == f"| air | 1 | {rows.best_1[0]:.3f} | {rows.best_1[1]:.3f} |"
    figure = copying.plot(rows, tmp_path / "copying.png")
    assert (tmp_path / "copying.png").is_file()
    for axis, column in zip(figure.axes, ("copied", "where_seen", "elsewhere"), strict=True):
        (line,) = axis.get_lines()
        assert [list(values) for values in line.get_data()] == [[1, 2], rows[column].tolist()]


def test_runs_of_several_sizes_are_not_put_into_one_table():
    config = tomllib.loads((study.ROOT / "benchmarks/quality/bytes.toml").read_text())
    runs = copying.chosen_runs(config, "*4800*")  # as in bytes.md
    assert {run.key for run in runs} >= set(pandas.read_csv(study.ROOT / "docs/results/quality/copying.csv").key)
    with pytest.raises(ValueError, match=r"--only \('\*'\) must select runs of one size, not E="):
        copying.chosen_runs(config, "*")
    with pytest.raises(ValueError, match=r"--only \('x'\) must match the name of a run"):
        copying.chosen_runs(config, "x")


def test_rows_of_other_runs_or_batches_are_neither_done_nor_shown(tmp_path):
    run = run_of("air")
    for step in (1, 2):
        (tmp_path / f"{run.key}/checkpoint/iter_{step:07d}").mkdir(parents=True)
    rows = copying.with_batches(pandas.DataFrame({"key": [run.key, "other", run.key], "step": [1, 1, 2]}))
    assert rows.batches.tolist() == [12] * 3  # of a file without this column
    rows.loc[2, "batches"] = 24
    for number, missing in ((12, [2]), (24, [1]), (6, [1, 2])):
        own = copying.rows_of_runs(rows, [run], number)
        assert len(own) == 2 - len(missing)
        assert list(copying.missing_checkpoints([run], own, tmp_path)[run.key]) == missing


# Commands.

LINES = {
    "study": (study, "small.toml --threads 0", "argument --threads: '0' must be a whole number of at least 1"),
    "study-jobs": (study, "small.toml --jobs -1", "argument --jobs: '-1' must be a whole number of at least 1"),
    "study-data": (study, "small.toml --data-dir {tmp}/none --out {tmp}", "is missing: run `make data`"),
    "step-time": (step_time, "small.toml --data x --out x --experts 5", "--experts (5) must be a size of the study"),
    "step-time-data": (step_time, "small.toml --data x --out x --experts 4096", "--data (x) must be the prefix"),
    "context": (context, "small.toml --data-dir {tmp}/none --work {tmp} --out x", "is missing: run `make data`"),
    "context-variant": (context, "small.toml --data-dir x --out x --variants x", "variant ('x') must be one of"),
    "drift-bytes": (drift, "small.toml --data-dir x --out x", "vocabulary (257): a study in bytes has no tokenizer"),
    "drift-data": (drift, "full.toml --data-dir {tmp}/none --work {tmp} --out x", "unpack wikitext-2 there"),
    "drift-variant": (drift, "{tmp}/topk.toml --data-dir x --out x --experts 64", "variant ('air') must be one of"),
    "copying": (copying, "bytes.toml --data-dir x --out x", "--only ('*') must select runs of one size"),
    "copying-none": (copying, "small.toml --data-dir x --out x --study {tmp} --only topk*", "make the runs with"),
    "bounds": (bounds, "--data-dir x --experts 5", "experts (5) must be a size of the air runs"),
    "bounds-data": (bounds, "--data-dir {tmp}/none --out {tmp}", "unpack wikitext-2 there"),
    "no-study": (context, "{tmp}/none.toml --data-dir x --out x", "No such file or directory"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_what_a_command_cannot_do_is_refused_in_one_line(name, tmp_path, monkeypatch, capsys):
    module, line, message = LINES[name]
    words = line.format(tmp=tmp_path).split()
    if words[0].endswith(".toml") and "/" not in words[0]:
        words[0] = str(study.ROOT / "benchmarks/quality" / words[0])
    (tmp_path / "topk.toml").write_text(
        'corpus = "wikitext-2"\nvocabulary = 300\nseeds = [1]\n[flags]\n[variants]\ntopk = {}\n'
        '[[runs]]\nexperts = [64]\nshapes = [[4, 1]]\nvariants = ["topk"]\n'
    )
    if hasattr(module, "begin"):
        monkeypatch.setattr(module, "begin", lambda threads: None)
    with pytest.raises(SystemExit) as stopped:
        module.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
