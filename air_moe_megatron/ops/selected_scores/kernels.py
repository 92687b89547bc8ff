"""Gradients of the selected scores by the kernels of the pair products: sums over (token, expert) pairs.

No copy of the weight is made, whatever the dtype of the scores. Sums are in fp32.

Legend: N = T*K pairs; others as in ``ops/__init__.py``.
"""

from collections.abc import Sequence

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from air_moe_megatron.ops.blocks import contiguous
from air_moe_megatron.ops.pair_products import make_pairs
from air_moe_megatron.ops.pair_products.kernels import launch_pair_sums, launch_pair_weight_gradient
from air_moe_megatron.ops.weight_gradient import add_weight_gradient


def gradients_of_selected(
    grad_scores: torch.Tensor,
    ids: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    parameter: torch.Tensor,
    needed: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of hidden, weight and bias, each None if it is not needed.

    Args:
        grad_scores: [T, K], any float dtype.
        ids: [T, K] integer expert ids; gradients at ids of -1 are ignored.
        hidden, weight, bias: [T, H], [E, H], [E] or None; contiguous; fp32, bf16 or fp16.
        parameter: the weight parameter itself, for its ``main_grad``.
        needed: three bools, for hidden, weight and bias.
    """
    num_tokens, num_selected = ids.shape
    tokens = torch.arange(num_tokens, device=ids.device).repeat_interleave(num_selected)
    pairs = make_pairs(tokens, ids.reshape(-1), num_tokens, weight.shape[0])
    values = grad_scores.masked_fill(ids < 0, 0.0).reshape(-1)
    grad_hidden = grad_weight = grad_bias = None
    if needed[0]:
        grad_hidden = launch_pair_sums(values, weight, pairs, hidden.dtype)
    if needed[1]:
        grad_weight = add_weight_gradient(
            parameter, lambda out: launch_pair_weight_gradient(hidden, values, pairs, out)
        )
    if needed[2]:
        grad_bias = torch.zeros_like(bias)
        ones = torch.ones(num_tokens, 1, dtype=torch.float32, device=ids.device)
        launch_pair_weight_gradient(ones, values, pairs, grad_bias.unsqueeze(1))
    return grad_hidden, grad_weight, grad_bias


class _SelectedScoresKernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ids: torch.Tensor,
        scores: torch.Tensor,
    ) -> torch.Tensor:
        ctx.weight = weight
        ctx.save_for_backward(*contiguous(hidden, weight, bias), ids)
        return scores.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_scores: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, ids = ctx.saved_tensors
        return *gradients_of_selected(grad_scores, ids, *inputs, ctx.weight, ctx.needs_input_grad), None, None


def selected_scores(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor, scores: torch.Tensor
) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.selected_scores.selected_scores`."""
    return _SelectedScoresKernel.apply(hidden, weight, bias, ids, scores)
