"""All that needs a GPU, in one command: `python -m benchmarks.gpu [STEP ...]`, or `make gpu`.

Steps run in the order of the list below, most important first, each in a process and with a time limit of its own. Each
writes its result as soon as it has ended, STEP.json in the results' folder, whatever the others do. A step whose result
is there for these very sources on this device is not repeated, unless `--again` is given. README.md in that folder
sums up. The exit status is 1 if any chosen step failed.

With `--dry` all steps run on the CPU at tiny sizes, into out/gpu-dry: a test of this command itself.

`python -m benchmarks.gpu --curves` makes the losses on the CPU with which the demo's on a GPU are compared.
"""

import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT, targets
from benchmarks.gpu_steps import (
    BENCHMARKS,
    CURVES,
    INTERRUPT_SECONDS,
    STEPS,
    Result,
    Setup,
    Step,
    compare_curves,
    make_curves,
    variables_of,
)

_SHORTEST_SECONDS = 30  # a step does not start with less
_DRY_SECONDS = 1200  # limit of a step of a dry run; large, because it only ends hangs on a possibly busy CPU
_EXPLAINED = "../../performance.md#one-command-on-a-gpu"
GROUPS = {"bench": tuple(BENCHMARKS)}


def environment(dry: bool) -> dict[str, str]:
    """Device, versions and commit, read by a process of its own, so that the device is free afterwards."""
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
    variables = {"THP_MEM_ALLOC_ENABLE": "1"} | variables_of(dry)  # as run.py sets it for the benchmarks
    answer = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True)
    if answer.returncode:
        sys.exit(f"{answer.stderr}gpu.py: torch or megatron-core cannot be imported")
    facts = json.loads(answer.stdout)
    if facts["gpus"] and shutil.which("nvidia-smi"):
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return facts


def sources() -> str:
    """A hash of all sources that a result depends on, uncommitted changes included."""
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
    """Run the steps in turn, and write a record of each as soon as it has ended. A failure does not stop later steps.

    Args:
        facts: the environment, for the summary.
        origin: commit, sources and device. A record of the same sources on the same device is kept.
        seconds: time for all steps; steps that no longer fit are left for the next run.
        again: whether to make all records anew.
    Returns:
        the records by step, without steps that did not fit.
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
        limit = min(allowed, int(deadline - time.monotonic()) - INTERRUPT_SECONDS)
        if limit < min(allowed, _SHORTEST_SECONDS):
            _say(f"{head}: no time left")
            continue
        _say(f"{head}, at most {limit} s")
        start = time.monotonic()
        try:
            result = step.run(setup, limit)
        except Exception as error:  # whatever it is, the later steps must still run
            traceback.print_exc()
            result = Result(False, f"{type(error).__name__}: {error}", {})
        taken = round(time.monotonic() - start, 1)
        record = {"passed": result.passed, "detail": result.detail, "seconds": taken, "limit": limit, "origin": origin}
        records[name] = record | {"figures": result.figures}
        write_record(setup, name, records[name], facts)
        _say(f"{head}: {_verdict(record)}")
    return records


def is_kept(record: dict, origin: dict) -> bool:
    """Whether a record is valid for this run. That of a step that was stopped at its limit is not."""
    is_stopped = not record["passed"] and record["seconds"] >= record["limit"]
    return not is_stopped and all(record["origin"][key] == origin[key] for key in ("sources", "device"))


def read_record(file: Path) -> dict | None:
    """The record of a step; None if there is none."""
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
    """The records in a folder as a page with one table. If a record has a "note", it follows the result."""
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
            result = ". ".join(filter(None, (record["detail"], record.get("note"))))
            cells = (result, f"{record['seconds']:.0f}", "yes" if record["passed"] else "NO", commit)
        lines.append(f"| {step.what} | {' | '.join(cells)} |")
    for target in targets.TARGETS:
        if "GPU" in target.threshold:
            measured, is_met = targets.judge(target, "GPU", out)
            threshold = f"{'<=' if target.at_most else '>='} {target.threshold['GPU']:g} {target.unit}".rstrip()
            lines.append(f"| {target.what}, target {threshold} | {measured or 'not run'} | | {is_met} | |")
    return "\n".join(lines) + "\n"


def compare_again(setup: Setup) -> None:
    """Compare the losses in the results' folder, if any, with a new reference."""
    record = read_record(setup.out / "curve.json")
    if record is not None and "made_for" in record["figures"]:
        figures = record["figures"]
        reference = json.loads(setup.curves.read_text())
        result = compare_curves(figures["losses"], figures["made_for"], reference, figures.get("ending", ""))
        write_record(setup, "curve", record | vars(result), json.loads((setup.out / "environment.json").read_text()))


def chosen_steps(names: Sequence[str]) -> dict[str, Step]:
    """The steps of the given names, or all, in the order of ``STEPS``; "bench" stands for all benchmarks.

    Raises:
        ValueError: if a name is unknown.
    """
    known = [*STEPS, *GROUPS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no step is named {', '.join(unknown)}; the names are {', '.join(known)}")
    wanted = {step for name in names for step in GROUPS.get(name, (name,))}
    return {name: step for name, step in STEPS.items() if not names or name in wanted}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run the steps; returns the exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # with `nohup make gpu &` the steps would ignore it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", help=f"of {', '.join(STEPS)}; bench: all benchmarks (default: all)")
    parser.add_argument("--dry", action="store_true", help="all steps on the CPU, at tiny sizes")
    parser.add_argument("--again", action="store_true", help="repeat steps whose results are there")
    parser.add_argument("--minutes", type=float, default=30, help="for all steps together (default: 30)")
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
