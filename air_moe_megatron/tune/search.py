"""Walk a grid of AIR's sizes, measure each on the same tokens of all layers, and choose the cheapest that suffices.

Legend: E experts, H hidden, C clusters, L shortlist, P probes, M candidates, K top-k.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config import (
    AIRFields,
    invalid,
    resolve_groups,
    resolve_product_keys,
    resolve_sizes,
    set_fields,
)
from air_moe_megatron.ops.coarse import assign
from air_moe_megatron.routers import ROUTERS, AIRRouter
from air_moe_megatron.routers.flops import Rebuilds, of_norm
from air_moe_megatron.tune.baselines import measure_groups, measure_product_keys
from air_moe_megatron.tune.recall import Layer, fit_codebook, make_lists, recall_of_lists

CLUSTERS = (4.0, 2.0, 8.0, 1.0, 16.0)  # over sqrt(E), in the order in which they are tried
LENGTHS = (0.25, 0.375, 0.5, 9 / 16, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)  # over sqrt(E)
PROBES = (1, 2, 4, 8, 16)
_SEARCHED_GROUPS = (1, 2, 4, 8, 16, 32)
_MOST_SIMILARITIES = 2**28  # between centers and groups; beyond that, groups are not fitted
_KEPT = (
    "moe_air_codebook_ema",
    "moe_air_refresh_interval",
    "moe_dispatch",
    "moe_granular_experts",
    "moe_router_input_norm",
)
TOKENS_PER_CLUSTER = 8  # least tokens of the fit per codeword: fewer do not give a meaningful mean


@dataclass(frozen=True)
class Setting:
    """Sizes of an AIR router."""

    num_clusters: int
    shortlist_size: int
    num_probes: int
    num_candidates: int = 0  # 0 is automatic

    @property
    def num_searched(self) -> int:
        """Slots of the lists that a token searches, P * L."""
        return self.num_probes * self.shortlist_size

    def flags(self) -> str:
        """The flags that select these sizes."""
        words = ["--moe-router-type air"]
        words += [f"--moe-air-{name.replace('_', '-')} {size}" for name, size in asdict(self).items() if size]
        return " ".join(words)


@dataclass(frozen=True)
class Result:
    """Cost and recall of a setting, or of another structure."""

    name: str
    setting: Setting | None  # None for a structure that is not AIR's
    flops: float  # of the router per token, forward, backward and rebuilds
    topk: tuple[float, ...]  # recall of each layer
    mass: tuple[float, ...]  # of all listed experts, or of the candidates if the setting has a number of them

    def recalls(self, metric: str) -> tuple[float, ...]:
        """Recall of each layer, by "topk" or "mass"."""
        return self.topk if metric == "topk" else self.mass

    def recall(self, metric: str) -> float:
        """Recall of the worst layer."""
        return min(self.recalls(metric))


@dataclass
class Search:
    """The results of a search and what it left out."""

    results: list[Result] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)  # number of clusters -> why


def of_type(config: TransformerConfig, router_type: str, **fields: object) -> TransformerConfig:
    """Copy a config for another router: our fields are as given, except that those of experts and rebuilds stay."""
    changed = copy.copy(config)
    kept = {name: getattr(config, name) for name in _KEPT if hasattr(config, name)}
    set_fields(changed, AIRFields(**{**kept, "moe_router_type": router_type, **fields}))
    return changed


def air_config(config: TransformerConfig, setting: Setting | None = None) -> TransformerConfig:
    """Copy a config for AIR routing with these sizes; None means the automatic ones."""
    sizes = {} if setting is None else {f"moe_air_{name}": size for name, size in asdict(setting).items()}
    return of_type(config, "air", **sizes)


def flops_of(config: TransformerConfig, tokens_per_batch: int | None = None) -> float:
    """FLOPs of a router per token. Given the tokens of a batch, they include rebuilds as on this device."""
    rebuilds = None
    if tokens_per_batch is not None:
        rebuilds = Rebuilds(tokens_per_batch, on_gpu=torch.cuda.is_available())
    return ROUTERS[config.moe_router_type].flops(config, rebuilds).total


def automatic(config: TransformerConfig) -> Setting:
    """The sizes that a run chooses automatically."""
    sizes = resolve_sizes(air_config(config))
    return Setting(sizes.num_clusters, sizes.shortlist_size, sizes.num_probes)


def grid(config: TransformerConfig, metric: str = "topk") -> dict[int, list[Setting]]:
    """The valid settings that cost less than exact scores, by their number of clusters, in the order of trial.

    Args:
        config: the model's config.
        metric: recall to reach. The number of candidates changes the recall by "mass" only, so only then several are in
            the grid.
    """
    root = math.sqrt(config.num_moe_experts)
    lengths = sorted({_round_up(root * factor) for factor in LENGTHS})
    settings = {
        clusters: [Setting(clusters, length, num_probes) for length in lengths for num_probes in PROBES]
        for clusters in dict.fromkeys(_round_up(root * factor) for factor in CLUSTERS)
    }
    chosen = automatic(config)
    if chosen not in settings.setdefault(chosen.num_clusters, []):
        settings[chosen.num_clusters].append(chosen)
    of_use = {
        clusters: [setting for setting in of_clusters if _is_of_use(config, setting)]
        for clusters, of_clusters in settings.items()
    }
    return {
        clusters: with_candidates(config, kept) if chooses_candidates(config, metric) else kept
        for clusters, kept in of_use.items()
        if kept
    }


def _is_of_use(config: TransformerConfig, setting: Setting) -> bool:
    num_scored = setting.num_clusters + setting.num_searched
    return num_scored < config.num_moe_experts and not any(invalid(air_config(config, setting)))


def chooses_candidates(config: TransformerConfig, metric: str) -> bool:
    """Whether the number of candidates is part of the choice. With an expert bias all get gradients."""
    return metric == "mass" and not config.moe_router_enable_expert_bias


def with_candidates(config: TransformerConfig, settings: Iterable[Setting]) -> list[Setting]:
    """Each setting with several numbers of candidates: around the automatic one, the least, and all."""
    usual, topk = resolve_sizes(air_config(config)).num_candidates, config.moe_router_topk
    return [
        replace(setting, num_candidates=number)
        for setting in settings
        for number in sorted({topk, usual // 2, usual, 2 * usual, 4 * usual, setting.num_searched})
        if topk <= number <= setting.num_searched
    ]


def _round_up(size: float) -> int:
    return max(8, -(-math.ceil(size) // 8) * 8)


def search(
    layers: Sequence[Layer],
    config: TransformerConfig,
    target: float,
    metric: str,
    tokens_per_batch: int | None,
    seconds: float,
    tick: Callable[[int], object] = lambda count: None,
) -> Search:
    """Measure the grid, one number of clusters after another.

    A number of clusters is left out if it has too few tokens of the fit, if even its cheapest setting costs more than
    one that reaches the target, or if the time is up. The first that has enough tokens is always measured.

    Args:
        layers: the model's layers; the recall of a setting is that of its worst layer.
        config: the model's config.
        target, metric: recall to reach, by "topk" or "mass".
        tokens_per_batch: tokens of a global batch, over which a rebuild is spread; None leaves rebuilds out of FLOPs.
        seconds: time after which no other number of clusters is begun.
        tick: called with the number of newly finished pairs of layer and number of clusters.
    """
    found, start, num_tokens = Search(), time.monotonic(), layers[0].fit.shape[0]
    for clusters, settings in grid(config, metric).items():
        flops = costs_of(config, settings, tokens_per_batch)
        best = cheapest(found.results, target, metric)
        if num_tokens < TOKENS_PER_CLUSTER * clusters:
            found.left_out[clusters] = f"their fit takes at least {TOKENS_PER_CLUSTER * clusters} tokens (--fit-tokens)"
        elif found.results and time.monotonic() - start > seconds:
            found.left_out[clusters] = "the time was up"
        elif best is not None and min(flops.values()) >= best.flops:
            found.left_out[clusters] = "its cheapest setting costs more than the best one found"
        if clusters in found.left_out:
            tick(len(layers))
        else:
            found.results += measure(layers, flops, tick)
    return found


def costs_of(
    config: TransformerConfig, settings: Iterable[Setting], tokens_per_batch: int | None
) -> dict[Setting, float]:
    """FLOPs per token of settings, as :func:`flops_of` counts them."""
    return {setting: flops_of(air_config(config, setting), tokens_per_batch) for setting in settings}


def measure(
    layers: Sequence[Layer], flops: dict[Setting, float], tick: Callable[[int], object] = lambda count: None
) -> list[Result]:
    """The results of settings with the same number of clusters, each given with its FLOPs."""
    recalls = []
    for layer in layers:
        recalls.append(_measure_clusters(layer, list(flops)))
        tick(1)
    return [
        Result("air", setting, cost, *zip(*(recall[setting] for recall in recalls), strict=True))
        for setting, cost in flops.items()
    ]


def _measure_clusters(layer: Layer, settings: Sequence[Setting]) -> dict[Setting, tuple[float, float]]:
    """Top-k and mass recall of settings with the same number of clusters."""
    codebook = fit_codebook(layer.fit, settings[0].num_clusters)
    lengths = sorted({one.shortlist_size for one in settings})
    lists = dict(zip(lengths, make_lists(layer, codebook, lengths), strict=True))
    return _recalls(layer, codebook.codewords, lists, settings)


def _recalls(
    layer: Layer, codewords: torch.Tensor, lists: dict[int, torch.Tensor], settings: Sequence[Setting]
) -> dict[Setting, tuple[float, float]]:
    """Top-k and mass recall of settings, whose lists are given by their lengths."""
    lengths, probe_counts = list(lists), sorted({one.num_probes for one in settings})
    numbers = sorted({one.num_candidates for one in settings if 0 < one.num_candidates < one.num_searched})
    probes = assign(layer.test, codewords, probe_counts[-1])
    topk, of_lists, of_candidates = recall_of_lists(layer, probes, list(lists.values()), probe_counts, numbers)
    found = {}
    for one in settings:
        index = lengths.index(one.shortlist_size), probe_counts.index(one.num_probes)
        mass = of_candidates[numbers.index(one.num_candidates)] if one.num_candidates in numbers else of_lists
        found[one] = float(topk[index]), float(mass[index])
    return found


def cheapest(results: Sequence[Result], target: float, metric: str) -> Result | None:
    """The result with the fewest FLOPs that reaches the target in every layer; None if there is none."""
    reaching = [result for result in results if result.recall(metric) >= target]
    return min(reaching, key=lambda result: (result.flops, -result.recall(metric)), default=None)


def best(results: Sequence[Result], metric: str) -> Result:
    """The result with the highest recall; of equal ones, the one with the fewest FLOPs."""
    return max(results, key=lambda result: (result.recall(metric), -result.flops))


def frontier(results: Sequence[Result], metric: str) -> list[Result]:
    """The results whose recall no other result exceeds at the same or lower cost, cheapest first."""
    kept: list[Result] = []
    for result in sorted(results, key=lambda one: (one.flops, -one.recall(metric))):
        if not kept or result.recall(metric) > kept[-1].recall(metric):
            kept.append(result)
    return kept


def measure_loaded(
    layers: Sequence[Layer], config: TransformerConfig, routers: Sequence[AIRRouter], metric: str, batch: int
) -> list[Result]:
    """The recall of the checkpoint's own codebooks and lists, and the cost of its routers; empty if it has none."""
    if not routers or any(layer.lists is None for layer in layers):
        return []
    sizes = routers[0].sizes
    setting = Setting(sizes.num_clusters, sizes.shortlist_size, sizes.num_probes)
    if chooses_candidates(config, metric):
        setting = replace(setting, num_candidates=sizes.num_candidates)
    found = [
        _recalls(layer, layer.codewords, {sizes.shortlist_size: layer.lists}, [setting])[setting] for layer in layers
    ]
    return [Result("checkpoint", setting, flops_of(config, batch), *zip(*found, strict=True))]


