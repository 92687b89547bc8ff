"""The roofline bound on numbers worked by hand, and every benchmark from its command line, at tiny sizes on CPU."""

import argparse
import csv
import dataclasses
import logging
import os
from pathlib import Path

import pytest
import torch

from air_moe_megatron.config import AIRSizes
from benchmarks import checks, layer, measure, peaks, roofline, tables, targets, timing
from benchmarks.arguments import BENCHMARKS
from benchmarks.models import Sizes
from benchmarks.roofline import Ceilings, Work

RESULTS = Path(__file__).resolve().parents[2] / "docs/results"
LOGGERS = ("benchmarks", "air_moe_megatron")
QUICK = ("--repetitions", "1", "--slow-repetitions", "1", "--warmup", "0")
BOUNDS = (
    *("bound_ms", "times_bound", "tokens_per_s"),
    *("gflops_per_s", "ceiling_gflops_per_s", "gbytes_per_s", "ceiling_gbytes_per_s"),
)
ORIGIN = ("device", "threads", "large_pages", "torch", "triton", "megatron_core", "commit", "repetitions", "dtype")
NAMES = {
    "router": ("--experts 256 --hidden 16 --tokens 64 --topk 8", 4),
    "growth": ("--experts 256 1024 --hidden 16 --tokens 64 --topk 8", 3),
    "scaling": ("--experts 256 4096 --dense-gib 0.0005 --hidden 16 --tokens 64 --topk 8", 4),
    "layer": ("--experts 1024 --stock-experts 256 --hidden 16 --tokens 64 --topk 8 --no-memory", 6),
    "refresh": ("--experts 256 --hidden 16 --tokens 64 --topk 8", 4),
    "diagnostics": ("--experts 256 --hidden 16 --tokens 64 --topk 8", 4),
    "train": ("--experts 256 --hidden 16 --tokens 64 --sequence 16 --topk 4", 6),
    "dispatch": ("--experts 64 --hidden 16 --tokens 64 --topk 8 --ranks 1", 1),
    "sharding": ("--experts 256 --hidden 16 --tokens 64 --topk 8 --ranks 1", 1),
}
CASES = {
    "router": [
        *(
            "TopKRouter.forward",
            "AIRRouter.route",
            "AIRRouter.route, one probe",
            "AIRRouter.route, whitened tokens",
            "AIRRouter.route, low-rank whitening",
        ),
        *("AIRRouter.forward", "ProductKeyRouter"),
        *("codebook update", "shortlist rebuild"),
    ],
    "growth": ["AIRRouter.route, E = 256", "AIRRouter.route, E = 1024"],
    "scaling": [
        *("AIRRouter.route", "ProductKeyRouter", "TopKRouter.forward"),
        *("AIRRouter.route", "ProductKeyRouter"),  # the dense maps are too large
    ],
    "layer": ["AIRMoELayer", "HierarchicalMoELayer", "PEERLayer", "AIRMoELayer, beside MoELayer", "MoELayer"],
    "refresh": [
        *("AIRMoELayer", "shortlist rebuild", "shortlist rebuild, in full"),
        *("codebook update", "codebook updates of 24 layers"),
    ],
    "diagnostics": ["AIRMoELayer", "AIRMoELayer, measured"],
    "train": ["GPT, AIRMoELayer", "GPT, MoELayer with TopKRouter", "shortlist rebuild, all layers"],
    "sharding": ["replicated", "sharded"],
    "dispatch": ["CompactTokenDispatcher", "MoEAlltoAllTokenDispatcher"],
}
FIGURES = {
    "router": "times_faster",
    "growth": "times_slower",
    "scaling": "times_ours",
    "layer": "times_ours",
    "refresh": "percent_of_step",
    "diagnostics": "percent_of_step",
    "train": "times_faster",
    "dispatch": "times_faster",
    "sharding": "times_faster",
}


def test_the_bound_takes_the_larger_of_arithmetic_and_bytes_in_each_phase():
    phases = {"forward": Work(100, 30), "backward": Work(20, 40)}
    ceilings = Ceilings(flops_per_s=10, bytes_per_s=2)
    assert roofline.bound(phases, ceilings) == {"forward": 15, "backward": 20, "total": 35}
    columns = roofline.bound_columns(phases, ceilings, seconds=70, tokens=140)
    assert columns == {
        "bound_forward_ms": 15_000,
        "bound_backward_ms": 20_000,
        "bound_ms": 35_000,
        "times_bound": 2,
        "tokens_per_s": 2,
        "gflops_per_s": round(120 / 70 / 1e9, 2),
        "ceiling_gflops_per_s": 0,
        "gbytes_per_s": 0,
        "ceiling_gbytes_per_s": 0,
    }
    without_phases = roofline.bound_columns({"total": Work(100, 30)}, ceilings, seconds=30, tokens=None)
    assert without_phases["times_bound"] == 2
    assert without_phases["bound_forward_ms"] == without_phases["tokens_per_s"] == ""


