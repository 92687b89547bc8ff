"""Weights that are split by expert over the expert-parallel ranks: their marks, and their shards of checkpoints."""

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch.distributed import ProcessGroup


def mark_expert_weight(weight: torch.nn.Parameter) -> None:
    """Mark a weight of this rank's experts as Megatron marks those of its own experts.

    Without ``allreduce`` False, the gradient would be summed over the data-parallel group of the dense layers. The
    tensor-parallel marks keep the optimizer from taking the weight for a copy of another tensor-parallel rank's.
    """
    weight.allreduce = False
    set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)


def sharded_by_expert(
    key: str,
    data: torch.Tensor,
    sharded_offsets: tuple[tuple[int, int, int], ...],
    ep_group: ProcessGroup,
    expt_dp_group: ProcessGroup,
    axis: int = 0,
) -> ShardedTensor:
    """Describe this rank's shard of a tensor in a checkpoint, which then loads at any expert-parallel size.

    Args:
        key: the name in the checkpoint.
        data: the part of this rank's experts.
        sharded_offsets: those that ``sharded_state_dict`` is given; each adds an axis in front.
        ep_group: the ranks that hold the parts, in the order of the experts.
        expt_dp_group: the ranks that hold copies of this part.
        axis: the axis of the data along which the ranks' parts are put together.
    """
    num_offsets = len(sharded_offsets)
    return ShardedTensor.from_rank_offsets(
        key,
        data,
        *sharded_offsets,
        (num_offsets + axis, ep_group.rank(), ep_group.size()),
        replica_id=(0, 0, expt_dp_group.rank()),
        prepend_axis_num=num_offsets,
    )
