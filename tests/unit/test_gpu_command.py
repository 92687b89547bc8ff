"""`make gpu`: what passes, what fails, that a failure stops nothing; and the whole command in a dry run on the CPU."""

import csv
import dataclasses
import json
import math
import os
import signal
import sys
import time

import pytest
import torch

from benchmarks import determinism, gpu, gpu_steps
from benchmarks.gpu_steps import Result, Setup, Step
from tests.processes import run

ORIGIN = {"commit": "c", "sources": "s", "device": "d"}
WELL = Result(True, "well", {"number": 1})


def reference(**curves):
    """A reference of two seeds 0.2 apart at the first of two steps, made for today's demo."""
    seeds = {"fp32, seed 1234": {"1": 3.0, "2": 2.0}, "fp32, seed 1": {"1": 3.2, "2": 2.0}}
    return {"commit": "c", "made_for": gpu_steps.demo_key(), "curves": seeds | curves}


@pytest.fixture
def setup(tmp_path):
    return Setup(tmp_path, tmp_path / "scratch", tmp_path / "data", tmp_path / "cpu_curves.json", dry=True)


# The comparisons.


def test_the_band_is_four_deviations_of_one_more_seed_from_the_mean():
    means, band = gpu_steps.expect(reference()["curves"])
    assert means == {"1": 3.1, "2": 2.0} and band == pytest.approx(4 * math.sqrt(0.01 * 1.5))
    bf16 = {"bf16, seed 1234": {"1": 9.0, "2": 9.0}}  # is no seed of fp32
    assert gpu_steps.expect(reference(**bf16)["curves"]) == (means, band)


@pytest.mark.parametrize(
    ("losses", "passed", "word"),
    [
        ({"1": 3.5, "2": 2.48}, True, "at most 0.4800 nats off (step 2), band 0.4899"),
        ({"1": 3.5, "2": 1.5}, False, "at most 0.5000 nats off (step 2), band 0.4899; outside at steps 2"),
        ({"1": 3.0, "2": math.nan}, False, "outside at steps 2"),
        ({"1": math.inf, "2": 2.0}, False, "outside at steps 1"),
        ({"1": 3.0}, False, "losses at steps 1, not 1, 2"),
        ({}, False, "losses at steps"),
    ],
    ids=("within", "outside", "nan", "infinite", "too-short", "none"),
)
def test_a_curve_is_compared_at_every_step(losses, passed, word):
    result = gpu_steps.compare_curves(losses, gpu_steps.demo_key(), reference())
    assert result.passed is passed and word in result.detail
    assert result.figures["losses"] == losses


@pytest.mark.parametrize(
    ("losses", "ending", "passed"),
    [
        ({"1": 3.0, "2": 2.0}, "stopped after 90 s", True),
        ({"1": 3.0}, "stopped after 90 s", False),
        ({"1": 9.0, "2": 2.0}, "stopped after 90 s", False),
        ({"1": 3.0, "2": 2.0}, "exit status 1", False),
        ({}, "the data: exit status 1", False),
    ],
    ids=("complete", "too-short", "outside", "failed", "no-data"),
)
def test_a_curve_of_a_run_that_was_stopped_passes_if_it_is_complete(losses, ending, passed, setup, monkeypatch):
    setup.curves.write_text(json.dumps(reference()))
    monkeypatch.setattr(gpu_steps, "_train", lambda *_: (losses, ending))
    result = gpu_steps.run_curve(dataclasses.replace(setup, dry=False), 90)
    assert result.passed is passed and result.detail.endswith(f"; {ending}") and result.figures["ending"] == ending