def test_work_of_routers():
    sizes = AIRSizes(num_experts=9, topk=1, num_clusters=4, shortlist_size=3, num_probes=1, num_candidates=2)
    air = roofline.air_route(2, 10, 1, sizes, num_live=2, num_used=1, element=4)
    assert air == {"forward": Work(280, 576), "backward": Work(160, 360)}
    # One list of 3 rows, 5 tokens with 2 candidates each: the list is read once.
    one_list = roofline.air_route(5, 10, 1, sizes, num_live=1, num_used=1, element=4)
    assert one_list["backward"] == Work(400, (2 * 5 + 3 + 1) * 40)
    # The sizes of the H200: 69 GFLOP; 67 MB of tokens, 4 MB of codewords, 268 MB of lists, 8 MB of routes.
    sizes = AIRSizes(65_536, 64, num_clusters=1024, shortlist_size=128, num_probes=8, num_candidates=256)
    large = roofline.air_route(16_384, 1024, 64, sizes, num_live=1024, num_used=65_536, element=2, prob_bytes=4)
    assert large["forward"].flops == pytest.approx(68.7e9, rel=0.01)
    assert large["forward"].bytes == pytest.approx(67.1e6 + 4.2e6 + 268.4e6 + 8.4e6, rel=0.01)
    assert large["backward"].bytes == pytest.approx(67.1e6 + 268.4e6 + 134.2e6, rel=0.01)
    # Forward 2 tokens and 5 centers of 40 bytes, maps of 10 numbers in 4 + 1 bytes; backward the gradient of the
    # probs, centers read and written.
    topk = roofline.topk_route(2, 10, num_experts=5, element=4)
    assert topk == {"forward": Work(200, 7 * 40 + 10 * 5), "backward": Work(400, 10 * 40 + 10 * 4)}
    # One head, keys of 3 numbers, 4 of each half: queries [10, 6], keys 24 numbers.
    keys = roofline.product_key_route(2, 10, 1, num_heads=1, num_keys=4, key_size=3, element=4)
    weights = (60 + 24) * 4
    assert keys == {"forward": Work(2 * 2 * 84, 2 * 40 + weights + 2 * 8), "backward": Work(4 * 2 * 84, 2 * weights)}


def test_no_committed_time_is_below_its_bound():
    below = [
        (path.name, row["case"], phase)
        for path in RESULTS.rglob("*.csv")
        for row in targets.read(path.parent, path.name)
        for phase in ("forward", "backward", "total")
        if row.get(f"{phase}_min_ms")
        and (bound := row.get("bound_ms" if phase == "total" else f"bound_{phase}_ms"))
        and float(row[f"{phase}_min_ms"]) < float(bound)
    ]
    assert below == []


def test_work_of_whitening():
    assert roofline.whitening(1200) == {"forward": Work(800), "backward": Work(400)}


def test_work_of_experts_counts_the_cheaper_order():
    one_row = roofline.experts(2, 10, 2, num_inputs=1, ffn=1, num_used=3, element=4)
    assert one_row == {"forward": Work(160, 480), "backward": Work(320, 560)}
    # Rows of 4 per expert: 16 in the order of the tokens, 4 + 3 * 4 = 16 in that of the experts; 2 used ones: 12.
    many_rows = roofline.experts(2, 10, 2, num_inputs=4, ffn=4, num_used=2, element=4)
    assert many_rows["forward"].bytes == 2 * 2 * 40 + 2 * 12 * 40


def test_work_of_the_rest():
    assert roofline.dispatch(3, 5, 10, 4)["backward"] == Work(0, 2 * 8 * 40)
    assert roofline.codebook_update(4, 10) == {"total": Work(0, 4 * 4 * 10 * 4)}
    assert roofline.rebuild(100, 10, 4, 3, 2) == {"total": Work(8000, 100 * 20 + 4 * (40 + 12))}
    assert roofline.adam(10) == {"optimizer": Work(0, 280)}
    assert roofline.transformer(2, 10, 3, 5, 7)["forward"].flops == 2 * (3 * (800 + 100) + 140)
    parts = {"forward": Work(1, 2)}, {"forward": Work(10, 20), "backward": Work(3, 4)}
    assert roofline.together(*parts) == {"forward": Work(11, 22), "backward": Work(3, 4)}


