"""VQRouter: half of a token's experts by its discrete code, half by an ordinary top-k router.

Each expert has a code, a vector of the hidden size. The discrete branch takes the experts of the K/2 codes nearest to the
token, with equal weights; the continuous branch the top K/2 by score; a learned gate of two weighs the branches. Source:
Do et al., "On the Role of Discrete Representation in Sparse Mixture of Experts" (VQMoE), arXiv 2411.19402: learned codebook,
codebook and commitment loss, both branches combined by a linear gate. Ours, not theirs: K/2 codes instead of one, so that
every router uses K experts; the experts of a code see the token itself instead of its code, as those of all routers do;
no layer norm between.

**Changes the loss**: adds ``moe_vq_loss_coeff * (|sg(h) - c|^2 + moe_vq_commitment * |h - sg(c)|^2)``, the mean over
tokens, their K/2 codes and the hidden size, attached to the probs as Megatron attaches auxiliary losses.

Cost of a token: two exact searches, forward ``4*H*E + 4*H`` FLOPs, backward ``4*H*E + 8*H``; the codes get theirs by K/2
row sums.

Legend: T tokens, H hidden, E experts, K top-k.
"""

import torch
from megatron.core.transformer.moe.moe_utils import router_gating_linear, topk_routing_with_score_function

from air_moe_megatron.routers.base import CompactRouter, Routes


class VQRouter(CompactRouter):
    """Route each token to the experts of its nearest codes and to its top experts; both may find the same one."""

    may_repeat = True

    def __init__(self, config, pg_collection=None, is_mtp_layer: bool = False) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.topk_per_branch = config.moe_router_topk // 2
        self.add_parameter("codes", config.num_moe_experts, config.hidden_size)
        self.add_parameter("branch_weight", 2, config.hidden_size)

    def _choose(self, hidden, keep, batch_size) -> Routes:
        dtype, topk = self._router_dtype(hidden), self.topk_per_branch
        code_ids = self._nearest_codes(hidden, dtype)
        logits = router_gating_linear(hidden, self.weight, self.bias, dtype)  # [T, E]
        logits = self.apply_z_loss(logits, padding_mask=None if keep is None else ~keep)
        top_probs, top_ids = topk_routing_with_score_function(logits, topk, dense_output=True, **self._score_settings())
        gate = router_gating_linear(hidden, self.branch_weight, None, dtype).softmax(dim=1)  # [T, 2]
        scale = (self.config.moe_router_topk_scaling_factor or 1.0) / topk
        code_probs = (gate[:, :1] * scale).expand(-1, topk)
        probs = torch.cat((code_probs, gate[:, 1:] * top_probs), dim=1).to(dtype)
        if self.training and torch.is_grad_enabled():
            probs = self._attach_vq_loss(probs, hidden, code_ids, keep)
        return Routes(torch.cat((code_ids, top_ids), dim=1).int(), probs)

    @torch.no_grad()
    def _nearest_codes(self, hidden, dtype):
        """[T, K/2] experts of the nearest codes, nearest first: by ``<h, c> - |c|^2 / 2``."""
        norms = self.codes.to(torch.promote_types(dtype, torch.float32)).square().sum(dim=1)
        products = router_gating_linear(hidden, self.codes, None, dtype)
        return (products - 0.5 * norms).topk(self.topk_per_branch, dim=1).indices

    def _attach_vq_loss(self, probs, hidden, code_ids, keep):
        """The probs, with codebook and commitment loss attached and logged as "vq_loss"."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        codes = torch.nn.functional.embedding(code_ids, self.codes).to(wide)  # [T, K/2, H]
        tokens = hidden.to(wide).unsqueeze(1)
        errors = (codes - tokens.detach()).square() + self.config.moe_vq_commitment * (tokens - codes.detach()).square()
        errors = errors.mean(dim=(1, 2))  # [T]
        num_tokens = errors.shape[0] if keep is None else keep.sum()
        total = errors.sum() if keep is None else (errors * keep).sum()
        # Each rank of the group adds its share, as with Megatron's z-loss.
        coeff = self.config.moe_vq_loss_coeff
        loss = total / max(num_tokens, 1) if keep is None else total / num_tokens.clamp_min(1)
        loss = loss * coeff / self.tp_cp_group.size()
        return self.attach_and_log_load_balancing_loss(
            probs, coeff, loss, "vq_loss", self.tp_cp_group, valid_token_count=num_tokens
        )
