"""What the routers are doing, for people to watch: one line per log interval, and TensorBoard and W&B scalars."""

import logging

import torch

from air_moe_megatron.sync import air_routers

logger = logging.getLogger(__name__)


@torch.no_grad()
def experts_used(routers) -> list[float]:
    """Share of the experts of each router that got a token since the last call, over all ranks of the stage.

    Communicates (one all-reduce over ``tp_dp_cp``) and waits for the device; sets the routers' counts back to zero.
    """
    loads = torch.stack([router.expert_load for router in routers])  # [routers, E]
    group = routers[0].tp_dp_cp_group
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(loads, group=group)
    for router in routers:
        router.expert_load.zero_()
    return (loads > 0).float().mean(dim=1).tolist()


def log_health(model, iteration: int) -> None:
    """Log the routing health of this pipeline stage where Megatron's own log line is due.

    Every rank of the stage must call it. The figures are means over the stage's routers; the last rank, which also
    prints Megatron's lines, prints those of its stage.

    Args:
        model: Megatron's list of model chunks.
        iteration: counted from 1.
    """
    from megatron.training import get_args, print_rank_last
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    args = get_args()
    if iteration % args.log_interval and iteration != 1:
        return
    routers = air_routers(model)
    if not routers:
        return
    used = experts_used(routers)
    healths = [router.codebook.health() for router in routers]
    sizes = routers[0].sizes
    scalars = {
        "air/quantisation-error": _mean([health.quantisation_error for health in healths]),
        "air/live-codewords": _mean([health.live_codewords for health in healths]),
        "air/experts-used": _mean(used),
        "air/dropped-updates": sum(health.num_dropped for health in healths),
    }
    print_rank_last(
        f" routing health at iteration {iteration:8d} | quantisation error: {scalars['air/quantisation-error']:.4f} | "
        f"live codewords: {scalars['air/live-codewords']:.1f} of {sizes.num_clusters} | "
        f"experts used: {100 * scalars['air/experts-used']:.1f}% of {sizes.num_experts} | "
        f"dropped codebook updates: {scalars['air/dropped-updates']} |"
    )
    writer, wandb_writer = get_tensorboard_writer(), get_wandb_writer()
    if writer:
        for name, value in scalars.items():
            writer.add_scalar(name, value, iteration)
    if wandb_writer:
        wandb_writer.log(scalars, iteration)


def _mean(values):
    return sum(values) / len(values)
