"""Fine scores and top-k in one Triton kernel: no [T, L] scores in memory.

A program keeps the scores of 16 rows on the chip, one tile of the list after another, and lets out only the selected
ones. A candidate is one int64 key of its score and its place in the list (``order_key``). ``tl.topk`` finds the largest
K keys of a tile. Of two sorted tiles, the larger of each two opposite keys are the largest K of both.

Legend: B blocks of tokens; others as in ``ops/__init__.py``.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import FunctionCtx, once_differentiable

from air_moe_megatron.ops.fine_scores.kernels import (
    LIMITS,
    Rows,
    experts_of_list,
    rows_of_block,
    score_tile,
    sort_rows,
)
from air_moe_megatron.ops.segments import (
    block_of,
    contiguous,
)
from air_moe_megatron.ops.selected_scores.kernels import gradients_of_selected
from air_moe_megatron.ops.tiles import (
    LOWEST_KEY,
    dot_dtype_of,
    id_of_key,
    order_key,
    step_of,
    value_of_key,
)

_TILE_COLUMNS = 512  # of a list whose scores are on the chip at once; half as many beside those of earlier tiles


@triton.jit
def _fine_topk_fwd_kernel(
    hidden,  # [T, H]
    weight,  # [E, H]
    bias,  # [E] or None
    shortlist,  # [C, L]
    order,  # [T] tokens sorted by codeword
    row_first,  # [C + 1]
    segments,  # [B]
    starts,  # [B]
    topk_scores,  # [T, K] fp32, written
    topk_ids,  # [T, K] int32, written
    C,
    K,
    H: tl.constexpr,
    L: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    NUM_TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    block = tl.program_id(0)
    codeword = tl.load(segments + block)
    if codeword == C:
        return
    rows, tokens, inside = rows_of_block(block, codeword, order, row_first, starts, 1, BLOCK_N)
    best = tl.full([BLOCK_N, BLOCK_K], LOWEST_KEY, tl.int64)
    for tile in range(NUM_TILES):
        columns = tile * BLOCK_L + tl.arange(0, BLOCK_L)
        experts = experts_of_list(shortlist, codeword, columns, L)
        scores = score_tile(
            hidden, weight, bias, tokens, inside, experts, H, HAS_BIAS, DOT_DTYPE, BLOCK_N, BLOCK_L, BLOCK_H
        )
        keys = tl.where((experts >= 0)[None, :], order_key(scores, columns[None, :]), LOWEST_KEY)
        keys = tl.topk(keys, BLOCK_K)
        if NUM_TILES == 1:
            best = keys
        else:
            best = tl.bitonic_merge(tl.maximum(best, tl.flip(keys, 1)), descending=True)
    present = best != LOWEST_KEY
    places = id_of_key(best).to(tl.int32)
    ids = tl.load(shortlist + codeword * L + places, mask=present, other=-1).to(tl.int32)
    choices = tl.arange(0, BLOCK_K)
    out = rows[:, None] * K + choices[None, :]
    kept = inside[:, None] & (choices < K)[None, :]
    tl.store(topk_scores + out, tl.where(present, value_of_key(best), float("-inf")), mask=kept)
    tl.store(topk_ids + out, ids, mask=kept)


def launch_fine_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    rows: Rows,
    topk: int,
    dot_dtype: tl.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k scores [T, K] fp32 and ids [T, K] int32.

    16 rows by a list of up to 512 are one tile, a warp for each 32 columns: 32 KiB of fp32 scores and 64 KiB of keys,
    of which a thread holds 16. A longer list takes several tiles of half of that, merged into the best K so far, which
    need as much room again; more than K = 256 of these spill registers, by some hundred bytes for each thread.
    """
    num_tokens, shortlist_size = hidden.shape[0], shortlist.shape[1]
    scores = torch.empty(num_tokens, topk, dtype=torch.float32, device=hidden.device)
    ids = torch.empty(num_tokens, topk, dtype=torch.int32, device=hidden.device)
    if num_tokens == 0:
        return scores, ids
    block_topk = block_of(topk, LIMITS["topk"])
    longest = _TILE_COLUMNS if shortlist_size <= _TILE_COLUMNS else _TILE_COLUMNS // 2
    block_list = max(block_topk, block_of(shortlist_size, longest))
    segments, starts = rows.blocks(16)
    _fine_topk_fwd_kernel[(segments.numel(),)](
        hidden, weight, bias, shortlist, rows.order, rows.row_first, segments, starts, scores, ids,
        rows.num_clusters, topk, hidden.shape[1], shortlist_size,
        HAS_BIAS=bias is not None, DOT_DTYPE=dot_dtype, NUM_TILES=triton.cdiv(shortlist_size, block_list),
        BLOCK_N=16, BLOCK_L=block_list, BLOCK_K=block_topk, BLOCK_H=step_of(hidden.shape[1], dot_dtype),
        num_warps=min(16, max(4, block_list // 32)), num_stages=3,
    )  # fmt: skip
    return scores, ids


class _FineTopkKernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        shortlist: torch.Tensor,
        assignments: torch.Tensor,
        topk: int,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.weight = weight  # the parameter itself, for its main_grad
        dot_dtype = dot_dtype_of(hidden, weight, dtype)
        hidden, weight, bias, shortlist = contiguous(hidden, weight, bias, shortlist)
        rows = sort_rows(assignments, shortlist.shape[0])
        scores, ids = launch_fine_topk(hidden, weight, bias, shortlist, rows, topk, dot_dtype)
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.mark_non_differentiable(ids)
        return scores, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_scores: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, ids = ctx.saved_tensors
        return *gradients_of_selected(grad_scores, ids, *inputs, ctx.weight, ctx.needs_input_grad), *[None] * 4


def fine_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    assignments: torch.Tensor,
    topk: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`air_moe_megatron.ops.fine_scores.fine_topk`; the scores are fp32, whatever the dtype of the arithmetic.

    Highest first; the lower place in the list first where scores are equal. Deterministic, and does not wait for the
    device. A list of up to 512 is one tile on the chip, a longer one several of 256 (:func:`launch_fine_topk`).
    """
    return _FineTopkKernel.apply(hidden, weight, bias, shortlist, assignments, topk, dtype)
