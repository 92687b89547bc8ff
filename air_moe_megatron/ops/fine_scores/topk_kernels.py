"""Fine scores and top-k in one Triton kernel: no [T, L] scores in memory.

A program keeps the scores of 16 rows on the chip, one tile of the list after another, and lets out only the selected
ones and the normaliser. A candidate is one int64 key of what it is ranked by and its place in the list (``order_key``).
A bitonic network keeps the largest K of a tile: runs of K are sorted in turn up and down, the larger of each two
opposite elements are the K largest of both, and so on; across tiles likewise.

Legend: T tokens, H hidden, E experts, C clusters, L shortlist, K top-k, B blocks of tokens.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from air_moe_megatron.ops.fine_scores.kernels import (
    dense_gradients,
    experts_of_list,
    launch_fine_scores,
    rows_of_block,
    score_tile,
    sort_rows,
)
from air_moe_megatron.ops.selected_scores.kernels import gradients_of_selected
from air_moe_megatron.ops.tiles import (
    LOWEST_KEY,
    SCORE_FUNCTIONS,
    apply_score_function,
    block_of,
    contiguous,
    dot_dtype_of,
    id_of_key,
    order_key,
    require_kernel_dtypes,
    step_of,
    value_of_key,
)

MAX_TOPK = 512

_TILE_COLUMNS = 512  # of a list whose scores are on the chip at once; half as many beside those of earlier tiles


@triton.jit
def _exchange(keys, payload, descending, AXIS: tl.constexpr, PAYLOAD: tl.constexpr):
    """Put the two elements along an axis of a hypercube, counted from the last, in order."""
    num_axes: tl.constexpr = len(keys.shape)
    is_second = tl.reshape(tl.arange(0, 2), [1] * (num_axes - AXIS - 1) + [2] + [1] * AXIS)
    other = tl.sum(keys, num_axes - 1 - AXIS, keep_dims=True) - keys  # integers wrap around
    swap = (keys > other) != (descending ^ is_second)
    if PAYLOAD:
        payload = tl.where(swap, tl.sum(payload, num_axes - 1 - AXIS, keep_dims=True) - payload, payload)
    return tl.where(swap, other, keys), payload


@triton.jit
def _merge_runs(keys, payload, LOG_RUN: tl.constexpr, order: tl.constexpr, PAYLOAD: tl.constexpr):
    """Sort bitonic runs of 2**LOG_RUN elements: order 0 upwards, 1 downwards, 2 in turn up and down."""
    num_axes: tl.constexpr = len(keys.shape)
    if order == 2:
        descending = tl.reshape(tl.arange(0, 2), [1] * (num_axes - LOG_RUN - 1) + [2] + [1] * LOG_RUN)
    else:
        descending = order
    for i in tl.static_range(LOG_RUN):
        keys, payload = _exchange(keys, payload, descending, LOG_RUN - 1 - i, PAYLOAD)
    return keys, payload


@triton.jit
def _largest(
    keys,
    payload,
    LOG_N: tl.constexpr,
    LOG_L: tl.constexpr,
    LOG_K: tl.constexpr,
    descending: tl.constexpr,
    PAYLOAD: tl.constexpr,
):
    """[2**LOG_N, 2**LOG_K] largest of int64 keys [2**LOG_N, 2**LOG_L], sorted, and their payload if there is one."""
    keys = tl.reshape(keys, [2] * (LOG_N + LOG_L))
    if PAYLOAD:
        payload = tl.reshape(payload, [2] * (LOG_N + LOG_L))
    for i in tl.static_range(1, LOG_K + 1):
        keys, payload = _merge_runs(keys, payload, i, 2 if i < LOG_L else descending, PAYLOAD)
    for i in tl.static_range(LOG_K + 1, LOG_L + 1):
        # The axis of the two runs: there is one axis less in each turn.
        if PAYLOAD:  # of two absent candidates, whose keys are equal, the payload does not matter
            larger = tl.max(keys, LOG_N + LOG_L - i, keep_dims=True)
            payload = tl.sum(tl.where(keys == larger, payload, 0), LOG_N + LOG_L - i)
        keys = tl.max(keys, LOG_N + LOG_L - i)
        keys, payload = _merge_runs(keys, payload, LOG_K, 2 if i < LOG_L else descending, PAYLOAD)
    keys = tl.reshape(keys, [2**LOG_N, 2**LOG_K])
    if PAYLOAD:
        payload = tl.reshape(payload, [2**LOG_N, 2**LOG_K])
    return keys, payload


@triton.jit
def _merge_sorted(
    keys, payload, other_keys, other_payload, LOG_N: tl.constexpr, LOG_K: tl.constexpr, PAYLOAD: tl.constexpr
):
    """The largest of two tiles [2**LOG_N, 2**LOG_K], the first sorted downwards, the other upwards; downwards again."""
    if PAYLOAD:
        payload = tl.reshape(tl.where(keys >= other_keys, payload, other_payload), [2] * (LOG_N + LOG_K))
    keys = tl.reshape(tl.maximum(keys, other_keys), [2] * (LOG_N + LOG_K))
    keys, payload = _merge_runs(keys, payload, LOG_K, 1, PAYLOAD)
    if PAYLOAD:
        payload = tl.reshape(payload, [2**LOG_N, 2**LOG_K])
    return tl.reshape(keys, [2**LOG_N, 2**LOG_K]), payload


@triton.jit
def _rank(scores, selection_bias, experts, FUNCTION: tl.constexpr, HAS_SELECTION_BIAS: tl.constexpr):
    """What candidates are ranked by."""
    rank = apply_score_function(scores, FUNCTION)
    if HAS_SELECTION_BIAS:
        added = tl.load(selection_bias + experts, mask=experts >= 0, other=0.0).to(tl.float32)
        rank += added[None, :]
    return rank


@triton.jit
def _fine_topk_fwd_kernel(
    hidden,  # [T, H]
    weight,  # [E, H]
    bias,  # [E] or None
    selection_bias,  # [E] or None
    shortlist,  # [C, L]
    order,  # [T] tokens sorted by codeword
    row_first,  # [C + 1]
    segments,  # [B]
    starts,  # [B]
    topk_scores,  # [T, K] fp32, written
    topk_ids,  # [T, K] int32, written
    topk_columns,  # [T, K] int32 places in the list, written
    logsumexp,  # [T] fp32, written
    C,
    K,
    H: tl.constexpr,
    L: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SELECTION_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    LOG_N: tl.constexpr,
    LOG_L: tl.constexpr,
    LOG_K: tl.constexpr,
    NUM_TILES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    BLOCK_N: tl.constexpr = 2**LOG_N
    BLOCK_L: tl.constexpr = 2**LOG_L
    BLOCK_K: tl.constexpr = 2**LOG_K
    # A score can be read off its key, unless the candidates are ranked by something else: then it travels along.
    PAYLOAD: tl.constexpr = HAS_SELECTION_BIAS or FUNCTION is not None
    block = tl.program_id(0)
    codeword = tl.load(segments + block)
    if codeword == C:
        return
    rows, tokens, inside = rows_of_block(block, codeword, order, row_first, starts, 1, BLOCK_N)
    best = tl.full([BLOCK_N, BLOCK_K], LOWEST_KEY, tl.int64)
    best_bits = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(NUM_TILES):
        columns = tile * BLOCK_L + tl.arange(0, BLOCK_L)
        experts = experts_of_list(shortlist, codeword, columns, L)
        scores = score_tile(
            hidden, weight, bias, tokens, inside, experts, H, HAS_BIAS, DOT_DTYPE, BLOCK_N, BLOCK_L, BLOCK_H
        )
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        shift = tl.where(tl.abs(new_highest) == float("inf"), 0.0, new_highest)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(scores - shift[:, None]), axis=1)
        highest = new_highest
        rank = _rank(scores, selection_bias, experts, FUNCTION, HAS_SELECTION_BIAS)
        keys = tl.where((experts >= 0)[None, :], order_key(rank, columns[None, :]), LOWEST_KEY)
        bits = best_bits
        if PAYLOAD:
            bits = scores.to(tl.int32, bitcast=True)
        if NUM_TILES == 1:
            best, best_bits = _largest(keys, bits, LOG_N, LOG_L, LOG_K, 1, PAYLOAD)
        else:
            keys, bits = _largest(keys, bits, LOG_N, LOG_L, LOG_K, 0, PAYLOAD)
            best, best_bits = _merge_sorted(best, best_bits, keys, bits, LOG_N, LOG_K, PAYLOAD)
    best_scores = best_bits.to(tl.float32, bitcast=True) if PAYLOAD else value_of_key(best)
    present = best != LOWEST_KEY
    places = id_of_key(best).to(tl.int32)
    ids = tl.load(shortlist + codeword * L + places, mask=present, other=-1).to(tl.int32)
    choices = tl.arange(0, BLOCK_K)
    out = rows[:, None] * K + choices[None, :]
    kept = inside[:, None] & (choices < K)[None, :]
    tl.store(topk_scores + out, tl.where(present, best_scores, float("-inf")), mask=kept)
    tl.store(topk_ids + out, ids, mask=kept)
    tl.store(topk_columns + out, tl.where(present, places, 0), mask=kept)
    shift = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)
    tl.store(logsumexp + rows, shift + tl.log(total), mask=inside)


def launch_fine_topk(hidden, weight, bias, selection_bias, function, shortlist, rows, topk, dot_dtype):
    """Top-k [T, K] scores, ids and columns, and the logsumexp [T].

    16 rows by a list of up to 512 are one tile, a warp for each 32 columns: 32 KiB of fp32 scores and 64 KiB of keys,
    of which a thread holds 16. A longer list takes several tiles of half of that, merged into the best K so far, which
    need as much room again; more than K = 256 of these spill registers, by some hundred bytes for each thread.
    """
    num_tokens, shortlist_size = hidden.shape[0], shortlist.shape[1]
    empty = dict(device=hidden.device)
    scores = torch.empty(num_tokens, topk, dtype=torch.float32, **empty)
    ids, columns = (torch.empty(num_tokens, topk, dtype=torch.int32, **empty) for _ in range(2))
    logsumexp = torch.empty(num_tokens, dtype=torch.float32, **empty)
    if num_tokens == 0:
        return scores, ids, columns, logsumexp
    block_topk = block_of(topk, MAX_TOPK)
    longest = _TILE_COLUMNS if shortlist_size <= _TILE_COLUMNS else _TILE_COLUMNS // 2
    block_list = max(block_topk, block_of(shortlist_size, longest))
    segments, starts = rows.blocks(16)
    _fine_topk_fwd_kernel[(segments.numel(),)](
        hidden, weight, bias, selection_bias, shortlist, rows.order, rows.row_first, segments, starts,
        scores, ids, columns, logsumexp, rows.num_clusters, topk, hidden.shape[1], shortlist_size,
        HAS_BIAS=bias is not None, HAS_SELECTION_BIAS=selection_bias is not None, FUNCTION=function,
        DOT_DTYPE=dot_dtype, LOG_N=4, LOG_L=block_list.bit_length() - 1, LOG_K=block_topk.bit_length() - 1,
        NUM_TILES=triton.cdiv(shortlist_size, block_list), BLOCK_H=step_of(hidden.shape[1], dot_dtype),
        num_warps=min(16, max(4, block_list // 32)), num_stages=3,
    )  # fmt: skip
    return scores, ids, columns, logsumexp


def _gradients_of_all(ctx, grad_topk, grad_logsumexp, columns, logsumexp, hidden, weight, bias, shortlist):
    """Through the normaliser every candidate gets a gradient: recompute the scores, [T, L] for as long as it takes."""
    rows = ctx.rows
    grad_scores = torch.empty(hidden.shape[0], shortlist.shape[1], dtype=torch.float32, device=hidden.device)
    of_logsumexp = (logsumexp, grad_logsumexp.contiguous())
    launch_fine_scores(hidden, weight, bias, shortlist, rows, 1, ctx.dot_dtype, grad_scores, of_logsumexp)
    if grad_topk is not None:
        grad_scores.scatter_add_(1, columns.long(), grad_topk)
    return dense_gradients(ctx, grad_scores, hidden, weight, bias, shortlist, 1)


class _FineTopkKernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, shortlist, assignments, dtype, topk, selection_bias, function, deterministic
    ):
        ctx.rows = sort_rows(assignments, shortlist.shape[0])
        ctx.dot_dtype, ctx.deterministic = dot_dtype_of(hidden, weight, dtype), deterministic
        ctx.weight = weight
        inputs = contiguous(hidden, weight, bias, selection_bias, shortlist)
        hidden, weight, bias, selection_bias, shortlist = inputs
        scores, ids, columns, logsumexp = launch_fine_topk(
            hidden, weight, bias, selection_bias, function, shortlist, ctx.rows, topk, ctx.dot_dtype
        )
        ctx.save_for_backward(hidden, weight, bias, shortlist, ids, columns, logsumexp)
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        return scores, ids, logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_topk, _, grad_logsumexp):
        *inputs, ids, columns, logsumexp = ctx.saved_tensors
        if grad_topk is not None:
            grad_topk = grad_topk.masked_fill(ids < 0, 0.0)
        if grad_logsumexp is not None:
            grads = _gradients_of_all(ctx, grad_topk, grad_logsumexp, columns, logsumexp, *inputs)
        elif grad_topk is not None:
            grads = gradients_of_selected(grad_topk, ids, *inputs[:3], ctx.weight, ctx.needs_input_grad)
        else:
            grads = (None, None, None)
        return *grads, *[None] * 7


def fine_topk_kernel(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    assignments: torch.Tensor,
    dtype: torch.dtype,
    topk: int,
    selection_bias: torch.Tensor | None = None,
    selection_function: str | None = None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score every token against its codeword's shortlist and keep the best: no [T, L] scores in memory.

    Differentiable in hidden, weight and bias through the scores and the logsumexp. While nothing asks for a gradient
    of the logsumexp, the backward costs K rows per token and is deterministic; otherwise it recomputes all scores. The
    weight's gradient goes into ``weight.main_grad`` where there is one. Does not wait for the device.

    A list of up to 512 is one tile on the chip, a longer one several of 256 (:func:`launch_fine_topk`).

    Args:
        hidden: [T, H], tokens; fp32, bf16 or fp16.
        weight: [E, H], expert centres; likewise.
        bias: [E] or None.
        shortlist: [C, L] integer expert ids, distinct in a row; -1 fills the end of a shorter list.
        assignments: [T, 1] int64, codeword of each token.
        dtype: of the arithmetic: fp32, bf16 or fp16. Sums are made in fp32 and not rounded to it.
        topk: K, from 1 to 512; may be more than L.
        selection_bias: [E] or None; candidates are ranked by ``selection_function(score) + selection_bias``.
        selection_function: None, or the score function to which Megatron's expert bias is added: "sigmoid",
            "sqrtsoftplus". Of equal ranks, the lower place in the list wins. Neither changes the scores returned.
        deterministic: as :func:`fine_scores_kernel`.
    Returns:
        [T, K] fp32 scores, those ranked highest first, -inf where candidates ran out; [T, K] int32 expert ids, -1
        there; [T] fp32 logsumexp of the scores of all candidates, -inf where there are none.
    Raises:
        ValueError: for another dtype, number of probes, K or selection function.

    Example: hidden [[1, 2]], weight [[1, 0], [0, 1], [1, 1]], shortlist [[0, 2]], assignments [[0]] and K = 1 give the
    scores [[3]], ids [[2]] and the logsumexp log(e + e^3) = 3.127.
    """
    require_kernel_dtypes(hidden=hidden, weight=weight, dtype=dtype)
    if assignments.dim() != 2 or assignments.shape[1] != 1:
        raise ValueError(f"assignments {tuple(assignments.shape)} must be [T, 1]: one probe")
    if not 1 <= topk <= MAX_TOPK:
        raise ValueError(f"topk ({topk}) must be from 1 to {MAX_TOPK}")
    if selection_function not in SCORE_FUNCTIONS:
        raise ValueError(f"selection_function ({selection_function!r}) must be one of {SCORE_FUNCTIONS}")
    return _FineTopkKernel.apply(
        hidden, weight, bias, shortlist, assignments, dtype, topk, selection_bias, selection_function, deterministic
    )
