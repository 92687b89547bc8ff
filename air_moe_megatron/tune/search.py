"""Walk a grid of AIR's sizes, measure each on the same tokens of all layers, and choose the cheapest that suffices.

Legend: E experts, H hidden, C clusters, L shortlist, P probes, M candidates, K top-k.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

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
_TOKENS_PER_CLUSTER = 8  # least tokens of the fit per codeword: fewer do not give a meaningful mean


@dataclass(frozen=True)
class Setting:
    """Sizes of an AIR router."""

    num_clusters: int
    shortlist_size: int
    num_probes: int

    def flags(self) -> str:
        """The flags that select these sizes."""
        return (
            f"--moe-router-type air --moe-air-num-clusters {self.num_clusters} --moe-air-shortlist-size "
            f"{self.shortlist_size} --moe-air-num-probes {self.num_probes}"
        )


@dataclass(frozen=True)
class Result:
    """Cost and recall of a setting, or of another structure."""

    name: str
    setting: Setting | None  # None for a structure that is not AIR's
    flops: float  # of the router per token, forward, backward and rebuilds
    topk: tuple[float, ...]  # recall of each layer
    mass: tuple[float, ...]

    def recall(self, metric: str) -> float:
        """Recall of the worst layer, by "topk" or "mass"."""
        return min(self.topk if metric == "topk" else self.mass)


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


def grid(config: TransformerConfig, num_tokens: int) -> dict[int, list[Setting]]:
    """The valid settings that cost less than exact scores, by their number of clusters, in the order of trial.

    Args:
        config: the model's config.
        num_tokens: tokens of a layer's fit; codebooks that are too large for them are left out.
    """
    num_experts, root = config.num_moe_experts, math.sqrt(config.num_moe_experts)
    lengths = sorted({_round_up(root * factor) for factor in LENGTHS})
    settings = {
        clusters: [Setting(clusters, length, num_probes) for length in lengths for num_probes in PROBES]
        for clusters in dict.fromkeys(_round_up(root * factor) for factor in CLUSTERS)
        if clusters * _TOKENS_PER_CLUSTER <= num_tokens
    }
    chosen = automatic(config)
    if chosen not in settings.setdefault(chosen.num_clusters, []):
        settings[chosen.num_clusters].append(chosen)
    return {
        clusters: kept
        for clusters, of_clusters in settings.items()
        if (kept := [setting for setting in of_clusters if _is_of_use(config, setting, num_experts)])
    }


def _is_of_use(config: TransformerConfig, setting: Setting, num_experts: int) -> bool:
    searched = setting.num_clusters + setting.num_probes * setting.shortlist_size
    return searched < num_experts and not any(invalid(air_config(config, setting)))


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

    A number of clusters is left out if even its cheapest setting costs more than one that reaches the target, or if the
    time is up. The first is always measured.

    Args:
        layers: the model's layers; the recall of a setting is that of its worst layer.
        config: the model's config.
        target, metric: recall to reach, by "topk" or "mass".
        tokens_per_batch: tokens of a global batch, over which a rebuild is spread; None leaves rebuilds out of FLOPs.
        seconds: time after which no other number of clusters is begun.
        tick: called with the number of newly finished pairs of layer and number of clusters.
    """
    found, start = Search(), time.monotonic()
    for number, (clusters, settings) in enumerate(grid(config, layers[0].fit.shape[0]).items()):
        flops = {setting: flops_of(air_config(config, setting), tokens_per_batch) for setting in settings}
        best = cheapest(found.results, target, metric)
        if number and time.monotonic() - start > seconds:
            found.left_out[clusters] = "the time was up"
        elif best is not None and min(flops.values()) >= best.flops:
            found.left_out[clusters] = "its cheapest setting costs more than the best one found"
        if clusters in found.left_out:
            tick(len(layers))
            continue
        recalls = []
        for layer in layers:
            recalls.append(_measure_clusters(layer, settings))
            tick(1)
        for setting in settings:
            topk, mass = zip(*(recall[setting] for recall in recalls), strict=True)
            found.results.append(Result("air", setting, flops[setting], topk, mass))
    return found


def _measure_clusters(layer: Layer, settings: Sequence[Setting]) -> dict[Setting, tuple[float, float]]:
    """Top-k and mass recall of settings with the same number of clusters."""
    names = ("shortlist_size", "num_probes")
    lengths, probe_counts = (sorted({getattr(one, name) for one in settings}) for name in names)
    codebook = fit_codebook(layer.fit, settings[0].num_clusters)
    lists = make_lists(layer, codebook, lengths)
    topk, mass = recall_of_lists(layer, assign(layer.test, codebook.codewords, probe_counts[-1]), lists, probe_counts)
    indices = {one: (lengths.index(one.shortlist_size), probe_counts.index(one.num_probes)) for one in settings}
    return {one: (float(topk[index]), float(mass[index])) for one, index in indices.items()}


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
    layers: Sequence[Layer], config: TransformerConfig, routers: Sequence[AIRRouter], batch: int
) -> list[Result]:
    """The recall of the checkpoint's own codebooks and lists, and the cost of its routers; empty if it has none."""
    if not routers or any(layer.lists is None for layer in layers):
        return []
    sizes = routers[0].sizes
    setting = Setting(sizes.num_clusters, sizes.shortlist_size, sizes.num_probes)
    found = []
    for layer in layers:
        topk, mass = recall_of_lists(
            layer, assign(layer.test, layer.codewords, setting.num_probes), [layer.lists], [setting.num_probes]
        )
        found.append((float(topk), float(mass)))
    return [Result("checkpoint", setting, flops_of(config, batch), *zip(*found, strict=True))]


def measure_others(layers: Iterable[Layer], config: TransformerConfig) -> list[Result]:
    """The recall of groups, for growing numbers of searched ones, and of product keys, fitted to the same centers."""
    groups = resolve_groups(of_type(config, "hierarchical"))
    keys = resolve_product_keys(of_type(config, "product_key")).num_keys
    searched = [number for number in _SEARCHED_GROUPS if number < groups.num_groups]
    of_groups, of_keys = [], []
    for layer in layers:
        if groups.num_groups * layer.num_experts <= _MOST_SIMILARITIES:
            of_groups.append(torch.stack(measure_groups(layer, groups.num_groups, searched), dim=1).tolist())
        of_keys.append(measure_product_keys(layer, keys))
    found = []
    if of_groups:
        for number, recalls in zip(searched, zip(*of_groups, strict=True), strict=True):
            fields = {"moe_hierarchical_num_groups": groups.num_groups, "moe_hierarchical_topk_groups": number}
            flops = flops_of(of_type(config, "hierarchical", **fields))
            found.append(Result(f"groups: {number} of {groups.num_groups}", None, flops, *zip(*recalls, strict=True)))
    # Forward, each half of a token is multiplied with the sub-keys of this half; backward costs twice that. The keys
    # are fitted to tokens after the input norm, and need it as the others do.
    flops = 3.0 * config.hidden_size * sum(keys) + of_norm(of_type(config, "topk"))
    found.append(Result(f"product keys: {keys[0]} x {keys[1]}", None, flops, *zip(*of_keys, strict=True)))
    return found
