"""The routers: AIR, exact top-k and the other baselines. Each is a file, and AIR sharded over ranks is a folder.

What they share is in base.py and losses.py.
"""

from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config import is_sharded
from air_moe_megatron.routers.air import AIRRouter
from air_moe_megatron.routers.base import CompactRouter
from air_moe_megatron.routers.base import find_routers as find_routers
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
