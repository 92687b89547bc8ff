"""All that needs a GPU, in one command: `python benchmarks/gpu.py [STEP ...]`, or `make gpu`.

Steps run in the order of the list below, most important first, each in a process and with a time limit of its own. Each
writes its result as soon as it has ended, STEP.json in the results' folder, whatever the others do. A step whose result
is there for these very sources on this device is not repeated, unless `--again` is given. README.md in that folder
sums up. The exit status is 1 if any chosen step failed.

With `--dry` all steps run on the CPU at tiny sizes, into out/gpu-dry: a test of this command itself.

`python benchmarks/gpu.py --curves` makes the losses on the CPU with which the demo's on a GPU are compared.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import targets  # noqa: E402

_INTERRUPT_SECONDS = 20  # between the signal that asks a step to end and the one that ends it
_SHORTEST_SECONDS = 30  # a step does not start with less
_DRY_SECONDS = 1200  # for a step of a dry run, on a CPU that may have other work: it ends a hang
_EXPLAINED = "../../performance.md#one-command-on-a-gpu"
_DEMO = ROOT / "examples/pretrain_demo.sh"
_GOLDEN = ROOT / "tests/golden/losses.json"
_LOSS = re.compile(r"iteration +(\d+)/ .*?lm loss: ([0-9.E+-]+|nan|inf) ")

_SIZES = "--hidden 1024 --tokens 16384 --topk 64"
_MEDIUM = "--experts 16384 --hidden 1024 --tokens 16384 --topk 32"
_RUNS = "--warmup 3 --repetitions 20 --slow-repetitions 10"
_TINY = "--hidden 16 --tokens 64 --topk 8"
_TINY_LAYER = f"--stock-experts 256 {_TINY} --no-memory"
BENCHMARKS = {  # file of the rows -> benchmark and flags on a large GPU, the same in a dry run, seconds
    "router": (f"router {_SIZES}", f"router --experts 256 {_TINY}", 120),
    "router_medium": (f"router {_MEDIUM}", f"router --experts 576 {_TINY}", 60),
    "recall": (f"recall {_SIZES}", f"recall --experts 256 {_TINY} --updates 5", 60),
    "recall_medium": (f"recall {_MEDIUM}", f"recall --experts 576 {_TINY} --updates 5", 30),
    "layer": (f"layer {_SIZES} --stock-experts 65536", f"layer --experts 1024 {_TINY_LAYER}", 120),
    "train": ("train --hidden 1024 --tokens 8192 --sequence 1024", f"train --experts 256 {_TINY} --sequence 16", 90),
    "growth": (f"growth {_SIZES}", f"growth --experts 256 1024 {_TINY}", 75),
    "refresh": ("refresh --hidden 1024", f"refresh --experts 256 {_TINY}", 45),
    "scaling": (f"scaling {_SIZES} --dense-gib 5", f"scaling --experts 256 {_TINY}", 75),
    "dispatch": ("dispatch --hidden 1024 --tokens 8192", f"dispatch --experts 64 {_TINY}", 45),
}  # fmt: skip
"""In the order of importance. The sizes are those that `targets.py` asks of a GPU."""

_TINY_DEMO = (
    *"--num-layers 1 --hidden-size 32 --num-experts 256 --moe-router-topk 4 --seq-length 64".split(),
    *"--max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 4 --train-iters 6".split(),
    *"--log-interval 2 --eval-iters 1 --lr-warmup-fraction 0.5".split(),
)
CURVES = {  # of the CPU -> flags added to the demo's
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
        scratch: folder of logs and of what is not kept.
        data: folder of the demo's data; made where it is missing.
        curves: file with the losses of the demo on a CPU.
        dry: tiny sizes on the CPU.
    """

    out: Path
    scratch: Path
    data: Path
    curves: Path
    dry: bool


@dataclass(frozen=True)
class Result:
    """What a step found: whether it passed, one line on it, and its figures."""

    passed: bool
    detail: str
    figures: dict


@dataclass(frozen=True)
class Step:
    """Something to be run: what it is, its limit in seconds, and how. ``run`` raises where it cannot give a result."""

    what: str
    seconds: int
    run: Callable[[Setup, int], Result]


# Processes.


def run_process(words: Sequence[str | Path], seconds: float, log: Path, environment: dict[str, str]) -> int | None:
    """Run a command, its output on the screen and at the end of a file.

    At the limit it is interrupted, as by Ctrl-C, so that it can still write what it has; soon after it is ended.

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
                        process.wait(_INTERRUPT_SECONDS)
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
    status = run_process(words, seconds, setup.scratch / f"{log}.log", _variables(setup.dry) | (variables or {}))
    if status is None:
        return f"stopped after {seconds:.0f} s"
    return f"exit status {status}" if status else ""


def _variables(dry: bool) -> dict[str, str]:
    """The environment of a step: this tree's sources come first, and a dry run sees no GPU."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if dry else {}
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **hidden}


