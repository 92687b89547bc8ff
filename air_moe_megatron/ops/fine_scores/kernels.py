"""Fine scores as Triton kernels: tiles of tokens of one codeword against its shortlist, forward and backward.

Rows are (token, probe) pairs, sorted by codeword. A program takes up to BLOCK_N rows of one codeword and gathers the
centers of its list, which all these rows share. Only the device knows how many blocks a codeword has
(``segment_blocks``). The products are bound by the memory traffic of gathered centers as long as a codeword has no more
than a few hundred rows.

The fused top-k (``topk_kernels.py``) uses the score tiles and the gradients of this module.

Legend: R = T*P rows, B blocks of rows; others as in ``ops/__init__.py``.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.autograd.function import FunctionCtx, once_differentiable

from air_moe_megatron.ops.blocks import block_of, block_rows_of, contiguous
from air_moe_megatron.ops.pair_products import make_pairs
from air_moe_megatron.ops.pair_products.kernels import launch_pair_weight_gradient
from air_moe_megatron.ops.segments import sort_into_segments
from air_moe_megatron.ops.tiles import (
    dot,
    dot_dtype_of,
    dot_wide,
    segment_blocks,
    step_of,
)
from air_moe_megatron.ops.weight_gradient import add_weight_gradient

LIMITS = {"topk": 2048, "probes": 8}
"""The largest sizes that the kernels take."""

_ROW_ELEMENTS = 2**27  # elements of the fp32 gradients of rows, kept until they are summed over the probes: 512 MiB
_TILE_ELEMENTS = 2**26  # elements of the fp32 gradients of centers, kept until they are summed in order: 256 MiB


@triton.jit
def rows_of_block(block, codeword, order, row_first, starts, P, BLOCK_N: tl.constexpr):
    """[BLOCK_N] rows of a block, their tokens, and a mask of those that exist."""
    slots = tl.load(starts + block) + tl.arange(0, BLOCK_N)
    inside = slots < tl.load(row_first + codeword + 1)
    rows = tl.load(order + slots, mask=inside, other=0)
    return rows, rows // P, inside


@triton.jit
def experts_of_list(shortlist, codeword, columns, L: tl.constexpr):
    """[BLOCK_L] experts at the columns of a codeword's list; -1 after its end."""
    experts = tl.load(shortlist + codeword * L + columns, mask=columns < L, other=-1)
    return experts.to(tl.int64)


