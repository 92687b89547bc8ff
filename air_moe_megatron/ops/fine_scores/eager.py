"""Fine scores with torch operations: one dense tile per codeword that has tokens.

Rows are (token, probe) pairs. For the n rows of codeword c and its list S_c the tile is
``X_c [n, H] @ W[S_c].T [H, L]``. Its gradients are ``G @ W[S_c]`` and ``G.T @ X_c``, scattered back. W is gathered once
per codeword instead of once per token, which makes a shortlist cheaper than the dense product.

Codewords with similar numbers of rows share a batched product, with rows padded to the largest number. The position of
every row in this padded order is computed once for all batches, because on a CPU a batch is so small that a few more
operations would matter. All batches gather their centers into one buffer: fresh memory for every list would cost more
in page faults than the products themselves.

With one list per token, the best K are chosen from each tile while it is in the cache, and the [T, L] scores are never
written. With several lists per token, the best are chosen from [n, P*L] scores, for a block of n tokens at a time.

Legend: R = T*P rows, B codewords in a batch, n rows of each of them after padding, X rows of all batches after padding;
others as in ``ops/__init__.py``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from air_moe_megatron.ops.dtypes import at_least_fp32
from air_moe_megatron.ops.score_functions import selection_scores
from air_moe_megatron.ops.weight_gradient import added_to_main_grad, main_grad_of

_BATCH_ELEMENTS = 2**21  # elements of the gathered centers: 8 MiB in fp32, which fit a CPU's cache beside the tiles
_MIN_FILL = 0.75  # least ratio of the rows of a batch's smallest codeword to those of its largest
SCORES_OF_BLOCK = 2**26  # scores of a block of tokens, made before the best are chosen: 256 MiB in fp32
_TABLE_BYTES = 2**23  # bytes of the table of experts that a block of tokens has found
_TABLE_ROWS = (32, 128)  # least and most tokens of such a block: fewer need more operations, more exceed the cache


@dataclass(frozen=True)
class _Batch:
    """Codewords whose tiles are one batched product."""

    span: slice  # of the X padded rows
    shape: tuple[int, int]  # B, n
    rows: torch.Tensor  # [B * n] int64, R where padded
    tokens: torch.Tensor  # [B * n] int64, the token of each row; undefined where padded
    experts: torch.Tensor  # [B, length], dtype of the shortlist, -1 after the end of a shorter list
    is_full: bool  # whether all lists have this length

    @property
    def ids(self) -> torch.Tensor:
        """[B * length] rows of the weight; undefined where there is no expert."""
        ids = self.experts.reshape(-1)
        return ids if self.is_full else ids.clamp(min=0)


@dataclass(frozen=True)
class _Grouping:
    """All batches, and the position of each row in them."""

    batches: list[_Batch]
    padded_rows: torch.Tensor  # [R] int64, padded row of each row; X for the rows of codewords without experts
    num_padded: int  # X
    width: int  # least list length over all batches; 0 if a batch is not full or a row is in no batch


def _group(shortlist: torch.Tensor, probes: torch.Tensor, hidden_size: int) -> _Grouping:
    """Group the rows by codeword; codewords without rows or experts are in no batch. Waits for the device once."""
    num_probes, flat_probes = probes.shape[1], probes.reshape(-1)
    num_rows, device = flat_probes.numel(), flat_probes.device
    order = torch.argsort(flat_probes, stable=True)
    counts = torch.zeros(shortlist.shape[0], dtype=torch.int64, device=device)
    counts.index_add_(0, flat_probes, torch.ones_like(flat_probes))
    lengths = (shortlist >= 0).sum(dim=1)
    by_count = torch.argsort(counts, descending=True, stable=True)
    sizes = torch.stack((counts[by_count], lengths[by_count]), dim=1).tolist()
    spans = list(_spans(sizes, hidden_size))
    num_padded = sum((end - start) * count for start, end, count, _, _ in spans)

    # The padded row of the first row of each codeword, in the order of ``by_count``.
    starts, offset = [num_padded] * len(sizes), 0
    for start, end, count, _, _ in spans:
        starts[start:end] = range(offset, offset + (end - start) * count, count)
        offset += (end - start) * count
    first = torch.empty_like(counts).index_copy_(0, by_count, torch.tensor(starts, dtype=torch.int64, device=device))
    sorted_probes = flat_probes[order]
    shift = first - (counts.cumsum(0) - counts)
    padded_rows = (torch.arange(num_rows, device=device) + shift[sorted_probes]).clamp(max=num_padded)
    rows = torch.full((num_padded + 1,), num_rows, device=device).index_copy_(0, padded_rows, order)
    tokens = rows.clamp(max=max(num_rows - 1, 0))
    tokens = tokens // num_probes if num_probes > 1 else tokens

    experts, batches, offset = shortlist[by_count], [], 0
    for start, end, count, length, is_full in spans:
        span = slice(offset, offset + (end - start) * count)
        shape, offset = (end - start, count), span.stop
        batches.append(_Batch(span, shape, rows[span], tokens[span], experts[start:end, :length], is_full))
    num_batched = sum(rows_of for start, end, *_ in spans for rows_of, _ in sizes[start:end])
    width = min((batch.experts.shape[1] if batch.is_full else 0 for batch in batches), default=0)
    padded_rows = torch.empty_like(padded_rows).index_copy_(0, order, padded_rows)
    return _Grouping(batches, padded_rows, num_padded, width * (num_batched == num_rows))


def _spans(sizes: list[list[int]], hidden_size: int) -> Iterator[tuple[int, int, int, int, bool]]:
    """Yield (start, end, most rows, longest list, whether all lists are that long) of each batch of codewords.

    The ``sizes`` are (rows, list length) of each codeword, sorted by rows, the most first.
    """
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
            yield start, end, count, length, shortest == length
        start = end


class _CenterBuffer:
    """One buffer for the gathered centers, which is reused by one batch after another."""

    def __init__(self, batches: list[_Batch], weight: torch.Tensor, dtype: torch.dtype) -> None:
        widest = max((batch.experts.numel() for batch in batches), default=0)
        self.buffer = torch.empty(widest, weight.shape[1], dtype=dtype, device=weight.device)

    def room_for(self, batch: _Batch) -> torch.Tensor:
        """[B, length, H] part of the buffer, for the caller to write."""
        return self.buffer[: batch.experts.numel()].view(*batch.experts.shape, -1)

    def gather(self, weight: torch.Tensor, batch: _Batch) -> torch.Tensor:
        """[B, length, H] centers of the batch's experts, in the buffer's dtype."""
        rows = self.buffer[: batch.experts.numel()]
        if weight.dtype == rows.dtype:
            torch.index_select(weight, 0, batch.ids, out=rows)
        else:
            rows.copy_(weight.index_select(0, batch.ids))
        return rows.view(*batch.experts.shape, -1)


def _tiles(
    batches: list[_Batch], hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[_Batch, torch.Tensor]]:
    """Yield each batch with its scores [B, n, length], -inf where a list is shorter."""
    centers = _CenterBuffer(batches, weight, dtype)
    for batch in batches:
        tile = torch.bmm(_tokens(hidden, batch, dtype), centers.gather(weight, batch).transpose(1, 2))
        if bias is not None:
            tile += bias.index_select(0, batch.ids).to(dtype).view_as(batch.experts).unsqueeze(1)
        if not batch.is_full:
            tile.masked_fill_((batch.experts < 0).unsqueeze(1), float("-inf"))
        yield batch, tile


def _scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    probes: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, list[_Batch]]:
    """[T, P, L] scores of all candidates, -inf where a list is shorter; and the batches that made them."""
    num_rows = probes.numel()
    grouping = _group(shortlist, probes, hidden.shape[1])
    # One extra row, to which padding is written.
    scores = torch.empty(num_rows + 1, shortlist.shape[1], dtype=dtype, device=hidden.device)
    if grouping.width < scores.shape[1]:
        scores.fill_(float("-inf"))
    for batch, tile in _tiles(grouping.batches, hidden, weight, bias, dtype):
        scores[:, : tile.shape[2]].index_copy_(0, batch.rows, tile.flatten(0, 1))
    return scores[:num_rows].view(*probes.shape, shortlist.shape[1]), grouping.batches


class _GroupedFineScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        shortlist: torch.Tensor,
        probes: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        scores, ctx.batches = _scores(hidden, weight, bias, shortlist, probes, dtype)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.weight = weight  # the parameter itself, for its main_grad
        ctx.num_probes, ctx.dtype = probes.shape[1], dtype
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_scores: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        num_probes, dtype, hidden_size = ctx.num_probes, ctx.dtype, hidden.shape[1]
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_scores = grad_scores.reshape(-1, grad_scores.shape[-1])  # [R, L]
        num_rows = grad_scores.shape[0]
        grad_rows = grad_scores.new_zeros(num_rows + 1, hidden_size) if need_hidden else None
        wide = at_least_fp32(dtype)  # sums over many lists lose digits in bf16
        main_grad = main_grad_of(ctx.weight)
        grad_weight = None
        if need_weight:
            is_wide = main_grad is not None and at_least_fp32(main_grad.dtype) == main_grad.dtype
            grad_weight = main_grad if is_wide else grad_scores.new_zeros(weight.shape, dtype=wide)
        grad_bias = grad_scores.new_zeros(bias.shape, dtype=wide) if need_bias else None
        centers = _CenterBuffer(ctx.batches, weight, dtype)
        for batch in ctx.batches:
            grad = _rows_or_zero(grad_scores[:, : batch.experts.shape[1]], batch)  # [B, n, length]
            if not batch.is_full:
                grad = grad.masked_fill((batch.experts < 0).unsqueeze(1), 0.0)
            if need_hidden:
                tile = grad.new_empty(*batch.shape, hidden_size)
                torch.bmm(grad, centers.gather(weight, batch), out=tile)  # autocast does not change the dtype of out
                grad_rows.index_copy_(0, batch.rows, tile.flatten(0, 1))
            if need_weight:
                grad_centers = centers.room_for(batch)
                torch.bmm(grad.transpose(1, 2), _tokens(hidden, batch, dtype), out=grad_centers)
                grad_weight.index_add_(0, batch.ids, grad_centers.flatten(0, 1).to(grad_weight.dtype))
            if need_bias:
                grad_bias.index_add_(0, batch.ids, grad.sum(dim=1, dtype=wide).reshape(-1))
        grad_hidden = None
        if need_hidden:
            grad_hidden = grad_rows[:num_rows]
            if num_probes > 1:
                grad_hidden = grad_hidden.view(-1, num_probes, hidden_size).sum(dim=1)
            grad_hidden = grad_hidden.to(hidden.dtype)
        if need_weight:
            if main_grad is not None and grad_weight is not main_grad:
                main_grad.add_(grad_weight)
            grad_weight = grad_weight.to(weight.dtype) if main_grad is None else added_to_main_grad(ctx.weight)
        return (
            grad_hidden,
            grad_weight,
            grad_bias.to(bias.dtype) if need_bias else None,
            None,
            None,
            None,
        )


def _tokens(hidden: torch.Tensor, batch: _Batch, dtype: torch.dtype) -> torch.Tensor:
    """[B, n, H] tokens of the batch's rows; undefined where padded."""
    return hidden.index_select(0, batch.tokens).to(dtype).view(*batch.shape, -1)


