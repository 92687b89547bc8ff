"""HierarchicalRouter: a gate chooses groups of experts, and only their experts are scored.

The experts are split into G groups of E/G consecutive ids. A learned gate chooses the best g groups of a token. Among
the experts of these groups, the best K are selected by the product of both gates, in logarithms
``log p(group) + log p(expert within its group)``. With g = G this is a distribution over all experts.

Source: Shazeer et al. 2017, "Outrageously Large Neural Networks", arXiv 1701.06538, appendix B (hierarchical mixture of
experts). Deviations: no noise on the gates, softmaxes over all entries of a gate, and the best K experts of all g
groups together instead of a fixed number from each.

Cost per token: forward ``2*H*(G + g*E/G)`` FLOPs, backward twice that.

Legend: G groups, g groups searched per token; others as in ``ops/__init__.py``.
"""

import argparse
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config import resolve_groups
from air_moe_megatron.ops.dtypes import at_least_fp32
from air_moe_megatron.ops.fine_scores import fine_scores
from air_moe_megatron.routers.base import CompactRouter, Routes
from air_moe_megatron.routers.flops import Rebuilds, RouterFlops, of_norm


class HierarchicalRouter(CompactRouter):
    """Route each token to the top-k experts of its top groups; gradients reach both gates through the probs."""

    router_type = "hierarchical"
    checkpoint_key = "group_weight"

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, is_mtp_layer: bool = False
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.sizes = resolve_groups(config)
        self.add_parameter("group_weight", self.sizes.num_groups, config.hidden_size)
        if config.add_bias_linear:
            self.add_parameter("group_bias", self.sizes.num_groups)
        else:
            self.group_bias = None

    @staticmethod
    def checkpoint_fields(config: TransformerConfig | argparse.Namespace) -> dict[str, Any]:
        """See the base class."""
        return {"moe_hierarchical_num_groups": resolve_groups(config).num_groups}

    @staticmethod
    def flops(config: TransformerConfig, rebuilds: Rebuilds | None = None) -> RouterFlops:
        """See the base class: 2H(G + gE/G) forward, twice that backward."""
        sizes = resolve_groups(config)
        forward = 2 * config.hidden_size * (sizes.num_groups + sizes.topk_groups * sizes.group_size)
        return RouterFlops(forward, 2 * forward, norm=of_norm(config))

    def _choose(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None, batch_size: int) -> Routes:
        sizes, dtype = self.sizes, self._router_dtype(hidden)
        group_logits = self._linear(hidden, self.group_weight, self.group_bias)  # [T, G]
        groups = group_logits.topk(sizes.topk_groups, dim=1).indices
        experts = torch.arange(self.num_experts, dtype=torch.int32, device=hidden.device)
        lists = experts.view(sizes.num_groups, sizes.group_size)
        logits = fine_scores(hidden, self.weight, self.bias, lists, groups, dtype)  # [T, g, E/G]
        if self.config.moe_z_loss_coeff is not None:
            group_logits, logits = self._with_z_loss(group_logits, logits, padding_mask)
        wide = at_least_fp32(dtype)
        group_scores = group_logits.log_softmax(dim=1, dtype=wide).gather(1, groups)
        scores = group_scores.unsqueeze(2) + logits.log_softmax(dim=2, dtype=wide)
        ids = lists[groups].flatten(1).long()
        return self._choose_among(scores.flatten(1).to(dtype), ids, padding_mask, batch_size)

    def _with_z_loss(
        self, group_logits: torch.Tensor, logits: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attach the z-loss, taken over the logits of both gates together, [T, G] and [T, g, E/G]; return both."""
        both = torch.cat((group_logits, logits.flatten(1)), dim=1)
        both = super().apply_z_loss(both, padding_mask)
        group_logits, flat = both.split([group_logits.shape[1], both.shape[1] - group_logits.shape[1]], dim=1)
        return group_logits, flat.view_as(logits)

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Do nothing: :meth:`_with_z_loss` attaches the loss before the gates are normalized."""
        return logits
