"""Routing health: one line per log interval, and the same metrics as TensorBoard and W&B scalars.

In each step that Megatron logs, all ranks communicate alike. Over ``tp_dp_cp`` of each pipeline stage they all-reduce
the expert loads (E int64 for each router), three fp64 numbers if layers are compact, one number for vq routers, and one
for each sharded AIR router. With several pipeline stages, Python objects are all-gathered over the pipeline of the last
rank, which writes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from air_moe_megatron.config import is_plain_topk
from air_moe_megatron.layer import AIRMoELayer, find_compact_layers
from air_moe_megatron.process_groups import gather_from_stages, group_size, sum_over_ranks
from air_moe_megatron.routers import AIRRouter, HashRouter, VQRouter
from air_moe_megatron.routers.base import CompactRouter

LOAD_METRICS = ("experts_used", "imbalance_factor", "rank_imbalance")
"""Names of the metrics of :func:`load_metrics_of`, in their order."""
_TOTALS = ("dropped-updates",)  # metrics that are totals, not means


@torch.no_grad()
def expert_loads(routers: Sequence[CompactRouter], reset: bool = True) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Read what the routers counted since the last reset, summed over all ranks of the stage.

    Communicates (one all-reduce over ``tp_dp_cp``).

    Args:
        routers: those of one pipeline stage; their numbers of experts may differ.
        reset: whether the routers' counts are set back to zero.
    Returns:
        for each router [E] int64, the tokens that each expert got; [routers] int64, the tokens that were routed.
    """
    flat = torch.cat([*(router.expert_load for router in routers), *(router.num_routed for router in routers)])
    sum_over_ranks(flat, routers[0].tp_dp_cp_group)
    for router in routers if reset else ():
        router.reset_log()
    *loads, num_routed = flat.split([*(router.num_experts for router in routers), len(routers)])
    return loads, num_routed


def load_metrics_of(load: torch.Tensor, num_ranks: int) -> dict[str, float]:
    """Compute how evenly the tokens of one router are spread. Waits for the device.

    Args:
        load: [E] tokens of each expert.
        num_ranks: expert-parallel size.
    Returns:
        the metrics of ``LOAD_METRICS``: share of experts that got a token; imbalance factor of the experts,
        ``E * sum(n^2) / sum(n)^2``, which is 1 if all get the same and E if one gets all (the term and formula are
        faiss's); load of the most loaded expert-parallel rank over the mean.

    Example: the load [2, 0, 1, 1] on 2 ranks: used 0.75, imbalance factor 4 * 6 / 16 = 1.5, most loaded rank 1.0.
    """
    return dict(zip(LOAD_METRICS, _load_metrics(load, num_ranks).tolist(), strict=True))


