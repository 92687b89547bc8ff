"""What the routers are doing, for people to watch: one line per log interval, and TensorBoard and W&B scalars."""

import logging

import torch

from air_moe_megatron.layer import AIRMoELayer
from air_moe_megatron.ops.fine_scores import fine_scores
from air_moe_megatron.routers.air import AIRRouter, merge_probes
from air_moe_megatron.routers.base import CompactRouter
from air_moe_megatron.routers.vq import VQRouter

logger = logging.getLogger(__name__)

_CHUNK = 16384  # experts whose exact scores are held at a time


@torch.no_grad()
def expert_loads(routers) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Read what the routers counted since the last call, summed over all ranks of the stage.

    Communicates (one all-reduce over ``tp_dp_cp``); sets the routers' counts back to zero.

    Args:
        routers: those of one pipeline stage; their numbers of experts may differ.
    Returns:
        for each router [E] int64, the tokens that each expert got; [routers] int64, the tokens that were routed.
    """
    flat = torch.cat([*(router.expert_load for router in routers), *(router.num_routed for router in routers)])
    group = routers[0].tp_dp_cp_group
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(flat, group=group)
    for router in routers:
        router.reset_log()
    *loads, num_routed = flat.split([*(router.num_experts for router in routers), len(routers)])
    return loads, num_routed


def load_figures(loads, num_ranks: int) -> dict[str, float]:
    """How evenly the tokens are spread, as means over the routers; waits for the device.

    Args:
        loads: for each router [E] tokens of each expert.
        num_ranks: expert-parallel size.
    Returns:
        share of experts that got a token; imbalance factor of the experts, ``E * sum(n^2) / sum(n)^2``, which is 1 if
        all get the same and E if one gets all (the term and formula are faiss's); load of the most loaded
        expert-parallel rank over the mean.

    Example: loads [[2, 0, 1, 1]] on 2 ranks: used 0.75, imbalance factor 4 * 6 / 16 = 1.5, most loaded rank 1.0.
    """
    figures = torch.stack([_load_figures_of(load.double(), num_ranks) for load in loads]).mean(dim=0).tolist()
    return dict(zip(("experts-used", "imbalance-factor", "rank-imbalance"), figures, strict=True))


def _load_figures_of(load, num_ranks):
    """[3] fp64: the three figures of one router."""
    total = load.sum().clamp_min(1.0)
    imbalance = load.numel() * load.square().sum() / total.square()
    return torch.stack(
        ((load > 0).double().mean(), imbalance, load.view(num_ranks, -1).sum(1).amax() * num_ranks / total)
    )


def empty_share(loads, num_routed: torch.Tensor, topks: list[int]) -> float:
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
def listed_share(routers) -> float:
    """Share of the experts that stand in some shortlist, as a mean over the routers; waits for the device."""
    shares = []
    for router in routers:
        listed = torch.zeros(router.num_experts + 1, dtype=torch.bool, device=router.index.shortlist.device)
        listed[router.index.shortlist.long().flatten()] = True  # -1, for no expert, is the last place
        shares.append(listed[:-1].double().mean())
    return float(torch.stack(shares).mean())


def dispatch_figures(layers, group) -> dict[str, float]:
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
    traffics = [(dispatcher.traffic, dispatcher.recomputed_traffic) for dispatcher in dispatchers]
    sums = [
        (first.tokens, first.row_bytes, first.remote_row_bytes + first.remote_pair_bytes, again.row_bytes)
        for first, again in traffics
    ]
    sums = torch.tensor(sums, dtype=torch.float64, device=next(layers[0].parameters()).device).sum(dim=0)
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(sums, group=group)
    for traffic in sum(traffics, ()):
        traffic.reset()
    tokens, *sums = sums.tolist()
    rows, remote, again = (total / max(tokens, 1.0) for total in sums)
    figures = {"dispatch-bytes-per-token": rows, "remote-bytes-per-token": remote}
    return figures | ({"recomputed-bytes-per-token": again} if again else {})


@torch.no_grad()
def recall(router: AIRRouter) -> tuple[float, float] | None:
    """What the shortlists of a router keep, on the tokens that it has kept of its last training forward.

    Reads the scores of all experts a chunk at a time, so that nothing larger than [tokens, chunk] is made:
    ``2 * tokens * E * H`` FLOPs. Waits for the device; does not communicate.

    Args:
        router: with a sample, see ``AIRRouter.sample``.
    Returns:
        mass recall, the exact softmax mass over all experts that the shortlists hold, and top-k recall, the share of
        the exact top-k among the top-k of the shortlists; means over the tokens. None without a sample.

    Example: exact probabilities [0.5, 0.3, 0.2], a shortlist of the experts 0 and 2, and K = 2: mass 0.7, top-k 0.5.
    """
    sample = router.sample
    if sample is None or sample.hidden.shape[0] == 0:
        return None
    hidden = sample.hidden.float()
    lists = router.index.shortlist.long()
    listed = fine_scores(sample.hidden, router.weight, router.bias, lists, sample.codewords, torch.float32)
    listed, ids = merge_probes(listed, lists[sample.codewords])  # [n, P*L]
    mass = torch.full((hidden.shape[0],), float("-inf"), device=hidden.device)
    listed_mass = mass.clone()
    best = hidden.new_empty(hidden.shape[0], 0)
    best_ids = ids.new_empty(hidden.shape[0], 0)
    for first in range(0, router.num_experts, _CHUNK):
        chunk = slice(first, min(first + _CHUNK, router.num_experts))
        logits = hidden @ router.weight[chunk].float().t()
        if router.bias is not None:
            logits += router.bias[chunk].float()
        mass = torch.logaddexp(mass, logits.logsumexp(dim=1))
        # Of the same logits: of large ones, the rounding of two products may differ by more than any mass.
        columns = (ids - chunk.start).clamp(-1, logits.shape[1]) + 1  # first and last column: not of this chunk
        is_listed = torch.zeros(len(ids), logits.shape[1] + 2, dtype=torch.bool, device=ids.device)
        is_listed = is_listed.scatter_(1, columns, True)[:, 1:-1]
        listed_mass = torch.logaddexp(listed_mass, logits.masked_fill(~is_listed, float("-inf")).logsumexp(dim=1))
        chunk_ids = torch.arange(chunk.start, chunk.stop, device=ids.device).expand_as(logits)
        ranks = torch.cat((best, _rank(router, logits, chunk_ids)), dim=1)
        best, places = ranks.topk(min(router.topk, ranks.shape[1]), dim=1)
        best_ids = torch.cat((best_ids, chunk_ids), dim=1).gather(1, places)
    found = ids.gather(1, _rank(router, listed, ids).topk(router.topk, dim=1).indices)
    shares = torch.stack(
        (
            (listed_mass - mass).exp(),
            (found.unsqueeze(2) == best_ids.unsqueeze(1)).any(dim=2).float().mean(dim=1),
        )
    )
    if sample.keep is not None:
        shares = shares[:, sample.keep]
    return tuple(shares.mean(dim=1).tolist()) if shares.shape[1] else None


def _rank(router, logits, ids):
    """What the top-k goes by: the logits, or with an expert bias the biased scores; -inf for what is no candidate."""
    if router.expert_bias is None:
        return logits
    scores = logits.sigmoid() if router.score_function == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()
    return (scores + router.expert_bias[ids.clamp(min=0)]).masked_fill(ids < 0, float("-inf"))


def recall_figures(routers) -> dict[str, float]:
    """Mass and top-k recall as means over the AIR routers and the ranks of the stage; empty where none has tokens.

    Communicates (one all-reduce over ``tp_dp_cp``) and waits for the device.
    """
    found = [figures for figures in map(recall, routers) if figures is not None]
    device = routers[0].weight.device
    sums = torch.tensor([sum(values) for values in zip(*found, strict=True)] or [0.0, 0.0], device=device)
    sums = torch.cat((sums, sums.new_tensor([float(len(found))])))
    group = routers[0].tp_dp_cp_group
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(sums, group=group)
    mass, topk, count = sums.tolist()
    return {"mass-recall": mass / count, "top-k-recall": topk / count} if count else {}


def log_health(model, iteration: int) -> None:
    """Log the routing health of this pipeline stage where Megatron's own log line is due.

    Every rank of the stage must call it. The last rank, which also prints Megatron's lines, prints those of its stage.

    Args:
        model: Megatron's list of model chunks.
        iteration: counted from 1.
    """
    from megatron.training import get_args, print_rank_last
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    args = get_args()
    if iteration % args.log_interval and iteration != 1:
        return
    modules = [module for chunk in model for module in chunk.modules()]
    routers = [module for module in modules if isinstance(module, CompactRouter)]
    if not routers:
        return
    layers = [module for module in modules if isinstance(module, AIRMoELayer) and module.is_compact]
    figures = health_figures(routers, layers)
    print_rank_last(health_line(figures, routers, iteration))
    writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
    scalars = {f"air/{name}": value for name, value in figures.items()}
    if writer:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if wandb_writer:
        wandb_writer.log(scalars, iteration)


def health_figures(routers, layers) -> dict[str, float]:
    """Figures of a pipeline stage, as means over the routers that have them; communicates and waits for the device.

    Codebooks, lists and recall are of the AIR routers among them, the vq loss is of the vq routers.

    Args:
        routers: all routers of the stage, of any types and sizes; at least one.
        layers: those with a compact dispatcher.
    """
    air = [router for router in routers if isinstance(router, AIRRouter)]
    vq = [router for router in routers if isinstance(router, VQRouter)]
    loads, num_routed = expert_loads(routers)
    figures = codebook_figures(air) if air else {}
    figures |= load_figures(loads, routers[0].config.expert_model_parallel_size)
    figures["empty-slots"] = empty_share(loads, num_routed, [router.topk for router in routers])
    figures |= dispatch_figures(layers, routers[0].tp_dp_cp_group)
    figures |= recall_figures(air) if air else {}
    if vq:
        figures["vq-loss"] = vq_loss(vq)
    return figures


def health_line(figures: dict[str, float], routers, iteration: int) -> str:
    """Word the figures of :func:`health_figures`; empty slots are named only where there are any."""
    line = [f"routing health at iteration {iteration:8d}"]
    if "quantisation-error" in figures:
        num_clusters = _range([router.sizes.num_clusters for router in routers if isinstance(router, AIRRouter)])
        line += [
            f"quantisation error: {figures['quantisation-error']:.4f}",
            f"live codewords: {figures['live-codewords']:.1f} of {num_clusters}",
        ]
    if "experts-listed" in figures:
        line.append(f"experts listed: {100 * figures['experts-listed']:.1f}%")
    line += [
        f"experts used: {100 * figures['experts-used']:.1f}% of {_range([router.num_experts for router in routers])}",
        f"imbalance factor: {figures['imbalance-factor']:.2f}",
        f"most loaded rank: {figures['rank-imbalance']:.3f} of the mean",
    ]
    if figures["empty-slots"]:
        line.append(f"empty slots: {100 * figures['empty-slots']:.2g}%")
    if "dispatch-bytes-per-token" in figures:
        again = figures.get("recomputed-bytes-per-token")
        line.append(
            f"dispatched bytes per token: {figures['dispatch-bytes-per-token']:.0f} "
            f"({figures['remote-bytes-per-token']:.0f} to other ranks"
            + (")" if again is None else f", {again:.0f} again when recomputed)")
        )
    if "mass-recall" in figures:
        line += [f"mass recall: {figures['mass-recall']:.2f}", f"top-k recall: {figures['top-k-recall']:.2f}"]
    if "vq-loss" in figures:
        line.append(f"vq loss: {figures['vq-loss']:.4f}")
    if "dropped-updates" in figures:
        line.append(f"dropped codebook updates: {figures['dropped-updates']}")
    return f" {' | '.join(line)} |"


def _range(sizes):
    """The size of all, or the smallest and the largest."""
    return f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


def vq_loss(routers) -> float:
    """Codebook and commitment loss of this step, a mean over routers, microbatches and ranks, without its coefficient.

    Read from Megatron's tracker, whose report leaves out losses that it does not know. Communicates (one all-reduce
    over ``tp_dp_cp``) and waits for the device.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    entry = get_moe_metrics_tracker().metrics.get("vq_loss")
    total = torch.zeros((), device=routers[0].weight.device) if entry is None else entry.values.sum()
    group, part_group = routers[0].tp_dp_cp_group, routers[0].tp_cp_group  # each rank of the latter adds a part
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(total, group=group)
    num_parts = group.size() // part_group.size() if group is not None else 1
    return float(total) / (len(routers) * get_num_microbatches() * num_parts)


def codebook_figures(routers) -> dict[str, float]:
    """How the codebooks of AIR routers fit, as means over them, where they were fitted since a checkpoint was loaded;
    waits for the device."""
    healths = [router.codebook.health() for router in routers]
    figures = {
        "experts-listed": listed_share(routers),
        "dropped-updates": sum(health.num_dropped for health in healths),
    }
    fitted = [health for health in healths if health.quantisation_error is not None]
    if fitted:
        figures["quantisation-error"] = _mean([health.quantisation_error for health in fitted])
        figures["live-codewords"] = _mean([health.live_codewords for health in fitted])
    return figures


def _mean(values):
    return sum(values) / len(values)
