"""The steps of `gpu.py`: what each runs in a process of its own, and how its result is judged.

``STEPS`` lists them, most important first: the tests, the benchmarks, the demo's losses, repeated steps.
"""

import contextlib
import csv
import hashlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks import ROOT

INTERRUPT_SECONDS = 20  # between the signal that asks a step to end and the one that ends it
_STOPPED = "stopped after"  # how a step ended at its limit
_DEMO = ROOT / "examples/pretrain_demo.sh"
_GOLDEN = ROOT / "tests/golden/losses.json"
_LOSS = re.compile(r"iteration +(\d+)/ .*?lm loss: ([0-9.E+-]+|nan|inf) ")

_SIZES = "--hidden 1024 --tokens 16384 --topk 64"
_MEDIUM = "--experts 16384 --hidden 1024 --tokens 16384 --topk 32"
_RUNS = "--warmup 3 --repetitions 20 --slow-repetitions 5"
_TINY = "--hidden 16 --tokens 64 --topk 8"
_TINY_LAYER = f"--stock-experts 256 {_TINY} --no-memory"
BENCHMARKS = {  # file of the rows -> benchmark and flags on a large GPU, the same in a dry run, seconds
    "router": (f"router {_SIZES}", f"router --experts 256 {_TINY}", 120),
    "router_medium": (f"router {_MEDIUM}", f"router --experts 576 {_TINY}", 60),
    "recall": (f"recall {_SIZES}", f"recall --experts 256 {_TINY} --updates 5", 60),
    "recall_medium": (f"recall {_MEDIUM}", f"recall --experts 576 {_TINY} --updates 5", 60),
    "layer": (f"layer {_SIZES} --stock-experts 65536", f"layer --experts 1024 {_TINY_LAYER}", 150),
    "train": ("train --hidden 1024 --tokens 8192 --sequence 1024", f"train --experts 256 {_TINY} --sequence 16", 180),
    "kernels": (f"kernels {_SIZES}", f"kernels --experts 256 {_TINY}", 90),
    "growth": (f"growth {_SIZES}", f"growth --experts 256 1024 {_TINY}", 180),
    "refresh": ("refresh --hidden 1024", f"refresh --experts 256 {_TINY}", 75),
    "scaling": (f"scaling {_SIZES} --dense-gib 5", f"scaling --experts 256 {_TINY}", 150),
    "dispatch": ("dispatch --hidden 1024 --tokens 8192", f"dispatch --experts 64 {_TINY}", 45),
}  # fmt: skip
"""Most important first. The sizes are those for which `targets.py` has targets on a GPU."""

_TINY_DEMO = (
    *"--num-layers 1 --hidden-size 32 --num-experts 256 --moe-router-topk 4 --seq-length 64".split(),
    *"--max-position-embeddings 256 --micro-batch-size 2 --global-batch-size 4 --train-iters 6".split(),
    *"--log-interval 2 --eval-iters 1 --lr-warmup-fraction 0.5".split(),
)
CURVES = {  # run on the CPU -> flags added to the demo's
    "fp32, seed 1234": (),
    "bf16, seed 1234": ("--bf16",),
    "fp32, seed 1": ("--seed", "1"),
    "fp32, seed 2": ("--seed", "2"),
}
TINY_CURVES = ("fp32, seed 1234", "fp32, seed 1")


@dataclass(frozen=True)
class Setup:
    """Where a run reads and writes.

    Attributes:
        out: folder of the results.
        scratch: folder of logs and temporary files.
        data: folder of the demo's data; created if missing.
        curves: file with the losses of the demo on a CPU.
        dry: whether to use tiny sizes on the CPU.
    """

    out: Path
    scratch: Path
    data: Path
    curves: Path
    dry: bool


@dataclass(frozen=True)
class Result:
    """Result of a step: whether it passed, a summary in one line, and its figures."""

    passed: bool
    detail: str
    figures: dict


@dataclass(frozen=True)
class Step:
    """A step: its description, its limit in seconds, and ``run``, which raises if it cannot give a result."""

    what: str
    seconds: int
    run: Callable[[Setup, int], Result]


