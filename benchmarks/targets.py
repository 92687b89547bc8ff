"""Print the targets, asked and measured, from the CSV files of the benchmarks: `python benchmarks/targets.py [FOLDER]`.

CPU rows are read from the folder, GPU rows from its `gpu/`; what has not been measured stays empty.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

_COMMANDS = {"CPU": "make bench", "GPU": "make bench-gpu"}
_FOLDERS = {"CPU": ".", "GPU": "gpu"}
_CPU = {"hidden": 512, "tokens": 4096, "topk": 64}
_GPU = {"hidden": 1024, "tokens": 16_384, "topk": 64}
_LARGE, _MILLION = {"experts": 65_536}, {"experts": 1_048_576}


@dataclass(frozen=True)
class Target:
    """A figure that is asked for: where it stands, and what it must be."""

    what: str
    file: str
    case: str
    column: str
    unit: str
    at_most: bool
    asked: dict[str, float]  # kind of device -> bound
    sizes: dict[str, dict[str, int]]  # kind of device -> sizes for which it is asked


TARGETS = (
    Target(
        what="route() fwd+bwd over its roofline bound, E = 65,536",
        file="router.csv",
        case="AIRRouter.route",
        column="times_bound",
        unit="x",
        at_most=True,
        asked={"CPU": 4, "GPU": 4},
        sizes={"CPU": _LARGE | _CPU, "GPU": _LARGE | _GPU},
    ),
    Target(
        what="route() fwd+bwd against TopKRouter, E = 65,536",
        file="router.csv",
        case="AIRRouter.route",
        column="times_faster",
        unit="x",
        at_most=False,
        asked={"CPU": 60, "GPU": 15},
        sizes={"CPU": _LARGE | _CPU, "GPU": _LARGE | _GPU},
    ),
    Target(
        what="E = 1,048,576 against 65,536, auto sizes, T = 16,384",
        file="growth.csv",
        case="AIRRouter.route, E = 1048576",
        column="times_slower",
        unit="x",
        at_most=True,
        asked={"CPU": 6, "GPU": 6},
        sizes={"CPU": _MILLION | {"hidden": 128, "tokens": 16_384, "topk": 64}, "GPU": _MILLION | _GPU},
    ),
    Target(
        what="whole layer fwd+bwd against PEER, same E K H F",
        file="layer.csv",
        case="AIRMoELayer",
        column="times_faster",
        unit="x",
        at_most=False,
        asked={"CPU": 1.5, "GPU": 3},
        sizes={"CPU": _LARGE | _CPU, "GPU": _LARGE | _GPU},
    ),
    Target(
        what="refresh, amortised, of a step at 8k tokens per rank",
        file="refresh.csv",
        case="shortlist rebuild",
        column="percent_of_step",
        unit="%",
        at_most=True,
        asked={"CPU": 10, "GPU": 10},
        sizes={"CPU": _LARGE | _CPU | {"tokens": 8192}, "GPU": _LARGE | _GPU | {"tokens": 8192}},
    ),
    Target(
        what="training step of a small GPT, AIR against TopK at E = 16,384",
        file="train.csv",
        case="GPT, AIRMoELayer",
        column="times_faster",
        unit="x",
        at_most=False,
        asked={"CPU": 3, "GPU": 3},
        sizes={"CPU": {"experts": 16_384}, "GPU": {"experts": 16_384}},
    ),
)


def read(folder: Path, file: str) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no file."""
    path = folder / file
    if not path.exists():
        return []
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def judge(target: Target, kind: str, folder: Path) -> tuple[str, str]:
    """What was measured for a target, and whether it is met; empty where it was not, at the sizes that are asked."""
    rows = [row for row in read(folder, target.file) if row["case"] == target.case]
    for row in rows:
        if all(row.get(name) == str(value) for name, value in target.sizes[kind].items()):
            measured = float(row[target.column])
            is_met = measured <= target.asked[kind] if target.at_most else measured >= target.asked[kind]
            return f"{measured:g} {target.unit}", "yes" if is_met else "NO"
    return "", ""


def table(folder: Path) -> str:
    """The targets as a table in Markdown, with the command that fills what is empty."""
    kinds = list(_COMMANDS)
    lines = ["| | " + " | ".join(f"{kind} asked | measured | met" for kind in kinds) + " |"]
    lines.append("|---" * (1 + 3 * len(kinds)) + "|")
    missing = set()
    for target in TARGETS:
        cells = [target.what]
        for kind in kinds:
            measured, is_met = judge(target, kind, folder / _FOLDERS[kind])
            cells += [f"{'<=' if target.at_most else '>='} {target.asked[kind]:g} {target.unit}", measured, is_met]
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
