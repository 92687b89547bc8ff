"""Put the logs of an expert-parallel scaling run into one table and one plot.

    python examples/ep_scaling.py --warmup 400 --out out/ep_scaling out/ep_scaling/ep1.log out/ep_scaling/ep2.log ...

`examples/ep_scaling.sh` makes the logs and calls this. Sizes are read from the list of arguments that Megatron prints
at its start, times from its iteration lines, bytes and loads from the lines of routing health. Writes
OUT/ep_scaling.csv and OUT/ep_scaling.png.

Tokens per second are the tokens of a global batch over the median time per step of the log lines after the warm-up; a
line is the mean of its log interval. The other figures are means over the same lines. Bytes are per token and layer,
one way: *dispatched* counts the rows of hidden states, those that stay on their rank included; *to other ranks* counts
what leaves a rank, expert ids and probabilities included.
"""

import argparse
import csv
import itertools
import re
import statistics
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files; needs no display
from matplotlib import pyplot  # noqa: E402

# Of the printed table, in the order of Row; B is bytes.
HEADINGS = (
    *("EP", "ranks", "steps", "ms/step", "tokens/s", "tokens/s/rank", "B/token", "to others B/token"),
    *("top rank/mean", "imbalance"),
)
BYTES_OF_DTYPE = {"torch.float32": 4, "torch.bfloat16": 2, "torch.float16": 2}

_ARGUMENT = re.compile(r"^\s*(\w+) \.{3,} (.+?)\s*$", re.MULTILINE)
_ITERATION = re.compile(
    r" iteration +(\d+)/ *\d+ \|.*? elapsed time per iteration \(ms\): ([0-9.]+) \|.*? global batch size: +(\d+) \|"
)
_HEALTH = re.compile(
    r"routing health at iteration +(\d+) \|.*? imbalance factor: ([0-9.]+) \| most loaded rank: ([0-9.]+) of the mean"
    r" \| dispatched bytes per token: ([0-9]+) \(([0-9]+) to other ranks\)"
)


@dataclass(frozen=True)
class Setting:
    """What all runs of a scaling run have in common."""

    backend: str
    num_layers: int
    num_experts: int
    topk: int
    hidden_size: int
    dtype: str
    tokens_per_rank: int  # per step

    @property
    def row_bytes(self) -> int:
        """Bytes of the hidden state of one token."""
        return self.hidden_size * BYTES_OF_DTYPE[self.dtype]


@dataclass(frozen=True)
class Row:
    """One run: a line of the table and of the CSV."""

    ep_size: int
    ranks: int
    steps: int  # measured, without the warm-up
    ms_per_step: float
    tokens_per_s: float
    tokens_per_s_per_rank: float
    dispatched_bytes_per_token: float
    remote_bytes_per_token: float
    most_loaded_rank: float  # over the mean of the ranks
    imbalance_factor: float  # of the experts; 1 is even


def read_log(path: Path, warmup: int) -> tuple[Setting, Row]:
    """Read one run.

    Args:
        path: what the run printed.
        warmup: steps at the start that do not count.
    Raises:
        ValueError: naming the log and the lines that it lacks.
    """
    text = path.read_text(errors="replace")
    arguments = dict(_ARGUMENT.findall(text))

    def argument(name):
        if name not in arguments:
            raise ValueError(f"{path}: Megatron's list of arguments, with {name}, is not in it; did the run start?")
        return arguments[name]

    steps = _after(warmup, [(int(step), float(ms), int(batch)) for step, ms, batch in _ITERATION.findall(text)])
    if not steps:
        raise ValueError(f"{path}: no line with 'elapsed time per iteration' lies after the warm-up of {warmup} steps")
    health = _after(warmup, [(int(step), *map(float, figures)) for step, *figures in _HEALTH.findall(text)])
    if not health:
        raise ValueError(
            f"{path}: no line of 'routing health' with dispatched bytes lies after the warm-up of {warmup} steps; "
            "was it --moe-router-type air --moe-granular-experts --moe-dispatch compact?"
        )
    dtype = argument("params_dtype")
    if dtype not in BYTES_OF_DTYPE:
        raise ValueError(f"{path}: params_dtype ({dtype}) must be one of {', '.join(BYTES_OF_DTYPE)}")

    ranks = int(argument("world_size"))
    tokens = steps[-1][2] * int(argument("seq_length"))
    ms_per_step = statistics.median(ms for _, ms, _ in steps)
    _, imbalance, most_loaded, dispatched, remote = map(statistics.fmean, zip(*health, strict=True))
    setting = Setting(
        backend=argument("distributed_backend"),
        num_layers=int(argument("num_layers")),
        num_experts=int(argument("num_experts")),
        topk=int(argument("moe_router_topk")),
        hidden_size=int(argument("hidden_size")),
        dtype=dtype,
        tokens_per_rank=tokens // ranks,
    )
    row = Row(
        ep_size=int(argument("expert_model_parallel_size")),
        ranks=ranks,
        steps=len(steps) * int(argument("log_interval")),
        ms_per_step=round(ms_per_step, 2),
        tokens_per_s=round(1e3 * tokens / ms_per_step, 1),
        tokens_per_s_per_rank=round(1e3 * tokens / ms_per_step / ranks, 1),
        dispatched_bytes_per_token=round(dispatched, 1),
        remote_bytes_per_token=round(remote, 1),
        most_loaded_rank=round(most_loaded, 3),
        imbalance_factor=round(imbalance, 2),
    )
    return setting, row


