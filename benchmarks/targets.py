"""Print targets and measured values from the CSV files of the benchmarks: `python -m benchmarks.targets [FOLDER]`.

CPU rows are read from the folder, GPU rows from its `gpu/`. Values that have not been measured stay empty.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

_COMMANDS = {"CPU": "make bench", "GPU": "make bench-gpu"}
_FOLDERS = {"CPU": ".", "GPU": "gpu"}
_CPU = {"hidden": 512, "tokens": 4096}
_GPU = {"hidden": 1024, "tokens": 16_384}
_MEDIUM, _LARGE = {"experts": 16_384, "topk": 32}, {"experts": 65_536, "topk": 64}
_MILLION = {"experts": 1_048_576, "topk": 64}


@dataclass(frozen=True)
class Target:
    """A target: where the figure is found, and the value to reach."""

    what: str
    file: str
    case: str
    column: str
    unit: str
    at_most: bool
    threshold: dict[str, float]  # kind of device -> value to reach
    sizes: dict[str, dict[str, int]]  # kind of device -> sizes at which it is measured


def _at(sizes: dict[str, int], **others: int) -> dict[str, dict[str, int]]:
    """The sizes for which a target is set, on a CPU and on a GPU."""
    return {"CPU": _CPU | sizes | others, "GPU": _GPU | sizes | others}


def _both(threshold: float) -> dict[str, float]:
    return {"CPU": threshold, "GPU": threshold}


_ROUTE = "AIRRouter.route"
TARGETS = (
    Target("route() fwd+bwd against TopKRouter, E = 65,536",
           "router.csv", _ROUTE, "times_faster", "x", False, {"CPU": 40, "GPU": 15}, _at(_LARGE)),
    Target("route() fwd+bwd against TopKRouter, E = 16,384",
           "router_medium.csv", _ROUTE, "times_faster", "x", False, {"CPU": 20, "GPU": 10}, _at(_MEDIUM)),
    Target("default over one probe, E = 65,536",
           "router.csv", _ROUTE, "times_one_probe", "x", True, _both(1.6), _at(_LARGE)),
    Target("route() fwd+bwd over its roofline bound, E = 65,536",
           "router.csv", _ROUTE, "times_bound", "x", True, _both(4), _at(_LARGE)),
    Target("top-k recall, power-law tokens, E = 65,536",
           "recall.csv", "AIRRouter", "topk_recall", "", False, _both(0.6), _at(_LARGE)),
    Target("top-k recall, power-law tokens, E = 16,384",
           "recall_medium.csv", "AIRRouter", "topk_recall", "", False, _both(0.6), _at(_MEDIUM)),
    Target("E = 1,048,576 against 65,536, T = 16,384",
           "growth.csv", "AIRRouter.route, E = 1048576", "times_slower", "x", True, _both(6),
           {"CPU": _MILLION | {"hidden": 128, "tokens": 16_384}, "GPU": _MILLION | _GPU}),
    Target("whole layer fwd+bwd: PEER over ours, same E K H F",
           "layer.csv", "PEERLayer", "times_ours", "x", False, {"CPU": 2, "GPU": 3}, _at(_LARGE)),
    Target("whole layer fwd+bwd: hierarchical over ours, same E K H F",
           "layer.csv", "HierarchicalMoELayer", "times_ours", "x", False, _both(1.2), _at(_LARGE)),
    Target("peak memory of route(), E = 1,048,576, H = 128, T = 4096",
           "scaling.csv", _ROUTE, "peak_mib", "MiB", True, {"CPU": 512}, {"CPU": _CPU | _MILLION | {"hidden": 128}}),
    Target("the same with a rebuild",
           "scaling.csv", _ROUTE, "peak_with_rebuild_mib", "MiB", True, {"CPU": 1024},
           {"CPU": _CPU | _MILLION | {"hidden": 128}}),
    Target("refresh, amortized, of a step at 8k tokens per rank",
           "refresh.csv", "shortlist rebuild", "percent_of_step", "%", True, _both(10), _at(_LARGE, tokens=8192)),
    Target("diagnostics every 100 steps, of the layer's step at 8k tokens per rank",
           "diagnostics.csv", "AIRMoELayer, measured", "percent_of_step", "%", True, {"CPU": 2},
           {"CPU": _CPU | _LARGE | {"tokens": 8192}}),
    Target("training step of a small GPT, AIR against TopK at E = 16,384",
           "train.csv", "GPT, AIRMoELayer", "times_faster", "x", False, _both(3),
           {"CPU": {"experts": 16_384}, "GPU": {"experts": 16_384}}),
)  # fmt: skip


def read(folder: Path, file: str) -> list[dict[str, str]]:
    """The rows of a CSV file; empty if there is no file."""
    path = folder / file
    if not path.exists():
        return []
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def judge(target: Target, kind: str, folder: Path) -> tuple[str, str]:
    """The measured value of a target at its sizes, and whether it is met; both empty if it was not measured."""
    rows = [row for row in read(folder, target.file) if row["case"] == target.case]
    for row in rows:
        sizes = target.sizes[kind].items()
        if row.get(target.column) and all(row.get(name) == str(value) for name, value in sizes):
            measured = float(row[target.column])
            is_met = measured <= target.threshold[kind] if target.at_most else measured >= target.threshold[kind]
            return f"{measured:g} {target.unit}".strip(), "yes" if is_met else "NO"
    return "", ""


def table(folder: Path) -> str:
    """The targets as a table in Markdown, with the commands that fill empty cells."""
    kinds = list(_COMMANDS)
    lines = ["| | " + " | ".join(f"{kind} target | measured | met" for kind in kinds) + " |"]
    lines.append("|---" * (1 + 3 * len(kinds)) + "|")
    missing = set()
    for target in TARGETS:
        cells = [target.what]
        for kind in kinds:
            if kind not in target.threshold:
                cells += ["", "", ""]
                continue
            measured, is_met = judge(target, kind, folder / _FOLDERS[kind])
            cells += [
                f"{'<=' if target.at_most else '>='} {target.threshold[kind]:g} {target.unit}".rstrip(),
                measured,
                is_met,
            ]
            if not measured:
                missing.add(kind)
        lines.append("| " + " | ".join(cells) + " |")
    for kind in kinds:
        rows = [row for target in TARGETS for row in read(folder / _FOLDERS[kind], target.file)]
        origins = dict.fromkeys(f"{row['device']}, {row['threads']} threads, commit {row['commit']}" for row in rows)
        lines += [f"{kind}: {origin}" for origin in origins]
        if kind in missing:
            lines.append(f"{kind}: empty cells are filled by `{_COMMANDS[kind]}`")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/results")) + "\n")
