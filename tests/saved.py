"""Sizes, fields and tensors of the small checkpoints that ``tests/unit/checkpoints`` saves and checks."""

import argparse
from pathlib import Path

import torch

from air_moe_megatron.command.agreement import Ranks

LAYERS, EXPERTS, HIDDEN, FFN, CLUSTERS, SHORTLIST = 2, 16, 32, 8, 4, 8
ALONE = Ranks(rank=0, world_size=1, store=None)
AIR = {"moe_router_type": "air", "moe_air_num_clusters": CLUSTERS, "moe_air_shortlist_size": SHORTLIST}
GRANULAR = {"moe_granular_experts": True}
NORM = {"moe_router_input_norm": "running"}
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}


def tensors_of(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The tensors of a layer that the checks look at, for the router and the experts that the arguments ask for."""
    router = {
        "topk": {"weight": (EXPERTS, HIDDEN)},
        "air": {
            "weight": (EXPERTS, HIDDEN),
            "codebook.codewords": (args.moe_air_num_clusters, HIDDEN),
            "index.shortlist": (args.moe_air_num_clusters, args.moe_air_shortlist_size),
            "index.progress": (2,),
        },
        "product_key": {"keys1": (1, 4, HIDDEN // 2)},
        "hierarchical": {"weight": (EXPERTS, HIDDEN), "group_weight": (4, HIDDEN)},
        "hash": {"table": (64, 2)},
        "vq": {"weight": (EXPERTS, HIDDEN), "codes": (EXPERTS, HIDDEN)},
    }[args.moe_router_type]
    if args.moe_router_input_norm == "running":
        router = router | {"input_norm.mean": (HIDDEN,)}
    if args.moe_router_enable_expert_bias:
        router = router | {"expert_bias": (EXPERTS,)}
    if args.moe_granular_experts:
        experts = {"weight1": (EXPERTS, 2 * FFN, HIDDEN), "weight2": (EXPERTS, FFN, HIDDEN)}
    else:
        experts = {"experts.linear_fc2.weight": (EXPERTS, HIDDEN, FFN)}
    shapes = {f"router.{name}": shape for name, shape in router.items()}
    shapes |= {f"experts.{name}": shape for name, shape in experts.items()}
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path
