"""The report: the choice as flags, the table of settings, and what the choice means layer by layer."""

import argparse
import dataclasses
import itertools
from collections.abc import Sequence

import pandas
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config import resolve_sizes
from air_moe_megatron.diagnostics.recall import measure_sample
from air_moe_megatron.diagnostics.two_stages import TwoStages
from air_moe_megatron.ops.coarse import assign
from air_moe_megatron.routers.air import TokenSample
from air_moe_megatron.routers.learned_bytes import learned_bytes
from air_moe_megatron.tune.recall import Layer, fit_codebook, make_lists, mass_of_candidates, time_exact, time_search
from air_moe_megatron.tune.search import (
    Result,
    Search,
    Setting,
    air_config,
    automatic,
    best,
    cheapest,
    flops_of,
    frontier,
    of_type,
)

METRICS = {"topk": "top-k", "mass": "mass"}
_COSTS = (
    "the rows of AIR have the automatic M and X = 0, as a run without --moe-air-num-candidates and "
    "--moe-air-num-explored; that of the checkpoint has its own"
)
_SHOWN = 10  # settings of the frontier in the table
_SAMPLED = 256  # tokens for which bounds are computed
_FORMATS = {"C": "{:.0f}", "L": "{:.0f}", "P": "{:.0f}", "kFLOPs": "{:.1f}", "KiB": "{:.0f}", "us/token": "{:.2f}"}


def report(
    args: argparse.Namespace,
    config: TransformerConfig,
    layers: Sequence[Layer],
    found: Search,
    loaded: Sequence[Result],
    others: Sequence[Result],
    batch: int,
) -> str:
    """The report: the choice, the table, the choice's candidates and layers, and what was left out."""
    metric, target = args.target_metric, args.target_recall
    exact = flops_of(of_type(config, "topk"))
    chosen = cheapest(found.results, target, metric)
    shown = chosen or best(found.results, metric)
    candidates = measure_candidates(layers, config, shown, batch)
    lines = ["", _verdict(shown, chosen is not None, target, metric, exact)]
    has_bias = config.moe_router_enable_expert_bias  # then all candidates get gradients
    lines.append(
        f"  {shown.setting.flags()}" + ("" if metric == "topk" or has_bias else _candidates_flag(candidates, target))
    )
    table, worst = _table(layers, config, found, shown, loaded, others, metric, exact)
    lines += ["", table]
    lines += [_COSTS]
    lines += [f"bounds, certified tokens and time are those of layer {worst.name}, whose recall is the lowest"]
    lines += ["", "The chosen setting by layer:" if chosen is not None else "That setting by layer:"]
    by_layer = pandas.DataFrame({"layer": [layer.name for layer in layers], "top-k": shown.topk, "mass": shown.mass})
    lines += [by_layer.to_string(index=False, float_format="{:.3f}".format)]
    lines += ["", "Its candidates with gradients (--moe-air-num-candidates), which losses and probabilities see:"]
    lines += [candidates.to_string(index=False, float_format="{:.3f}".format)]
    lines += [f"left out: {number} clusters, {reason}" for number, reason in found.left_out.items()]
    return "\n".join(lines) + "\n"


def _verdict(shown: Result, is_reached: bool, target: float, metric: str, exact: float) -> str:
    cost = f"at 1/{exact / shown.flops:.1f} of the FLOPs of exact routing"
    recall = f"{METRICS[metric]} recall"
    if is_reached:
        return (
            f"The cheapest setting with a {recall} of {target} in every layer has {shown.recall(metric):.3f}, {cost}:"
        )
    return (
        f"No setting that was measured reaches a {recall} of {target} in every layer for less than exact routing "
        f"costs. The best one has {shown.recall(metric):.3f}, {cost}:"
    )


