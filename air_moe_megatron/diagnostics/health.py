"""Routing health: one line per log interval, and the same figures as TensorBoard and W&B scalars."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from air_moe_megatron.layer import AIRMoELayer
from air_moe_megatron.layer.dispatcher import Traffic
from air_moe_megatron.process_groups import group_size, sum_over_ranks
from air_moe_megatron.routers import AIRRouter, HashRouter, VQRouter
from air_moe_megatron.routers.base import CompactRouter


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


def load_figures(loads: Sequence[torch.Tensor], num_ranks: int) -> dict[str, float]:
    """Figures of how evenly the tokens are spread, as means over the routers; waits for the device.

    Args:
        loads: for each router [E] tokens of each expert.
        num_ranks: expert-parallel size.
    Returns:
        share of experts that got a token; imbalance factor of the experts, ``E * sum(n^2) / sum(n)^2``, which is 1 if
        all get the same and E if one gets all (the term and formula are faiss's); load of the most loaded
        expert-parallel rank over the mean.

    Example: loads [[2, 0, 1, 1]] on 2 ranks: used 0.75, imbalance factor 4 * 6 / 16 = 1.5, most loaded rank 1.0.
    """
    figures = torch.stack([load_figures_of(load, num_ranks) for load in loads]).mean(dim=0).tolist()
    return dict(zip(("experts-used", "imbalance-factor", "rank-imbalance"), figures, strict=True))


def load_figures_of(load: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """[3] fp64: the three figures of :func:`load_figures` for one router, of its load [E]."""
    load = load.double()
    total = load.sum().clamp_min(1.0)
    imbalance = load.numel() * load.square().sum() / total.square()
    return torch.stack(
        ((load > 0).double().mean(), imbalance, load.view(num_ranks, -1).sum(1).amax() * num_ranks / total)
    )


def empty_share(loads: Sequence[torch.Tensor], num_routed: torch.Tensor, topks: list[int]) -> float:
    """Share of the routes' slots that hold no expert, over all tokens and routers; waits for the device.

    Args:
        loads: for each router [E] tokens of each expert.
        num_routed: [routers] tokens.
        topks: for each router K.

    Example: loads [[2, 0, 1, 1]] of 4 tokens with K = 2: 4 of 8 slots are empty, 0.5.
    """
    num_slots = int((num_routed * num_routed.new_tensor(topks)).sum())
    num_filled = int(torch.stack([load.sum() for load in loads]).sum())
    return (num_slots - num_filled) / max(num_slots, 1)


@torch.no_grad()
def listed_share(routers: Sequence[AIRRouter]) -> float:
    """Share of the experts that stand in some shortlist, as a mean over the routers; waits for the device.

    Every rank must call it: sharded routers communicate.
    """
    return float(torch.stack([listed_share_of(router) for router in routers]).mean())


def listed_share_of(router: AIRRouter) -> torch.Tensor:
    """[] fp64: the share of :func:`listed_share` for one router."""
    index = router.index
    listed = torch.zeros(index.num_experts + 1, dtype=torch.bool, device=index.shortlist.device)
    listed[index.shortlist.long().flatten()] = True  # -1, for no expert, is the last slot
    return router.mean_over_shards(listed[:-1].double().mean())


def dispatch_figures(layers: Sequence[AIRMoELayer], group: torch.distributed.ProcessGroup | None) -> dict[str, float]:
    """Bytes per token and layer, one way, that compact dispatchers have handed over since the last call.

    Communicates (one all-reduce over ``group``), waits for the device, and sets the counters back to zero.

    Returns:
        bytes of rows (what Megatron's all-to-all would need is the top-k times a row); all bytes, ids and probs
        included, that left their rank; where activations are recomputed, bytes of rows that were moved a second time.
        Empty without compact dispatchers.
    """
    dispatchers = [layer.token_dispatcher for layer in layers]
    if not dispatchers:
        return {}
    traffics = ((dispatcher.traffic, dispatcher.recomputed_traffic) for dispatcher in dispatchers)
    sums = [
        (first.tokens, first.row_bytes, first.remote_row_bytes + first.remote_pair_bytes, again.row_bytes)
        for first, again in traffics
    ]
    sums = torch.tensor(sums, dtype=torch.float64, device=next(layers[0].parameters()).device).sum(dim=0)
    sum_over_ranks(sums, group)
    for dispatcher in dispatchers:
        dispatcher.traffic, dispatcher.recomputed_traffic = Traffic(), Traffic()
    tokens, *sums = sums.tolist()
    rows, remote, again = (total / max(tokens, 1.0) for total in sums)
    figures = {"dispatch-bytes-per-token": rows, "remote-bytes-per-token": remote}
    return figures | ({"recomputed-bytes-per-token": again} if again else {})


def is_due(iteration: int) -> bool:
    """Whether Megatron's own log line, and with it ours, is due after a step, counted from 1."""
    from megatron.training import get_args

    return iteration % get_args().log_interval == 0 or iteration == 1


def log_health(
    model: Sequence[torch.nn.Module],
    routers: Sequence[CompactRouter],
    iteration: int,
    counts: tuple[list[torch.Tensor], torch.Tensor],
    measured: dict[str, float],
) -> None:
    """Log the routing health of this pipeline stage.

    Every rank of the stage must call it. The last rank, which also prints Megatron's lines, prints those of its stage.

    Args:
        model: Megatron's list of model chunks.
        routers: the routers in it, at least one.
        iteration: counted from 1.
        counts: as :func:`expert_loads` gives them.
        measured: figures of the diagnostics since the last line, which are logged with those of this line.
    """
    from megatron.training import print_rank_last

    modules = (module for chunk in model for module in chunk.modules())
    layers = [module for module in modules if isinstance(module, AIRMoELayer) and module.is_compact]
    figures = health_figures(routers, layers, *counts) | measured
    print_rank_last(health_line(figures, routers, iteration))
    write_scalars(figures, "air", iteration)


def write_scalars(figures: dict[str, float], prefix: str, iteration: int) -> None:
    """Hand figures to Megatron's writers of TensorBoard and W&B, which the last rank has, where it has them."""
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
    scalars = {f"{prefix}/{name}": value for name, value in figures.items()}
    if writer:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if wandb_writer:
        wandb_writer.log(scalars, iteration)


def health_figures(
    routers: Sequence[CompactRouter],
    layers: Sequence[AIRMoELayer],
    loads: Sequence[torch.Tensor],
    num_routed: torch.Tensor,
) -> dict[str, float]:
    """Figures of a pipeline stage, as means over the routers that have them; communicates and waits for the device.

    Codebooks and lists are of the AIR routers among them, the vq loss is of the vq routers. Where there are hash layers
    beside others, the figures of loads are of the others, and those of the hash layers begin with "hash-".

    Args:
        routers: all routers of the stage, of any types and sizes; at least one.
        layers: those with a compact dispatcher.
        loads: for each router [E] tokens of each expert, of all ranks.
        num_routed: [routers] tokens, of all ranks.
    """
    air = [router for router in routers if isinstance(router, AIRRouter)]
    vq = [router for router in routers if isinstance(router, VQRouter)]
    figures = codebook_figures(air) if air else {}
    by_hash = [isinstance(router, HashRouter) for router in routers]
    num_ranks = routers[0].config.expert_model_parallel_size
    if any(by_hash) and not all(by_hash):
        hashed = load_figures([load for load, hashed in zip(loads, by_hash, strict=True) if hashed], num_ranks)
        figures |= {f"hash-{name}": value for name, value in hashed.items()}
        others = [number for number, hashed in enumerate(by_hash) if not hashed]
    else:
        others = list(range(len(routers)))
    loads = [loads[number] for number in others]
    figures |= load_figures(loads, num_ranks)
    figures["empty-slots"] = empty_share(loads, num_routed[others], [routers[number].topk for number in others])
    figures |= dispatch_figures(layers, routers[0].tp_dp_cp_group)
    if vq:
        figures["vq-loss"] = vq_loss(vq)
    return figures


class Item(NamedTuple):
    """One item of the health line."""

    key: str  # of the figure; there is no item without it
    label: str
    format: str  # of the figure; other figures, and the sizes of the routers, by name
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
    Item("dropped-updates", "dropped codebook updates", "{}"),
)


def health_line(figures: dict[str, float], routers: Sequence[CompactRouter], iteration: int) -> str:
    """Word the figures of :func:`health_figures`; empty slots are named only where there are any."""
    others = [router for router in routers if not isinstance(router, HashRouter)] or routers
    sizes = {"num_experts": _range([router.num_experts for router in others])}
    if clusters := [router.sizes.num_clusters for router in routers if isinstance(router, AIRRouter)]:
        sizes["num_clusters"] = _range(clusters)
    items = [f"routing health at iteration {iteration:8d}"]
    for item in ITEMS:
        value = figures.get(item.key)
        if value is not None and (value or not item.only_nonzero):
            items.append(f"{item.label}: " + item.format.format(item.scale * value, **figures, **sizes))
    return f" {' | '.join(items)} |"


def _range(sizes: list[int]) -> str:
    """The size of all, or the smallest and the largest."""
    return f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


def vq_loss(routers: Sequence[VQRouter]) -> float:
    """Codebook and commitment loss of this step, a mean over routers, microbatches and ranks, without its coefficient.

    Read from Megatron's tracker, whose report leaves out losses that it does not know. Communicates (one all-reduce
    over ``tp_dp_cp``) and waits for the device.
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


def codebook_figures(routers: Sequence[AIRRouter]) -> dict[str, float]:
    """Figures of the codebooks of AIR routers; waits for the device.

    Error and live codewords are means over the codebooks that were fitted since a checkpoint was loaded.
    """
    healths = [router.codebook.health() for router in routers]
    figures = {
        "experts-listed": listed_share(routers),
        "dropped-updates": sum(health.num_dropped for health in healths),
    }
    fitted = [health for health in healths if health.quantization_error is not None]
    if fitted:
        figures["quantization-error"] = _mean([health.quantization_error for health in fitted])
        figures["live-codewords"] = _mean([health.live_codewords for health in fitted])
    return figures


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
