"""ExactRouter: Megatron's top-k router, with compact routes.

Scores, selection, probabilities and losses are Megatron's own functions on the scores of all experts; only the form of
the result is ours, for granular experts and compact dispatch.

Cost of a token: forward 2*H*E FLOPs, backward 4*H*E, and a row of E scores.

Legend: T tokens, H hidden, E experts, K top-k.
"""

import torch
from megatron.core.transformer.moe.moe_utils import (
    apply_biased_logits,
    apply_random_logits,
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)

from air_moe_megatron.routers.base import CompactRouter, Routes


class ExactRouter(CompactRouter):
    """Route each token to the top-k of all experts; equal to ``TopKRouter``, whose parameters it has."""

    def _choose(self, hidden, keep, batch_size) -> Routes:
        padded = None if keep is None else ~keep
        logits = self._linear(hidden, self.weight, self.bias)  # [T, E]
        if self.config.moe_router_force_load_balancing:
            logits = apply_random_logits(logits)
        if self.config.moe_router_force_biased is not None:
            logits = apply_biased_logits(logits, self.config.moe_router_force_biased, self.layer_number)
        logits = self.apply_z_loss(logits, padding_mask=padded)
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
            probs = self._attach_dense_aux_losses(probs, logits, padded, batch_size)
        return Routes(topk_ids.int(), probs)

    def _attach_dense_aux_losses(self, probs, logits, padded, batch_size):
        """As ``TopKRouter.routing``: every expert is a candidate, in order."""
        if logits.shape[0] == 0:  # which Megatron's reshaping does not take
            ids = torch.arange(self.num_experts, device=logits.device).expand_as(logits)
            return self._attach_aux_losses(probs, logits, ids, padded, batch_size)
        routing_map, scores = compute_routing_scores_for_aux_loss(
            logits, self.topk, self.score_function, padding_mask=padded
        )
        masked = padded is not None
        probs = self._apply_aux_loss(probs, scores, routing_map, with_padding_mask=masked)
        sequence_length = logits.shape[0] // batch_size
        probs = self._apply_seq_aux_loss(
            probs, scores, routing_map, sequence_length, batch_size, with_padding_mask=masked
        )
        return self._apply_global_aux_loss(probs, scores, routing_map, with_padding_mask=masked)