# Steps.


def run_tests(setup: Setup, seconds: int) -> Result:
    """The tests marked gpu; in a dry run a few that are not."""
    report = setup.scratch / "tests.xml"
    report.unlink(missing_ok=True)
    chosen = ("tests/ops/test_tiles.py", "-m", "not gpu") if setup.dry else ("-m", "gpu")
    words = ("-m", "pytest", "--durations", "10", "--junitxml", report, *chosen)
    return read_tests(report, _python(setup, words, seconds, "tests"))


def read_tests(report: Path, ending: str) -> Result:
    """Count the tests of a JUnit file. It passes if some test passed, none failed and the run came to its end."""
    figures, failed = {"passed": 0, "failed": 0, "skipped": 0}, []
    if report.exists():
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
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
        words = ("benchmarks/run.py", *f"{tiny if setup.dry else large} {runs} {plot}".split(), "--out", rows)
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
    """The demo in bf16: its losses beside those of the CPU."""
    if setup.dry:
        make_curves(setup, TINY_CURVES, seconds)
    losses, ending = _train(setup, ("--bf16",), seconds, "curve")
    if ending:
        return Result(False, ending, {"losses": losses})
    return compare_curves(losses, demo_key(), json.loads(setup.curves.read_text()))


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
    """Hashes that change with what the demo's losses depend on: its flags, and the losses of AIR routers."""
    golden = json.loads(_GOLDEN.read_text())
    of_air = [losses for name, losses in golden.items() if name.startswith("air")]
    texts = {"examples/pretrain_demo.sh": _DEMO.read_text(), "tests/golden/losses.json": json.dumps(of_air)}
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


def compare_again(setup: Setup) -> None:
    """Compare the losses that stand in the results' folder, if any, with a reference that is new."""
    record = read_record(setup.out / "curve.json")
    if record is not None and "made_for" in record["figures"]:
        figures = record["figures"]
        result = compare_curves(figures["losses"], figures["made_for"], json.loads(setup.curves.read_text()))
        write_record(setup, "curve", record | vars(result), json.loads((setup.out / "environment.json").read_text()))


def run_determinism(setup: Setup, seconds: int) -> Result:
    """Hashes of forty repeats of a training step in deterministic mode."""
    file = setup.scratch / "hashes.json"
    file.unlink(missing_ok=True)
    tiny = ("--experts", "256", *_TINY.split(), "--sequence", "16", "--repeats", "3") if setup.dry else ()
    ending = _python(setup, ("benchmarks/determinism.py", *tiny, "--out", file), seconds, "determinism")
    return compare_hashes(json.loads(file.read_text()) if file.exists() else [], ending)


def compare_hashes(hashes: Sequence[str], ending: str = "") -> Result:
    """It passes if there are several hashes and all are one."""
    counts = {digest: hashes.count(digest) for digest in dict.fromkeys(hashes)}
    detail = f"{len(hashes)} repeats, {len(counts)} hash{'' if len(counts) == 1 else 'es'}"
    passed = not ending and len(hashes) > 1 and len(counts) == 1
    return Result(passed, f"{detail}; {ending}" if ending else detail, {"repeats_of_hash": counts})


def expect(curves: dict[str, dict[str, float]]) -> tuple[dict[str, float], float]:
    """What is expected of one more seed: the mean loss of the fp32 runs at each step, and how far it may be from it.

    A GPU starts from other random weights than a CPU with the same seed, so its run is one more seed. The band is four
    standard deviations of its distance from the mean of n: ``4 * sqrt(variance * (1 + 1 / n))``. The variance is that
    of the n losses at one step, averaged over the steps.

    Example: losses 3.0 and 3.2 at one step, 2.0 and 2.0 at another: means 3.1 and 2.0, variances 0.02 and 0, band
    4 * sqrt(0.01 * 1.5).
    """
    seeds = [losses for name, losses in curves.items() if name.startswith("fp32")]
    at_steps = {step: [losses[step] for losses in seeds] for step in seeds[0]}
    variance = statistics.fmean(map(statistics.variance, at_steps.values()))
    means = {step: round(statistics.fmean(losses), 6) for step, losses in at_steps.items()}
    return means, 4 * math.sqrt(variance * (1 + 1 / len(seeds)))


