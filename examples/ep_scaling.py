"""Put the runs of an expert-parallel scaling run into one table and one plot.

    python examples/ep_scaling.py --warmup 400 --out out/ep_scaling out/ep_scaling/ep1 out/ep_scaling/ep2 ...

`examples/ep_scaling.sh` makes the runs and calls this. All figures come from a run's TensorBoard folder: sizes from
Megatron's arguments, times, bytes and loads from the scalars of the log intervals. Writes OUT/ep_scaling.csv and
OUT/ep_scaling.png.

Tokens per second are the tokens of a global batch over the median time per step of the log intervals after the warm-up;
the time of an interval is the mean of its steps. The other figures are means over the same intervals. Bytes are per
token and layer, one way. *Dispatched* counts the rows of hidden states, those that stay on their rank included. *To
other ranks* counts what leaves a rank, expert ids and probabilities included.

The columns *planned* are predictions of `air_moe_megatron.plan`, which takes experts as equally loaded. *MB/step* is
all that a rank sends in a step, in all layers and directions: rows, gradients of the centers, statistics. *Cost* is
the time of a step over that of the smallest size. Its prediction is that the arithmetic of a rank stays the same, and
that the collectives of the plan come on top of it, at the speed of `--node-gbytes`. Predictions are nan with tensor,
pipeline or context parallelism, with routers other than `air`, codebooks of source `experts`, hash layers and layers
without experts, which the plan does not know.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import matplotlib
import pandas
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")  # writes files; needs no display
from matplotlib import pyplot  # noqa: E402

# Of the printed table, in the order of Row; B is bytes.
HEADINGS = (
    *("EP", "ranks", "steps", "ms/step", "tokens/s", "tokens/s/rank", "B/token", "to others B/token"),
    *("planned B/token", "planned MB/step", "cost", "planned cost", "top rank/mean", "imbalance"),
)
BYTES_OF_DTYPE = {"torch.float32": 4, "torch.bfloat16": 2, "torch.float16": 2}
TIME = "iteration-time"
HEALTH = ("imbalance-factor", "rank-imbalance", "dispatch-bytes-per-token", "remote-bytes-per-token")


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
    planned_remote_bytes_per_token: float
    planned_mb_per_step: float  # sent by a rank
    cost: float  # time of a step over that of the smallest size
    planned_cost: float
    most_loaded_rank: float  # over the mean of the ranks
    imbalance_factor: float  # of the experts; 1 is even


@dataclass(frozen=True)
class Planned:
    """What the plan says of one run."""

    remote_bytes_per_token: float = math.nan
    mb_per_step: float = math.nan
    ms_per_step: float = math.nan  # of the collectives


def predict(argument: Callable[[str], str], node_gbytes: float) -> Planned:
    """Predict what a rank sends, by ``air_moe_megatron.plan``.

    Args:
        argument: gives the value of one of Megatron's arguments, as text.
        node_gbytes: GB/s that a rank sends to the others.
    """
    from air_moe_megatron import plan  # takes seconds to import, and a run that lacks something is named before

    is_known = argument("moe_router_type") == "air" and argument("moe_num_hash_layers") == "0"
    is_known = is_known and argument("moe_air_codebook_source") == "tokens" and argument("moe_layer_freq") == "1"
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        is_known = is_known and argument(name) == "1"
    if not is_known:
        return Planned()
    ranks, layers = int(argument("world_size")), int(argument("num_layers"))
    microbatch, sequence = int(argument("micro_batch_size")), int(argument("seq_length"))
    microbatches = int(argument("global_batch_size")) // (microbatch * ranks)
    values = {
        "--experts": argument("num_experts"),
        "--hidden": argument("hidden_size"),
        "--topk": argument("moe_router_topk"),
        "--ep": argument("expert_model_parallel_size"),
        "--gpus-per-node": ranks,
        "--layers": layers,
        "--ffn": argument("moe_ffn_hidden_size"),
        "--tokens": microbatch * sequence,
        "--microbatches": microbatches,
        "--dtype": "fp32" if argument("params_dtype") == "torch.float32" else "bf16",  # fp16 has as many bytes
        "--input-norm": argument("moe_router_input_norm"),
        "--node-gbytes": node_gbytes,
    }
    sizes = {"clusters": "num_clusters", "shortlist": "shortlist_size", "list-parts": "list_parts"}
    sizes |= {"probes": "num_probes", "candidates": "num_candidates", "explored": "num_explored"}
    sizes |= {"refresh-interval": "refresh_interval"}
    for flag, name in sizes.items():
        values[f"--{flag}"] = argument(f"moe_air_{name}")
    words = [str(word) for pair in values.items() for word in pair]
    words += ["--swiglu"] if argument("swiglu") == "True" else []
    words += ["--recompute"] if _is_recomputed(argument) else []
    words += ["--distributed-optimizer"] if argument("use_distributed_optimizer") == "True" else []
    words += [] if argument("accumulate_allreduce_grads_in_fp32") == "True" else ["--bf16-gradients"]
    args = plan.make_parser().parse_args(words)
    collectives = plan.predict(args, argument("moe_air_shard_experts") == "True").collectives
    return Planned(
        remote_bytes_per_token=sum(one.outward for one in collectives) / (microbatches * microbatch * sequence),
        mb_per_step=layers * sum(one.num_bytes for one in collectives) / 1e6,
        ms_per_step=layers * sum(plan.seconds(args, one) for one in collectives) * 1e3,
    )


def _is_recomputed(argument: Callable[[str], str]) -> bool:
    """Whether the backward repeats the forwards of the layers with experts."""
    granularity = argument("recompute_granularity")
    return granularity == "full" or (granularity == "selective" and "'moe'" in argument("recompute_modules"))


def read_run(folder: Path, warmup: int, node_gbytes: float) -> tuple[Setting, Row, Planned]:
    """Read one run.

    Args:
        folder: its TensorBoard folder.
        warmup: steps at the start that do not count.
        node_gbytes: GB/s that a rank sends to the others, for the prediction.
    Returns:
        what it has in common with the others, its row with the costs left open, and its prediction.
    Raises:
        ValueError: naming the folder and what it lacks.
    """
    argument, figures = read_events(folder)
    try:
        measured = after_warmup(figures, int(argument("log_interval")), warmup)
        setting, planned = setting_of(argument), predict(argument, node_gbytes)
        return setting, row_of(argument, measured, planned), planned
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def read_events(folder: Path) -> tuple[Callable[[str], str], pandas.DataFrame]:
    """Read a TensorBoard folder.

    Returns:
        a function that gives Megatron's argument of a name as text, and raises ValueError if there is none; and the
        scalars of time and routing health, a column each, by step.
    """
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    texts = {tag.removesuffix("/text_summary"): tag for tag in events.Tags()["tensors"]}
    # Ours have a prefix; the diagnostics write figures of the same names, with another one, for each layer.
    tags = {tag.removeprefix("air/"): tag for tag in events.Tags()["scalars"]}

    def argument(name: str) -> str:
        if name not in texts:
            raise ValueError(f"Megatron's argument {name} is not in it; did the run start?")
        return events.Tensors(texts[name])[0].tensor_proto.string_val[0].decode()

    figures = {
        name: pandas.Series({event.step: event.value for event in events.Scalars(tags[name])}, dtype=float)
        for name in (TIME, *HEALTH)
        if name in tags
    }
    return argument, pandas.DataFrame(figures)


def after_warmup(figures: pandas.DataFrame, interval: int, warmup: int) -> pandas.DataFrame:
    """The figures of those log intervals whose steps all come after the warm-up.

    Raises:
        ValueError: if there are none.
    """
    measured = figures[figures.index - interval >= warmup]
    if TIME not in measured or measured[TIME].dropna().empty:
        raise ValueError(
            f"no scalar {TIME} lies after the warm-up of {warmup} steps; was it --log-timers-to-tensorboard?"
        )
    if not set(HEALTH) <= set(measured) or measured[list(HEALTH)].dropna().empty:
        raise ValueError(
            f"no scalars of routing health with dispatched bytes lie after the warm-up of {warmup} steps; "
            "was it --air-moe?"
        )
    return measured


def setting_of(argument: Callable[[str], str]) -> Setting:
    """What a run has in common with the others, from Megatron's arguments."""
    dtype = argument("params_dtype")
    if dtype not in BYTES_OF_DTYPE:
        raise ValueError(f"params_dtype ({dtype}) must be one of {', '.join(BYTES_OF_DTYPE)}")
    return Setting(
        backend=argument("distributed_backend"),
        num_layers=int(argument("num_layers")),
        num_experts=int(argument("num_experts")),
        topk=int(argument("moe_router_topk")),
        hidden_size=int(argument("hidden_size")),
        dtype=dtype,
        tokens_per_rank=tokens_per_step(argument) // int(argument("world_size")),
    )


