"""The routers: AIR, exact top-k and the other baselines. Each is a file, and AIR sharded over ranks is a folder.

What they share is in base.py and losses.py.
"""

from collections.abc import Iterable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config import is_sharded
from air_moe_megatron.routers.air import AIRRouter
from air_moe_megatron.routers.base import CompactRouter
from air_moe_megatron.routers.exact import ExactRouter
from air_moe_megatron.routers.hashing import HashRouter
from air_moe_megatron.routers.hierarchical import HierarchicalRouter
from air_moe_megatron.routers.product_key import ProductKeyRouter
from air_moe_megatron.routers.sharded import ShardedAIRRouter
from air_moe_megatron.routers.vq import VQRouter

ROUTERS: dict[str, type[CompactRouter]] = {
    router.router_type: router
    for router in (ExactRouter, AIRRouter, ProductKeyRouter, HierarchicalRouter, HashRouter, VQRouter)
}
"""The router class of each ``moe_router_type``. With Megatron's own experts, "topk" is Megatron's own class instead."""


def router_class(config: TransformerConfig) -> type[CompactRouter]:
    """The router class that a config selects."""
    return ShardedAIRRouter if is_sharded(config) else ROUTERS[config.moe_router_type]


def find_routers[R: CompactRouter](
    modules: torch.nn.Module | Iterable[torch.nn.Module], router_class: type[R] = CompactRouter
) -> list[R]:
    """Find all routers of a class in a fixed order, each once.

    Args:
        modules: a module, or several, such as Megatron's model chunks.
        router_class: the class to find; by default every router of this package.
    """
    chunks = [modules] if isinstance(modules, torch.nn.Module) else modules
    found = dict.fromkeys(module for chunk in chunks for module in chunk.modules())
    return [module for module in found if isinstance(module, router_class)]
