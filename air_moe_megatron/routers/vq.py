"""VQRouter: half of a token's experts by its discrete code, half by an ordinary top-k router.

Each expert has a code, a vector of the hidden size. The discrete branch takes the experts of the K/2 codes nearest to
the token, with equal weights. The continuous branch takes the top K/2 by score. A learned gate weighs the two.

Source: Do et al., "On the Role of Discrete Representation in Sparse Mixture of Experts" (VQMoE), arXiv 2411.19402: a
learned codebook with codebook and commitment loss, and a linear gate over both branches. Deviations: K/2 codes instead
of one, so that every router uses K experts. The experts of a code see the token itself instead of its code, without
another layer norm.

**Changes the loss**: adds ``moe_vq_loss_coeff * (|sg(h) - c|^2 + moe_vq_commitment * |h - sg(c)|^2)``, where sg stops
the gradient. The loss is the mean over tokens, their K/2 codes and the hidden size. It is attached to the probs as
Megatron attaches auxiliary losses.

Cost per token: two exact searches, forward ``4*H*E + 4*H`` FLOPs, backward ``4*H*E + 8*H``. The codes' gradients are
sums of K/2 rows.
"""

from collections.abc import Iterator

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import FunctionCtx, once_differentiable

from air_moe_megatron.ops.dtypes import at_least_fp32
from air_moe_megatron.routers.base import CompactRouter, Routes
from air_moe_megatron.routers.flops import Rebuilds, RouterFlops, of_norm


class VQRouter(CompactRouter):
    """Route each token to the experts of its nearest codes and to its top experts, which may be the same."""

    router_type = "vq"
    checkpoint_key = "codes"
    vectors_per_expert = 2
    may_repeat = True

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, is_mtp_layer: bool = False
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.topk_per_branch = config.moe_router_topk // 2
        self.add_parameter("codes", config.num_moe_experts, config.hidden_size)
        self.add_parameter("branch_weight", 2, config.hidden_size)

    @staticmethod
    def flops(config: TransformerConfig, rebuilds: Rebuilds | None = None) -> RouterFlops:
        """See the base class: 4HE + 4H forward, 4HE + 8H backward."""
        products = 4 * config.hidden_size * config.num_moe_experts
        return RouterFlops(products + 4 * config.hidden_size, products + 8 * config.hidden_size, norm=of_norm(config))

    def _choose(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None, batch_size: int) -> Routes:
        dtype, topk = self._router_dtype(hidden), self.topk_per_branch
        code_ids = self._nearest_codes(hidden)
        logits = self._linear(hidden, self.weight, self.bias)  # [T, E]
        logits = self.apply_z_loss(logits, padding_mask=padding_mask)
        top_probs, top_ids = topk_routing_with_score_function(logits, topk, dense_output=True, **self._score_settings())
        gate = self._linear(hidden, self.branch_weight).softmax(dim=1)  # [T, 2]
        scale = (self.config.moe_router_topk_scaling_factor or 1.0) / topk
        code_probs = (gate[:, :1] * scale).expand(-1, topk)
        probs = torch.cat((code_probs, gate[:, 1:] * top_probs), dim=1).to(dtype)
        if self.training and torch.is_grad_enabled():
            probs = self._attach_vq_loss(probs, hidden, code_ids, padding_mask)
        return Routes(torch.cat((code_ids, top_ids), dim=1).int(), probs)

    @torch.no_grad()
    def _nearest_codes(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, K/2] experts of the nearest codes, nearest first: by ``<h, c> - |c|^2 / 2``, in fp32 or wider."""
        wide = at_least_fp32(hidden.dtype)
        products = self._linear(hidden, self.codes, dtype=wide)
        norms = self.codes.to(wide).square().sum(dim=1)
        return (products - 0.5 * norms).topk(self.topk_per_branch, dim=1).indices

    def _attach_vq_loss(
        self, probs: torch.Tensor, hidden: torch.Tensor, code_ids: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attach codebook and commitment loss to the probs [T, K], and log them as "vq_loss"."""
        num_tokens, coeff = self._num_tokens(hidden, padding_mask), self.config.moe_vq_loss_coeff
        wide = at_least_fp32(hidden.dtype)
        weights = (coeff / (hidden.shape[1] * self.topk_per_branch) / num_tokens.to(wide)).expand(hidden.shape[0])
        if padding_mask is not None:
            hidden, weights = hidden.masked_fill(padding_mask.unsqueeze(1), 0.0), weights.masked_fill(padding_mask, 0.0)
        loss = _VQLoss.apply(hidden, self.codes, code_ids, weights, self.config.moe_vq_commitment)
        return self._attach_loss(probs, loss, num_tokens, "vq_loss", coeff, self.tp_cp_group)


class _VQLoss(torch.autograd.Function):
    """``sum over t, k of weight_t * (|sg(h_t) - c_tk|^2 + commitment * |h_t - sg(c_tk)|^2)``, in fp32 or wider.

    Takes one code of each token at a time, so that no tensor of size [T, K, H] is made.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        codes: torch.Tensor,
        code_ids: torch.Tensor,
        weights: torch.Tensor,
        commitment: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, codes, code_ids, weights)
        ctx.commitment = commitment
        # Errors are weighted before they are squared, so that a square overflows only if the loss itself does.
        roots = (weights * (1.0 + commitment)).sqrt().unsqueeze(1)
        return sum((error * roots).square().sum() for _, error in _errors(hidden, codes, code_ids, weights.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, codes, code_ids, weights = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=weights.dtype)
        grad_codes = torch.zeros_like(codes, dtype=weights.dtype)
        scale = (2.0 * grad * weights).unsqueeze(1)
        for ids, error in _errors(hidden, codes, code_ids, weights.dtype):
            error = error * scale
            grad_codes.index_add_(0, ids, error)
            grad_hidden -= ctx.commitment * error
        return grad_hidden.to(hidden.dtype), grad_codes.to(codes.dtype), None, None, None


def _errors(
    hidden: torch.Tensor, codes: torch.Tensor, code_ids: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ids [T] and errors ``c - h`` [T, H]: first of each token's nearest code, then of the second nearest, ..."""
    for ids in code_ids.unbind(dim=1):
        yield ids, codes[ids].to(dtype) - hidden.to(dtype)
