"""The tables of the page: a summary of the runs, their newest metrics, the cost of routing, and their flags."""

import math
from collections.abc import Sequence
from typing import Any

import pandas

from air_moe_megatron.command.console import flag_of
from air_moe_megatron.report.rules import RECORDS
from air_moe_megatron.report.runs import Run, changes


def number(value: Any, form: str = ".3g", scale: float = 1.0) -> str:
    """A metric as text; a dash if it is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return format(value * scale, form)


def summary(run: Run) -> dict[str, str]:
    """A run in one row: its setup and its progress."""
    sizes = list(run.sizes.values())
    steps = run.steps
    last = steps["loss"].iloc[-1] if len(steps) else None
    row = {
        "router": ", ".join(run.routers),
        "layers": str(len(sizes)),
        "experts": _range(sizes, "num_experts"),
        "top-k": _range(sizes, "topk"),
    }
    names = {
        "num_clusters": "codewords C",
        "shortlist_size": "list L",
        "num_probes": "probes P",
        "num_candidates": "candidates M",
        "num_explored": "explored candidates X",
    }
    row |= {name: _range(sizes, key) for key, name in names.items()}
    newest = pandas.concat([steps, run.totals])[["iteration", "tokens"]].max()
    row |= {
        "steps": f"{newest['iteration']:,.0f}",
        "tokens": f"{newest['tokens']:,.0f}",
        "training time": _duration(steps["seconds"].iloc[-1]) if len(steps) else "–",
        "loss, nats per token": number(last, ".3f"),
        "perplexity": number(math.exp(min(last, 700)) if last is not None else None, ".4g"),
        "device": str(run.header.get("device", "–")),
        "versions": ", ".join(f"{name} {version}" for name, version in (run.header.get("versions") or {}).items()),
    }
    return row


def _range(sizes: list[dict[str, Any]], key: str) -> str:
    values = sorted({size[key] for size in sizes if size.get(key) is not None})
    if not values:
        return "–"
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "–"
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def notes(run: Run) -> list[str]:
    """Remarks on the files of a run for the reader."""
    found = list(run.notes)
    for resume in run.resumes:
        text = f"resumed after step {resume.iteration:,} ({resume.tokens:,.0f} tokens)"
        if resume.num_superseded:
            text += f"; {resume.num_superseded} lines of the earlier run that lie beyond are left out"
        if resume.changed:
            text += "; changed: " + ", ".join(f"{flag_of(name)} {a} → {b}" for name, (a, b) in resume.changed.items())
        found.append(text)
    if not len(run.totals):
        interval = run.argument("moe_air_diagnostics_interval")
        remedy = f"one is due every {interval} steps" if interval else "give --moe-air-diagnostics-interval"
        found.append(f"no diagnostics were recorded: {remedy}")
    return found


def last_metrics(run: Run) -> tuple[list[str], list[tuple[int, str, list[str]]]]:
    """Headings, and for each layer its number, router and metrics in the last record."""
    columns = (
        ("topk_recall", "top-k recall", ".1%", 1),
        ("certified", "proven exact", ".1%", 1),
        ("mass_recall", "mass recall", ".1%", 1),
        ("mass_bound", "our bound", ".1%", 1),
        ("paper_bound", "paper's bound", ".2%", 1),
        ("experts_used", "experts used", ".1%", 1),
        ("experts_listed", "experts listed", ".1%", 1),
        ("imbalance_factor", "imbalance", ".2f", 1),
        ("rank_imbalance", "most loaded rank", ".3f", 1),
        ("idle", "idle codewords", ".1%", 1),
        ("codeword_entropy", "entropy", ".3f", 1),
        ("quantization_error", "quantization error", ".3f", 1),
        ("drift", "list drift", ".1%", 1),
        ("routing_seconds", "routing, ms", ".2f", 1e3),
    )
    newest = run.layers.sort_values("iteration").groupby("layer").tail(1).sort_values("layer")
    present = [column for column in columns if newest[column[0]].notna().any()]
    rows = [
        (int(row["layer"]), row["router"], [number(row[name], form, scale) for name, _, form, scale in present])
        for _, row in newest.iterrows()
    ]
    return [title for _, title, _, _ in present], rows


def cost_rows(runs: Sequence[Run]) -> list[dict[str, str]]:
    """For each run, FLOPs and time of its routers against exact ones. Times are means over the newest records."""
    times = [float(run.totals["routing_seconds"].tail(RECORDS).mean()) for run in runs]
    exact_times: dict[tuple, float] = {}  # of the first exact run with such steps
    for run, time in zip(runs, times, strict=True):
        if run.routers == ["topk"]:
            exact_times.setdefault(_exact_work_of(run), time)
    rows = []
    for run, time in zip(runs, times, strict=True):
        own, exact = router_flops(run)
        exact_time = exact_times.get(_exact_work_of(run))
        rows.append(
            {
                "run": run.name,
                "router": ", ".join(run.routers),
                "router, MFLOPs per token": number(own, ",.3f", 1e-6),
                "exact, MFLOPs per token": number(exact, ",.3f", 1e-6),
                "share of exact": number(own / exact if own is not None and exact else None, ".2%"),
                "routing, ms per step": number(time, ",.1f", 1e3),
                "share of the step": number(float(run.totals["routing_share"].tail(RECORDS).mean()), ".1%"),
                "step, ms": number(float(run.steps["step_seconds"].tail(RECORDS).mean()), ",.0f", 1e3),
                "time against exact": number(time / exact_time if exact_time else None, ".2f"),
            }
        )
    return rows


def _exact_work_of(run: Run) -> tuple:
    """What decides the work of exact routers on a rank in a step; only where it is the same are times compared."""
    names = ("global_batch_size", "step_batch_size_schedule", "seq_length", "world_size")
    names += ("pipeline_model_parallel_size", "hidden_size", "bf16", "fp16", "moe_router_dtype")
    sizes = tuple(tuple(size.get(name) for name in ("layer", "num_experts", "topk")) for size in run.header["layers"])
    return run.header.get("device"), sizes, *(run.argument(name) for name in names)


def router_flops(run: Run) -> tuple[float | None, float | None]:
    """FLOPs per token of all layers' routers, and of exact ones in their place; None if a layer lacks the metric.

    A hash layer computes no input norm, and the file gives its exact router without one. In a run with other layers the
    exact router would have their norm, so it costs as much as in those with equally many experts.
    """
    layers = run.header["layers"]
    own = [layer.get("router_flops_per_token") for layer in layers]
    exact = [layer.get("exact_router_flops_per_token") for layer in layers]
    if None not in exact:
        most: dict[int | None, float] = {}  # experts of a layer -> FLOPs of an exact router, norm included
        for layer, cost in zip(layers, exact, strict=True):
            most[layer.get("num_experts")] = max(cost, most.get(layer.get("num_experts"), 0.0))
        exact = [most[layer.get("num_experts")] for layer in layers]
    own_sum, exact_sum = (None if None in costs or not costs else float(sum(costs)) for costs in (own, exact))
    return own_sum, exact_sum


def settings(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """Flags with their value in each run and whether the values differ; flags that differ come first."""
    names = sorted({name for run in runs for name in run.header["arguments"]})
    different = set().union(*(changes(runs[0].header["arguments"], run.header["arguments"]) for run in runs))
    rows = [(flag_of(name), [str(run.argument(name, "–")) for run in runs], name in different) for name in names]
    return sorted(rows, key=lambda row: not row[2])