def compare_curves(losses: dict[str, float], made_for: dict[str, str], reference: dict) -> Result:
    """It passes if every loss is within the band around the mean of the fp32 runs on a CPU.

    Args:
        losses: of the demo on the GPU, by step.
        made_for: ``demo_key`` at that time. A reference with another one is refused.
        reference: as ``make_curves`` writes it.
    """
    expected, width = expect(reference["curves"])
    figures = {"losses": losses, "made_for": made_for, "cpu": expected, "band": round(width, 4)}
    figures["cpu_commit"] = reference["commit"]
    if losses.keys() != expected.keys():
        return Result(False, f"losses at steps {', '.join(losses)}, not {', '.join(expected)}", figures)
    distances = {step: abs(losses[step] - expected[step]) for step in expected}
    outside = [step for step, distance in distances.items() if not distance <= width]  # NaN is outside
    worst = max(distances, key=lambda step: math.inf if math.isnan(distances[step]) else distances[step])
    detail = f"at most {distances[worst]:.4f} nats off (step {worst}), band {width:.4f}"
    if outside:
        detail += f"; outside at steps {', '.join(outside)}"
    stale = [name for name, key in made_for.items() if reference["made_for"].get(name) != key]
    if stale:
        detail += f"; the CPU's losses are of another {' and '.join(stale)}: make gpu-curves"
    return Result(not outside and not stale, detail, figures)


STEPS = {
    "tests": Step("tests marked `gpu`", 450, run_tests),
    **{name: Step(f"benchmark `{name}`", seconds, run_benchmark(name)) for name, (_, _, seconds) in BENCHMARKS.items()},
    "curve": Step("losses of the demo in bf16 against fp32 on a CPU", 180, run_curve),
    "determinism": Step("loss and gradients of repeated steps, `--deterministic-mode`", 90, run_determinism),
}
"""All steps, in their order. The limits add up to 24 minutes."""
GROUPS = {"bench": tuple(BENCHMARKS)}


# A run.


def environment(dry: bool) -> dict[str, str]:
    """Device, versions and commit, from a process of its own that gives the device back."""
    code = (
        "import json, os, platform, sys, torch\n"
        "from benchmarks.measure import environment\n"
        "on_gpu = torch.cuda.is_available()\n"
        "facts = environment(torch.device('cuda' if on_gpu else 'cpu')) | {'python': platform.python_version()}\n"
        "facts |= {'cpus': os.cpu_count(), 'cuda': torch.version.cuda, 'gpus': torch.cuda.device_count()}\n"
        "if on_gpu:\n"
        "    facts['memory_gib'] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)\n"
        "print(json.dumps(facts))\n"
    )
    words = (sys.executable, "-W", "ignore", "-c", code)
    answer = subprocess.run(words, cwd=ROOT, env=_variables(dry), capture_output=True, text=True)
    if answer.returncode:
        sys.exit(f"{answer.stderr}gpu.py: torch or megatron-core cannot be imported")
    facts = json.loads(answer.stdout)
    if facts["gpus"] and shutil.which("nvidia-smi"):
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return facts


def sources() -> str:
    """A hash of all that a result depends on: it tells whether one is of this tree, with uncommitted changes too."""
    folders = ("air_moe_megatron", "benchmarks", "examples", "tests")
    files = sorted(
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh", ".json")
    )
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_steps(
    steps: dict[str, Step], setup: Setup, facts: dict, origin: dict, seconds: float, again: bool = False
) -> dict[str, dict]:
    """Run the steps in turn and write a record of each as soon as it has ended; one that fails stops none.

    Args:
        facts: the environment, for the summary.
        origin: commit, sources and device. A record of the same sources on the same device is kept.
        seconds: for all steps; what no longer fits is left for the next run.
        again: make all records anew.
    Returns:
        the records by step, without those that did not fit.
    """
    deadline, records = time.monotonic() + seconds, {}
    for number, (name, step) in enumerate(steps.items(), 1):
        head, file = f"[{number}/{len(steps)}] {name}: {step.what}", setup.out / f"{name}.json"
        kept = read_record(file)
        if not again and kept is not None and is_kept(kept, origin):
            _say(f"{head}: kept, {_verdict(kept)}; --again repeats it")
            records[name] = kept
            continue
        allowed = _DRY_SECONDS if setup.dry else step.seconds
        limit = min(allowed, int(deadline - time.monotonic()) - _INTERRUPT_SECONDS)
        if limit < min(allowed, _SHORTEST_SECONDS):
            _say(f"{head}: no time left")
            continue
        _say(f"{head}, at most {limit} s")
        start = time.monotonic()
        try:
            result = step.run(setup, limit)
        except Exception as error:  # whatever it is, the later steps must have their turn
            traceback.print_exc()
            result = Result(False, f"{type(error).__name__}: {error}", {})
        taken = round(time.monotonic() - start, 1)
        record = {"passed": result.passed, "detail": result.detail, "seconds": taken, "limit": limit, "origin": origin}
        records[name] = record | {"figures": result.figures}
        write_record(setup, name, records[name], facts)
        _say(f"{head}: {_verdict(record)}")
    return records