def _rows_or_zero(values: torch.Tensor, batch: _Batch) -> torch.Tensor:
    """[B, n, length] rows of values [R, length]; zero where padded."""
    num_rows = values.shape[0]
    rows = values.index_select(0, batch.rows.clamp(max=num_rows - 1))
    return rows.masked_fill_((batch.rows == num_rows).unsqueeze(1), 0.0).view(*batch.shape, -1)


def fine_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    probes: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.fine_scores.fine_scores`."""
    return _GroupedFineScores.apply(hidden, weight, bias, shortlist, probes, dtype)


@torch.no_grad()
def fine_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    probes: torch.Tensor,
    num_candidates: int,
    dtype: torch.dtype,
    score_function: str | None,
    expert_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`air_moe_megatron.ops.fine_scores.fine_topk`, without gradients."""
    if probes.shape[1] == 1 and expert_bias is None:
        return _best_of_list(hidden, weight, bias, shortlist, probes, num_candidates, dtype)
    num_tokens, num_slots = hidden.shape[0], probes.shape[1] * shortlist.shape[1]
    scores = torch.full((num_tokens, num_candidates), float("-inf"), dtype=dtype, device=hidden.device)
    ids = torch.full((num_tokens, num_candidates), -1, dtype=torch.int32, device=hidden.device)
    num_best = min(num_candidates, num_slots)
    size = max(1, SCORES_OF_BLOCK // num_slots)
    for start in range(0, num_tokens, size):
        block = slice(start, start + size)
        found, _ = _scores(hidden[block], weight, bias, shortlist, probes[block], dtype)
        found = found.flatten(1)
        best = _best_distinct(found, shortlist, probes[block], weight.shape[0], num_best, score_function, expert_bias)
        scores[block, :num_best], ids[block, :num_best] = best
    return scores, ids


def _best_distinct(
    scores: torch.Tensor,
    shortlist: torch.Tensor,
    probes: torch.Tensor,
    num_experts: int,
    num_best: int,
    score_function: str | None,
    expert_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best M experts of each token by scores [T, P*L], an expert in several of its lists counted once.

    A table [tokens of a block, E] holds the position of the last probe in whose list an expert was found. It takes one
    byte each, for up to 127 probes. Only the P*L entries of a token are written and read. Blocks are small, so that the
    table fits the cache.

    Returns:
        [T, M] scores and ids, in no order.
    """
    num_tokens, num_probes = probes.shape
    lists = torch.where(shortlist < 0, num_experts, shortlist).long()  # empty slots use an extra column of the table
    number = torch.int8 if num_probes <= 127 else torch.int32
    positions = torch.arange(num_probes, dtype=number, device=scores.device).repeat_interleave(shortlist.shape[1])
    size = min(_TABLE_ROWS[1], max(_TABLE_ROWS[0], _TABLE_BYTES // num_experts), max(num_tokens, 1))
    last_position = torch.empty(size, num_experts + 1, dtype=number, device=scores.device)
    if expert_bias is not None:
        expert_bias = torch.nn.functional.pad(expert_bias, (0, 1), value=float("-inf"))
    best_scores = scores.new_empty(num_tokens, num_best)
    best_ids = probes.new_empty(num_tokens, num_best)
    for start in range(0, num_tokens, size):
        block = slice(start, start + size)
        ids = lists.index_select(0, probes[block].reshape(-1)).view(-1, scores.shape[1])
        table, position = last_position[: ids.shape[0]], positions.expand_as(ids)
        is_repeated = table.scatter_(1, ids, position).gather(1, ids) != position
        ranked = scores[block]
        if expert_bias is not None:
            ranked = selection_scores(ranked, score_function, expert_bias[ids])
        ranked = ranked.masked_fill(is_repeated, float("-inf"))
        values, columns = ranked.topk(num_best, dim=1, sorted=False)
        is_none = values == float("-inf")
        values = scores[block].gather(1, columns) if expert_bias is not None else values
        best_scores[block] = values.masked_fill(is_none, float("-inf"))
        best_ids[block] = ids.gather(1, columns).masked_fill(is_none, -1)
    return best_scores, best_ids


def _best_of_list(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    probes: torch.Tensor,
    num_candidates: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best M experts of one list per token; each tile is reduced to these while it is in the cache."""
    grouping = _group(shortlist, probes, hidden.shape[1])
    num_padded, list_size = grouping.num_padded + 1, shortlist.shape[1]  # one row more, for rows in no batch
    scores = torch.empty(num_padded, num_candidates, dtype=dtype, device=hidden.device)
    columns = torch.empty(num_padded, num_candidates, dtype=torch.int64, device=hidden.device)
    if grouping.width < num_candidates:
        scores.fill_(float("-inf"))
        columns.fill_(list_size)
        shortlist = torch.nn.functional.pad(shortlist, (0, 1), value=-1)
    for batch, tile in _tiles(grouping.batches, hidden, weight, bias, dtype):
        num_best = min(num_candidates, tile.shape[2])
        if num_best == num_candidates:
            out = tuple(values[batch.span].view(*batch.shape, num_candidates) for values in (scores, columns))
            torch.topk(tile, num_candidates, dim=2, sorted=False, out=out)
        else:
            for values, best in zip((scores, columns), tile.topk(num_best, dim=2, sorted=False), strict=True):
                values[batch.span, :num_best] = best.flatten(0, 1)
    scores, columns = (values.index_select(0, grouping.padded_rows) for values in (scores, columns))
    ids = shortlist.reshape(-1).index_select(0, (probes * shortlist.shape[1] + columns).reshape(-1))
    return scores, ids.int().view_as(columns)
