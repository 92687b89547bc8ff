"""Gradients of the selected scores as two weighted sums of rows, each one ``embedding_bag``.

The tokens' gradient sums K centers per token. The centers' gradient sums the tokens of each expert, over pairs (token,
expert) sorted by expert. It is added to ``main_grad`` if it exists (``ops/weight_gradient.py``). If scores and weight
differ in dtype, the weight is copied, because ``embedding_bag`` takes one dtype only.
"""

import torch
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import embedding_bag

from air_moe_megatron.ops.dtypes import at_least_fp32
from air_moe_megatron.ops.weight_gradient import weight_gradient


class _SelectedScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ids: torch.Tensor,
        scores: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.weight = weight  # the parameter itself, for its main_grad
        return scores.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_scores: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, ids = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dtype, num_selected = grad_scores.dtype, ids.shape[1]
        grad_scores = grad_scores.masked_fill(ids < 0, 0.0)
        ids = ids.clamp(min=0)
        grad_hidden = grad_weight = grad_bias = None
        if need_hidden:
            grad_hidden = embedding_bag(ids, weight.to(dtype), per_sample_weights=grad_scores, mode="sum")
        if need_weight:
            sorted_ids, order = ids.reshape(-1).int().sort(stable=True)
            experts = torch.arange(weight.shape[0] + 1, dtype=torch.int32, device=ids.device)
            first = torch.searchsorted(sorted_ids, experts)
            values = grad_scores.reshape(-1).index_select(0, order)
            grad_weight = weight_gradient(ctx.weight, hidden.to(dtype), first, order // num_selected, values)
        if need_bias:
            wide = at_least_fp32(dtype)
            grad_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device)
            grad_bias.index_add_(0, ids.reshape(-1), grad_scores.reshape(-1).to(wide))
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            grad_weight,
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def selected_scores(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor, scores: torch.Tensor
) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.selected_scores.selected_scores`."""
    return _SelectedScores.apply(hidden, weight, bias, ids, scores)