def _after(warmup, lines):
    """The lines all of whose steps, which began after the line before, come after the warm-up."""
    return [line for before, line in itertools.pairwise([(0,), *lines]) if before[0] >= warmup]


def read_logs(paths: list[Path], warmup: int) -> tuple[Setting, list[Row]]:
    """Read all runs, sorted by expert-parallel size.

    Raises:
        ValueError: as :func:`read_log`, or if the runs differ in more than the number of ranks.
    """
    runs = [(path, *read_log(path, warmup)) for path in paths]
    first, setting, _ = runs[0]
    for path, other, _ in runs[1:]:
        for field in fields(Setting):
            own, wanted = getattr(other, field.name), getattr(setting, field.name)
            if own != wanted:
                raise ValueError(f"{path}: {field.name} ({own}) must be that of {first} ({wanted})")
    return setting, sorted((row for _, _, row in runs), key=lambda row: row.ep_size)


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [HEADINGS, *([f"{value:,}" for value in asdict(row).values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def write_csv(rows: list[Row], path: Path) -> None:
    """Write the rows, a column per field of :class:`Row`."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def plot(setting: Setting, rows: list[Row], path: Path) -> None:
    """Draw throughput, bytes and loads over the expert-parallel size."""
    sizes = [row.ep_size for row in rows]
    figure, ((total, per_rank), (traffic, load)) = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    device = "CPU, gloo (all ranks share its cores)" if setting.backend == "gloo" else f"GPUs, {setting.backend}"
    figure.suptitle(
        f"Expert-parallel scaling: {setting.num_experts:,} experts, top-{setting.topk}, hidden size "
        f"{setting.hidden_size:,}, {setting.num_layers} layers\n{setting.tokens_per_rank:,} tokens per rank and step, "
        f"{setting.dtype.removeprefix('torch.')}, {device}"
    )
    ideal = {"linestyle": "--", "color": "gray"}
    own = rows[0].tokens_per_s_per_rank

    total.plot(sizes, [own * row.ranks for row in rows], label=f"linear from EP {sizes[0]}", **ideal)
    total.plot(sizes, [row.tokens_per_s for row in rows], "o-", label="all ranks")
    total.set(title="Throughput", ylabel="tokens per second")
    per_rank.plot(sizes, [own] * len(rows), label=f"that of EP {sizes[0]}", **ideal)
    per_rank.plot(sizes, [row.tokens_per_s_per_rank for row in rows], "o-", label="per rank")
    per_rank.set(title="Throughput per rank", ylabel="tokens per second and rank")

    bound = [setting.row_bytes * min(setting.topk, size) for size in sizes]
    traffic.plot(sizes, bound, label="bound: row bytes x min(K, EP)", **ideal)
    traffic.plot(sizes, [row.dispatched_bytes_per_token for row in rows], "o-", label="dispatched rows")
    remote = [row.remote_bytes_per_token for row in rows]
    traffic.plot(sizes, remote, "s-", label="to other ranks, with ids and probabilities")
    traffic.set(
        title=f"Dispatch; one copy per expert would be {setting.row_bytes * setting.topk:,} bytes",
        ylabel="bytes per token and layer, one way",
    )
    load.plot(sizes, [row.most_loaded_rank for row in rows], "o-", label="ranks: most loaded / mean (left)")
    load.plot([], [], "s-", label="experts: imbalance factor (right)")
    load.set(title="Load; 1 is even", ylabel="most loaded rank / mean rank")
    experts = load.twinx()
    experts.plot(sizes, [row.imbalance_factor for row in rows], "s-", color="C1")
    experts.set(ylabel="imbalance factor of the experts")

    for axes in (total, per_rank, traffic, load, experts):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, labels=map(str, sizes))
        axes.minorticks_off()
        axes.set_ylim(bottom=0, top=1.2 * axes.get_ylim()[1])
        axes.yaxis.set_major_formatter("{x:,.10g}")
    legends = {total: "upper left", per_rank: "lower left", traffic: "upper left", load: "lower left"}
    for axes, place in legends.items():
        axes.set_xlabel("expert-parallel size (ranks)")
        axes.grid(alpha=0.3)
        axes.legend(loc=place, fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Print the table, write the CSV and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+", help="one log per expert-parallel size")
    parser.add_argument("--warmup", type=int, default=0, help="steps at the start of each run that do not count")
    parser.add_argument("--out", type=Path, required=True, help="folder for ep_scaling.csv and ep_scaling.png")
    args = parser.parse_args()
    try:
        setting, rows = read_logs(args.logs, args.warmup)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    print(table(rows))
    write_csv(rows, args.out / "ep_scaling.csv")
    plot(setting, rows, args.out / "ep_scaling.png")
    print(f"table: {args.out / 'ep_scaling.csv'}\nplot:  {args.out / 'ep_scaling.png'}")


if __name__ == "__main__":
    main()
