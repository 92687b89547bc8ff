"""The best experts of a token's lists: of one list fused with the fine scores, of several lists by a merge.

One list: no [T, L] scores are written to memory. A program keeps the scores of 16 rows on the chip, one tile of the
list after another, and writes only the selected ones. A candidate is one int64 key of its score and its slot in the
list (``order_key``). ``tl.topk`` finds the largest K keys of a tile. To merge two sorted tiles of K keys, one is
reversed: the larger keys at each position are the largest K of both.

Several lists: the kernel of ``kernels.py`` writes the scores of a block of tokens. Then one program per token reads its
P * L scores, tile by tile. Lists are ascending, so a binary search tells whether an expert is in an earlier list of the
token.

Legend: K best candidates of a token (``num_candidates``, which is M outside of this file), B blocks of tokens; others
as in ``ops/__init__.py``.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import FunctionCtx, once_differentiable

from air_moe_megatron.ops.blocks import block_of, contiguous
from air_moe_megatron.ops.fine_scores.eager import SCORES_OF_BLOCK
from air_moe_megatron.ops.fine_scores.kernels import (
    LIMITS,
    Block,
    Rows,
    dense_gradients,
    experts_of_list,
    launch_fine_scores,
    rows_of_block,
    score_tile,
    sort_rows,
)
from air_moe_megatron.ops.selected_scores.kernels import selected_scores
from air_moe_megatron.ops.tiles import (
    LOWEST_KEY,
    apply_score_function,
    dot_dtype_of,
    id_of_key,
    order_key,
    step_of,
    value_of_key,
)

_FUSED_TOPK = 512  # largest K of the fused kernel, which keeps 16 tokens on the chip at once
_SCORES_PER_CANDIDATE = 16  # scores whose gradients by tiles cost as much as the gradient of one candidate alone
_TILE_COLUMNS = 512  # list entries whose scores are on the chip at once; half as many beside those of earlier tiles


class _Best(NamedTuple):
    """The best candidates of each token's lists, [T, K] each."""

    scores: torch.Tensor  # fp32
    ids: torch.Tensor  # int32, -1 for no candidate
    columns: torch.Tensor  # int32, position in the token's lists, p * L + slot; 0 for no candidate


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
    topk_columns,  # [T, K] int32, written
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
    slots = id_of_key(best).to(tl.int32)
    ids = tl.load(shortlist + codeword * L + slots, mask=present, other=-1).to(tl.int32)
    choices = tl.arange(0, BLOCK_K)
    out = rows[:, None] * K + choices[None, :]
    kept = inside[:, None] & (choices < K)[None, :]
    tl.store(topk_scores + out, tl.where(present, value_of_key(best), float("-inf")), mask=kept)
    tl.store(topk_ids + out, ids, mask=kept)
    tl.store(topk_columns + out, tl.where(present, slots, 0), mask=kept)


