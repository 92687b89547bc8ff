"""The files of a run: what is read, what a resumed run supersedes, and what is refused."""

import json
import math

import numpy
import pytest

from air_moe_megatron.report import __main__ as command
from air_moe_megatron.report import runs
from air_moe_megatron.report.runs import names_of, read_run, read_runs
from tests import run_files
from tests.run_files import STEP_TOKENS, codebook, diagnostics, header, lines, step, write


def read(folder, records, snapshot=None):
    return read_run(write(folder, records, snapshot), "run")


def test_figures_come_back_as_they_were_written(tmp_path):
    records = lines(end=60, interval=20)
    run = read(tmp_path, records, codebook(iteration=60, num_clusters=16))
    assert run.steps["iteration"].tolist() == [20, 40, 60]
    assert run.steps["loss"].tolist() == [record["loss"] for record in records if record["kind"] == "step"]
    assert run.steps["seconds"].tolist() == pytest.approx([5.0, 10.0, 15.0])
    written = [layer for record in records if record["kind"] == "diagnostics" for layer in record["layers"]]
    for name in ("topk_recall", "mass_bound", "imbalance_factor"):
        assert run.layers[name].tolist() == [layer[name] for layer in written]
    assert run.layers["drift"].tolist() == pytest.approx([1 - layer["list_overlap"] for layer in written])
    assert run.layers["idle"].tolist() == pytest.approx([layer["idle_codewords"] / 512 for layer in written])
    numpy.testing.assert_allclose(run.bins[2]["load_bins"][1], written[3]["load_bins"], rtol=1e-6)
    assert run.bins[2]["load_bins_tokens"].tolist() == [20 * STEP_TOKENS, 40 * STEP_TOKENS, 60 * STEP_TOKENS]
    assert run.codebooks[1].load.tolist() == codebook(num_clusters=16)["layers"][0]["load"]
    assert run.codebook_iteration == 60 and not run.notes and not run.resumes


def test_a_router_without_a_figure_has_none(tmp_path):
    run = read(tmp_path, lines("hash", end=20))
    assert run.layers["topk_recall"].isna().all() and run.layers["experts_used"].notna().all()


def test_a_step_without_a_loss_is_a_gap(tmp_path):
    without = {name: value for name, value in step(20).items() if name != "loss"}
    assert math.isnan(read(tmp_path, [header(), without, step(40)]).steps["loss"][0])


def test_lines_beyond_a_resume_are_superseded(tmp_path):
    before = [header(), step(20, 3.0), diagnostics(20, 60), step(40, 2.5), diagnostics(40, 60)]
    after = [header(iteration=30, lr=0.001), step(40, 2.4), diagnostics(40, 60, topk_recall=0.5), step(60, 2.0)]
    run = read(tmp_path, before + after)
    assert run.steps[["iteration", "loss"]].to_numpy().tolist() == [[20, 3.0], [40, 2.4], [60, 2.0]]
    assert run.layers["iteration"].tolist() == [20, 20, 40, 40]
    assert run.layers["topk_recall"].tolist()[2:] == [0.5, 0.5]
    (resume,) = run.resumes
    assert (resume.iteration, resume.tokens, resume.num_superseded) == (30, 30 * STEP_TOKENS, 2)
    assert resume.changed == {"lr": (0.003, 0.001)} and run.argument("lr") == 0.001


def test_time_goes_on_after_a_resume(tmp_path):
    run = read(tmp_path, [header(), step(20), step(40), header(iteration=30), step(40), step(60)])
    assert run.steps["seconds"].tolist() == pytest.approx([5.0, 10.0, 15.0])


def test_a_run_started_anew_supersedes_all(tmp_path):
    run = read(tmp_path, [*lines(end=100), header(iteration=50), step(60), header(iteration=0), step(20)])
    assert run.steps["iteration"].tolist() == [20] and run.layers.empty
    assert [(resume.iteration, resume.tokens) for resume in run.resumes] == [(0, 0)]


def test_a_resume_before_the_first_log_line_counts_the_tokens_up_to_it(tmp_path):
    (resume,) = read(tmp_path, [header(), header(iteration=10), step(20)]).resumes
    assert resume.tokens == 10 * STEP_TOKENS