def _load_metrics(load: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """[3] fp64, the metrics of :func:`load_metrics_of`, on the device of the load."""
    load = load.double()
    total = load.sum().clamp_min(1.0)
    imbalance = load.numel() * load.square().sum() / total.square()
    return torch.stack(
        ((load > 0).double().mean(), imbalance, load.view(num_ranks, -1).sum(1).amax() * num_ranks / total)
    )


def listed_share_of(router: AIRRouter) -> torch.Tensor:
    """[] fp64: share of the experts that are in any shortlist of a router.

    Every rank must call it: sharded routers communicate.
    """
    index = router.index
    listed = torch.zeros(index.num_experts + 1, dtype=torch.bool, device=index.shortlist.device)
    listed[index.shortlist.long().flatten()] = True  # -1, for no expert, is the last slot
    return router.mean_over_shards(listed[:-1].double().mean())


def is_due(iteration: int) -> bool:
    """Whether our log line is due after a step, counted from 1. Megatron's is also due in the first after a resume."""
    from megatron.training import get_args

    return iteration % get_args().log_interval == 0 or iteration == 1


def log_health(
    model: Sequence[torch.nn.Module],
    routers: Sequence[CompactRouter],
    iteration: int,
    counts: tuple[list[torch.Tensor], torch.Tensor] | None,
    measured: dict[str, float],
) -> None:
    """Log the routing health of all pipeline stages; nothing if no stage has a router.

    Every rank must call it, even if its stage has no router. The last rank, which also prints Megatron's lines, prints
    and writes.

    Args:
        model: Megatron's list of model chunks.
        routers: the routers in it.
        iteration: counted from 1.
        counts: as :func:`expert_loads` gives them; None without routers.
        measured: metrics that the diagnostics have measured since the last line; they are logged too.
    """
    from megatron.training import get_args, print_rank_last

    if is_plain_topk(get_args()):
        return
    layers = find_compact_layers(model)
    stages = gather_from_stages(None if counts is None else stage_health(routers, layers, *counts))
    stages = [stage for stage in stages if stage is not None]
    if stages:
        metrics = health_metrics(stages) | measured
        print_rank_last(health_line(metrics, sizes_of(stages), iteration))
        write_scalars(metrics, "air", iteration)


def scalar_name(metric: str) -> str:
    """The name of a metric in TensorBoard and W&B, spelled as that of the health line.

    Example: ``topk_recall`` is "top-k-recall", and ``experts_used`` is "experts-used".
    """
    return metric.replace("topk", "top-k").replace("_", "-")


def write_scalars(metrics: dict[str, float], prefix: str, iteration: int) -> None:
    """Write metrics by Megatron's TensorBoard and W&B writers, if they exist; only the last rank has them."""
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
    scalars = {f"{prefix}/{name}": value for name, value in metrics.items()}
    if writer:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if wandb_writer:
        wandb_writer.log(scalars, iteration)


class StageHealth(NamedTuple):
    """What one pipeline stage adds to the health line."""

    sums: dict[str, tuple[float, float]]
    """Metric -> its sum over routers, tokens or slots of the stage, and their number."""
    sizes: dict[str, list[int]]
    """Size -> its values in the routers of the stage."""


def stage_health(
    routers: Sequence[CompactRouter],
    layers: Sequence[AIRMoELayer],
    loads: Sequence[torch.Tensor],
    num_routed: torch.Tensor,
) -> StageHealth:
    """The health of a pipeline stage. Communicates within it, and waits for the device.

    Metrics of codebooks and lists cover the AIR routers, the vq loss covers the vq routers. The names of load metrics
    of hash routers begin with "hash-".

    Args:
        routers: all routers of the stage, of any types and sizes; at least one.
        layers: layers with a compact dispatcher.
        loads: for each router [E] tokens of each expert, of all ranks.
        num_routed: [routers] tokens, of all ranks.
    """
    sums: dict[str, tuple[float, float]] = {}
    sizes: dict[str, list[int]] = {}
    num_ranks = routers[0].config.expert_model_parallel_size
    for prefix, is_hash in (("", False), ("hash-", True)):
        numbers = [number for number, router in enumerate(routers) if isinstance(router, HashRouter) == is_hash]
        if numbers:
            topks = [routers[number].topk for number in numbers]
            found = load_sums([loads[number] for number in numbers], num_routed[numbers], topks, num_ranks)
            sums |= {f"{prefix}{name}": values for name, values in found.items()}
            sizes[f"{prefix}num_experts"] = [routers[number].num_experts for number in numbers]
    if air := [router for router in routers if isinstance(router, AIRRouter)]:
        sums |= codebook_sums(air)
        sizes["num_clusters"] = [router.sizes.num_clusters for router in air]
    sums |= dispatch_sums(layers, int(num_routed.sum()), routers[0].tp_dp_cp_group)
    if vq := [router for router in routers if isinstance(router, VQRouter)]:
        sums["vq-loss"] = len(vq) * vq_loss(vq), len(vq)
    return StageHealth(sums, sizes)


def health_metrics(stages: Sequence[StageHealth]) -> dict[str, float]:
    """Metrics of all pipeline stages: means over the routers, tokens or slots that have them.

    If there are hash layers beside others, load metrics cover the others, and the names of those of the hash layers
    begin with "hash-".
    """
    sums: dict[str, tuple[float, float]] = {}
    for stage in stages:
        for name, (total, count) in stage.sums.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + total, before[1] + count
    metrics = {name: total if name in _TOTALS else total / max(count, 1.0) for name, (total, count) in sums.items()}
    hashed = {name: metrics.pop(name) for name in list(metrics) if name.startswith("hash-")}
    if "experts-used" in metrics:
        hashed.pop("hash-empty-slots", None)
        metrics |= hashed
    else:
        metrics |= {name.removeprefix("hash-"): value for name, value in hashed.items()}
    if not metrics.get("recomputed-bytes-per-token"):
        metrics.pop("recomputed-bytes-per-token", None)
    return metrics


def sizes_of(stages: Sequence[StageHealth]) -> dict[str, str]:
    """The sizes in the health line: a single value, or a range. Hash layers count only if there are no others."""
    sizes: dict[str, list[int]] = {}
    for stage in stages:
        for name, values in stage.sizes.items():
            sizes.setdefault(name, []).extend(values)
    of_hash_layers = sizes.pop("hash-num_experts", [])
    sizes.setdefault("num_experts", of_hash_layers)
    return {
        name: f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"
        for name, values in sizes.items()
    }


def load_sums(
    loads: Sequence[torch.Tensor], num_routed: torch.Tensor, topks: list[int], num_ranks: int
) -> dict[str, tuple[float, float]]:
    """How evenly the tokens are spread, and how many of the K slots per token hold no expert. Waits for the device.

    Args:
        loads: for each router [E] tokens of each expert.
        num_routed: [routers] tokens.
        topks: for each router K.
        num_ranks: expert-parallel size.
    Returns:
        metric -> (sum, number): those of :func:`load_metrics_of` over routers, empty slots over all slots.

    Example: loads [[2, 0, 1, 1]] of 4 tokens with K = 2: 4 of 8 slots are empty.
    """
    totals = torch.stack([_load_metrics(load, num_ranks) for load in loads]).sum(dim=0).tolist()
    num_slots = int((num_routed * num_routed.new_tensor(topks)).sum())
    num_filled = int(torch.stack([load.sum() for load in loads]).sum())
    sums = {scalar_name(name): (total, len(loads)) for name, total in zip(LOAD_METRICS, totals, strict=True)}
    return sums | {"empty-slots": (num_slots - num_filled, num_slots)}


def codebook_sums(routers: Sequence[AIRRouter]) -> dict[str, tuple[float, float]]:
    """Sums over the codebooks and lists of AIR routers. Waits for the device.

    Quantization error and live codewords cover only codebooks that were updated since a checkpoint was loaded.
    """
    healths = [router.codebook.health() for router in routers]
    sums = {
        "experts-listed": (float(torch.stack([listed_share_of(router) for router in routers]).sum()), len(routers)),
        "dropped-updates": (sum(health.num_dropped for health in healths), len(routers)),
    }
    if fitted := [health for health in healths if health.quantization_error is not None]:
        sums["quantization-error"] = sum(health.quantization_error for health in fitted), len(fitted)
        sums["live-codewords"] = sum(health.live_codewords for health in fitted), len(fitted)
    return sums


def dispatch_sums(
    layers: Sequence[AIRMoELayer], num_routed: int, group: torch.distributed.ProcessGroup | None
) -> dict[str, tuple[float, float]]:
    """Bytes that compact dispatchers have moved in training since the last call.

    Communicates (one all-reduce over ``group``), waits for the device, and sets the counters back to zero.

    Args:
        layers: layers with a compact dispatcher.
        num_routed: tokens that their routers routed, over all layers and ranks, without padding.
        group: the ranks of the pipeline stage.
    Returns:
        metric -> (bytes one way, tokens): bytes of all rows (Megatron's all-to-all would need K rows per token); bytes
        sent to other ranks, ids and probs included; bytes of rows moved a second time by recomputation. Empty without
        compact dispatchers.
    """
    dispatchers = [layer.token_dispatcher for layer in layers]
    if not dispatchers:
        return {}
    traffics = ((dispatcher.traffic, dispatcher.recomputed_traffic) for dispatcher in dispatchers)
    sums = [
        (first.row_bytes, first.remote_row_bytes + first.remote_pair_bytes, again.row_bytes)
        for first, again in traffics
    ]
    sums = torch.tensor(sums, dtype=torch.float64, device=next(layers[0].parameters()).device).sum(dim=0)
    sum_over_ranks(sums, group)
    for dispatcher in dispatchers:
        dispatcher.reset_log()
    names = ("dispatch-bytes-per-token", "remote-bytes-per-token", "recomputed-bytes-per-token")
    return {name: (total, num_routed) for name, total in zip(names, sums.tolist(), strict=True)}


def vq_loss(routers: Sequence[VQRouter]) -> float:
    """Codebook and commitment loss of this step, a mean over routers, microbatches and ranks, without its coefficient.

    It is read from Megatron's tracker, because Megatron's report leaves out losses that it does not know. Communicates
    (one all-reduce over ``tp_dp_cp``) and waits for the device.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    from air_moe_megatron.compat import get_moe_metrics_tracker

    entry = get_moe_metrics_tracker().metrics.get("vq_loss")
    total = torch.zeros((), dtype=torch.float64, device=routers[0].weight.device)
    if entry is not None:
        total += entry.values.sum()
    group, part_group = routers[0].tp_dp_cp_group, routers[0].tp_cp_group  # each rank of the latter adds a part
    num_parts = group_size(group) // group_size(part_group)
    return float(sum_over_ranks(total, group)) / (len(routers) * get_num_microbatches() * num_parts)


class Item(NamedTuple):
    """One item of the health line."""

    key: str  # name of the metric; without the metric the item is left out
    label: str
    format: str  # its field without a name is the metric; named ones are other metrics and router sizes
    scale: int = 1
    only_nonzero: bool = False


ITEMS = (
    Item("quantization-error", "quantization error", "{:.4f}"),
    Item("live-codewords", "live codewords", "{:.1f} of {num_clusters}"),
    Item("experts-listed", "experts listed", "{:.1%}"),
    Item("experts-used", "experts used", "{:.1%} of {num_experts}"),
    Item("imbalance-factor", "imbalance factor", "{:.2f}"),
    Item("rank-imbalance", "most loaded rank", "{:.3f} of the mean"),
    Item("hash-experts-used", "experts used by hash layers", "{:.1%}"),
    Item("hash-imbalance-factor", "imbalance factor of hash layers", "{:.2f}"),
    Item("hash-rank-imbalance", "most loaded rank of hash layers", "{:.3f} of the mean"),
    Item("empty-slots", "empty slots", "{:.2g}%", scale=100, only_nonzero=True),
    Item(
        "dispatch-bytes-per-token",
        "dispatched bytes per token",
        "{:.0f} ({remote-bytes-per-token:.0f} to other ranks)",
    ),
    Item("recomputed-bytes-per-token", "dispatched again when recomputed", "{:.0f}"),
    Item("mass-recall", "mass recall", "{:.2f}"),
    Item("top-k-recall", "top-k recall", "{:.2f}"),
    Item("vq-loss", "vq loss", "{:.4f}"),
    Item("dropped-updates", "dropped codebook updates", "{:.0f}"),
)


def health_line(metrics: dict[str, float], sizes: dict[str, str], iteration: int) -> str:
    """Format the metrics of :func:`health_metrics` as a line; empty slots appear only if there are any."""
    items = [f"routing health at iteration {iteration:8d}"]
    for item in ITEMS:
        value = metrics.get(item.key)
        if value is not None and (value or not item.only_nonzero):
            items.append(f"{item.label}: " + item.format.format(item.scale * value, **metrics, **sizes))
    return f" {' | '.join(items)} |"
