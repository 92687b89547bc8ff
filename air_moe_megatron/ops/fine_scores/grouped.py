"""Fine scores with torch operations: one dense tile per codeword that has tokens.

Rows are (token, probe) pairs. For the n rows of codeword c and its list S_c the tile is
``X_c [n, H] @ W[S_c].T [H, L]``; its gradients are ``G @ W[S_c]`` and ``G.T @ X_c``, scattered back. Gathering W once
per codeword instead of once per token is what makes a shortlist cheaper than the dense product.

Codewords with about as many rows share a batched product, their rows padded to the largest. The gathered centres of a
batch share one buffer with those of all others: on a CPU, fresh memory for every list costs more in page faults than
the products themselves.

Where only the best K scores of a token are wanted, each tile is reduced to them while it is in the cache: the [T, L]
scores are never written.

Legend: T tokens, H hidden, E experts, C clusters, L shortlist, P probes, K top-k, R = T*P rows, B codewords of a batch,
n their rows after padding.
"""

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from air_moe_megatron.ops.weight_gradient import added_to_main_grad, main_grad_of

_BATCH_ELEMENTS = 2**22  # of the gathered centres: 16 MiB in fp32, which the largest cache of a CPU still holds
_MIN_FILL = 0.75  # rows of the smallest codeword of a batch over those of the largest


@dataclass(frozen=True)
class _Batch:
    """Codewords whose tiles are one batched product."""

    rows: torch.Tensor  # [B, n] int64, R where padded
    tokens: torch.Tensor  # [B, n] int64, the token of each row; any where padded
    experts: torch.Tensor  # [B, length], dtype of the shortlist, -1 after the end of a shorter list
    is_full: bool  # whether no list is shorter
    num_rows: int  # without padding

    @property
    def ids(self):
        """[B * length] rows of the weight; any where there is no expert."""
        ids = self.experts.reshape(-1)
        return ids if self.is_full else ids.clamp(min=0)


def _make_batches(shortlist, assignments, hidden_size) -> list[_Batch]:
    """Group the rows by codeword; codewords without rows or experts are left out. Waits for the device once."""
    num_probes, codewords = assignments.shape[1], assignments.reshape(-1)
    num_rows = codewords.numel()
    order = torch.argsort(codewords, stable=True)
    counts = torch.zeros(shortlist.shape[0], dtype=torch.int64, device=codewords.device)
    counts.index_add_(0, codewords, torch.ones_like(codewords))
    lengths = (shortlist >= 0).sum(dim=1)
    by_count = torch.argsort(counts, descending=True, stable=True)
    first = (counts.cumsum(0) - counts)[by_count]
    sorted_counts, shortlist = counts[by_count], shortlist[by_count]
    sizes = torch.stack((sorted_counts, lengths[by_count]), dim=1).tolist()
    places = torch.arange(sizes[0][0] if sizes else 0, device=codewords.device)
    batches = []
    for batch, (count, length, is_full) in _spans(sizes, hidden_size):
        places_in = places[:count]
        where = (first[batch].unsqueeze(1) + places_in).clamp(max=num_rows - 1)
        some_rows = order[where]
        rows = some_rows.masked_fill(places_in >= sorted_counts[batch].unsqueeze(1), num_rows)
        tokens = some_rows // num_probes if num_probes > 1 else some_rows
        num_rows_in = sum(rows_in for rows_in, _ in sizes[batch])
        batches.append(_Batch(rows, tokens, shortlist[batch, :length], is_full, num_rows_in))
    return batches


def _leave_gaps(batches, num_rows, width):
    """Whether a row has fewer than ``width`` experts: its list is shorter, or empty and in no batch."""
    return sum(batch.num_rows for batch in batches) < num_rows or any(
        not batch.is_full or batch.experts.shape[1] < width for batch in batches
    )


def _spans(sizes, hidden_size):
    """Yield (slice of the codewords sorted by rows, (most rows, longest list, whether all lists are that long))."""
    start = 0
    while start < len(sizes) and sizes[start][0]:
        count, length = sizes[start]
        shortest, end = length, start + 1
        while end < len(sizes) and sizes[end][0] >= max(1, _MIN_FILL * count):
            longest = max(length, sizes[end][1])
            if (end + 1 - start) * longest * hidden_size > _BATCH_ELEMENTS:
                break
            length, shortest, end = longest, min(shortest, sizes[end][1]), end + 1
        if length:
            yield slice(start, end), (count, length, shortest == length)
        start = end


class _Centres:
    """The gathered centres of one batch after another, in one buffer."""

    def __init__(self, batches, weight, dtype):
        widest = max((batch.experts.numel() for batch in batches), default=0)
        self.buffer = torch.empty(widest, weight.shape[1], dtype=dtype, device=weight.device)

    def room_for(self, batch):
        """[B, length, H] to be written."""
        return self.buffer[: batch.experts.numel()].view(*batch.experts.shape, -1)

    def gather(self, weight, batch):
        """[B, length, H] centres of the batch's experts, in the buffer's dtype."""
        rows = self.buffer[: batch.experts.numel()]
        if weight.dtype == rows.dtype:
            torch.index_select(weight, 0, batch.ids, out=rows)
        else:
            rows.copy_(weight.index_select(0, batch.ids))
        return rows.view(*batch.experts.shape, -1)