def test_ceilings_are_rates_of_this_machine():
    probe = roofline.CeilingProbe(torch.device("cpu"), torch.float32)
    measured = probe.ceilings(probe.matmul()["total"], probe.copy()["total"])
    assert 1e8 < measured.flops_per_s < 1e15 and 1e8 < measured.bytes_per_s < 1e14


@pytest.fixture(scope="module")
def main():
    """The command line's function, with what it changes in this process undone at the end."""
    from air_moe_megatron import cpu

    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    random_state = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # as run.py sets it
        from benchmarks.run import main

        try:
            yield main
        finally:
            cpu.disable()
            torch.set_rng_state(random_state)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_cpu_seconds_of_several_threads_have_no_rates():
    outcome = timing.Outcome(
        {"x": timing.Case(dict, {"total": Work(100, 0)}, 50)},
        {"x": {"total": measure.Timing([10.0])}},
        Ceilings(10, 1),
        torch.device("cpu"),
        ("total",),
    )
    row = outcome.row("x", {}, {}, by_clock=measure.is_by_clock(torch.device("cpu")))
    assert (row["times_bound"], row["tokens_per_s"], row["bound_ms"]) == (1.0, 5, 1e4)
    torch.set_num_threads(2)
    row = outcome.row("x", {}, {}, by_clock=measure.is_by_clock(torch.device("cpu")))
    assert {row[name] for name in ("times_bound", "tokens_per_s", "gflops_per_s", "gbytes_per_s")} == {""}
    assert (row["total_ms"], row["bound_ms"]) == (1e4, 1e4)


@pytest.mark.usefixtures("one_thread")
def test_cpu_seconds_of_more_ranks_than_cores_have_no_rates():
    cores = len(os.sched_getaffinity(0))
    assert measure.is_by_clock(torch.device("cpu"), cores)
    assert not measure.is_by_clock(torch.device("cpu"), cores + 1)
    assert measure.is_by_clock(torch.device("cuda"), cores + 1)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_checks_before_it_measures(main, name, tmp_path, caplog, capsys):
    flags, num_checks = NAMES[name]
    plot = ["--plot", str(tmp_path / "plot.png")] if name == "scaling" else []
    rows = main([name, *flags.split(), *QUICK, "--out", str(tmp_path / "rows.csv"), *plot])
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("benchmarks")]
    passed = [message.startswith("check passed") for message in messages]
    assert sum(passed) >= num_checks
    # No row is timed before its check: those of several sizes are checked one size after the other.
    assert passed.index(True) < messages.index("repetition 1 of 1 done")
    if name not in ("scaling", "layer"):
        assert not any(passed[messages.index("repetition 1 of 1 done") :])

    with (tmp_path / "rows.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["case"] for row in written] == [row["case"] for row in rows] == CASES[name]
    for row in written:
        assert set(BOUNDS + ORIGIN) <= set(row)
        for column in ("total_ms", "total_min_ms", "total_max_ms", *BOUNDS[:2], *BOUNDS[4::2]):
            assert float(row[column]) > 0, column
        assert row["large_pages"].endswith(", asked for")
        if row["forward_ms"]:
            assert float(row["tokens_per_s"]) > 0
            assert float(row["bound_ms"]) >= float(row["bound_forward_ms"]) + float(row["bound_backward_ms"]) - 1e-3
    assert any(row[FIGURES[name]] for row in written)
    assert (tmp_path / "plot.png").exists() == (name == "scaling")
    assert "times_bound" in capsys.readouterr().out


def test_recall_of_power_law_tokens(main, tmp_path, capsys):
    flags = "--experts 256 --hidden 16 --tokens 300 --topk 8 --updates 5".split()
    default, one_probe, flattened = main(["recall", *flags, "--out", str(tmp_path / "rows.csv")])
    assert (default["probes"], one_probe["probes"], flattened["probes"]) == (8, 1, 8)
    assert 0 < one_probe["topk_recall"] < default["topk_recall"] <= 1
    assert 0 < one_probe["mass_recall"] < default["mass_recall"] <= 1
    assert 0 < flattened["topk_recall"] < default["topk_recall"]
    assert "topk_recall" in capsys.readouterr().out and (tmp_path / "rows.csv").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("recall --hidden 500", "--hidden (500) must be a power of two"),
        ("layer --ffn 2", "--ffn (2) must be 1 for PEER, or add --no-baseline"),
        ("router --experts 250", "--experts (250) must be a square, for product keys"),
        ("kernels --experts 250", "--experts (250) must be a square, for product keys"),
        ("scaling --experts 256 250", "--experts (250) must be a square, for product keys"),
        ("train --tokens 100 --sequence 16", "--tokens (100) must be divisible by --sequence (16)"),
        ("dispatch --experts 33 --ranks 2", "--experts (33) must be divisible by --ranks (2)"),
        ("growth --repetitions 0", "argument --repetitions: '0' must be a whole number of at least 1"),
        ("router --tokens x", "argument --tokens: 'x' must be a whole number of at least 1"),
        ("router --probes -1", "argument --probes: '-1' must be a whole number of at least 0"),
    ],
)
def test_sizes_that_a_benchmark_cannot_have_are_refused_before_any_work(main, line, message, monkeypatch, capsys):
    for module in BENCHMARKS:
        monkeypatch.setattr(f"benchmarks.{module}.run", None)
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {message}")