def tokens_per_step(argument: Callable[[str], str]) -> int:
    """Tokens of a global batch."""
    return int(argument("global_batch_size")) * int(argument("seq_length"))


def row_of(argument: Callable[[str], str], measured: pandas.DataFrame, planned: Planned) -> Row:
    """The row of a run, with the costs left open, from its figures after the warm-up and its prediction."""
    ranks, tokens = int(argument("world_size")), tokens_per_step(argument)
    seconds = measured[TIME].median()
    means = measured[list(HEALTH)].mean()
    return Row(
        ep_size=int(argument("expert_model_parallel_size")),
        ranks=ranks,
        steps=measured[TIME].count() * int(argument("log_interval")),
        ms_per_step=round(1e3 * seconds, 2),
        tokens_per_s=round(tokens / seconds, 1),
        tokens_per_s_per_rank=round(tokens / seconds / ranks, 1),
        dispatched_bytes_per_token=round(means["dispatch-bytes-per-token"], 1),
        remote_bytes_per_token=round(means["remote-bytes-per-token"], 1),
        planned_remote_bytes_per_token=round(planned.remote_bytes_per_token, 1),
        planned_mb_per_step=round(planned.mb_per_step, 3),
        cost=math.nan,
        planned_cost=math.nan,
        most_loaded_rank=round(means["rank-imbalance"], 3),
        imbalance_factor=round(means["imbalance-factor"], 2),
    )