# Processes.


def run_process(words: Sequence[str | Path], seconds: float, log: Path, environment: dict[str, str]) -> int | None:
    """Run a command, with its output on the screen and appended to a file.

    At the limit it is interrupted as by Ctrl-C, so that it can still write partial results. Soon after it is killed.

    Returns:
        its exit status; None if it was stopped at the limit.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            list(map(str, words)), cwd=ROOT, env=environment, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        copier = threading.Thread(target=_copy, args=(process.stdout, file), daemon=True)
        copier.start()
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            for signal_number in (signal.SIGINT, signal.SIGKILL):
                if process.poll() is None:
                    os.killpg(process.pid, signal_number)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(INTERRUPT_SECONDS)
            copier.join(5)


def _copy(stream, file) -> None:
    for chunk in iter(lambda: stream.read1(65536), b""):
        file.write(chunk)
        file.flush()
        sys.stdout.buffer.write(chunk)
        sys.stdout.flush()


def _python(
    setup: Setup, words: Sequence[str | Path], seconds: float, log: str, variables: dict[str, str] | None = None
) -> str:
    """Run a Python of this environment on this tree's sources; returns how it ended, empty if well."""
    return _command(setup, [sys.executable, "-W", "ignore", *words], seconds, log, variables)


def _command(
    setup: Setup, words: Sequence[str | Path], seconds: float, log: str, variables: dict[str, str] | None = None
) -> str:
    status = run_process(words, seconds, setup.scratch / f"{log}.log", variables_of(setup.dry) | (variables or {}))
    if status is None:
        return f"{_STOPPED} {seconds:.0f} s"
    return f"exit status {status}" if status else ""


