"""Gradients of the selected scores as two weighted sums of rows, each one ``embedding_bag``.

The tokens' gradient sums K centres per token. The centres' gradient sums the tokens of each expert, the (token, expert)
pairs sorted by expert: every row of it is written once, and nothing has to be cleared first.

Legend: T tokens, H hidden, E experts, K selected.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag


class _BaggedSelectedScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, scores):
        ctx.save_for_backward(hidden, weight, bias, ids)
        return scores.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_scores):
        hidden, weight, bias, ids = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dtype, num_selected = grad_scores.dtype, ids.shape[1]
        grad_scores = grad_scores.masked_fill(ids < 0, 0.0)
        ids = ids.clamp(min=0)
        grad_hidden = grad_weight = grad_bias = None
        if need_hidden:
            grad_hidden = embedding_bag(ids, weight.to(dtype), per_sample_weights=grad_scores, mode="sum")
        if need_weight or need_bias:
            order = ids.reshape(-1).argsort(stable=True)
            weights = grad_scores.reshape(-1)[order]
            counts = torch.zeros(weight.shape[0], dtype=torch.int64, device=ids.device)
            counts.index_add_(0, ids.reshape(-1), torch.ones_like(order))
            first = counts.cumsum(0) - counts
            if need_weight:
                tokens = order // num_selected
                grad_weight = embedding_bag(tokens, hidden.to(dtype), first, per_sample_weights=weights, mode="sum")
            if need_bias:
                grad_bias = torch.segment_reduce(weights.double(), "sum", lengths=counts, initial=0, unsafe=True)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def bagged_selected_scores(hidden, weight, bias, ids, scores):
    """As :func:`air_moe_megatron.ops.selected_scores.selected_scores`, whose caller has validated the shapes."""
    return _BaggedSelectedScores.apply(hidden, weight, bias, ids, scores)
