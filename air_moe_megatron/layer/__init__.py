"""AIRMoELayer: Megatron's MoE layer on compact routes."""

import dataclasses
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config import hash_layer_config, hash_layer_numbers, is_sharded, num_hash_layers
from air_moe_megatron.layer.dispatcher import CompactTokenDispatcher, ShardedTokenDispatcher
from air_moe_megatron.modules import find_modules
from air_moe_megatron.process_groups import HoldsProcessGroups
from air_moe_megatron.routers import HashRouter, ShardedAIRRouter
from air_moe_megatron.routers.losses import layer_of


class AIRMoELayer(HoldsProcessGroups, MoELayer):
    """Megatron's MoE layer: route, dispatch, apply the experts, combine.

    With ``moe_dispatch`` "compact" the routes go to a :class:`CompactTokenDispatcher` and :class:`GranularExperts`,
    without tensors of size [tokens, experts]. With ``moe_air_shard_experts`` the dispatcher is a
    :class:`ShardedTokenDispatcher`. With "stock" this is Megatron's layer. With ``moe_num_hash_layers`` the layer's
    number decides whether it gets a :class:`HashRouter`, so :meth:`set_layer_number` makes the router.

    Args: as ``MoELayer``'s, and
        hash_layers: numbers of the layers that get a hash router; None derives them from ``moe_layer_freq``.
    Raises:
        ValueError: if ``moe_air_shard_experts`` does not fit the router's class.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        hash_layers: Collection[int] | None = None,
        **kwargs: Any,
    ) -> None:
        pg_collection = pg_collection or get_default_pg_collection()
        given = submodules
        is_decided = is_mtp_layer or not num_hash_layers(config)  # layers of multi-token prediction are never hashed
        if not is_decided:
            submodules = dataclasses.replace(submodules, router=_UnnumberedRouter)
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, **kwargs)
        self.hash_layers: Collection[int] = ()
        self._router_makers: tuple[Callable[[], torch.nn.Module], Callable[[], torch.nn.Module]] | None = None
        if not is_decided:
            self.hash_layers = hash_layer_numbers(config) if hash_layers is None else hash_layers
            self._router_makers = (
                partial(given.router, config=config, pg_collection=pg_collection, is_mtp_layer=False),
                partial(HashRouter, config=hash_layer_config(config), pg_collection=pg_collection),
            )
        self.is_compact = config.moe_dispatch == "compact"
        if isinstance(self.router, ShardedAIRRouter) != is_sharded(config):
            raise ValueError(
                f"moe_air_shard_experts ({is_sharded(config)}) does not fit the router {type(self.router).__name__}: "
                "build the layer with air_moe_megatron.routers.router_class(config)"
            )
        if self.is_compact:
            self.local_expert_indices = range(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
            dispatcher = ShardedTokenDispatcher if is_sharded(config) else CompactTokenDispatcher
            self.token_dispatcher = dispatcher(self.num_local_experts, config, pg_collection)

    def set_layer_number(self, layer_number: int) -> None:
        """Set the layer's number, counted from 1. The first call makes the router if the number decides its kind.

        Raises:
            ValueError: if the layer already has a router, and the new number requires the other kind.
        """
        by_hash = layer_number in self.hash_layers
        if self._router_makers is not None:
            self.router, self._router_makers = self._router_makers[by_hash](), None
        elif self.hash_layers and by_hash != isinstance(self.router, HashRouter):
            raise ValueError(
                f"layer_number ({layer_number}) must stay that of {'other' if by_hash else 'hash'} layers, as "
                f"{self.layer_number}: the hash layers are {list(self.hash_layers)}"
            )
        super().set_layer_number(layer_number)
        if self.is_compact:
            self.token_dispatcher.layer_number = layer_of(self.router)

    def train(self, mode: bool = True) -> "AIRMoELayer":
        """Set training or evaluation mode; only forwards in training mode count as traffic."""
        if self.is_compact:
            self.token_dispatcher.training = mode
        return super().train(mode)


def find_compact_layers(modules: torch.nn.Module | Iterable[torch.nn.Module]) -> list[AIRMoELayer]:
    """Find all layers with a compact dispatcher in a module or several, such as Megatron's model chunks, each once."""
    return [layer for layer in find_modules(modules, AIRMoELayer) if layer.is_compact]


class _UnnumberedRouter(torch.nn.Module):
    """Placeholder for the router until the layer's number decides which router it is."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, *_: Any) -> None:
        raise ValueError(
            "layer_number (None) must be set before a layer is used: with moe_num_hash_layers it decides "
            "which router the layer has; call set_layer_number"
        )
