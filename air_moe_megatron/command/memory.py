"""Compare the memory that experts and routers need with what a rank has, before anything is allocated."""

import argparse
import os
from pathlib import Path

import torch

from air_moe_megatron.command.arguments import has_experts_by_layer
from air_moe_megatron.config import is_plain_topk, is_sharded, num_hash_layers
from air_moe_megatron.routers import ROUTERS

_GIB = 2**30

_KEY_BYTES = 8  # per expert during a rebuild of AIR's lists; lists and pools come on top

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_memory(args: argparse.Namespace) -> None:
    """Refuse a model whose experts and routers alone exceed the memory of this machine.

    The estimate is a lower bound: parameters, gradients and optimizer state of experts and routers, and the dense
    [tokens, experts] maps of one layer. Attention, activations and temporary tensors come on top. Megatron's own router
    with its own experts is not checked. Does not communicate.

    Raises:
        ValueError: naming the sizes, the memory needed and the memory available.
    """
    if is_plain_topk(args):
        return
    needed = needed_bytes(args)
    available, where = _available_bytes(args)
    total = sum(needed.values())
    if total > available:
        parts = ", ".join(f"{size / _GIB:.1f} GiB for {what}" for what, size in needed.items() if size)
        raise ValueError(
            f"--num-experts ({args.num_experts}): a rank needs at least {total / _GIB:.1f} GiB ({parts}), and there "
            f"are {available / _GIB:.1f} GiB {where}: use fewer or smaller experts, or a larger "
            f"--expert-model-parallel-size ({args.expert_model_parallel_size})"
        )


def needed_bytes(args: argparse.Namespace) -> dict[str, int]:
    """Lower bounds on the bytes that the rank with the most MoE layers needs, by purpose.

    Example: 2 layers of 16 experts with 3 * 8 rows of 32 on one rank have 2 * 16 * 768 parameters. In fp32, with
    gradient and Adam's two moments, each takes 16 bytes: 393,216 in all.
    """
    experts, hidden = args.num_experts, args.hidden_size
    expert_shards = (
        args.expert_model_parallel_size * args.expert_tensor_parallel_size * args.expert_gtp_weight_remat_size
    )
    router_size = hidden * ROUTERS[args.moe_router_type].vectors_per_expert
    layers = -(-sum(has_experts_by_layer(args)) // args.pipeline_model_parallel_size)
    scored_layers = max(0, layers - num_hash_layers(args))  # this rank may hold all hash layers
    size = parameters_of_expert(
        args.moe_latent_size or hidden,
        args.moe_ffn_hidden_size or args.ffn_hidden_size,
        is_gated=args.swiglu or args.quick_geglu,
    )
    expert_replicas = args.world_size // (expert_shards * args.pipeline_model_parallel_size)
    router_shards, router_replicas = 1, args.data_parallel_size * args.context_parallel_size
    if is_sharded(args):
        router_shards, router_replicas = args.expert_model_parallel_size, expert_replicas
    tokens = args.micro_batch_size * args.seq_length // args.context_parallel_size
    if args.sequence_parallel:
        tokens //= args.tensor_model_parallel_size
    map_bytes = args.params_dtype.itemsize + 1  # a prob and a boolean
    return {
        "experts": round(layers * experts * size // expert_shards * _bytes_per_parameter(args, expert_replicas)),
        "routers": round(
            scored_layers
            * (experts // router_shards)
            * (router_size * _bytes_per_parameter(args, router_replicas) + (args.moe_router_type == "air") * _KEY_BYTES)
        ),
        f"maps of {tokens} tokens times {experts} experts, which --moe-dispatch compact avoids": (
            tokens * experts * map_bytes if args.moe_dispatch == "stock" else 0
        ),
    }


def parameters_of_expert(input_size: int, ffn_hidden_size: int, is_gated: bool) -> int:
    """Number of parameters of one expert: two projections, with a gate three. Biases are not counted.

    Example: 32 inputs and a hidden size of 8 take 512, with a gate 768.
    """
    return (3 if is_gated else 2) * input_size * ffn_hidden_size


def _bytes_per_parameter(args: argparse.Namespace, replicas: int) -> float:
    return sum(parameter_bytes(args, replicas).values())


def parameter_bytes(args: argparse.Namespace, replicas: int) -> dict[str, float]:
    """Bytes per parameter of weight, gradient and optimizer state: the least that the flags allow.

    Example: fp32 with Adam takes 4, 4 and 8 bytes. A distributed optimizer over 16 replicas takes 8 / 16 = 0.5 of them.
    """
    weight = args.params_dtype.itemsize
    if args.skip_train:
        return {"weights": weight, "gradients": 0, "optimizer state": 0}
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 else weight
    state = 0
    if args.optimizer == "adam" and not args.use_precision_aware_optimizer:
        state = 8 if weight == 4 else 12  # two moments; 16-bit weights also have an fp32 copy
        if args.use_distributed_optimizer:
            state /= replicas
    return {"weights": weight, "gradients": gradient, "optimizer state": state}


def _available_bytes(args: argparse.Namespace) -> tuple[int, str]:
    """Bytes of memory that a rank has, and where, in words. Ranks on CPU share the host's memory equally."""
    if not args.cpu:
        device = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        return torch.cuda.get_device_properties(device).total_memory, f"on GPU {device}"
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    if limit != "max":
        host = min(host, int(limit))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return host // ranks, f"for each of the {ranks} ranks on this host"
