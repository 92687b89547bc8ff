"""Fine scores with torch operations: one dense tile per codeword that has tokens.

Rows are (token, probe) pairs sorted by codeword. For the n rows of codeword c and its list S_c the tile is
``X_c [n, H] @ W[S_c].T [H, L]``; its gradients are ``G @ W[S_c]`` and ``G.T @ X_c``, scattered back. Gathering W once
per codeword instead of once per token is what makes a shortlist cheaper than the dense product.

Codewords are handled in chunks whose gathered centres share one buffer: on a CPU, fresh memory for every list costs
more in page faults than the products themselves.

Legend: T tokens, H hidden, E experts, C clusters, L shortlist, P probes, R = T*P rows.
"""

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from air_moe_megatron.ops.weight_gradient import added_to_main_grad, main_grad_of

_CHUNK_ELEMENTS = 2**21  # of the gathered centres: 8 MiB in fp32


@dataclass(frozen=True)
class _Span:
    """The rows of one codeword after sorting, and its experts within the chunk."""

    first: int
    end: int
    experts_first: int
    experts_end: int

    @property
    def num_experts(self):
        return self.experts_end - self.experts_first


@dataclass(frozen=True)
class _Groups:
    """Where the rows of each codeword lie after sorting, codewords without rows or experts left out."""

    order: torch.Tensor  # [R] int64, row at each sorted place
    chunks: list  # (expert ids of the chunk's lists, one after another; its spans)


def _group_rows(shortlist, assignments, hidden_size) -> _Groups:
    codewords = assignments.reshape(-1)
    order = torch.argsort(codewords, stable=True)
    counts = torch.bincount(codewords, minlength=shortlist.shape[0])
    lengths = (shortlist >= 0).sum(dim=1)
    chunks, ids, spans, first, width = [], [], [], 0, 0
    for codeword, (count, length) in enumerate(torch.stack((counts, lengths), dim=1).tolist()):
        if count and length:
            if spans and (width + length) * hidden_size > _CHUNK_ELEMENTS:
                chunks.append((torch.cat(ids), spans))
                ids, spans, width = [], [], 0
            ids.append(shortlist[codeword, :length])
            spans.append(_Span(first, first + count, width, width + length))
            width += length
        first += count
    if spans:
        chunks.append((torch.cat(ids), spans))
    return _Groups(order, chunks)


def _buffer_for(groups, hidden_size, like, dtype):
    """Room for the gathered centres of the widest chunk."""
    widest = max((ids.numel() for ids, _ in groups.chunks), default=0)
    return torch.empty(widest, hidden_size, dtype=dtype, device=like.device)


def _gather(weight, ids, buffer):
    """Rows ``ids`` of weight in the buffer, in the buffer's dtype."""
    rows = buffer[: ids.numel()]
    if weight.dtype == buffer.dtype:
        return torch.index_select(weight, 0, ids, out=rows)
    return rows.copy_(weight.index_select(0, ids))


class _GroupedFineScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, shortlist, assignments, dtype):
        num_probes, hidden_size = assignments.shape[1], hidden.shape[1]
        groups = _group_rows(shortlist, assignments, hidden_size)
        rows = hidden.index_select(0, groups.order // num_probes).to(dtype)  # [R, H]
        sorted_scores = rows.new_full((rows.shape[0], shortlist.shape[1]), float("-inf"))
        buffer = _buffer_for(groups, hidden_size, weight, dtype)
        for ids, spans in groups.chunks:
            centres = _gather(weight, ids, buffer)
            offsets = None if bias is None else bias[ids].to(dtype)
            for span in spans:
                experts = slice(span.experts_first, span.experts_end)
                tile = sorted_scores[span.first : span.end, : span.num_experts]
                torch.mm(rows[span.first : span.end], centres[experts].t(), out=tile)
                if bias is not None:
                    tile += offsets[experts]
        scores = torch.empty_like(sorted_scores).index_copy_(0, groups.order, sorted_scores)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.weight = weight  # the parameter itself, for its main_grad
        ctx.groups, ctx.num_probes, ctx.dtype = groups, num_probes, dtype
        return scores.view(-1, num_probes, shortlist.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_scores):
        hidden, weight, bias = ctx.saved_tensors
        groups, num_probes, dtype, hidden_size = ctx.groups, ctx.num_probes, ctx.dtype, hidden.shape[1]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        sorted_grad = grad_scores.reshape(-1, grad_scores.shape[-1]).index_select(0, groups.order)  # [R, L]
        rows = hidden.index_select(0, groups.order // num_probes).to(dtype) if need_weight else None
        grad_rows = sorted_grad.new_zeros(sorted_grad.shape[0], hidden_size) if need_hidden else None
        wide = torch.promote_types(dtype, torch.float32)  # sums over many lists lose digits in bf16
        main_grad = main_grad_of(ctx.weight)
        grad_weight = None
        if need_weight:
            grad_weight = sorted_grad.new_zeros(weight.shape, dtype=wide) if main_grad is None else main_grad
        grad_bias = sorted_grad.new_zeros(bias.shape, dtype=wide) if need_bias else None
        buffer = _buffer_for(groups, hidden_size, weight, dtype)
        for ids, spans in groups.chunks:
            tiles = [
                (slice(span.first, span.end), slice(span.experts_first, span.experts_end), span.num_experts)
                for span in spans
            ]
            if need_hidden:
                centres = _gather(weight, ids, buffer)
                for places, experts, length in tiles:
                    torch.mm(sorted_grad[places, :length], centres[experts], out=grad_rows[places])
            if need_weight:
                grad_centres = buffer[: ids.numel()]
                for places, experts, length in tiles:
                    torch.mm(sorted_grad[places, :length].t(), rows[places], out=grad_centres[experts])
                grad_weight.index_add_(0, ids, grad_centres.to(grad_weight.dtype))
            if need_bias:
                sums = [sorted_grad[places, :length].sum(dim=0, dtype=wide) for places, _, length in tiles]
                grad_bias.index_add_(0, ids, torch.cat(sums))
        grad_hidden = None
        if need_hidden:
            grad_hidden = torch.empty_like(grad_rows).index_copy_(0, groups.order, grad_rows)
            if num_probes > 1:
                grad_hidden = grad_hidden.view(-1, num_probes, hidden_size).sum(dim=1)
            grad_hidden = grad_hidden.to(hidden.dtype)
        if need_weight:
            grad_weight = grad_weight.to(weight.dtype) if main_grad is None else added_to_main_grad(ctx.weight)
        return (
            grad_hidden,
            grad_weight,
            grad_bias.to(bias.dtype) if need_bias else None,
            None,
            None,
            None,
        )


def grouped_fine_scores(hidden, weight, bias, shortlist, assignments, dtype):
    """As :func:`air_moe_megatron.ops.fine_scores.fine_scores`, whose caller has validated the shapes."""
    return _GroupedFineScores.apply(hidden, weight, bias, shortlist, assignments, dtype)