def test_the_page_says_of_huge_pages_what_the_rows_say(monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    assert gpu.environment(dry=True)["large_pages"].endswith(", asked for")


def test_curves_of_another_demo_are_not_compared_with():
    old = reference() | {"made_for": {**gpu_steps.demo_key(), "tests/golden/losses.json": "0"}}
    result = gpu_steps.compare_curves({"1": 3.0, "2": 2.0}, gpu_steps.demo_key(), old)
    assert not result.passed and "of another tests/golden/losses.json: make gpu-curves" in result.detail


def test_a_new_reference_is_compared_with_the_losses_that_are_there(setup):
    def curve(name, seconds):
        return gpu_steps.compare_curves({"1": 3.0, "2": 2.0}, gpu_steps.demo_key(), reference() | {"made_for": {}})

    gpu.compare_again(setup)  # nothing is there
    gpu.run_steps({"curve": Step("", 60, curve)}, setup, {}, ORIGIN, 600)
    (setup.out / "environment.json").write_text("{}")
    setup.curves.write_text(json.dumps(reference()))
    before = gpu.read_record(setup.out / "curve.json")
    gpu.compare_again(setup)
    after = gpu.read_record(setup.out / "curve.json")
    assert not before["passed"] and after["passed"] and after["origin"] == ORIGIN
    assert "| yes | c |" in (setup.out / "README.md").read_text()


def test_the_committed_curves_hold_bf16_on_a_cpu_within_their_band():
    committed = json.loads((gpu.ROOT / "docs/results/gpu/cpu_curves.json").read_text())
    curves = committed["curves"]
    assert curves.keys() == gpu_steps.CURVES.keys()
    assert all(list(losses) == ["1", *map(str, range(20, 201, 20))] for losses in curves.values())
    assert all(losses["200"] < losses["20"] - 1 for losses in curves.values())
    result = gpu_steps.compare_curves(curves["bf16, seed 1234"], committed["made_for"], committed)
    assert result.passed, result.detail
    assert 0 < gpu_steps.expect(curves)[1] < 0.4


@pytest.mark.parametrize(
    ("hashes", "ending", "passed"),
    [
        (["a", "a", "a"], "", True),
        (["a", "a", "b"], "", False),
        (["a"], "", False),
        ([], "", False),
        (["a", "a"], "exit status 1", False),
    ],
    ids=("one", "two", "no-repeat", "none", "failed"),
)
def test_repeats_must_have_one_hash(hashes, ending, passed):
    assert gpu_steps.compare_hashes(hashes, ending).passed is passed


def test_a_hash_sees_every_bit():
    values = torch.arange(6.0).reshape(2, 3)
    changed = values.clone()
    changed.view(torch.int32)[1, 2] ^= 1
    assert determinism.digest([values, values[:, 0]]) == determinism.digest([values.clone(), values[:, 0]])
    assert determinism.digest([values]) != determinism.digest([changed])
    assert determinism.digest([torch.zeros(1)]) != determinism.digest([-torch.zeros(1)])


def test_tests_are_counted_from_pytests_own_report(tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('no device')\n"
        "def test_broken(broken): pass\n"
        "def test_skipped(): pytest.skip('no GPU')\n"
    )
    report = tmp_path / "tests.xml"

    def counted(*flags):
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", report, *flags]
        return gpu_steps.read_tests(
            report, f"exit status {run(words, cwd=tmp_path).returncode}".replace("exit status 0", "")
        )

    result = counted()
    assert not result.passed and result.detail == "1 passed, 2 failed, 1 skipped; exit status 1"
    wrong, broken = result.figures["failures"]
    assert wrong["test"] == "test_three.py::test_wrong" and "assert 1 == 2" in wrong["message"]
    assert "no device" in broken["message"]
    assert counted("-k", "right or skipped").passed
    assert not counted("-k", "skipped").passed  # nothing was tested
    # Of a process that was stopped in a test the file has a case without a name.
    cases = '<testcase classname="test_three" name="test_right" /><testcase time="0.1" />'
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert gpu_steps.read_tests(report, "").detail == "1 passed, 0 failed, 0 skipped"
    report.unlink()
    assert not gpu_steps.read_tests(report, "stopped after 1 s").passed


def test_rows_of_a_benchmark_that_ended_badly_do_not_pass(tmp_path):
    rows = tmp_path / "router.csv"
    assert not gpu_steps.read_rows(rows, "").passed
    rows.write_text("case,total_ms\nAIRRouter.route,1.5\n")
    assert gpu_steps.read_rows(rows, "") == Result(True, "AIRRouter.route 1.5 ms", {"rows": 1})
    assert not gpu_steps.read_rows(rows, "stopped after 60 s").passed
    rows.write_text("case,experts,total_ms\na,4,1\na,8,2\nb,8,3\n")
    assert gpu_steps.read_rows(rows, "").detail == "a, E = 4 1 ms; a, E = 8 2 ms; b 3 ms"
    rows.write_text("case,topk_recall\nAIRRouter,0.61\n")
    assert gpu_steps.read_rows(rows, "").detail == "AIRRouter recall 0.61"


# A run.


def steps_of(calls, **results):
    """Steps that note their names in ``calls``; a result that is an exception is raised."""

    def step(name, result):
        def run(setup, seconds):
            calls.append(name)
            if isinstance(result, Exception):
                raise result
            return result

        return Step(f"step {name}", 60, run)

    return {name: step(name, result) for name, result in results.items()}


def test_a_step_that_fails_stops_no_other(setup):
    calls = []
    wrong = Result(False, "wrong", {})
    steps = steps_of(calls, tests=wrong, router=OSError("no such file"), curve=WELL)
    records = gpu.run_steps(steps, setup, {}, ORIGIN, 600)
    assert calls == ["tests", "router", "curve"]
    assert [record["passed"] for record in records.values()] == [False, False, True]
    for name, record in records.items():
        assert json.loads((setup.out / f"{name}.json").read_text()) == record
        assert record["origin"] == ORIGIN
    assert records["router"]["detail"] == "OSError: no such file"
    table = (setup.out / "README.md").read_text()
    assert "| tests marked `gpu` | wrong | 0 | NO | c |" in table
    assert "| benchmark `layer` | not run |" in table


def test_a_result_of_the_same_sources_on_the_same_device_is_kept(setup):
    calls = []
    steps = steps_of(calls, tests=WELL, curve=Result(False, "outside", {}))
    first = gpu.run_steps(steps, setup, {}, ORIGIN, 600)
    assert gpu.run_steps(steps, setup, {}, ORIGIN | {"commit": "with the results"}, 600) == first
    assert calls == ["tests", "curve"]
    for origin, again in ((ORIGIN | {"sources": "t"}, False), (ORIGIN | {"device": "e"}, False), (ORIGIN, True)):
        calls.clear()
        gpu.run_steps(steps, setup, {}, origin, 600, again)
        assert calls == ["tests", "curve"]


def test_a_step_that_was_stopped_at_its_limit_is_repeated(setup):
    record = {"passed": False, "seconds": 60.1, "limit": 60, "origin": ORIGIN}
    assert not gpu.is_kept(record, ORIGIN)
    assert gpu.is_kept(record | {"seconds": 59.9}, ORIGIN) and gpu.is_kept(record | {"passed": True}, ORIGIN)


def test_a_step_that_no_longer_fits_is_left_for_the_next_run(setup, capsys):
    calls = []
    steps = steps_of(calls, tests=WELL, curve=WELL)
    assert gpu.run_steps(steps, setup, {}, ORIGIN, 20) == {} and not calls
    assert capsys.readouterr().out.count("no time left") == 2
    assert not (setup.out / "tests.json").exists()


def test_a_process_is_interrupted_at_its_limit_and_its_output_is_kept(tmp_path):
    code = (
        "import time\n"
        "try:\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(600)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', flush=True)\n"
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as main does
    try:
        start = time.monotonic()
        assert gpu_steps.run_process([sys.executable, "-c", code], 2, tmp_path / "log", dict(os.environ)) is None
        assert time.monotonic() - start < 300
        assert (tmp_path / "log").read_text() == "begun\ninterrupted\n"
        assert gpu_steps.run_process([sys.executable, "-c", "raise SystemExit(3)"], 600, tmp_path / "log", {}) == 3
    finally:
        signal.signal(signal.SIGINT, before)


def test_steps_are_chosen_by_name_and_keep_their_order():
    assert list(gpu.chosen_steps([])) == ["tests", *gpu_steps.BENCHMARKS, "curve", "determinism"]
    assert list(gpu.chosen_steps(["curve", "bench"])) == [*gpu_steps.BENCHMARKS, "curve"]
    with pytest.raises(ValueError, match="no step is named benches; the names are tests, "):
        gpu.chosen_steps(["benches"])


def test_all_limits_together_fit_in_30_minutes():
    assert sum(step.seconds for step in gpu_steps.STEPS.values()) <= 29 * 60


def test_without_a_gpu_one_line_says_so():
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(gpu.ROOT)}
    result = run(words, env=environment)
    assert result.returncode == 1 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("gpu.py: no CUDA GPU is visible") and "make gpu DRY=1" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [["router", "determinism"], pytest.param(list(gpu_steps.STEPS), marks=pytest.mark.long)],
    ids=["two-steps", "all-steps"],
)
def test_a_dry_run_goes_through_its_steps_and_then_keeps_them(tmp_path, chosen):
    out = tmp_path / "results"
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--dry", "--out", out, "--minutes", "900"]
    words += ["--data", tmp_path / "data", *chosen]
    environment = {**os.environ, "PYTHONPATH": str(gpu.ROOT)}
    result = run(words, env=environment)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    records = {name: json.loads((out / f"{name}.json").read_text()) for name in chosen}
    assert all(record["passed"] for record in records.values())
    for name in gpu_steps.BENCHMARKS.keys() & records.keys():
        with (out / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == records[name]["figures"]["rows"] > 0
        assert all(float(row.get("total_ms", row.get("topk_recall"))) > 0 for row in rows)
    ((digest, repeats),) = records["determinism"]["figures"]["repeats_of_hash"].items()
    assert len(digest) == 64 and repeats == 3
    if "curve" in chosen:
        assert records["tests"]["figures"]["passed"] > 0
        assert (out / "route_time.png").exists()
        curves = json.loads((out / "cpu_curves.json").read_text())["curves"]
        losses = records["curve"]["figures"]["losses"]
        assert list(losses) == ["1", "2", "4", "6"] and curves.keys() == set(gpu_steps.TINY_CURVES)
        assert losses not in curves.values()  # bf16 was trained, not fp32 again
    facts = json.loads((out / "environment.json").read_text())
    assert facts["gpus"] == 0 and {"device", "torch", "triton", "megatron_core", "commit", "python"} <= facts.keys()
    table = (out / "README.md").read_text()
    assert table.count("| yes |") == len(chosen) and "Nothing here was measured on a GPU" in table
    assert str(tmp_path) not in table
    kept = run(words, env=environment)
    assert kept.returncode == 0 and kept.stdout.count(": kept, passed") == len(chosen)
