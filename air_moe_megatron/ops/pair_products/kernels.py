"""Pair products as Triton kernels.

Whatever reads or writes a weight row once goes in the order of the weight rows: the dot products (the weight, larger
than any cache, streams by once; the tokens stay in the second-level cache) and the weight's gradient. The sums go in
the order of the tokens and gather weight rows. Every element has one writer and every sum a fixed order: no atomic
additions, and two runs give equal bits.

A block of pairs is one program. How many blocks a weight row has is known on the device only, so the grid is the
largest number that N pairs can need, and the programs beyond the last block return at once (:func:`segment_blocks`).
A loop over what only the device can count is a ``while``: Triton pipelines no loop without a matrix product, and its
interpreter does not take such bounds in a ``for`` (NumPy 2.5).

The products are memory bound, a few operations per byte, so they are plain multiplications: a matrix product would pad
the few pairs of a weight row to sixteen.

Legend: R rows of tokens, N pairs, M weight rows, H hidden, S segments, B blocks, Q consecutive weight rows of an id.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from air_moe_megatron.ops.weight_gradient import added_to_main_grad, main_grad_of

_TILE = 4096  # elements in fp32 of a tile of 4 warps: 32 registers of each thread
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _pair_dots_fwd_kernel(
    hidden,  # [R, H]
    weight,  # [M, H]
    rows,  # [N]
    by_id,  # [N]
    id_first,  # [M + 1]
    segments,  # [B]
    starts,  # [B]
    dots,  # [N] fp32, written
    num_ids,
    hidden_size: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    block = tl.program_id(0)
    weight_row = tl.load(segments + block)
    if weight_row == num_ids:
        return
    places = tl.load(starts + block) + tl.arange(0, BLOCK_N)
    inside = places < tl.load(id_first + weight_row + 1)
    pairs = tl.load(by_id + places, mask=inside, other=0)
    hidden_rows = hidden + tl.load(rows + pairs, mask=inside, other=0)[:, None] * hidden_size
    products = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        in_row = columns < hidden_size
        w = tl.load(weight + weight_row * hidden_size + columns, mask=in_row, other=0.0).to(tl.float32)
        x = tl.load(hidden_rows + columns[None, :], mask=inside[:, None] & in_row[None, :], other=0.0)
        products += x.to(tl.float32) * w[None, :]
    tl.store(dots + pairs, tl.sum(products, axis=1), mask=inside)


@triton.jit
def _pair_sums_fwd_kernel(
    values,  # [N, Q]
    weight,  # [M, Q, H]
    ids,  # [N], -1 for no pair
    row_first,  # [R + 1]
    sums,  # [R, H], written
    hidden_size: tl.constexpr,
    num_column_blocks,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // num_column_blocks).to(tl.int64)
    columns = (program % num_column_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = columns < hidden_size
    end = tl.load(row_first + row + 1) * PARTS
    products = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    start = tl.load(row_first + row) * PARTS
    while start < end:
        places = start + tl.arange(0, BLOCK_N)
        expert = tl.load(ids + places // PARTS, mask=places < end, other=-1)
        present = expert >= 0
        value = tl.load(values + places, mask=present, other=0.0).to(tl.float32)
        weight_rows = weight + (expert * PARTS + places % PARTS)[:, None] * hidden_size
        w = tl.load(weight_rows + columns[None, :], mask=present[:, None] & in_row[None, :], other=0.0)
        products += value[:, None] * w.to(tl.float32)
        start += BLOCK_N
    tl.store(sums + row * hidden_size + columns, tl.sum(products, axis=0), mask=in_row)


@triton.jit
def _pair_weight_bwd_kernel(
    source,  # [R, H]
    values,  # [N]
    rows,  # [N]
    by_id,  # [N]
    id_first,  # [M + 1]
    segments,  # [B]
    grad_weight,  # [M, H], added to
    num_ids,
    hidden_size: tl.constexpr,
    num_column_blocks,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0)
    weight_row = tl.load(segments + program // num_column_blocks)
    if weight_row == num_ids:
        return
    columns = (program % num_column_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = columns < hidden_size
    end = tl.load(id_first + weight_row + 1)
    products = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    start = tl.load(id_first + weight_row)
    while start < end:
        places = start + tl.arange(0, BLOCK_N)
        inside = places < end
        pairs = tl.load(by_id + places, mask=inside, other=0)
        value = tl.load(values + pairs, mask=inside, other=0.0).to(tl.float32)
        source_rows = source + tl.load(rows + pairs, mask=inside, other=0)[:, None] * hidden_size
        x = tl.load(source_rows + columns[None, :], mask=inside[:, None] & in_row[None, :], other=0.0)
        products += value[:, None] * x.to(tl.float32)
        start += BLOCK_N
    out = grad_weight + weight_row * hidden_size + columns
    tl.store(out, tl.load(out, mask=in_row, other=0.0).to(tl.float32) + tl.sum(products, axis=0), mask=in_row)


def segment_blocks(first: torch.Tensor, num_items: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut segments of consecutive items into blocks, without waiting for the device.

    There are as many blocks as ``num_items`` items in S segments can need at most: with n segments in use, each but for
    its last block full, that is ``(num_items + (block_size - 1) * n) / block_size``.

    Args:
        first: [S + 1] int64, first item of each segment; the last is where the last segment ends. S is at least 1.
        num_items: items at most; with ``block_size`` at least as many, each segment in use is one block.
        block_size: items of a block.
    Returns:
        [B] int64 segment of each block, S where there is no block; [B] int64 first item of each block.

    Example: first [0, 3, 3, 4], 4 items, blocks of 2: segments [0, 0, 2], starts [0, 2, 3].
    """
    num_segments = first.numel() - 1
    num_used = min(num_segments, num_items)
    num_blocks = (num_items + (block_size - 1) * num_used) // block_size
    blocks = (first.diff() + block_size - 1) // block_size
    ends = blocks.cumsum(0)
    places = torch.arange(num_blocks, device=first.device)
    segments = torch.searchsorted(ends, places, right=True)
    near = segments.clamp(max=num_segments - 1)
    return segments, first[near] + (places - (ends - blocks)[near]) * block_size