def is_kept(record: dict, origin: dict) -> bool:
    """Whether a record counts for this run. One of a step that was stopped at its limit does not."""
    is_stopped = not record["passed"] and record["seconds"] >= record["limit"]
    return not is_stopped and all(record["origin"][key] == origin[key] for key in ("sources", "device"))


def read_record(file: Path) -> dict | None:
    """The record of a step; None where there is none."""
    return json.loads(file.read_text()) if file.exists() else None


def write_record(setup: Setup, name: str, record: dict, facts: dict) -> None:
    """Write the record of a step, and the summary of all."""
    (setup.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (setup.out / "README.md").write_text(summary(setup.out, facts))


def _verdict(record: dict) -> str:
    return f"{'passed' if record['passed'] else 'FAILED'} in {record['seconds']:.0f} s, {record['detail']}"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def summary(out: Path, facts: dict) -> str:
    """The records in a folder as a page with one table."""
    lines = ["# Results on a GPU", "", f"Written by `make gpu`, see [performance]({_EXPLAINED}).", ""]
    if facts:
        lines += [", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()), ""]
    if not facts.get("gpus"):
        lines += ["**Nothing here was measured on a GPU.**", ""]
    lines += ["| | result | seconds | passed | commit |", "|---|---|---|---|---|"]
    for name, step in STEPS.items():
        record = read_record(out / f"{name}.json")
        cells = ("not run", "", "", "")
        if record is not None:
            commit = record["origin"]["commit"]
            cells = (record["detail"], f"{record['seconds']:.0f}", "yes" if record["passed"] else "NO", commit)
        lines.append(f"| {step.what} | {' | '.join(cells)} |")
    for target in targets.TARGETS:
        if "GPU" in target.asked:
            measured, is_met = targets.judge(target, "GPU", out)
            asked = f"{'<=' if target.at_most else '>='} {target.asked['GPU']:g} {target.unit}".rstrip()
            lines.append(f"| {target.what}, asked {asked} | {measured or 'not run'} | | {is_met} | |")
    return "\n".join(lines) + "\n"


def chosen_steps(names: Sequence[str]) -> dict[str, Step]:
    """The steps of the given names, or all, in the order of ``STEPS``; "bench" stands for all benchmarks.

    Raises:
        ValueError: for a name that is none.
    """
    known = [*STEPS, *GROUPS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no step is named {', '.join(unknown)}; the names are {', '.join(known)}")
    wanted = {step for name in names for step in GROUPS.get(name, (name,))}
    return {name: step for name, step in STEPS.items() if not names or name in wanted}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the steps; returns the exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `nohup make gpu &` would have the steps ignore it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help=f"of {', '.join(STEPS)}; bench: all benchmarks (default: all)")
    parser.add_argument("--dry", action="store_true", help="all steps on the CPU, at tiny sizes")
    parser.add_argument("--again", action="store_true", help="repeat steps whose results are there")
    parser.add_argument("--minutes", type=float, default=25, help="for all steps together (default: 25)")
    parser.add_argument("--out", type=Path, help="folder of the results (default: docs/results/gpu, dry: out/gpu-dry)")
    parser.add_argument("--data", type=Path, default=ROOT / "data/stdlib", help="folder of the demo's data")
    parser.add_argument("--curves", action="store_true", help="make the CPU's losses of the demo instead (12 minutes)")
    args = parser.parse_args(argv)
    try:
        steps = chosen_steps(args.steps)
    except ValueError as error:
        parser.error(str(error))
    out = (args.out or ROOT / ("out/gpu-dry" if args.dry else "docs/results/gpu")).resolve()
    scratch = ROOT / "out/gpu" if not args.dry else out / "scratch"
    curves = out / "cpu_curves.json" if args.dry else ROOT / "docs/results/gpu/cpu_curves.json"
    setup = Setup(out, scratch, args.data.resolve(), curves, args.dry)
    if args.curves:
        make_curves(setup, CURVES, 3600)
        compare_again(setup)
        return 0
    facts = environment(args.dry)
    if not facts["gpus"] and not args.dry:
        sys.stderr.write("gpu.py: no CUDA GPU is visible; --dry (make gpu DRY=1) tests this command on the CPU\n")
        return 1
    out.mkdir(parents=True, exist_ok=True)
    (out / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")
    origin = {"commit": facts["commit"], "sources": sources(), "device": facts["device"]}
    records = run_steps(steps, setup, facts, origin, 60 * args.minutes, args.again)
    (out / "README.md").write_text(summary(out, facts))
    _say(f"\n{summary(out, facts)}")
    failed = [name for name in steps if name not in records or not records[name]["passed"]]
    _say(f"failed or not run: {', '.join(failed)}" if failed else "all steps passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