def measure_candidates(
    layers: Sequence[Layer], config: TransformerConfig, result: Result, batch: int
) -> pandas.DataFrame:
    """Mass in the worst layer, and cost, of the best M candidates of a setting, for several M."""
    setting = result.setting
    automatic_number = resolve_sizes(air_config(config, setting)).num_candidates
    most = setting.num_probes * setting.shortlist_size
    numbers = {config.moe_router_topk, automatic_number, most}
    numbers |= {automatic_number // 2, 2 * automatic_number, 4 * automatic_number}
    numbers = sorted(number for number in numbers if config.moe_router_topk <= number <= most)
    masses = []
    for layer in layers:
        codebook = fit_codebook(layer.fit, setting.num_clusters)
        (lists,) = make_lists(layer, codebook, [setting.shortlist_size])
        masses.append(
            mass_of_candidates(layer, assign(layer.test, codebook.codewords, setting.num_probes), lists, numbers)
        )
    rows = []
    for number, mass in zip(numbers, torch.stack(masses).amin(dim=0).tolist(), strict=True):
        changed = air_config(config, setting)
        changed.moe_air_num_candidates = number
        note = "automatic" if number == automatic_number else "all" if number == most else ""
        rows.append({"M": number, "": note, "mass": mass, "kFLOPs": flops_of(changed, batch) / 1e3})
    return pandas.DataFrame(rows)


def _candidates_flag(candidates: pandas.DataFrame, target: float) -> str:
    """The flag with the fewest candidates whose mass reaches the target; all of them if none does."""
    reaching = candidates[candidates["mass"] >= target]
    number = int((reaching if len(reaching) else candidates.tail(1))["M"].iloc[0])
    return f" --moe-air-num-candidates {number}"


def _table(
    layers: Sequence[Layer],
    config: TransformerConfig,
    found: Search,
    shown: Result,
    loaded: Sequence[Result],
    others: Sequence[Result],
    metric: str,
    exact: float,
) -> tuple[str, Layer]:
    """The table, and the layer in which its bounds and times were measured."""
    line, usual = frontier(found.results, metric), automatic(config)
    kept = [*line[:: max(1, -(-len(line) // _SHOWN))], shown, *(one for one in found.results if one.setting == usual)]
    kept = sorted({one.setting: one for one in kept}.values(), key=lambda one: one.flops)
    recalls = shown.topk if metric == "topk" else shown.mass
    worst = layers[recalls.index(min(recalls))]
    details = _details(worst, config, [*kept, *loaded])
    rows = [_row(one, _name(one, shown, usual), exact) for one in [*kept, *loaded, *others]]
    rows = [row | detail for row, detail in itertools.zip_longest(rows, details, fillvalue={})]
    rows.append({"router": "exact top-k", "top-k": 1.0, "mass": 1.0, "kFLOPs": exact / 1e3, "of exact": 1.0})
    rows[-1]["us/token"] = time_exact(worst) * 1e6
    table = pandas.DataFrame(rows)
    for name in table.columns[1:]:
        table[name] = [
            "-" if pandas.isna(value) else _FORMATS.get(name, "{:.3f}").format(value) for value in table[name]
        ]
    return table.to_string(index=False), worst


def _name(result: Result, shown: Result, usual: Setting) -> str:
    if result.name == "checkpoint":
        return "AIR as in the checkpoint"
    if result.setting is None:
        return result.name
    notes = [word for word, holds in (("chosen", result is shown), ("automatic", result.setting == usual)) if holds]
    return " ".join(["AIR", *(f"({note})" for note in notes)])


def _row(result: Result, name: str, exact: float) -> dict[str, object]:
    sizes = (None, None, None) if result.setting is None else dataclasses.astuple(result.setting)
    return {
        "router": name,
        **dict(zip("CLP", sizes, strict=True)),
        "top-k": min(result.topk),
        "mass": min(result.mass),
        "kFLOPs": result.flops / 1e3,
        "of exact": result.flops / exact,
    }


def _details(layer: Layer, config: TransformerConfig, results: Sequence[Result]) -> list[dict[str, float]]:
    """Bound, certified share, time and memory of settings in one layer."""
    details, codebooks = [], {}
    hidden = layer.test[:: max(1, layer.test.shape[0] // _SAMPLED)]
    for result in results:
        setting = result.setting
        if result.name == "checkpoint":
            codewords, lists = layer.codewords, layer.lists
        else:
            if setting.num_clusters not in codebooks:
                codebooks[setting.num_clusters] = fit_codebook(layer.fit, setting.num_clusters)
            codewords = codebooks[setting.num_clusters].codewords
            (lists,) = make_lists(layer, codebooks[setting.num_clusters], [setting.shortlist_size])
        sample = TokenSample(hidden, assign(hidden, codewords, setting.num_probes), None)
        stages = TwoStages(codewords, lists, layer.centers, layer.topk, layer.centers.expert_bias)
        metrics = measure_sample(stages, sample)
        details.append(
            {
                "bound": float(metrics.mass_bound.mean()),
                "certified": float(metrics.certified.float().mean()),
                "us/token": time_search(layer, codewords, lists, setting.num_probes) * 1e6,
                "KiB": sum(learned_bytes(air_config(config, setting))[0].values()) / 1024,
            }
        )
    return details