def _tiles(batches, hidden, weight, bias, dtype):
    """Yield each batch with its scores [B, n, length], -inf where a list is shorter."""
    centres = _Centres(batches, weight, dtype)
    for batch in batches:
        tile = torch.bmm(_tokens(hidden, batch, dtype), centres.gather(weight, batch).transpose(1, 2))
        if bias is not None:
            tile += bias.index_select(0, batch.ids).to(dtype).view_as(batch.experts).unsqueeze(1)
        if not batch.is_full:
            tile.masked_fill_((batch.experts < 0).unsqueeze(1), float("-inf"))
        yield batch, tile


class _GroupedFineScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, shortlist, assignments, dtype):
        num_rows, num_probes = assignments.numel(), assignments.shape[1]
        batches = _make_batches(shortlist, assignments, hidden.shape[1])
        # One row more, for what padding gives.
        scores = torch.empty(num_rows + 1, shortlist.shape[1], dtype=dtype, device=hidden.device)
        if _leave_gaps(batches, num_rows, scores.shape[1]):
            scores.fill_(float("-inf"))
        for batch, tile in _tiles(batches, hidden, weight, bias, dtype):
            scores[:, : tile.shape[2]].index_copy_(0, batch.rows.reshape(-1), tile.flatten(0, 1))
        ctx.save_for_backward(hidden, weight, bias)
        ctx.weight = weight  # the parameter itself, for its main_grad
        ctx.batches, ctx.num_probes, ctx.dtype = batches, num_probes, dtype
        return scores[:num_rows].view(-1, num_probes, shortlist.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_scores):
        hidden, weight, bias = ctx.saved_tensors
        num_probes, dtype, hidden_size = ctx.num_probes, ctx.dtype, hidden.shape[1]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_scores = grad_scores.reshape(-1, grad_scores.shape[-1])  # [R, L]
        num_rows = grad_scores.shape[0]
        grad_rows = grad_scores.new_zeros(num_rows + 1, hidden_size) if need_hidden else None
        wide = torch.promote_types(dtype, torch.float32)  # sums over many lists lose digits in bf16
        main_grad = main_grad_of(ctx.weight)
        grad_weight = None
        if need_weight:
            grad_weight = grad_scores.new_zeros(weight.shape, dtype=wide) if main_grad is None else main_grad
        grad_bias = grad_scores.new_zeros(bias.shape, dtype=wide) if need_bias else None
        centres = _Centres(ctx.batches, weight, dtype)
        for batch in ctx.batches:
            grad = _rows_or_zero(grad_scores[:, : batch.experts.shape[1]], batch)  # [B, n, length]
            if not batch.is_full:
                grad = grad.masked_fill((batch.experts < 0).unsqueeze(1), 0.0)
            if need_hidden:
                tile = torch.bmm(grad, centres.gather(weight, batch))
                grad_rows.index_copy_(0, batch.rows.reshape(-1), tile.flatten(0, 1))
            if need_weight:
                grad_centres = centres.room_for(batch)
                torch.bmm(grad.transpose(1, 2), _tokens(hidden, batch, dtype), out=grad_centres)
                grad_weight.index_add_(0, batch.ids, grad_centres.flatten(0, 1).to(grad_weight.dtype))
            if need_bias:
                grad_bias.index_add_(0, batch.ids, grad.sum(dim=1, dtype=wide).reshape(-1))
        grad_hidden = None
        if need_hidden:
            grad_hidden = grad_rows[:num_rows]
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


def _tokens(hidden, batch, dtype):
    """[B, n, H] tokens of the batch's rows; any where padded."""
    return hidden.index_select(0, batch.tokens.reshape(-1)).to(dtype).view(*batch.rows.shape, -1)


def _rows_or_zero(values, batch):
    """[B, n, length] rows of values [R, length]; zero where padded."""
    num_rows = values.shape[0]
    rows = values.index_select(0, batch.rows.reshape(-1).clamp(max=num_rows - 1)).view(*batch.rows.shape, -1)
    return rows.masked_fill_((batch.rows == num_rows).unsqueeze(2), 0.0)


def grouped_fine_scores(hidden, weight, bias, shortlist, assignments, dtype):
    """As :func:`air_moe_megatron.ops.fine_scores.fine_scores`, whose caller has validated the shapes."""
    return _GroupedFineScores.apply(hidden, weight, bias, shortlist, assignments, dtype)


@torch.no_grad()
def grouped_fine_topk(hidden, weight, bias, shortlist, assignments, topk, dtype):
    """As :func:`air_moe_megatron.ops.fine_scores.fine_topk`, whose caller has validated the shapes."""
    num_rows = assignments.numel()
    batches = _make_batches(shortlist, assignments, hidden.shape[1])
    # One row more, for what padding gives.
    scores = torch.empty(num_rows + 1, topk, dtype=dtype, device=hidden.device)
    ids = torch.empty(num_rows + 1, topk, dtype=torch.int32, device=hidden.device)
    if _leave_gaps(batches, num_rows, topk):
        scores.fill_(float("-inf"))
        ids.fill_(-1)
    for batch, tile in _tiles(batches, hidden, weight, bias, dtype):
        best, places = tile.topk(min(topk, tile.shape[2]), dim=2)
        experts = batch.experts.unsqueeze(1).expand_as(tile).gather(2, places)
        rows = batch.rows.reshape(-1)
        scores[:, : best.shape[2]].index_copy_(0, rows, best.flatten(0, 1))
        ids[:, : best.shape[2]].index_copy_(0, rows, experts.flatten(0, 1).int())
    return scores[:num_rows], ids[:num_rows]