def measure_others(layers: Iterable[Layer], config: TransformerConfig) -> list[Result]:
    """The recall of groups, for growing numbers of searched ones, and of product keys, fitted to the same centers.

    A structure is left out if the number of experts does not divide into it, as a prime number does not.
    """
    groups = resolve_groups(of_type(config, "hierarchical"))
    keys = resolve_product_keys(of_type(config, "product_key")).num_keys
    searched = [number for number in _SEARCHED_GROUPS if number < groups.num_groups]
    has_groups = groups.group_size > 1 and groups.num_groups * config.num_moe_experts <= _MOST_SIMILARITIES
    has_keys = min(keys) > 1
    of_groups, of_keys = [], []
    for layer in layers:
        if has_groups:
            of_groups.append(torch.stack(measure_groups(layer, groups.num_groups, searched), dim=1).tolist())
        if has_keys:
            of_keys.append(measure_product_keys(layer, keys))
    found = []
    if has_groups:
        for number, recalls in zip(searched, zip(*of_groups, strict=True), strict=True):
            fields = {"moe_hierarchical_num_groups": groups.num_groups, "moe_hierarchical_topk_groups": number}
            flops = flops_of(of_type(config, "hierarchical", **fields))
            found.append(Result(f"groups: {number} of {groups.num_groups}", None, flops, *zip(*recalls, strict=True)))
    if has_keys:
        # Forward, each half of a token is multiplied with the sub-keys of this half; backward costs twice that. The
        # keys are fitted to tokens after the input norm, and need it as the others do.
        flops = 3.0 * config.hidden_size * sum(keys) + of_norm(of_type(config, "topk"))
        found.append(Result(f"product keys: {keys[0]} x {keys[1]}", None, flops, *zip(*of_keys, strict=True)))
    return found