def test_kernels_are_profiled_after_their_checks(main, caplog):
    rows = main(["kernels", *"--experts 256 --hidden 16 --tokens 64 --topk 8 --shown 1".split(), *QUICK])
    passed = [message for message in map(logging.LogRecord.getMessage, caplog.records) if "check passed" in message]
    assert len(passed) == 8  # router, three layers, lists and tokens of both AIR cases
    assert {row["case"].partition(":")[0] for row in rows} == {
        *("AIRRouter.route", "AIRMoELayer", "HierarchicalMoELayer", "PEERLayer")
    }


@pytest.fixture
def place(main):
    """The device and the process groups of a benchmark."""
    with measure.world() as found:
        yield found


def test_a_wrong_peer_layer_fails_its_check(place, monkeypatch):
    from benchmarks.peer import PEERLayer

    device, pg_collection = place
    checks.check_peer(pg_collection, device)
    right = PEERLayer.forward
    for wrong in (lambda self, x: right(self, x) * 1.01, lambda self, x: right(self, x.detach()) + 0 * x):
        monkeypatch.setattr(PEERLayer, "forward", wrong)
        with pytest.raises(AssertionError):
            checks.check_peer(pg_collection, device)


@pytest.mark.parametrize("kind", ["AIRRouter.route", "AIRMoELayer", "PEERLayer"])
def test_each_peak_is_measured_by_itself(kind, place, monkeypatch):
    """In one process only the first peak is reliable."""
    sizes, measured = Sizes(experts=256, hidden=16, tokens=64, topk=8), []

    def peak_memory(work, device):
        work()
        measured.append(device)
        return 3 * measure.MIB

    def measure_memory(measure, args, device, pg_collection):
        before = len(measured)
        peak = measure(*args, device, pg_collection)
        assert len(measured) == before + 1
        return peak

    monkeypatch.setattr(peaks, "peak_memory", peak_memory)
    monkeypatch.setattr(peaks, "measure_memory", measure_memory)
    has_lists = kind != "PEERLayer"
    expected = {"peak_mib": 3, "peak_with_rebuild_mib": 3 if has_lists else ""}
    assert peaks.peak_columns(kind, sizes, *place) == expected
    assert len(measured) == (2 if has_lists else 1)


def test_two_cases_of_a_group_have_two_names():
    args = argparse.Namespace(experts=256, hidden=16, tokens=64, topk=8, ffn=1, stock_experts=256, no_baseline=False)
    names = [name for _, kinds in layer._groups(args) for name in kinds]
    assert len(names) == len(set(names)) == 5


def test_recall_routes_only_the_tokens_that_it_measures(main, monkeypatch):
    from air_moe_megatron import AIRRouter

    routed, route = [], AIRRouter.route
    monkeypatch.setattr(AIRRouter, "route", lambda self, tokens: routed.append(len(tokens)) or route(self, tokens))
    main(["recall", *"--experts 256 --hidden 16 --tokens 300 --topk 8 --updates 1".split()])
    of_a_case = [300, *[64] * 16]  # one update, and the samples
    assert routed[-3 * len(of_a_case) :] == 3 * of_a_case