@triton.jit
def score_tile(
    hidden,
    weight,
    bias,
    tokens,
    inside,
    experts,
    H: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """[BLOCK_N, BLOCK_L] fp32 scores; -inf where there is no expert, undefined where there is no token."""
    present = experts >= 0
    hidden_rows = hidden + tokens[:, None] * H
    weight_rows = weight + experts[:, None] * H
    scores = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
    for start in range(0, H, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        in_row = columns < H
        x = tl.load(hidden_rows + columns[None, :], mask=inside[:, None] & in_row[None, :], other=0.0)
        w = tl.load(weight_rows + columns[None, :], mask=present[:, None] & in_row[None, :], other=0.0)
        scores = dot(x.to(DOT_DTYPE), tl.trans(w.to(DOT_DTYPE)), scores)
    if HAS_BIAS:
        scores += tl.load(bias + experts, mask=present, other=0.0).to(tl.float32)[None, :]
    return tl.where(present[None, :], scores, float("-inf"))


@triton.jit
def _fine_scores_fwd_kernel(
    hidden,  # [T, H]
    weight,  # [E, H]
    bias,  # [E] or None
    shortlist,  # [C, L]
    order,  # [R] rows sorted by codeword
    row_first,  # [C + 1]
    segments,  # [B]
    starts,  # [B]
    scores,  # [R, L], written
    C,
    P,
    num_list_blocks,
    H: tl.constexpr,
    L: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0)
    block = program // num_list_blocks
    codeword = tl.load(segments + block)
    if codeword == C:
        return
    rows, tokens, inside = rows_of_block(block, codeword, order, row_first, starts, P, BLOCK_N)
    columns = (program % num_list_blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    experts = experts_of_list(shortlist, codeword, columns, L)
    tile = score_tile(hidden, weight, bias, tokens, inside, experts, H, HAS_BIAS, DOT_DTYPE, BLOCK_N, BLOCK_L, BLOCK_H)
    out = scores + rows[:, None] * L + columns[None, :]
    tl.store(out, tile, mask=inside[:, None] & (columns < L)[None, :])


@triton.jit
def _fine_scores_bwd_hidden_kernel(
    grad_scores,  # [R, L]
    weight,  # [E, H]
    shortlist,  # [C, L]
    order,  # [R]
    row_first,  # [C + 1]
    segments,  # [B]
    starts,  # [B]
    grad_rows,  # [R, WIDTH], written: columns of H from first_column on
    C,
    num_column_blocks,
    first_column,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    L: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0)
    block = program // num_column_blocks
    codeword = tl.load(segments + block)
    if codeword == C:
        return
    rows, _, inside = rows_of_block(block, codeword, order, row_first, starts, 1, BLOCK_N)
    columns = (program % num_column_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = columns < WIDTH
    sums = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for start in range(0, L, BLOCK_L):
        slots = start + tl.arange(0, BLOCK_L)
        experts = experts_of_list(shortlist, codeword, slots, L)
        present = experts >= 0
        where = rows[:, None] * L + slots[None, :]
        grad = tl.load(grad_scores + where, mask=inside[:, None] & present[None, :], other=0.0)
        w = tl.load(
            weight + experts[:, None] * H + first_column + columns[None, :],
            mask=present[:, None] & in_row[None, :],
            other=0.0,
        )
        sums = dot_wide(grad, w, sums, DOT_DTYPE)
    out = grad_rows + rows[:, None] * WIDTH + columns[None, :]
    tl.store(out, sums, mask=inside[:, None] & in_row[None, :])


@triton.jit
def _fine_scores_bwd_weight_kernel(
    grad_scores,  # [R, L]
    hidden,  # [T, H]
    shortlist,  # [C, L]
    order,  # [R]
    row_first,  # [C + 1]
    out,  # atomic: [E, H] fp32, added to; otherwise [codewords from the first on, L, H] fp32, written where in use
    first_codeword,
    P,
    num_list_blocks,
    num_column_blocks,
    H: tl.constexpr,
    L: tl.constexpr,
    ATOMIC: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0)
    column_block = program % num_column_blocks
    list_block = program // num_column_blocks % num_list_blocks
    chunk_codeword = (program // num_column_blocks // num_list_blocks).to(tl.int64)
    codeword = first_codeword + chunk_codeword
    first, end = tl.load(row_first + codeword), tl.load(row_first + codeword + 1)
    if first == end:
        return
    columns = column_block * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = columns < H
    slots = list_block * BLOCK_L + tl.arange(0, BLOCK_L)
    experts = experts_of_list(shortlist, codeword, slots, L)
    present = experts >= 0
    sums = tl.zeros([BLOCK_L, BLOCK_H], tl.float32)
    while first < end:
        where = first + tl.arange(0, BLOCK_N)
        inside = where < end
        rows = tl.load(order + where, mask=inside, other=0)
        grad = tl.load(
            grad_scores + rows[None, :] * L + slots[:, None],
            mask=present[:, None] & inside[None, :],
            other=0.0,
        )
        x = tl.load(
            hidden + (rows // P)[:, None] * H + columns[None, :],
            mask=inside[:, None] & in_row[None, :],
            other=0.0,
        )
        sums = dot_wide(grad, x, sums, DOT_DTYPE)
        first += BLOCK_N
    kept = present[:, None] & in_row[None, :]
    if ATOMIC:
        tl.atomic_add(out + experts[:, None] * H + columns[None, :], sums, mask=kept, sem="relaxed")
    else:
        tile_rows = chunk_codeword * L + slots
        tl.store(out + tile_rows[:, None] * H + columns[None, :], sums, mask=kept)


@dataclass(frozen=True)
class Rows:
    """The rows sorted by codeword."""

    order: torch.Tensor  # [R] int64
    row_first: torch.Tensor  # [C + 1] int64, first slot of each codeword in ``order``; the last entry is R

    @property
    def num_rows(self) -> int:
        return self.order.numel()

    @property
    def num_clusters(self) -> int:
        return self.row_first.numel() - 1

    @property
    def block_size(self) -> int:
        """Rows per block: about the mean number per codeword, from 16 (the least of a matrix product) to 64."""
        return block_rows_of(self.num_rows, self.num_clusters)

    def blocks(self, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(segments [B], starts [B]) of the codewords' blocks, see ``segment_blocks``."""
        return segment_blocks(self.row_first, self.num_rows, block_size)


def sort_rows(probes: torch.Tensor, num_clusters: int) -> Rows:
    """The rows [R] of probes [T, P], sorted by codeword."""
    return Rows(*sort_into_segments(probes.reshape(-1), num_clusters))


def launch_fine_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    rows: Rows,
    num_probes: int,
    dot_dtype: tl.dtype,
    scores: torch.Tensor,
) -> None:
    """Write scores [R, L].

    A tile has 128 list entries and 16 to 64 rows, about the mean number per codeword. The gathered centers of a step
    take 16 KiB in bf16, so that several programs fit on a multiprocessor and hide each other's gathers.
    """
    block_rows, block_list = rows.block_size, block_of(shortlist.shape[1], 128)
    if scores.numel() == 0:
        return
    num_list_blocks = triton.cdiv(shortlist.shape[1], block_list)
    segments, starts = rows.blocks(block_rows)
    _fine_scores_fwd_kernel[(segments.numel() * num_list_blocks,)](
        hidden, weight, bias, shortlist, rows.order, rows.row_first, segments, starts,
        scores, rows.num_clusters, num_probes, num_list_blocks,
        hidden.shape[1], shortlist.shape[1],
        HAS_BIAS=bias is not None, DOT_DTYPE=dot_dtype,
        BLOCK_N=block_rows, BLOCK_L=block_list, BLOCK_H=step_of(hidden.shape[1], dot_dtype),
        num_warps=4, num_stages=3,
    )  # fmt: skip


def launch_fine_scores_grad_hidden(
    grad_scores: torch.Tensor,
    weight: torch.Tensor,
    shortlist: torch.Tensor,
    rows: Rows,
    dot_dtype: tl.dtype,
    grad_rows: torch.Tensor,
    first_column: int = 0,
) -> None:
    """Write ``grad_scores [R, L] @ centers`` into grad_rows [R, width], columns of H from ``first_column`` on.

    The tiles are those of the forward, with 128 columns each.
    """
    width = grad_rows.shape[1]
    if grad_rows.numel() == 0:
        return
    block_rows, block_columns = rows.block_size, block_of(width, 128)
    num_column_blocks = triton.cdiv(width, block_columns)
    segments, starts = rows.blocks(block_rows)
    _fine_scores_bwd_hidden_kernel[(segments.numel() * num_column_blocks,)](
        grad_scores, weight, shortlist, rows.order, rows.row_first, segments, starts, grad_rows,
        rows.num_clusters, num_column_blocks, first_column, weight.shape[1], width, shortlist.shape[1],
        DOT_DTYPE=dot_dtype, BLOCK_N=block_rows, BLOCK_L=step_of(shortlist.shape[1], dot_dtype),
        BLOCK_H=block_columns, num_warps=4, num_stages=3,
    )  # fmt: skip


def _sum_over_probes(
    grad_scores: torch.Tensor,
    weight: torch.Tensor,
    shortlist: torch.Tensor,
    rows: Rows,
    num_probes: int,
    dot_dtype: tl.dtype,
    grad_hidden: torch.Tensor,
) -> None:
    """Sum the gradients of each token's rows into grad_hidden [tokens, H].

    The rows' gradients are fp32. As many columns are made at a time as fit into 512 MiB, but at least a tile of 128.
    """
    if num_probes == 1:
        launch_fine_scores_grad_hidden(grad_scores, weight, shortlist, rows, dot_dtype, grad_hidden)
        return
    step = max(1, _ROW_ELEMENTS // (128 * max(1, rows.num_rows))) * 128
    for first in range(0, grad_hidden.shape[1], step):
        out = grad_hidden[:, first : first + step]
        grad_rows = torch.empty(rows.num_rows, out.shape[1], dtype=torch.float32, device=out.device)
        launch_fine_scores_grad_hidden(grad_scores, weight, shortlist, rows, dot_dtype, grad_rows, first)
        out.copy_(grad_rows.view(-1, num_probes, out.shape[1]).sum(dim=1))


def launch_fine_scores_grad_weight(
    grad_scores: torch.Tensor,
    hidden: torch.Tensor,
    shortlist: torch.Tensor,
    rows: Rows,
    num_probes: int,
    dot_dtype: tl.dtype,
    deterministic: bool,
    grad_weight_out: torch.Tensor,
) -> None:
    """Add ``grad_scores.T @ tokens`` of each list slot to its expert's row of ``grad_weight_out`` [E, H] fp32.

    One program sums 64 slots by 128 columns over all rows of a codeword. An expert can be in the lists of several
    codewords, whose sums are added by fp32 atomics. If ``deterministic``, the sums are stored for a chunk of codewords
    at a time and added in order. Rows of experts without tokens are not touched.
    """
    if grad_scores.numel() == 0:
        return
    (num_clusters, shortlist_size), hidden_size = shortlist.shape, hidden.shape[1]
    block_list, block_columns = block_of(shortlist_size, 64), block_of(hidden_size, 128)
    num_list_blocks = triton.cdiv(shortlist_size, block_list)
    num_column_blocks = triton.cdiv(hidden_size, block_columns)

    def launch(out: torch.Tensor, first_codeword: int, num_codewords: int) -> None:
        _fine_scores_bwd_weight_kernel[(num_codewords * num_list_blocks * num_column_blocks,)](
            grad_scores, hidden, shortlist, rows.order, rows.row_first, out, first_codeword, num_probes,
            num_list_blocks, num_column_blocks, hidden_size, shortlist_size,
            ATOMIC=not deterministic, DOT_DTYPE=dot_dtype, BLOCK_N=min(32, rows.block_size), BLOCK_L=block_list,
            BLOCK_H=block_columns, num_warps=4, num_stages=2,
        )  # fmt: skip

    if not deterministic:
        launch(grad_weight_out, 0, num_clusters)
        return
    chunk = min(num_clusters, max(1, _TILE_ELEMENTS // (shortlist_size * hidden_size)))
    tiles = torch.empty(chunk * shortlist_size, hidden_size, dtype=torch.float32, device=hidden.device)
    for first in range(0, num_clusters, chunk):
        count = min(chunk, num_clusters - first)
        launch(tiles, first, count)
        in_use = rows.row_first[first : first + count + 1].diff() > 0
        experts = shortlist[first : first + count].masked_fill(~in_use.unsqueeze(1), -1).reshape(-1)
        slots = torch.arange(experts.numel(), device=experts.device)
        pairs = make_pairs(slots, experts, experts.numel(), grad_weight_out.shape[0])
        launch_pair_weight_gradient(tiles, torch.ones_like(slots, dtype=torch.float32), pairs, grad_weight_out)


@dataclass(frozen=True)
class Block:
    """The gradients of all scores of a range of consecutive tokens."""

    tokens: slice
    rows: Rows  # the rows of these tokens
    grad_scores: torch.Tensor  # [tokens * P, L], contiguous


def dense_gradients(
    blocks: Iterable[Block],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    parameter: torch.Tensor,
    num_probes: int,
    dot_dtype: tl.dtype,
    deterministic: bool,
    needed: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of hidden, weight and bias from the gradients of all scores; each None if it is not needed.

    Sums over tokens are made in fp32 and rounded once, after the last block. For weights and ``main_grad`` of 16 bits
    they take a tensor of their own.

    Args:
        blocks: all tokens, block by block.
        hidden, weight, bias, shortlist: contiguous.
        parameter: the weight parameter itself, for its ``main_grad``.
        num_probes: P.
        needed: three bools, for hidden, weight and bias.
    """
    need_hidden, need_weight, need_bias = needed
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    bias_sums = torch.zeros_like(bias, dtype=torch.float32) if need_bias else None

    def run(grad_weight_out: torch.Tensor | None) -> None:
        weight_sums = grad_weight_out
        if need_weight and grad_weight_out.dtype != torch.float32:
            weight_sums = torch.zeros_like(grad_weight_out, dtype=torch.float32)
        for block in blocks:
            rows, grad_scores = block.rows, block.grad_scores
            of_rows = (shortlist, rows, num_probes)
            if need_hidden:
                out = grad_hidden[block.tokens]
                _sum_over_probes(grad_scores, weight, *of_rows, dot_dtype, out)
            if need_weight:
                tokens = hidden[block.tokens]
                launch_fine_scores_grad_weight(grad_scores, tokens, *of_rows, dot_dtype, deterministic, weight_sums)
            if need_bias:  # the bias is a column of the weight whose feature is 1 in every token
                ones = hidden.new_ones(hidden[block.tokens].shape[0], 1, dtype=torch.float32)
                out = bias_sums.unsqueeze(1)
                launch_fine_scores_grad_weight(grad_scores, ones, *of_rows, tl.float32, deterministic, out)
        if weight_sums is not grad_weight_out:
            grad_weight_out += weight_sums

    grad_weight = None
    if need_weight:
        grad_weight = add_weight_gradient(parameter, run)
    else:
        run(None)
    return grad_hidden, grad_weight, bias_sums.to(bias.dtype) if need_bias else None


class _FineScoresKernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        shortlist: torch.Tensor,
        probes: torch.Tensor,
        dtype: torch.dtype,
        deterministic: bool,
    ) -> torch.Tensor:
        ctx.rows = sort_rows(probes, shortlist.shape[0])
        ctx.dot_dtype, ctx.deterministic = dot_dtype_of(hidden, weight, dtype), deterministic
        ctx.weight = weight  # the parameter itself, for its main_grad
        hidden, weight, bias, shortlist = contiguous(hidden, weight, bias, shortlist)
        scores = torch.empty(*probes.shape, shortlist.shape[1], dtype=dtype, device=hidden.device)
        launch_fine_scores(hidden, weight, bias, shortlist, ctx.rows, probes.shape[1], ctx.dot_dtype, scores)
        ctx.save_for_backward(hidden, weight, bias, shortlist)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_scores: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (num_tokens, num_probes), grad_scores = grad_scores.shape[:2], grad_scores.contiguous().flatten(0, 1)
        blocks = [Block(slice(0, num_tokens), ctx.rows, grad_scores)]
        settings = (ctx.weight, num_probes, ctx.dot_dtype, ctx.deterministic, ctx.needs_input_grad[:3])
        return *dense_gradients(blocks, *ctx.saved_tensors, *settings), *[None] * 4


def fine_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    probes: torch.Tensor,
    dtype: torch.dtype,
    deterministic: bool = False,
) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.fine_scores.fine_scores`; sums in fp32. Does not wait for the device.

    If ``deterministic``, the weight's gradients are added in a fixed order, which takes up to 256 MiB of memory.
    """
    return _FineScoresKernel.apply(hidden, weight, bias, shortlist, probes, dtype, deterministic)