def test_a_codebook_of_superseded_steps_is_left_out(tmp_path):
    records = [header(), diagnostics(20, 60), diagnostics(40, 60), header(iteration=30)]
    snapshot = codebook(iteration=40, num_clusters=16)
    run = read(tmp_path / "resumed", [*records, step(40)], snapshot)
    assert not run.codebooks and run.codebook_iteration is None
    assert run.notes == ("air_codebook.json is of step 40, but this run has no metrics of that step; it is left out",)
    for valid in (records[:3], [*records, diagnostics(40, 60)]):
        run = read(tmp_path / f"{len(valid)}", valid, snapshot)
        assert run.codebooks and run.codebook_iteration == 40 and not run.notes


def test_a_codebook_of_an_earlier_run_is_left_out(tmp_path):
    """A run without AIR routers writes no snapshot, so that of an earlier run in its folder stays."""
    snapshot = codebook(iteration=40, num_clusters=16)
    anew = [*lines(end=40), *lines("hash", end=40)]
    run = read(tmp_path / "anew", anew, snapshot)
    assert run.routers == ["hash"] and not run.codebooks and run.codebook_iteration is None
    assert run.notes == ("air_codebook.json is left out: no layer of this run has an air router",)
    assert not read(tmp_path / "alone", lines("hash", end=40), snapshot).codebooks
    assert not read(tmp_path / "changed", [*lines(end=40), header("topk", iteration=40), step(60)], snapshot).codebooks
    assert not read(tmp_path / "other-step", lines(end=20), snapshot).codebooks


def test_a_layer_that_has_become_one_by_hash_has_no_codebook(tmp_path):
    run = read(tmp_path, lines(end=40, num_hash_layers=1), codebook(iteration=40, num_clusters=16))
    assert list(run.codebooks) == [2]
    (note,) = run.notes
    assert note == "air_codebook.json has a codebook of layer 1, which has no air router in this run; it is left out"


def test_flags_of_a_superseded_resume_do_not_count_as_changed_back(tmp_path):
    records = [header(), step(20), header(iteration=20, lr=0.001), step(40), header(iteration=20), step(40)]
    (resume,) = read(tmp_path / "back", records).resumes
    assert (resume.iteration, resume.num_superseded, resume.changed) == (20, 1, {})
    (anew,) = read(tmp_path / "anew", [*records[:4], header(iteration=0), step(20)]).resumes
    assert anew.changed == {"lr": (0.001, 0.003)}


def test_a_run_from_a_checkpoint_of_another_starts_where_that_ended(tmp_path):
    run = read(tmp_path, [header(iteration=1000), step(1020)])
    assert run.steps["seconds"].tolist() == pytest.approx([5.0]) and not run.resumes


@pytest.mark.parametrize("cut", ['{"kind": "step", "iter', '{"kind": "step", "iteration": 40, "tok\ufffd'])
def test_a_last_line_that_a_kill_cut_is_left_out_with_a_note(tmp_path, cut):
    run = read(tmp_path, [header(), step(20), cut])
    assert len(run.steps) == 1
    (note,) = run.notes
    assert "last line" in note and "cut short" in note


def test_a_cut_line_before_a_resume_is_left_out_with_a_note(tmp_path):
    run = read(tmp_path, [header(), step(20), '{"kind": "st', header(iteration=20), step(40)])
    assert run.steps["iteration"].tolist() == [20, 40]
    (note,) = run.notes
    assert note.startswith("line 3 ")


CUT, CUT_HEADER = '{"kind": "st', '{"kind": "run", "form'