def launch_fine_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    rows: Rows,
    dot_dtype: tl.dtype,
    best: _Best,
) -> None:
    """Write the best K candidates of one list per token.

    16 rows by a list of up to 512 are one tile, with a warp per 32 columns: 32 KiB of fp32 scores and 64 KiB of keys,
    16 keys per thread. A longer list takes several tiles of half the width, which are merged into the best K so far.
    These need as much room again; with K above 256 they spill some hundred bytes of registers per thread.
    """
    (num_tokens, num_best), shortlist_size = best.ids.shape, shortlist.shape[1]
    if num_tokens == 0:
        return
    block_topk = block_of(num_best, _FUSED_TOPK)
    longest = _TILE_COLUMNS if shortlist_size <= _TILE_COLUMNS else _TILE_COLUMNS // 2
    block_list = max(block_topk, block_of(shortlist_size, longest))
    segments, starts = rows.blocks(16)
    _fine_topk_fwd_kernel[(segments.numel(),)](
        hidden, weight, bias, shortlist, rows.order, rows.row_first, segments, starts, *best,
        rows.num_clusters, num_best, hidden.shape[1], shortlist_size,
        HAS_BIAS=bias is not None, DOT_DTYPE=dot_dtype, NUM_TILES=triton.cdiv(shortlist_size, block_list),
        BLOCK_N=16, BLOCK_L=block_list, BLOCK_K=block_topk, BLOCK_H=step_of(hidden.shape[1], dot_dtype),
        num_warps=min(16, max(4, block_list // 32)), num_stages=3,
    )  # fmt: skip


@triton.jit
def _is_listed(experts, candidates, L: tl.constexpr, STEPS: tl.constexpr):
    """Whether each candidate is in the list ``experts`` [L], which is ascending with -1 at its end."""
    before = tl.zeros_like(candidates)  # experts of the list that are smaller
    for step in tl.static_range(STEPS):
        half = 1 << (STEPS - 1 - step)
        where = before + half - 1
        found = tl.load(experts + where, mask=where < L, other=-1)
        before = tl.where((found >= 0) & (found < candidates), before + half, before)
    return tl.load(experts + before, mask=before < L, other=-1) == candidates


@triton.jit
def _merge_lists_fwd_kernel(
    scores,  # [T, P * L] fp32
    shortlist,  # [C, L] int32
    probes,  # [T, P] int64
    expert_bias,  # [E] or None
    topk_scores,  # [T, K] fp32, written
    topk_ids,  # [T, K] int32, written
    topk_columns,  # [T, K] int32, written
    K,
    P: tl.constexpr,
    L: tl.constexpr,
    FUNCTION: tl.constexpr,
    STEPS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    own_probes = probes + token * P
    best = tl.full([BLOCK_K], LOWEST_KEY, tl.int64)
    for tile in range(NUM_TILES):
        columns = tile * BLOCK + tl.arange(0, BLOCK)
        inside = columns < P * L
        positions = columns // L  # of the probes in whose lists they are
        codeword = tl.load(own_probes + positions, mask=inside, other=0)
        experts = tl.load(shortlist + codeword * L + columns % L, mask=inside, other=-1)
        is_candidate = experts >= 0
        for position in range(min(P - 1, (tile * BLOCK + BLOCK - 1) // L)):  # lists before the tile's last one
            earlier = shortlist + tl.load(own_probes + position) * L
            is_candidate &= (positions <= position) | (_is_listed(earlier, experts, L, STEPS) == 0)
        ranks = tl.load(scores + token * P * L + columns, mask=inside, other=0.0)
        if FUNCTION is not None:
            ranks = apply_score_function(ranks, FUNCTION)
            ranks += tl.load(expert_bias + experts, mask=is_candidate, other=0.0).to(tl.float32)
        keys = tl.topk(tl.where(is_candidate, order_key(ranks, columns), LOWEST_KEY), BLOCK_K)
        if NUM_TILES == 1:
            best = keys
        else:
            best = tl.bitonic_merge(tl.maximum(best, tl.flip(keys, 0)), dim=0, descending=True)
    present = best != LOWEST_KEY
    columns = id_of_key(best).to(tl.int32)
    codeword = tl.load(own_probes + columns // L, mask=present, other=0)
    ids = tl.load(shortlist + codeword * L + columns % L, mask=present, other=-1)
    values = tl.load(scores + token * P * L + columns, mask=present, other=float("-inf"))
    choices = tl.arange(0, BLOCK_K)
    tl.store(topk_scores + token * K + choices, values, mask=choices < K)
    tl.store(topk_ids + token * K + choices, ids, mask=choices < K)
    tl.store(topk_columns + token * K + choices, tl.where(present, columns, 0), mask=choices < K)


def launch_merge_lists(
    scores: torch.Tensor,
    shortlist: torch.Tensor,
    probes: torch.Tensor,
    score_function: str | None,
    expert_bias: torch.Tensor | None,
    best: _Best,
) -> None:
    """Write the best K distinct experts of scores [T, P * L].

    A tile is as wide as K, and at least 256; one warp holds it.
    """
    num_tokens, num_best = best.ids.shape
    if num_tokens == 0:
        return
    shortlist_size, num_probes = shortlist.shape[1], probes.shape[1]
    num_slots = num_probes * shortlist_size
    block_topk = block_of(num_best, LIMITS["topk"])
    block = max(block_topk, block_of(num_slots, 256))
    _merge_lists_fwd_kernel[(num_tokens,)](
        scores, shortlist, probes, expert_bias, *best, num_best, num_probes, shortlist_size,
        FUNCTION=score_function, STEPS=shortlist_size.bit_length(), NUM_TILES=triton.cdiv(num_slots, block),
        BLOCK=block, BLOCK_K=block_topk, num_warps=1 if block <= 256 else min(16, block // 128),
    )  # fmt: skip


def _blocks(num_tokens: int, num_slots: int) -> list[slice]:
    """Blocks of tokens; the scores of all slots are written for one block at a time."""
    size = max(1, SCORES_OF_BLOCK // num_slots)
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def find_best(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    probes: torch.Tensor,
    num_candidates: int,
    dot_dtype: tl.dtype,
    score_function: str | None,
    expert_bias: torch.Tensor | None,
) -> _Best:
    """The best K candidates of each token, as :func:`fine_topk` chooses them; all tensors must be contiguous."""
    (num_tokens, num_probes), (num_clusters, shortlist_size) = probes.shape, shortlist.shape
    dtypes = (torch.float32, torch.int32, torch.int32)
    best = _Best(*(torch.empty(num_tokens, num_candidates, dtype=dtype, device=hidden.device) for dtype in dtypes))
    if num_probes == 1 and expert_bias is None and num_candidates <= _FUSED_TOPK:
        rows = sort_rows(probes, num_clusters)
        launch_fine_topk(hidden, weight, bias, shortlist, rows, dot_dtype, best)
        return best
    for block in _blocks(num_tokens, num_probes * shortlist_size):
        found = hidden.new_empty(*probes[block].shape, shortlist_size, dtype=torch.float32)
        rows = sort_rows(probes[block], num_clusters)
        launch_fine_scores(hidden[block], weight, bias, shortlist, rows, num_probes, dot_dtype, found)
        of_block = _Best(*(tensor[block] for tensor in best))
        launch_merge_lists(found, shortlist, probes[block], score_function, expert_bias, of_block)
    return best


class _FineTopkKernel(torch.autograd.Function):
    """The best scores. The backward uses gradients of all scores, which are zero except for the best."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        shortlist: torch.Tensor,
        probes: torch.Tensor,
        dot_dtype: tl.dtype,
        best: _Best,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.weight, ctx.dot_dtype = weight, dot_dtype  # the parameter itself, for its main_grad
        ctx.save_for_backward(*contiguous(hidden, weight, bias), shortlist, probes, best.ids, best.columns)
        return best.scores.to(dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_scores: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, shortlist, probes, ids, columns = ctx.saved_tensors
        num_probes, (num_clusters, shortlist_size) = probes.shape[1], shortlist.shape

        def all_gradients() -> Iterator[Block]:
            for block in _blocks(ids.shape[0], num_probes * shortlist_size):
                grad = grad_scores.new_zeros(ids[block].shape[0], num_probes * shortlist_size)
                # An empty slot adds zero to the first column. Every other column gets at most one addend.
                grad.scatter_add_(1, columns[block].long(), grad_scores[block].masked_fill(ids[block] < 0, 0.0))
                yield Block(block, sort_rows(probes[block], num_clusters), grad.view(-1, shortlist_size))

        settings = (shortlist, ctx.weight, num_probes, ctx.dot_dtype, False, ctx.needs_input_grad[:3])
        return *dense_gradients(all_gradients(), *inputs, *settings), *[None] * 5


def fine_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    probes: torch.Tensor,
    num_candidates: int,
    dtype: torch.dtype,
    score_function: str | None = None,
    expert_bias: torch.Tensor | None = None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`air_moe_megatron.ops.fine_scores.fine_topk`. Does not wait for the device.

    Scores are in descending order, and of equal scores the lower slot of the lists comes first, in every run. A list of
    up to 512 is one tile on the chip, and a longer one several tiles of 256 (:func:`launch_fine_topk`).

    Gradients of many candidates are computed by tiles of whole lists, and gradients of few by sums over the candidates
    (``ops/selected_scores``). If ``deterministic``, it is always by sums, because tiles add to the weight's gradient by
    atomics.
    """
    parameter, dot_dtype = weight, dot_dtype_of(hidden, weight, dtype)
    shortlist, probes, expert_bias = contiguous(shortlist.int(), probes, expert_bias)
    with torch.no_grad():
        inputs = (*contiguous(hidden, weight, bias), shortlist, probes, num_candidates, dot_dtype)
        best = find_best(*inputs, score_function, expert_bias)
    if deterministic or num_candidates * _SCORES_PER_CANDIDATE < probes.shape[1] * shortlist.shape[1]:
        return selected_scores(hidden, parameter, bias, best.ids, best.scores.to(dtype)), best.ids
    lists = (shortlist, probes, dot_dtype, best, dtype)
    return _FineTopkKernel.apply(hidden, parameter, bias, *lists), best.ids
