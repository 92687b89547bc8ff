"""The report: the choice as flags, the table of settings, and what the choice means layer by layer."""

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
from air_moe_megatron.tune.measured import Measured
from air_moe_megatron.tune.recall import Layer, fit_codebook, make_lists, time_exact, time_search
from air_moe_megatron.tune.search import (
    Result,
    Setting,
    air_config,
    chooses_candidates,
    costs_of,
    frontier,
    measure,
    with_candidates,
)

METRICS = {"topk": "top-k", "mass": "mass"}
_COSTS = (  # if M is automatic
    "the rows of AIR have the automatic M and X = 0, as a run without --moe-air-num-candidates and "
    "--moe-air-num-explored; that of the checkpoint has its own",
    "mass is that of all listed experts",
)
_COSTS_OF_CANDIDATES = (  # if M is a part of the choice
    "the rows of AIR have X = 0, as a run without --moe-air-num-explored; that of the checkpoint has its own",
    "mass is that of the M candidates",
)
_SHOWN = 10  # settings of the frontier in the table
_SAMPLED = 256  # tokens for which bounds are computed
_FORMATS = {name: "{:.0f}" for name in ("C", "L", "P", "M", "KiB")} | {"kFLOPs": "{:.1f}", "us/token": "{:.2f}"}


def report(measured: Measured) -> str:
    """The report: the choice, the table, the choice's candidates and layers, and what was left out."""
    shown, worst, is_reached = measured.shown, measured.worst_layer, measured.chosen is not None
    has_candidates = chooses_candidates(measured.config, measured.metric)
    lines = ["", _verdict(measured), f"  {_flags(measured)}", *_remarks(measured.config), "", _table(measured)]
    lines += _COSTS_OF_CANDIDATES if has_candidates else _COSTS
    lines += [f"listed, bound, certified and us/token are those of layer {worst.name}, whose recall is the lowest"]
    lines += [
        f"listed is the mass of all listed experts for {len(_sample(worst))} tokens, bound its proven lower bound"
    ]
    lines += ["", "The chosen setting by layer:" if is_reached else "That setting by layer:"]
    names = [layer.name for layer in measured.layers]
    by_layer = pandas.DataFrame({"layer": names, "top-k": shown.topk, "mass": shown.mass})
    lines += [by_layer.to_string(index=False, float_format="{:.3f}".format)]
    lines += ["", "Its candidates with gradients (--moe-air-num-candidates), which losses and probabilities see:"]
    lines += [_candidates(measured).to_string(index=False, float_format="{:.3f}".format)]
    lines += [f"left out: {number} clusters, {reason}" for number, reason in measured.found.left_out.items()]
    return "\n".join(lines) + "\n"


def _verdict(measured: Measured) -> str:
    shown, recall = measured.shown, f"{METRICS[measured.metric]} recall"
    cost = f"at 1/{measured.exact_flops / shown.flops:.1f} of the FLOPs of exact routing"
    reached = f"{shown.recall(measured.metric):.3f}, {cost}:"
    if measured.chosen is not None:
        return f"The cheapest setting with a {recall} of {measured.target} in every layer has {reached}"
    return (
        f"No setting that was measured reaches a {recall} of {measured.target} in every layer for less than exact "
        f"routing costs. The best one has {reached}"
    )


def _flags(measured: Measured) -> str:
    """The flags that select the shown setting; the measured codebooks are of tokens, whatever the checkpoint's are."""
    flags = measured.shown.setting.flags()
    return flags if _source(measured.config) == "tokens" else f"{flags} --moe-air-codebook-source tokens"


def _source(config: TransformerConfig) -> str:
    return getattr(config, "moe_air_codebook_source", "tokens")


def _remarks(config: TransformerConfig) -> list[str]:
    """How the checkpoint's lists differ in form from the measured ones."""
    remarks, parts = [], getattr(config, "moe_air_list_parts", 1)
    if _source(config) != "tokens":
        remarks.append("  the checkpoint's own lists, with codebooks of its experts, are not measured")
    if parts > 1:
        remarks.append(
            f"  lists are measured in one part; --moe-air-list-parts {parts} must divide the length L, and its recall "
            "may be slightly lower"
        )
    return remarks