def variables_of(dry: bool) -> dict[str, str]:
    """The environment variables of a step: this tree's sources come first, and a dry run sees no GPU."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if dry else {}
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **hidden}


# Steps.


def run_tests(setup: Setup, seconds: int) -> Result:
    """Run the tests marked gpu, or in a dry run a few others, in several processes if pytest-xdist is installed.

    Compiling the kernels takes most of the time.
    """
    report = setup.scratch / "tests.xml"
    report.unlink(missing_ok=True)
    chosen = ("tests/ops/test_tiles.py", "-m", "not gpu") if setup.dry else ("-m", "gpu")
    parallel = ("-n", "auto", "--maxprocesses", "8", "--dist", "loadgroup") if find_spec("xdist") else ()
    words = ("-m", "pytest", "--durations", "10", "--junitxml", report, *parallel, *chosen)
    return read_tests(report, _python(setup, words, seconds, "tests"))


def read_tests(report: Path, ending: str) -> Result:
    """Count the tests of a JUnit file. The step passes if a test passed, none failed and the run was complete."""
    figures, failed = {"passed": 0, "failed": 0, "skipped": 0}, []
    if report.exists():
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
            if "name" not in case.attrib:  # its process was stopped during a test
                continue
            faults = [*case.iter("failure"), *case.iter("error")]
            kind = "failed" if faults else "skipped" if case.find("skipped") is not None else "passed"
            figures[kind] += 1
            if faults:
                file = f"{case.get('classname', '').replace('.', '/')}.py"
                message = faults[0].get("message", "").replace(str(ROOT), ".")[:400]
                failed.append({"test": f"{file}::{case.get('name')}", "message": message})
    detail = ", ".join(f"{number} {kind}" for kind, number in figures.items())
    passed = not ending and figures["passed"] > 0 and not failed
    return Result(passed, f"{detail}; {ending}" if ending else detail, figures | {"failures": failed})


def run_benchmark(name: str) -> Callable[[Setup, int], Result]:
    """A step that writes the rows of a benchmark as NAME.csv."""

    def run(setup: Setup, seconds: int) -> Result:
        rows = setup.out / f"{name}.csv"
        rows.unlink(missing_ok=True)
        large, tiny, _ = BENCHMARKS[name]
        runs = "--warmup 0 --repetitions 1 --slow-repetitions 1" if setup.dry else _RUNS
        plot = f"--plot {setup.out}/route_time.png" if name == "scaling" else ""
        words = ("-m", "benchmarks.run", *f"{tiny if setup.dry else large} {runs} {plot}".split(), "--out", rows)
        return read_rows(rows, _python(setup, words, seconds, name))

    return run


def read_rows(path: Path, ending: str) -> Result:
    """The median time or the recall of each row of a benchmark, with E where a case has several rows."""
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    cases, figures = [row["case"] for row in rows], []
    for row in rows:
        size = "" if cases.count(row["case"]) == 1 else f", E = {row['experts']}"
        figure = f"{float(row['total_ms']):.4g} ms" if "total_ms" in row else f"recall {row['topk_recall']}"
        figures.append(f"{row['case']}{size} {figure}")
    return Result(bool(rows) and not ending, "; ".join(filter(None, (*figures, ending))), {"rows": len(rows)})


def run_curve(setup: Setup, seconds: int) -> Result:
    """Train the demo in bf16, and compare its losses with those on a CPU."""
    if setup.dry:
        make_curves(setup, TINY_CURVES, seconds)
    losses, ending = _train(setup, ("--bf16",), seconds, "curve")
    return compare_curves(losses, demo_key(), json.loads(setup.curves.read_text()), ending)


def _train(
    setup: Setup, flags: Sequence[str], seconds: float, log: str, on_cpu: bool = False
) -> tuple[dict[str, float], str]:
    """Train the demo; returns its losses by step, and how it ended."""
    out = setup.scratch / "demo"
    (out / "train.log").unlink(missing_ok=True)
    if not (setup.data / "stdlib_test.idx").exists():
        ending = _python(setup, ("examples/prepare_stdlib.py", "--out", setup.data), seconds, log)
        if ending:
            return {}, f"the data: {ending}"
    variables = {"PYTHON": sys.executable, "DATA": str(setup.data.resolve()), "OUT": str(out.resolve())}
    if on_cpu:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    tiny = _TINY_DEMO if setup.dry else ()
    ending = _command(setup, ["bash", _DEMO, *tiny, *flags], seconds, log, variables)
    text = (out / "train.log").read_text() if (out / "train.log").exists() else ""
    return {step: float(loss) for step, loss in _LOSS.findall(text)}, ending


def demo_key() -> dict[str, str]:
    """Hashes of what the demo's losses depend on: its flags, and the golden losses of AIR as the demo uses it.

    Flags of the demo's output (logs, checkpoints, diagnostics) do not change a loss and are left out.
    """
    golden = json.loads(_GOLDEN.read_text())
    of_air = [golden[name] for name in ("air", "air-several-probes")]
    flags, _, _ = _DEMO.read_text().partition("\nOUTPUT=(")
    texts = {"examples/pretrain_demo.sh": flags, "tests/golden/losses.json": json.dumps(of_air)}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in texts.items()}


def make_curves(setup: Setup, names: Sequence[str], seconds: float) -> None:
    """Train the demo on the CPU, once for each of the names, and write the losses to ``setup.curves``."""
    from benchmarks.measure import commit

    curves = {}
    for name in names:
        curves[name], ending = _train(setup, CURVES[name], seconds, "curves", on_cpu=True)
        if ending:
            raise RuntimeError(f"the demo on the CPU ({name}): {ending}")
    setup.curves.parent.mkdir(parents=True, exist_ok=True)
    reference = {"commit": commit(), "python": sys.version.split()[0], "made_for": demo_key(), "curves": curves}
    setup.curves.write_text(json.dumps(reference, indent=1) + "\n")


def run_determinism(setup: Setup, seconds: int) -> Result:
    """Hashes of forty repeats of a training step in deterministic mode."""
    file = setup.scratch / "hashes.json"
    file.unlink(missing_ok=True)
    tiny = ("--experts", "256", *_TINY.split(), "--sequence", "16", "--repeats", "3") if setup.dry else ()
    ending = _python(setup, ("-m", "benchmarks.determinism", *tiny, "--out", file), seconds, "determinism")
    return compare_hashes(json.loads(file.read_text()) if file.exists() else [], ending)


def compare_hashes(hashes: Sequence[str], ending: str = "") -> Result:
    """The step passes if there are several hashes and all are equal."""
    counts = {digest: hashes.count(digest) for digest in dict.fromkeys(hashes)}
    detail = f"{len(hashes)} repeats, {len(counts)} hash{'' if len(counts) == 1 else 'es'}"
    passed = not ending and len(hashes) > 1 and len(counts) == 1
    return Result(passed, f"{detail}; {ending}" if ending else detail, {"repeats_of_hash": counts})


def expect(curves: dict[str, dict[str, float]]) -> tuple[dict[str, float], float]:
    """The losses expected of one more seed: the mean over the fp32 runs at each step, and the width of the band.

    With the same seed, a GPU starts from other random weights than a CPU, so its run counts as one more seed. The band
    is four standard deviations of its distance from the mean of n runs: ``4 * sqrt(variance * (1 + 1 / n))``. The
    variance is that of the n losses at one step, averaged over the steps.

    Example: losses 3.0 and 3.2 at one step and 2.0 and 2.0 at another have means 3.1 and 2.0, variances 0.02 and 0, and
    the band 4 * sqrt(0.01 * 1.5).
    """
    seeds = [losses for name, losses in curves.items() if name.startswith("fp32")]
    at_steps = {step: [losses[step] for losses in seeds] for step in seeds[0]}
    variance = statistics.fmean(map(statistics.variance, at_steps.values()))
    means = {step: round(statistics.fmean(losses), 6) for step, losses in at_steps.items()}
    return means, 4 * math.sqrt(variance * (1 + 1 / len(seeds)))


def compare_curves(losses: dict[str, float], made_for: dict[str, str], reference: dict, ending: str = "") -> Result:
    """The step passes if every loss is within the band around the mean of the fp32 runs on a CPU.

    A run that was stopped at its limit passes too: with all losses, only what follows the training is missing.

    Args:
        losses: losses of the demo on the GPU, by step.
        made_for: the ``demo_key`` of that run. A reference with another key is refused.
        reference: as ``make_curves`` writes it.
        ending: how the run ended, empty if well.
    """
    expected, width = expect(reference["curves"])
    figures = {"losses": losses, "made_for": made_for, "cpu": expected, "band": round(width, 4)}
    figures["cpu_commit"] = reference["commit"]
    how = f"; {ending}" if ending else ""
    if ending:
        figures["ending"] = ending
    if losses.keys() != expected.keys():
        return Result(False, f"losses at steps {', '.join(losses)}, not {', '.join(expected)}{how}", figures)
    distances = {step: abs(losses[step] - expected[step]) for step in expected}
    outside = [step for step, distance in distances.items() if not distance <= width]  # NaN is outside
    worst = max(distances, key=lambda step: math.inf if math.isnan(distances[step]) else distances[step])
    detail = f"at most {distances[worst]:.4f} nats off (step {worst}), band {width:.4f}"
    if outside:
        detail += f"; outside at steps {', '.join(outside)}"
    stale = [name for name, key in made_for.items() if reference["made_for"].get(name) != key]
    if stale:
        detail += f"; the CPU's losses are of another {' and '.join(stale)}: make gpu-curves"
    is_complete = not ending or ending.startswith(_STOPPED)
    return Result(is_complete and not outside and not stale, detail + how, figures)


STEPS = {
    "tests": Step("tests marked `gpu`", 300, run_tests),
    **{name: Step(f"benchmark `{name}`", seconds, run_benchmark(name)) for name, (_, _, seconds) in BENCHMARKS.items()},
    "curve": Step("losses of the demo in bf16 against fp32 on a CPU", 180, run_curve),
    "determinism": Step("loss and gradients of repeated steps, `--deterministic-mode`", 90, run_determinism),
}
"""All steps, in their order. The limits add up to 29 minutes."""
