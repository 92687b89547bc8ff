"""ExactRouter: Megatron's top-k router, with compact routes.

Megatron's own functions compute scores, selection and probabilities, over all experts. The losses (losses.py) and the
form of the result are ours, for granular experts and compact dispatch.

Cost per token: forward 2*H*E FLOPs, backward 4*H*E, and E scores in memory.
"""

import torch
from megatron.core.transformer.moe.moe_utils import (
    apply_biased_logits,
    apply_random_logits,
    topk_routing_with_score_function,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.routers.base import CompactRouter, Routes
from air_moe_megatron.routers.flops import Rebuilds, RouterFlops, of_norm


class ExactRouter(CompactRouter):
    """Route each token to the top-k of all experts; routes and parameters are those of ``TopKRouter``."""

    router_type = "topk"

    @staticmethod
    def flops(config: TransformerConfig, rebuilds: Rebuilds | None = None) -> RouterFlops:
        """See the base class: 2HE forward, 4HE backward."""
        products = config.hidden_size * config.num_moe_experts
        return RouterFlops(2 * products, 4 * products, norm=of_norm(config))

    def _choose(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None, batch_size: int) -> Routes:
        logits = self._linear(hidden, self.weight, self.bias)  # [T, E]
        if self.config.moe_router_force_load_balancing:
            logits = apply_random_logits(logits)
        if self.config.moe_router_force_biased is not None:
            logits = apply_biased_logits(logits, self.config.moe_router_force_biased, self.layer_number)
        logits = self.apply_z_loss(logits, padding_mask=padding_mask)
        probs, topk_ids = topk_routing_with_score_function(
            logits,
            self.topk,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            expert_bias=self.expert_bias,
            dense_output=True,
            **self._score_settings(),
        )
        if self._needs_aux_scores():
            # None for the ids: every expert is a candidate.
            probs = self._attach_aux_losses(probs, logits, None, padding_mask, batch_size)
        return Routes(topk_ids.int(), probs)
