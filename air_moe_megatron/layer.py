"""AIRMoELayer: Megatron's MoE layer on compact routes."""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.dispatcher import CompactTokenDispatcher
from air_moe_megatron.process_groups import HoldsProcessGroups


class AIRMoELayer(HoldsProcessGroups, MoELayer):
    """Route, dispatch, apply the experts, combine: Megatron's steps, without anything of size [tokens, experts].

    With ``moe_dispatch`` "compact" the router's :class:`Routes` go to a :class:`CompactTokenDispatcher` and
    :class:`GranularExperts`. With "stock" it is Megatron's layer. Arguments as ``MoELayer``'s.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, **kwargs)
        self.is_compact = config.moe_dispatch == "compact"
        if self.is_compact:
            self.local_expert_indices = range(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
            self.token_dispatcher = CompactTokenDispatcher(self.num_local_experts, config, pg_collection)

    def set_layer_number(self, layer_number: int) -> None:
        super().set_layer_number(layer_number)
        if self.is_compact:
            self.token_dispatcher.layer_number = layer_number
