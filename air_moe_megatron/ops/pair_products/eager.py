"""Pair products with torch's sparse operations.

On a CPU the dot products are ``torch.sparse.sampled_addmm`` in the order of the weight rows. Each weight row is read
once, in memory order, while the tokens stay in the cache. On a GPU the dot products gather the rows of a bounded chunk
of pairs at a time. The sums are ``embedding_bag`` in the order of the tokens, so each output row is written once.
"""

from typing import TYPE_CHECKING

import torch
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import embedding_bag

from air_moe_megatron.ops.dtypes import at_least_fp32
from air_moe_megatron.ops.weight_gradient import sparse_rows, weight_gradient

if TYPE_CHECKING:
    from air_moe_megatron.ops.pair_products import Pairs

_CHUNK_ELEMENTS = 2**21  # elements of the weight rows that are widened at a time: 8 MiB in fp32
_GATHERED_ELEMENTS = 2**26  # elements of each of the two gathers of a chunk of pairs: 256 MiB in fp32


def _dots(hidden: torch.Tensor, weight: torch.Tensor, pairs: "Pairs") -> torch.Tensor:
    """[N] dot products, fp32 or wider."""
    wide = at_least_fp32(hidden.dtype, weight.dtype)
    if hidden.is_cuda:
        return _gathered_dots(hidden, weight, pairs, wide)
    tokens = pairs.rows[pairs.by_id]
    hidden = hidden.to(wide)
    if weight.dtype == wide:
        dots = _sampled(weight, hidden, pairs.id_first, tokens)
    else:  # widen a bounded chunk of the weight at a time
        dots = torch.empty(tokens.numel(), dtype=wide, device=hidden.device)
        chunk = max(1, _CHUNK_ELEMENTS // weight.shape[1])
        for first in range(0, weight.shape[0], chunk):
            rows = weight[first : first + chunk].to(wide)
            slots = pairs.id_first[first : first + rows.shape[0] + 1]
            span = slice(int(slots[0]), int(slots[-1]))
            dots[span] = _sampled(rows, hidden, slots - span.start, tokens[span])
    return torch.empty_like(dots).index_copy_(0, pairs.by_id, dots)


def _sampled(weight: torch.Tensor, hidden: torch.Tensor, id_first: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[N] products ``<weight_m, hidden_t>`` of each weight row m with its tokens t, sorted by weight row."""
    pattern = sparse_rows(id_first, tokens, hidden.new_zeros(tokens.numel()), hidden.shape[0])
    return torch.sparse.sampled_addmm(pattern, weight, hidden.t(), beta=0.0).values()


def _gathered_dots(hidden: torch.Tensor, weight: torch.Tensor, pairs: "Pairs", wide: torch.dtype) -> torch.Tensor:
    chunk = max(1, _GATHERED_ELEMENTS // weight.shape[1])
    dots = torch.empty(pairs.ids.numel(), dtype=wide, device=hidden.device)
    for first in range(0, dots.numel(), chunk):
        part = slice(first, first + chunk)
        products = hidden[pairs.rows[part]].to(wide).mul_(weight[pairs.ids[part]])
        dots[part] = products.sum(dim=1)
    return dots


def _sums(values: torch.Tensor, weight: torch.Tensor, pairs: "Pairs") -> torch.Tensor:
    """[R, H] in the dtype of weight."""
    return embedding_bag(
        pairs.ids, weight, pairs.row_first[:-1], per_sample_weights=values.to(weight.dtype), mode="sum"
    )


def _weight_gradient(weight: torch.Tensor, source: torch.Tensor, values: torch.Tensor, pairs: "Pairs") -> torch.Tensor:
    """Sum of ``value * source[row]`` over the pairs of each weight row."""
    order = pairs.by_id
    return weight_gradient(weight, source, pairs.id_first, pairs.rows[order], values[order])


class _PairDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: torch.Tensor, weight: torch.Tensor, pairs: "Pairs") -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.weight, ctx.pairs = weight, pairs  # the parameter itself, for its main_grad
        return _dots(hidden, weight.view(pairs.num_ids, -1), pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_dots: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        pairs = ctx.pairs
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = _sums(grad_dots, weight.view(pairs.num_ids, -1), pairs).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(ctx.weight, hidden, grad_dots, pairs)
        return grad_hidden, grad_weight, None


class _PairSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, values: torch.Tensor, weight: torch.Tensor, pairs: "Pairs") -> torch.Tensor:
        ctx.save_for_backward(values, weight)
        ctx.weight, ctx.pairs = weight, pairs
        return _sums(values, weight.view(pairs.num_ids, -1), pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_sums: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        pairs = ctx.pairs
        grad_sums = grad_sums.contiguous()
        grad_values = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_values = _dots(grad_sums, weight.view(pairs.num_ids, -1), pairs).to(values.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(ctx.weight, grad_sums, values, pairs)
        return grad_values, grad_weight, None


def pair_dots(hidden: torch.Tensor, weight: torch.Tensor, pairs: "Pairs") -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.pair_products.pair_dots`."""
    return _PairDots.apply(hidden, weight, pairs)


def pair_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    pairs: "Pairs",
    grad_dots: torch.Tensor,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """As :func:`air_moe_megatron.ops.pair_products.pair_gradients`; summed in the dtype of ``grad_dots``."""
    grad_hidden = grad_weight = None
    if need_hidden:
        grad_hidden = _sums(grad_dots, weight.view(pairs.num_ids, -1).to(grad_dots.dtype), pairs).to(hidden.dtype)
    if need_weight:
        grad_weight = _weight_gradient(weight, hidden.to(grad_dots.dtype), grad_dots, pairs)
    return grad_hidden, grad_weight


def pair_sums(values: torch.Tensor, weight: torch.Tensor, pairs: "Pairs") -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.pair_products.pair_sums`."""
    return _PairSums.apply(values, weight, pairs)