def _candidates(measured: Measured) -> pandas.DataFrame:
    """Mass in the worst layer, and cost, of the shown setting's best M candidates, for several M."""
    config, setting = measured.config, dataclasses.replace(measured.shown.setting, num_candidates=0)
    usual = resolve_sizes(air_config(config, setting)).num_candidates
    settings = with_candidates(config, [setting]) if chooses_candidates(config, "mass") else [setting]
    rows = []
    for one in measure(measured.layers, costs_of(config, settings, measured.tokens_per_batch)):
        number = one.setting.num_candidates or usual
        note = "automatic" if number == usual else "all" if number == setting.num_searched else ""
        rows.append({"M": number, "": note, "mass": one.recall("mass"), "kFLOPs": one.flops / 1e3})
    return pandas.DataFrame(rows)


def _table(measured: Measured) -> str:
    """A part of the settings, the checkpoint's own one, the other structures, and exact routing."""
    line, worst, exact = frontier(measured.found.results, measured.metric), measured.worst_layer, measured.exact_flops
    kept = [*line[:: max(1, -(-len(line) // _SHOWN))], measured.shown]
    kept += [one for one in measured.found.results if _is_automatic(measured.config, one.setting)]
    kept = sorted({one.setting: one for one in kept}.values(), key=lambda one: one.flops)
    details = _details(worst, measured.config, [*kept, *measured.loaded])
    rows = [_row(measured, one) for one in [*kept, *measured.loaded, *measured.others]]
    rows = [row | detail for row, detail in itertools.zip_longest(rows, details, fillvalue={})]
    rows.append({"router": "exact top-k", "top-k": 1.0, "mass": 1.0, "kFLOPs": exact / 1e3, "of exact": 1.0})
    rows[-1]["us/token"] = time_exact(worst) * 1e6
    table = pandas.DataFrame(rows)
    for name in table.columns[1:]:
        table[name] = [
            "-" if pandas.isna(value) else _FORMATS.get(name, "{:.3f}").format(value) for value in table[name]
        ]
    return table.to_string(index=False)


def _is_automatic(config: TransformerConfig, setting: Setting) -> bool:
    return resolve_sizes(air_config(config, setting)) == resolve_sizes(air_config(config))


def _name(measured: Measured, result: Result) -> str:
    if result.name == "checkpoint":
        return "AIR as in the checkpoint"
    if result.setting is None:
        return result.name
    notes = ["(chosen)"] if result is measured.shown else []
    notes += ["(automatic)"] if _is_automatic(measured.config, result.setting) else []
    return " ".join(["AIR", *notes])


def _row(measured: Measured, result: Result) -> dict[str, object]:
    names = "CLPM" if chooses_candidates(measured.config, measured.metric) else "CLP"
    sizes = dataclasses.astuple(result.setting) if result.setting is not None else [None] * len(names)
    return {
        "router": _name(measured, result),
        **dict(zip(names, sizes, strict=False)),
        "top-k": min(result.topk),
        "mass": min(result.mass),
        "kFLOPs": result.flops / 1e3,
        "of exact": result.flops / measured.exact_flops,
    }


def _sample(layer: Layer) -> torch.Tensor:
    """[n, H] held-out tokens for which bounds are computed."""
    return layer.test[:: max(1, layer.test.shape[0] // _SAMPLED)]


def _details(layer: Layer, config: TransformerConfig, results: Sequence[Result]) -> list[dict[str, float]]:
    """Mass with its bound, certified share, time and memory of settings in one layer."""
    details, codebooks, hidden = [], {}, _sample(layer)
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
                "listed": float(metrics.mass_recall.mean()),
                "bound": float(metrics.mass_bound.mean()),
                "certified": float(metrics.certified.float().mean()),
                "us/token": time_search(layer, codewords, lists, setting.num_probes) * 1e6,
                "KiB": sum(learned_bytes(air_config(config, setting))[0].values()) / 1024,
            }
        )
    return details