def test_a_run_that_was_killed_twice_is_read(tmp_path):
    """The second start was killed while it wrote its header."""
    killed = [header(), step(20), CUT, CUT_HEADER]
    run = read(tmp_path / "resumed", [*killed, header(iteration=20), step(40)])
    assert run.steps["iteration"].tolist() == [20, 40]
    assert [note.split(" of ")[0] for note in run.notes] == ["line 3", "line 4"]
    run = read(tmp_path / "killed", killed)
    assert run.steps["iteration"].tolist() == [20]
    assert [note.split(" of ")[0] for note in run.notes] == ["line 3", "the last line"]
    run = read(tmp_path / "at-once", ["{", '{"kind"', CUT_HEADER, header(), step(20), CUT, header(iteration=20), CUT])
    assert run.steps["iteration"].tolist() == [20] and len(run.notes) == 5


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "is empty"),
        ([header()], "no metrics yet"),
        ([header(), step(20), "garbage", step(40)], "line 3 is not JSON"),
        ([header(), step(20), "garbage", "more"], "line 3 is not JSON"),
        ([header(), step(20), CUT, CUT, header()], "line 3 is not JSON"),
        ([header(), step(20), CUT, "", header()], "line 3 is not JSON"),
        ([header(), step(20), CUT, CUT_HEADER, step(40), header()], "line 3 is not JSON"),
        (["garbage"], "line 1 is not JSON"),
        ([step(20)], "line 1: the first line must be of kind run"),
        ([header(), [1, 2], step(20)], "line 2: kind (None) must be one of run, step, diagnostics"),
        ([header(), {**step(20), "kind": "stop"}], "line 2: kind (stop) must be one of"),
        ([{**header(), "format": 2}, step(20)], "line 1: format (2) must be 1"),
        ([header(), step(20), {**header(), "format": 7}], "line 3: format (7) must be 1"),
        ([header(), {**step(20), "tokens": "many"}], "line 2: tokens (many) of a line of kind step must be a number"),
        ([header(), {**step(20), "loss": "low"}], "line 2: loss (low) of a line of kind step must be a number"),
        ([{**header(), "arguments": None}, step(20)], "line 1: arguments must be an object"),
        ([header(), {**diagnostics(20, 20), "layers": [{"layer": 1}]}], "line 2: layers must be a list of objects"),
        ([header(), diagnostics(20, 20, topk_recall="high")], "line 2: topk_recall (high) of layer 1 must be a number"),
        ([header(), diagnostics(20, 20, load_bins="even")], "line 2: load_bins of layer 1 must be a list of numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_file_is_refused_with_file_and_line(tmp_path, records, message, capsys):
    write(tmp_path, [record if isinstance(record, str) else json.dumps(record) for record in records])
    with pytest.raises(SystemExit) as stopped:
        command.main([str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert error.startswith("air_moe_megatron.report: error: ") and message in error
    assert str(tmp_path / "air_diagnostics.jsonl") in error
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("text", ["{", '{"iteration": 1}', "[]", '{"iteration": 1, "layers": [{"layer": 1}]}'])
def test_a_damaged_snapshot_is_refused(tmp_path, text):
    write(tmp_path, lines(end=20))
    (tmp_path / "air_codebook.json").write_text(text)
    with pytest.raises(ValueError, match="air_codebook.json is no snapshot of codebooks"):
        read_run(tmp_path, "run")


def test_columns_of_a_snapshot_have_one_length(tmp_path):
    snapshot = codebook(num_clusters=8)
    snapshot["layers"][1]["load"].pop()
    with pytest.raises(ValueError, match="layer 2 differ in length"):
        read(tmp_path, lines(end=20), snapshot)


def test_a_folder_without_the_file_is_named_with_the_one_that_has_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; a run with diagnostics writes"):
        read_runs([tmp_path])
    write(tmp_path / "checkpoint", lines(end=20))
    with pytest.raises(FileNotFoundError, match="does not exist; .*/checkpoint has it"):
        read_runs([tmp_path])


def test_runs_are_named_by_what_their_paths_do_not_share(tmp_path):
    assert names_of([tmp_path / "a" / "checkpoint", tmp_path / "b" / "checkpoint"]) == ["a", "b"]
    assert names_of([tmp_path / "a", tmp_path / "b" / "c"]) == ["a", "b/c"]
    assert names_of([tmp_path, tmp_path / "b"]) == [str(tmp_path), str(tmp_path / "b")]
    assert names_of([tmp_path]) == [str(tmp_path)]


def test_too_many_runs_and_one_twice_are_refused(tmp_path):
    write(tmp_path, lines(end=20))
    with pytest.raises(ValueError, match="is given twice"):
        read_runs([tmp_path, tmp_path])
    with pytest.raises(ValueError, match="8 runs are given; colors tell 7 apart"):
        read_runs([tmp_path] * 8)


def test_made_up_files_have_the_form_of_the_loop(tmp_path):
    """A guard of the other tests: figures that the reader knows are those that the generator makes."""
    assert set(runs.METRICS) == set(run_files.OF_AIR) | set(run_files.OF_ALL)


def test_the_files_that_are_read_are_those_that_training_writes():
    """The names stand twice: the writer loads Megatron, which a report does not need."""
    from air_moe_megatron.diagnostics import files

    for name in ("FORMAT", "LINES", "SNAPSHOT"):
        assert getattr(runs, name) == getattr(files, name)
