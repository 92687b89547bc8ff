"""Metrics of single layers, from what the ranks of one pipeline stage have seen in a step.

Legend: n tokens of the sample; others as in ``ops/__init__.py``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from air_moe_megatron.diagnostics.health import listed_share_of, load_metrics_of
from air_moe_megatron.diagnostics.observation import CodewordCounter
from air_moe_megatron.diagnostics.recall import measure
from air_moe_megatron.process_groups import group_size, sum_over_ranks
from air_moe_megatron.routers import AIRRouter, ExactRouter
from air_moe_megatron.routers.base import CompactRouter
from air_moe_megatron.routers.flops import Rebuilds
from air_moe_megatron.routers.losses import layer_of

SAMPLE_METRICS = ("mass_recall", "paper_bound", "mass_bound", "certified", "topk_recall")
_MOST_BINS = 64


@dataclass(frozen=True)
class RouterSums:
    """Measurements of one router in a step, over all ranks of its pipeline stage. Tensors are fp64, on the CPU."""

    seconds: float  # in its forwards, mean over the ranks
    sample: torch.Tensor | None = None  # AIR: [6] sums of SAMPLE_METRICS, and the number of sampled tokens
    codeword_load: torch.Tensor | None = None  # AIR: [C] tokens
    codeword_recall: torch.Tensor | None = None  # AIR: [2, C] sums of the sample's top-k recall, and sampled tokens


def reduce_stage(
    routers: Sequence[CompactRouter], seconds: Sequence[float], counters: dict[CompactRouter, CodewordCounter]
) -> list[RouterSums]:
    """Measure the routers' samples of tokens, and sum what the ranks of the stage have seen of each router.

    Communicates: one all-reduce over ``tp_dp_cp`` of one fp64 number per router and ``3 * C + 6`` more per AIR router;
    sharded routers also in :func:`~air_moe_megatron.diagnostics.recall.measure`. Waits for the device. The samples are
    dropped.

    Args:
        routers: those of one pipeline stage, at least one.
        seconds: for each router, seconds in its forwards on this rank.
        counters: those of the AIR routers among them.
    Returns:
        the sums of each router.
    """
    device, group = routers[0].expert_load.device, routers[0].tp_dp_cp_group
    parts = [torch.tensor(seconds, dtype=torch.float64, device=device)]
    parts += [_sums_of(router, counters[router]) for router in routers if isinstance(router, AIRRouter)]
    sizes = [part.numel() for part in parts]
    spent, *parts = sum_over_ranks(torch.cat(parts), group).cpu().split(sizes)
    sums = []
    for router, total in zip(routers, spent.tolist(), strict=True):
        if isinstance(router, AIRRouter):
            num_clusters = router.sizes.num_clusters
            sample, load, recall = parts.pop(0).split([len(SAMPLE_METRICS) + 1, num_clusters, 2 * num_clusters])
            sums.append(RouterSums(total / group_size(group), sample, load, recall.view(2, -1)))
        else:
            sums.append(RouterSums(total / group_size(group)))
    return sums


@torch.no_grad()
def _sums_of(router: AIRRouter, counter: CodewordCounter) -> torch.Tensor:
    """[6 + 3 * C] fp64: the sums of this rank, as :class:`RouterSums` holds them."""
    sample = counter.load.new_zeros(len(SAMPLE_METRICS) + 1, dtype=torch.float64)
    recall = counter.load.new_zeros(2, router.sizes.num_clusters, dtype=torch.float64)
    metrics = measure(router)
    router.sample = None
    if metrics is not None:
        values = torch.stack([getattr(metrics, name).double() for name in SAMPLE_METRICS])  # [5, n]
        sample[:-1], sample[-1] = values.sum(dim=1), values.shape[1]
        nearest = metrics.probed[:, 0]
        recall[0].index_add_(0, nearest, values[-1])
        recall[1].index_add_(0, nearest, torch.ones_like(values[-1]))
    return torch.cat((sample, counter.load.double(), recall.flatten()))


def layer_metrics(
    router: CompactRouter, sums: RouterSums, load: torch.Tensor, last_lists: torch.Tensor | None
) -> dict[str, Any]:
    """The metrics of one layer, as far as its router has them.

    Every rank of the stage must call it: a sharded router communicates over its expert-parallel group.

    Args:
        router: the layer's router.
        sums: its measurements in this step.
        load: [E] tokens of each expert on all ranks since the previous diagnostics.
        last_lists: [C, L] int32, AIR's lists at the previous diagnostics; None if there were none.
    """
    metrics: dict[str, Any] = {"layer": layer_of(router), "router": router.router_type}
    if isinstance(router, AIRRouter):
        num_tokens = float(sums.sample[-1])
        if num_tokens:
            means = (sums.sample[:-1] / num_tokens).tolist()
            metrics |= dict(zip(SAMPLE_METRICS, means, strict=True))
        error = router.codebook.health().quantization_error
        if error is not None:
            metrics["quantization_error"] = error
        metrics |= codeword_metrics(sums.codeword_load)
        if last_lists is not None:
            overlap = list_overlap(last_lists, router.index.shortlist)
            metrics["list_overlap"] = float(router.mean_over_shards(load.new_tensor(overlap, dtype=torch.float64)))
        metrics["experts_listed"] = float(listed_share_of(router))
    metrics |= load_metrics_of(load, router.config.expert_model_parallel_size)
    metrics["routing_seconds"] = sums.seconds
    metrics["load_bins"], metrics["max_bins"] = load_bins(load)
    return metrics


def describe(router: CompactRouter, tokens_per_batch: int) -> dict[str, Any]:
    """Describe a router for the first line of a run. FLOPs cover forward, backward and AIR's rebuilds."""
    described: dict[str, Any] = {
        "layer": layer_of(router),
        "router": router.router_type,
        "num_experts": router.num_experts,
        "topk": router.topk,
    }
    if isinstance(router, AIRRouter):
        names = ("num_clusters", "shortlist_size", "num_probes", "num_candidates", "num_explored")
        described |= {name: getattr(router.sizes, name) for name in names}
    is_on_gpu = any(parameter.is_cuda for parameter in router.parameters())
    num_ranks = group_size(router.tp_dp_cp_group) // group_size(router.tp_group)
    rebuilds = Rebuilds(tokens_per_batch, on_gpu=is_on_gpu, num_ranks=num_ranks)
    described["router_flops_per_token"] = router.flops(router.config, rebuilds).total
    described["exact_router_flops_per_token"] = ExactRouter.flops(router.config).total
    return described


