"""What the routers are doing, for people to watch: one line per log interval, and TensorBoard and W&B scalars."""

import logging

import torch

from air_moe_megatron.layer import AIRMoELayer
from air_moe_megatron.ops.fine_scores import fine_scores
from air_moe_megatron.router import AIRRouter, air_routers, merge_probes
from air_moe_megatron.routers.base import CompactRouter

logger = logging.getLogger(__name__)

_CHUNK = 16384  # experts whose exact scores are held at a time


@torch.no_grad()
def expert_loads(routers) -> torch.Tensor:
    """[routers, E] int64: tokens that each expert got since the last call, over all ranks of the stage.

    Communicates (one all-reduce over ``tp_dp_cp``); sets the routers' counts back to zero.
    """
    loads = torch.stack([router.expert_load for router in routers])
    group = routers[0].tp_dp_cp_group
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(loads, group=group)
    for router in routers:
        router.expert_load.zero_()
    return loads


def load_figures(loads: torch.Tensor, num_ranks: int) -> dict[str, float]:
    """How evenly the tokens are spread, as means over the routers; waits for the device.

    Args:
        loads: [routers, E] tokens of each expert.
        num_ranks: expert-parallel size.
    Returns:
        share of experts that got a token; imbalance factor of the experts, ``E * sum(n^2) / sum(n)^2``, which is 1 if
        all get the same and E if one gets all (the term and formula are faiss's); load of the most loaded
        expert-parallel rank over the mean.

    Example: loads [[2, 0, 1, 1]] on 2 ranks: used 0.75, imbalance factor 4 * 6 / 16 = 1.5, most loaded rank 1.0.
    """
    loads = loads.double()
    totals = loads.sum(dim=1).clamp_min(1.0)
    ranks = loads.view(loads.shape[0], num_ranks, -1).sum(dim=2)
    figures = torch.stack(
        (
            (loads > 0).double().mean(),
            (loads.shape[1] * loads.square().sum(dim=1) / totals.square()).mean(),
            (ranks.amax(dim=1) * num_ranks / totals).mean(),
        )
    ).tolist()
    return dict(zip(("experts-used", "imbalance-factor", "rank-imbalance"), figures, strict=True))


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
    best = hidden.new_empty(hidden.shape[0], 0)
    best_ids = ids.new_empty(hidden.shape[0], 0)
    for first in range(0, router.num_experts, _CHUNK):
        chunk = slice(first, min(first + _CHUNK, router.num_experts))
        logits = hidden @ router.weight[chunk].float().t()
        if router.bias is not None:
            logits += router.bias[chunk].float()
        mass = torch.logaddexp(mass, logits.logsumexp(dim=1))
        chunk_ids = torch.arange(chunk.start, chunk.stop, device=ids.device).expand_as(logits)
        ranks = torch.cat((best, _rank(router, logits, chunk_ids)), dim=1)
        best, places = ranks.topk(min(router.topk, ranks.shape[1]), dim=1)
        best_ids = torch.cat((best_ids, chunk_ids), dim=1).gather(1, places)
    found = ids.gather(1, _rank(router, listed, ids).topk(router.topk, dim=1).indices)
    shares = torch.stack(
        (
            (listed.logsumexp(dim=1) - mass).exp(),
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

    Every rank of the stage must call it. The figures are means over the stage's routers; the last rank, which also
    prints Megatron's lines, prints those of its stage. What concerns codebooks and shortlists is AIR's alone.

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
    air = air_routers(model)
    figures = codebook_figures(air) if air else {}
    figures |= load_figures(expert_loads(routers), routers[0].config.expert_model_parallel_size)
    figures |= dispatch_figures(layers, routers[0].tp_dp_cp_group)
    figures |= recall_figures(air) if air else {}
    if routers[0].config.moe_router_type == "vq":
        figures["vq-loss"] = vq_loss(routers)
    line = [f"routing health at iteration {iteration:8d}"]
    if "quantisation-error" in figures:
        line += [
            f"quantisation error: {figures['quantisation-error']:.4f}",
            f"live codewords: {figures['live-codewords']:.1f} of {air[0].sizes.num_clusters}",
        ]
    if air:
        line.append(f"experts listed: {100 * figures['experts-listed']:.1f}%")
    line += [
        f"experts used: {100 * figures['experts-used']:.1f}% of {routers[0].num_experts}",
        f"imbalance factor: {figures['imbalance-factor']:.2f}",
        f"most loaded rank: {figures['rank-imbalance']:.3f} of the mean",
    ]
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
    if air:
        line.append(f"dropped codebook updates: {figures['dropped-updates']}")
    print_rank_last(f" {' | '.join(line)} |")
    writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
    scalars = {f"air/{name}": value for name, value in figures.items()}
    if writer:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if wandb_writer:
        wandb_writer.log(scalars, iteration)


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