def read_runs(folders: list[Path], warmup: int, node_gbytes: float) -> tuple[Setting, list[Row]]:
    """Read all runs, sorted by expert-parallel size.

    Raises:
        ValueError: as :func:`read_run`, or if the runs differ in more than the number of ranks.
    """
    runs = [(folder, *read_run(folder, warmup, node_gbytes)) for folder in folders]
    first, setting, *_ = runs[0]
    for folder, other, *_ in runs[1:]:
        for field in fields(Setting):
            own, wanted = getattr(other, field.name), getattr(setting, field.name)
            if own != wanted:
                raise ValueError(f"{folder}: {field.name} ({own}) must be that of {first} ({wanted})")
    pairs = sorted(((row, planned) for _, _, row, planned in runs), key=lambda pair: pair[0].ep_size)
    least, least_planned = pairs[0]
    return setting, [
        replace(
            row,
            cost=round(row.ms_per_step / least.ms_per_step, 3),
            planned_cost=round(1 + (planned.ms_per_step - least_planned.ms_per_step) / least.ms_per_step, 3),
        )
        for row, planned in pairs
    ]


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
    per_rank.plot(sizes, [own / row.planned_cost for row in rows], "x:", label="planned")
    per_rank.set(title="Throughput per rank", ylabel="tokens per second and rank")

    bound = [setting.row_bytes * min(setting.topk, size) for size in sizes]
    traffic.plot(sizes, bound, label="bound: row bytes x min(K, EP)", **ideal)
    traffic.plot(sizes, [row.dispatched_bytes_per_token for row in rows], "o-", label="dispatched rows")
    remote = [row.remote_bytes_per_token for row in rows]
    traffic.plot(sizes, remote, "s-", label="to other ranks, with ids and probabilities")
    traffic.plot(sizes, [row.planned_remote_bytes_per_token for row in rows], "x:", label="planned: to other ranks")
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
    parser.add_argument("runs", type=Path, nargs="+", help="one TensorBoard folder per expert-parallel size")
    parser.add_argument("--warmup", type=int, default=0, help="steps at the start of each run that do not count")
    parser.add_argument("--node-gbytes", type=float, default=300.0, help="GB/s that a rank sends; default 300")
    parser.add_argument("--out", type=Path, required=True, help="folder for ep_scaling.csv and ep_scaling.png")
    args = parser.parse_args()
    try:
        setting, rows = read_runs(args.runs, args.warmup, args.node_gbytes)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    table = pandas.DataFrame(rows)
    print(table.to_string(index=False, header=HEADINGS, float_format="{:,.10g}".format))
    table.to_csv(args.out / "ep_scaling.csv", index=False)
    plot(setting, rows, args.out / "ep_scaling.png")
    print(f"table: {args.out / 'ep_scaling.csv'}\nplot:  {args.out / 'ep_scaling.png'}")


if __name__ == "__main__":
    main()