def test_dispatch_over_two_processes(main):
    ours, stock = main(["dispatch", *"--experts 64 --hidden 16 --tokens 64 --topk 8".split(), *QUICK])
    assert ours["ranks"] == stock["ranks"] == 2
    assert stock["row_bytes_per_token"] == 8 * 16 * 4  # K copies
    assert 16 * 4 <= ours["row_bytes_per_token"] <= 2 * 16 * 4  # one per rank that is wanted
    assert 0 < ours["forward_remote_mib"] <= ours["forward_mib"]


@pytest.mark.parametrize("name", ["router", "growth", "refresh", "train"])
def test_nothing_is_reported_of_a_router_that_is_wrong(main, name, tmp_path, monkeypatch):
    from air_moe_megatron import AIRRouter

    right = AIRRouter.route

    def wrong(self, *args, **kwargs):
        routes = right(self, *args, **kwargs)
        return dataclasses.replace(routes, probs=routes.probs * 1.01)

    monkeypatch.setattr(AIRRouter, "route", wrong)
    with pytest.raises(AssertionError):
        main([name, *NAMES[name][0].split(), *QUICK, "--out", str(tmp_path / "rows.csv")])
    assert not (tmp_path / "rows.csv").exists()


def test_targets_are_judged_from_rows_of_the_sizes_asked_for(tmp_path):
    def write(experts, times):
        row = {"case": "PEERLayer", "experts": experts, "hidden": 512, "tokens": 4096, "topk": 64}
        row |= {"times_ours": times, "device": "somewhere", "threads": 2, "commit": "0"}
        with (tmp_path / "layer.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            writer.writeheader()
            writer.writerow(row)

    layer = next(target for target in targets.TARGETS if target.file == "layer.csv")
    assert targets.judge(layer, "CPU", tmp_path) == ("", "")
    write(65_536, 8.5)
    assert targets.judge(layer, "CPU", tmp_path) == ("8.5 x", "yes")
    assert "| >= 2 x | 8.5 x | yes | >= 3 x |  |  |" in targets.table(tmp_path)
    assert "GPU: empty cells are filled by `make bench-gpu`" in targets.table(tmp_path)
    write(65_536, 1.2)
    assert targets.judge(layer, "CPU", tmp_path) == ("1.2 x", "NO")
    write(1024, 8.5)
    assert targets.judge(layer, "CPU", tmp_path) == ("", "")


def test_the_tables_of_the_results_are_those_of_their_rows():
    text = (RESULTS / "README.md").read_text()
    assert text.count("<!-- ") == len(tables._MARK.findall(text)) > 10
    assert tables.filled(text, RESULTS) == text


def test_a_table_is_made_of_the_rows_of_several_files(tmp_path):
    for number, file in enumerate(("train.csv", "train_large.csv")):
        cells = {"case": "GPT", "total_ms": 1234.56, "total_min_ms": 1000, "total_max_ms": 2000 + number}
        cells |= {"forward_ms": "", "backward_ms": 0.4, "times_faster": 2, "bound_ms": 3, "times_bound": 4.567}
        (tmp_path / file).write_text(",".join(cells) + "\n" + ",".join(map(str, cells.values())) + "\n")
    mark = "<!-- rows of train.csv train_large.csv -->\n\n"
    found = tables.filled(f"Before\n{mark}| old |\n|---|\n\n| other |\n", tmp_path)
    lines = found.removeprefix(f"Before\n{mark}").split("\n")
    assert lines[0].startswith("| | forward ms | backward ms | total ms (min - max) |") and lines[1] == "|---" * 7 + "|"
    assert lines[2] == "| `GPT` | | 0 | 1,235 (1,000 - 2,000) | 2.00 | 3.0 | 4.57 |"
    assert lines[3] == "| `GPT` | | 0 | 1,235 (1,000 - 2,001) | 2.00 | 3.0 | 4.57 |"
    assert lines[4:] == ["", "| other |", ""]
    with pytest.raises(ValueError, match="layer.csv has no rows"):
        tables.filled("<!-- rows of layer.csv -->\n\n| old |\n", tmp_path)


def test_tables_of_a_folder_without_a_page_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        tables.main([str(tmp_path)])
    assert stopped.value.code == 2 and "README.md" in capsys.readouterr().err.splitlines()[-1]


def test_the_commit_of_a_copy_is_the_one_it_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    assert measure.commit() == "unknown"
    monkeypatch.setenv("AIR_MOE_COMMIT", "of the copy")
    assert measure.commit() == "of the copy"