def add_weight_gradient(weight, add):
    """Have ``add`` add to ``main_grad`` [M, H] where there is one, otherwise to zeros; give what backward returns."""
    main_grad = main_grad_of(weight)
    if main_grad is None:
        grad_weight = torch.zeros_like(weight)
        add(grad_weight.view(-1, weight.shape[-1]))
        return grad_weight
    add(main_grad)
    return added_to_main_grad(weight)


def launch_pair_dots(hidden, weight, pairs):
    """[N] fp32 dot products of hidden [R, H] and weight [M, H]; left unwritten where the id is -1.

    Blocks hold about as many pairs as a weight row has on average, 4 to 32, and as much of a row as a tile then takes.
    """
    num_pairs, hidden_size = pairs.ids.numel(), hidden.shape[1]
    dots = torch.empty(num_pairs, dtype=torch.float32, device=hidden.device)
    if num_pairs == 0:
        return dots
    block_rows = min(32, max(4, triton.next_power_of_2(num_pairs // min(num_pairs, pairs.num_ids))))
    segments, starts = segment_blocks(pairs.id_first, num_pairs, block_rows)
    _pair_dots_fwd_kernel[(segments.numel(),)](
        hidden.contiguous(), weight.contiguous(), pairs.rows, pairs.by_id, pairs.id_first, segments, starts, dots,
        pairs.num_ids, hidden_size,
        BLOCK_N=block_rows, BLOCK_H=min(_TILE // block_rows, triton.next_power_of_2(hidden_size)),
    )  # fmt: skip
    return dots


def launch_pair_sums(values, weight, pairs, dtype, parts=1):
    """[R, H] sums in ``dtype`` of the weight rows [M * Q, H] by the values [N * Q]; an id of -1 is no pair.

    The Q weight rows of an id lie together, and so do the values of a pair. Tiles of 8 pairs and up to 512 columns: a
    gathered piece of a weight row is 1 KiB in bf16.
    """
    hidden_size = weight.shape[-1]
    sums = torch.empty(pairs.num_rows, hidden_size, dtype=dtype, device=weight.device)
    block_columns = min(_TILE // 8, triton.next_power_of_2(hidden_size))
    num_column_blocks = triton.cdiv(hidden_size, block_columns)
    _pair_sums_fwd_kernel[(pairs.num_rows * num_column_blocks,)](
        values.contiguous(), weight.contiguous(), pairs.ids, pairs.row_first, sums, hidden_size, num_column_blocks,
        PARTS=parts, BLOCK_N=8, BLOCK_H=block_columns,
    )  # fmt: skip
    return sums


def launch_pair_weight_gradient(source, values, pairs, grad_weight_out):
    """Add ``values[n] * source[row]`` of each weight row's pairs to its row of ``grad_weight_out`` [M, H].

    Any float dtype; the sum of a row is made in fp32 and rounded once. Rows without pairs are not touched. One program
    walks all pairs of a weight row, in tiles of 16 pairs and up to 256 columns: a long segment is slow, not wrong.
    """
    num_pairs, hidden_size = pairs.ids.numel(), source.shape[1]
    segments, _ = segment_blocks(pairs.id_first, num_pairs, max(1, num_pairs))
    block_columns = min(_TILE // 16, triton.next_power_of_2(hidden_size))
    num_column_blocks = triton.cdiv(hidden_size, block_columns)
    _pair_weight_bwd_kernel[(segments.numel() * num_column_blocks,)](
        source.contiguous(), values.contiguous(), pairs.rows, pairs.by_id, pairs.id_first, segments, grad_weight_out,
        pairs.num_ids, hidden_size, num_column_blocks,
        BLOCK_N=16, BLOCK_H=block_columns,
    )  # fmt: skip


class _PairDotsKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, pairs):
        ctx.save_for_backward(hidden, weight)
        ctx.weight, ctx.pairs = weight, pairs  # the parameter itself, for its main_grad
        return launch_pair_dots(hidden, weight, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_dots):
        hidden, weight = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = launch_pair_sums(grad_dots, weight, ctx.pairs, hidden.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = add_weight_gradient(
                ctx.weight, lambda out: launch_pair_weight_gradient(hidden, grad_dots, ctx.pairs, out)
            )
        return grad_hidden, grad_weight, None


class _PairSumsKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, weight, pairs):
        ctx.save_for_backward(values, weight)
        ctx.weight, ctx.pairs = weight, pairs
        return launch_pair_sums(values, weight, pairs, weight.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sums):
        values, weight = ctx.saved_tensors
        grad_values = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_values = launch_pair_dots(grad_sums, weight, ctx.pairs).to(values.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = add_weight_gradient(
                ctx.weight, lambda out: launch_pair_weight_gradient(grad_sums, values, ctx.pairs, out)
            )
        return grad_values, grad_weight, None


def require_kernel_dtypes(**tensors_or_dtypes) -> None:
    """Refuse what the kernels do not compute with: they accumulate in fp32."""
    for name, value in tensors_or_dtypes.items():
        dtype = getattr(value, "dtype", value)
        if dtype not in _DTYPES:
            raise ValueError(f"{name} is {dtype}, but the kernels take {', '.join(map(str, _DTYPES))}")


def pair_dots_kernel(hidden: torch.Tensor, weight: torch.Tensor, pairs) -> torch.Tensor:
    """Dot product of each pair's row of tokens and weight row.

    As :func:`air_moe_megatron.ops.pair_products.pair_dots`, whose caller has validated the shapes. Differentiable in
    hidden and weight, deterministic, does not wait for the device.

    Args:
        hidden: [R, H], fp32, bf16 or fp16.
        weight: [..., H] of M rows, likewise.
        pairs: N pairs, see :class:`air_moe_megatron.ops.pair_products.Pairs`.
    Returns:
        [N] fp32.
    Raises:
        ValueError: for another dtype.

    Example: hidden [[1, 2]], weight [[1, 0], [0, 1], [1, 1]], the pairs (0, 2) and (0, 0) give [3, 1].
    """
    require_kernel_dtypes(hidden=hidden, weight=weight)
    return _PairDotsKernel.apply(hidden, weight, pairs)


def pair_sums_kernel(values: torch.Tensor, weight: torch.Tensor, pairs) -> torch.Tensor:
    """Sum the weight rows of each row of tokens, weighted by the pairs' values.

    As :func:`air_moe_megatron.ops.pair_products.pair_sums`, whose caller has validated the shapes. Differentiable in
    values and weight, deterministic, does not wait for the device.

    Args:
        values: [N], fp32, bf16 or fp16.
        weight: [..., H] of M rows, likewise.
        pairs: N pairs, see :class:`air_moe_megatron.ops.pair_products.Pairs`.
    Returns:
        [R, H] in the dtype of weight, summed in fp32; zero where a row has no pairs.
    Raises:
        ValueError: for another dtype.

    Example: values [2, 1], weight [[1, 0], [0, 1], [1, 1]], the pairs (0, 2) and (0, 0) give [[3, 2]].
    """
    require_kernel_dtypes(values=values, weight=weight)
    return _PairSumsKernel.apply(values, weight, pairs)