def codeword_metrics(load: torch.Tensor) -> dict[str, float]:
    """Entropy of the loads [C] over its maximum, log C, and the number of codewords without a token.

    Empty without tokens; with one codeword there is no entropy.

    Example: loads [2, 1, 1, 0] have an entropy of 1.5 of 2 bits, 0.75, and one idle codeword.
    """
    if not load.any():
        return {}
    shares = load[load > 0] / load.sum()
    metrics: dict[str, float] = {"idle_codewords": int((load == 0).sum())}
    if load.numel() > 1:
        entropy = float(-(shares * shares.log()).sum())
        metrics = {"codeword_entropy": entropy / math.log(load.numel())} | metrics
    return metrics


def list_overlap(before: torch.Tensor, now: torch.Tensor) -> float:
    """Share of the list entries that are still in the same codeword's list. Waits for the device.

    Args:
        before, now: [C, L] expert ids in any order, -1 for no expert.

    Example: from [0, 1] and [2, 3] to [0, 5] and [2, 3] it is 0.75.
    """
    now = now.sort(dim=1).values
    slots = torch.searchsorted(now, before.contiguous()).clamp(max=now.shape[1] - 1)
    is_entry = before >= 0
    return float(((now.gather(1, slots) == before) & is_entry).sum() / is_entry.sum().clamp_min(1))


def load_bins(load: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and largest load in at most 64 equal ranges of expert ids, over the mean of all. Waits for the device.

    Args:
        load: [E] tokens. If 64 does not divide E, the ranges' sizes differ by at most one expert.

    Example: loads [2, 0, 1, 1] have means and maxima [2, 0, 1, 1].
    """
    num_experts = load.numel()
    num_bins = min(_MOST_BINS, num_experts)
    bins = torch.arange(num_experts, device=load.device) * num_bins // num_experts
    load = load.double()
    load = load / load.mean().clamp_min(torch.finfo(torch.float64).tiny)
    zeros = load.new_zeros(num_bins)
    means = zeros.index_add(0, bins, load) / zeros.index_add(0, bins, torch.ones_like(load))
    largest = zeros.scatter_reduce(0, bins, load, "amax", include_self=False)
    return means.tolist(), largest.tolist()
