"""Pair products as Triton kernels.

The dot products and the weight's gradient are made in the order of the weight rows. So the weight, which is larger than
any cache, is streamed once, while the tokens stay in the L2 cache. The sums are made in the order of the tokens, and
gather weight rows. Every element has one writer and every sum a fixed order. So there are no atomic additions, and two
runs give equal bits.

A program takes a block of pairs. Only the device knows how many blocks a weight row has. So the grid is the largest
number of blocks that N pairs can need, and programs beyond the last block return at once (``segment_blocks``).

The products are memory bound, with a few operations per byte. So they are plain multiplications: a matrix product would
pad the few pairs of a weight row to 16.

Legend: Q consecutive weight rows per id; others as in ``ops/__init__.py``.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import FunctionCtx, once_differentiable

from air_moe_megatron.ops.blocks import next_power_of_2
from air_moe_megatron.ops.pair_products import Pairs
from air_moe_megatron.ops.tiles import segment_blocks
from air_moe_megatron.ops.weight_gradient import add_weight_gradient

_TILE = 4096  # fp32 elements of a tile of 4 warps: 32 registers per thread


@triton.jit
def pairs_from(start, end, by_id, rows, BLOCK_N: tl.constexpr):
    """[BLOCK_N] pairs in the order of the weight rows, their token rows, and a mask of those before ``end``."""
    slots = start + tl.arange(0, BLOCK_N)
    inside = slots < end
    pairs = tl.load(by_id + slots, mask=inside, other=0)
    return pairs, tl.load(rows + pairs, mask=inside, other=0), inside


@triton.jit
def _pair_dots_fwd_kernel(
    hidden,  # [R, H]
    weight,  # [V, H]
    rows,  # [N]
    by_id,  # [N]
    id_first,  # [V + 1]
    segments,  # [B]
    starts,  # [B]
    dots,  # [N] fp32, written
    V,
    H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    block = tl.program_id(0)
    weight_row = tl.load(segments + block)
    if weight_row == V:
        return
    start, end = tl.load(starts + block), tl.load(id_first + weight_row + 1)
    pairs, tokens, inside = pairs_from(start, end, by_id, rows, BLOCK_N)
    hidden_rows = hidden + tokens[:, None] * H
    products = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for first in range(0, H, BLOCK_H):
        columns = first + tl.arange(0, BLOCK_H)
        in_row = columns < H
        w = tl.load(weight + weight_row * H + columns, mask=in_row, other=0.0).to(tl.float32)
        x = tl.load(hidden_rows + columns[None, :], mask=inside[:, None] & in_row[None, :], other=0.0)
        products += x.to(tl.float32) * w[None, :]
    tl.store(dots + pairs, tl.sum(products, axis=1), mask=inside)


@triton.jit
def _pair_sums_fwd_kernel(
    values,  # [N, Q]
    weight,  # [V, Q, H]
    ids,  # [N], -1 for no pair
    row_first,  # [R + 1]
    sums,  # [R, H], written
    H: tl.constexpr,
    num_column_blocks,
    Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // num_column_blocks).to(tl.int64)
    columns = (program % num_column_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = columns < H
    end = tl.load(row_first + row + 1) * Q
    products = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    start = tl.load(row_first + row) * Q
    while start < end:
        slots = start + tl.arange(0, BLOCK_N)
        expert = tl.load(ids + slots // Q, mask=slots < end, other=-1)
        present = expert >= 0
        value = tl.load(values + slots, mask=present, other=0.0).to(tl.float32)
        weight_rows = weight + (expert * Q + slots % Q)[:, None] * H
        w = tl.load(weight_rows + columns[None, :], mask=present[:, None] & in_row[None, :], other=0.0)
        products += value[:, None] * w.to(tl.float32)
        start += BLOCK_N
    tl.store(sums + row * H + columns, tl.sum(products, axis=0), mask=in_row)


@triton.jit
def _pair_weight_bwd_kernel(
    source,  # [R, H]
    values,  # [N]
    rows,  # [N]
    by_id,  # [N]
    id_first,  # [V + 1]
    segments,  # [B]
    grad_weight,  # [V, H], added to
    V,
    H: tl.constexpr,
    num_column_blocks,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0)
    weight_row = tl.load(segments + program // num_column_blocks)
    if weight_row == V:
        return
    columns = (program % num_column_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = columns < H
    end = tl.load(id_first + weight_row + 1)
    products = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    start = tl.load(id_first + weight_row)
    while start < end:
        pairs, tokens, inside = pairs_from(start, end, by_id, rows, BLOCK_N)
        value = tl.load(values + pairs, mask=inside, other=0.0).to(tl.float32)
        source_rows = source + tokens[:, None] * H
        x = tl.load(source_rows + columns[None, :], mask=inside[:, None] & in_row[None, :], other=0.0)
        products += value[:, None] * x.to(tl.float32)
        start += BLOCK_N
    out = grad_weight + weight_row * H + columns
    tl.store(out, tl.load(out, mask=in_row, other=0.0).to(tl.float32) + tl.sum(products, axis=0), mask=in_row)


def launch_pair_dots(hidden: torch.Tensor, weight: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """[N] fp32 dot products of hidden [R, H] and weight [V, H]; zero where the id is -1.

    A block has 4 to 8 pairs, about the mean number per weight row, and as many columns as then fit a tile.
    """
    num_pairs, hidden_size = pairs.ids.numel(), hidden.shape[1]
    dots = torch.zeros(num_pairs, dtype=torch.float32, device=hidden.device)
    if num_pairs == 0:
        return dots
    block_rows = min(8, max(4, next_power_of_2(num_pairs // min(num_pairs, pairs.num_ids))))
    segments, starts = segment_blocks(pairs.id_first, num_pairs, block_rows)
    _pair_dots_fwd_kernel[(segments.numel(),)](
        hidden.contiguous(), weight.contiguous(), pairs.rows, pairs.by_id, pairs.id_first, segments, starts, dots,
        pairs.num_ids, hidden_size,
        BLOCK_N=block_rows, BLOCK_H=min(_TILE // block_rows, next_power_of_2(hidden_size)),
    )  # fmt: skip
    return dots


def launch_pair_sums(
    values: torch.Tensor, weight: torch.Tensor, pairs: Pairs, dtype: torch.dtype, parts: int = 1
) -> torch.Tensor:
    """[R, H] sums in ``dtype`` of weight rows [V * Q, H] weighted by values [N * Q]; ids of -1 are skipped.

    The Q weight rows of an id are consecutive, and so are the values of a pair. A tile has 8 pairs and up to 512
    columns: a gathered piece of a weight row is 1 KiB in bf16.
    """
    hidden_size = weight.shape[-1]
    sums = torch.empty(pairs.num_rows, hidden_size, dtype=dtype, device=weight.device)
    block_columns = min(_TILE // 8, next_power_of_2(hidden_size))
    num_column_blocks = triton.cdiv(hidden_size, block_columns)
    _pair_sums_fwd_kernel[(pairs.num_rows * num_column_blocks,)](
        values.contiguous(), weight.contiguous(), pairs.ids, pairs.row_first, sums, hidden_size, num_column_blocks,
        Q=parts, BLOCK_N=8, BLOCK_H=block_columns,
    )  # fmt: skip
    return sums


def launch_pair_weight_gradient(
    source: torch.Tensor, values: torch.Tensor, pairs: Pairs, grad_weight_out: torch.Tensor
) -> None:
    """Add ``values[n] * source[row]`` of each weight row's pairs to its row of ``grad_weight_out`` [V, H].

    The output may have any float dtype: a row is summed in fp32 and rounded once. Rows without pairs are not touched.
    One program takes all pairs of a weight row, in tiles of 8 pairs and up to 1024 columns, so long segments are slow.
    """
    num_pairs, hidden_size = pairs.ids.numel(), source.shape[1]
    segments, _ = segment_blocks(pairs.id_first, num_pairs, max(1, num_pairs))
    block_columns = min(1024, next_power_of_2(hidden_size))
    num_column_blocks = triton.cdiv(hidden_size, block_columns)
    _pair_weight_bwd_kernel[(segments.numel() * num_column_blocks,)](
        source.contiguous(), values.contiguous(), pairs.rows, pairs.by_id, pairs.id_first, segments, grad_weight_out,
        pairs.num_ids, hidden_size, num_column_blocks,
        BLOCK_N=8, BLOCK_H=block_columns,
    )  # fmt: skip


class _PairDotsKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: torch.Tensor, weight: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.weight, ctx.pairs = weight, pairs  # the parameter itself, for its main_grad
        return launch_pair_dots(hidden, weight, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_dots: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, _ = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        return *pair_gradients(hidden, ctx.weight, ctx.pairs, grad_dots, need_hidden, need_weight), None


def pair_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    pairs: Pairs,
    grad_dots: torch.Tensor,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """As :func:`air_moe_megatron.ops.pair_products.pair_gradients`, summed in fp32, deterministic."""
    grad_hidden = grad_weight = None
    if need_hidden:
        grad_hidden = launch_pair_sums(grad_dots, weight, pairs, hidden.dtype)
    if need_weight:
        grad_weight = add_weight_gradient(
            weight, lambda out: launch_pair_weight_gradient(hidden, grad_dots, pairs, out)
        )
    return grad_hidden, grad_weight


class _PairSumsKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, values: torch.Tensor, weight: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        ctx.save_for_backward(values, weight)
        ctx.weight, ctx.pairs = weight, pairs
        return launch_pair_sums(values, weight, pairs, weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_sums: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        grad_values = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_values = launch_pair_dots(grad_sums, weight, ctx.pairs).to(values.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = add_weight_gradient(
                ctx.weight, lambda out: launch_pair_weight_gradient(grad_sums, values, ctx.pairs, out)
            )
        return grad_values, grad_weight, None


def pair_dots(hidden: torch.Tensor, weight: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.pair_products.pair_dots`, summed in fp32, deterministic."""
    return _PairDotsKernel.apply(hidden, weight, pairs)


def pair_sums(values: torch.Tensor, weight: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.pair_products.pair_sums`, summed in fp32, deterministic."""
    return _PairSumsKernel.apply(values, weight, pairs)
