"""Granular experts as Triton kernels: many tiny MLPs, ordered by expert.

``y_r = sum over the pairs n of row r of p_n * W2_e.T act(W1_e x_r)``. A program of the first projection takes up to
BLOCK_N pairs of one expert. It gathers their rows, multiplies them by the expert's F rows, and applies activation and
probability. The second projection sums per token row. The first, and the second in expert order, are matrix products
in which F and the pairs of a block are padded to 16: with F = 1 and four pairs per expert, one product in 64 is used.
That costs little, because gathers of rows bound the time: such a tile moves at most (16 + F) * H numbers for its
16 * 16 * H products.

The backward keeps the inputs of the activation, N * Q numbers in fp32. Recomputing them would read every token row and
weight row again, for N * Q * H products. Activation and probability are recomputed.

Sums per token row, in the second projection and in the tokens' gradient, are made in one of two ways:

- In row order, one program gathers the Q = F or 2F weight rows of all pairs of a row. It reads N * Q * H numbers, uses
  no atomics, and is deterministic (``launch_pair_sums``).
- In expert order, a block of pairs reads an expert's weight rows once, sums over Q on the chip, and adds the results to
  the rows with fp32 atomics: N * H additions in the L2 cache.

The second way is used from Q = 8 on, unless ``deterministic``: there the gathers would move 16 bytes in bf16 for each 4
that are added. Gradients of the weights have one program per (expert, columns), and so no atomics.

Legend: Q = F, or 2F for a gated first projection; others as in ``ops/__init__.py``.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import FunctionCtx, once_differentiable

from air_moe_megatron.ops.blocks import block_of, block_rows_of, contiguous
from air_moe_megatron.ops.pair_products import Pairs
from air_moe_megatron.ops.pair_products.kernels import launch_pair_sums, launch_pair_weight_gradient, pairs_from
from air_moe_megatron.ops.tiles import (
    dot,
    dot_dtype_of,
    dot_wide,
    segment_blocks,
    step_of,
)
from air_moe_megatron.ops.weight_gradient import add_weight_gradient

MAX_FFN_HIDDEN_SIZE = 64
LIMITS = {"ffn_hidden_size": MAX_FFN_HIDDEN_SIZE}
"""The largest sizes that the kernels take."""

_ATOMIC_PARTS = 8  # least number of weight rows per expert for which sums per token row are made in expert order


@triton.jit
def _activation(x, NAME: tl.constexpr):
    """The activation and its derivative at x."""
    if NAME == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value, slope = x * below, below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif NAME == "silu":
        below = 1.0 / (1.0 + tl.exp(-x))
        value, slope = x * below, below * (1.0 + x * (1.0 - below))
    elif NAME == "relu":
        value, slope = tl.maximum(x, 0.0), tl.where(x > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(NAME == "squared_relu")
        positive = tl.maximum(x, 0.0)
        value, slope = positive * positive, 2.0 * positive
    return value, slope


@triton.jit
def _granular_experts_fwd_kernel(
    hidden,  # [R, H]
    weight,  # [E, Q, H]
    probs,  # [N]
    rows,  # [N]
    by_id,  # [N]
    id_first,  # [E + 1]
    segments,  # [B]
    starts,  # [B]
    inputs,  # [N, Q] fp32, written
    values,  # [N, F] fp32, written
    E,
    H: tl.constexpr,
    F: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    Q: tl.constexpr = 2 * F if GATED else F
    block = tl.program_id(0)
    expert = tl.load(segments + block)
    if expert == E:
        return
    start, end = tl.load(starts + block), tl.load(id_first + expert + 1)
    pairs, tokens, inside = pairs_from(start, end, by_id, rows, BLOCK_N)
    hidden_rows = hidden + tokens[:, None] * H
    parts = tl.arange(0, BLOCK_F)
    weight_rows = weight + (expert * Q + parts)[:, None] * H
    gate = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    linear = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for first in range(0, H, BLOCK_H):
        columns = first + tl.arange(0, BLOCK_H)
        in_row = columns < H
        kept = (parts < F)[:, None] & in_row[None, :]
        x = tl.load(hidden_rows + columns[None, :], mask=inside[:, None] & in_row[None, :], other=0.0).to(DOT_DTYPE)
        w = tl.load(weight_rows + columns[None, :], mask=kept, other=0.0)
        gate = dot(x, tl.trans(w.to(DOT_DTYPE)), gate)
        if GATED:
            w = tl.load(weight_rows + F * H + columns[None, :], mask=kept, other=0.0)
            linear = dot(x, tl.trans(w.to(DOT_DTYPE)), linear)
    kept = inside[:, None] & (parts < F)[None, :]
    out = pairs[:, None] * Q + parts[None, :]
    tl.store(inputs + out, gate, mask=kept)
    value, _ = _activation(gate, ACTIVATION)
    if GATED:
        tl.store(inputs + out + F, linear, mask=kept)
        value *= linear
    prob = tl.load(probs + pairs, mask=inside, other=0.0).to(tl.float32)
    tl.store(values + pairs[:, None] * F + parts[None, :], prob[:, None] * value, mask=kept)


@triton.jit
def _expert_sums_fwd_kernel(
    values,  # [N, Q] fp32
    weight,  # [E, Q, H]
    rows,  # [N]
    by_id,  # [N]
    id_first,  # [E + 1]
    segments,  # [B]
    starts,  # [B]
    sums,  # [R, H] fp32, added to
    E,
    num_column_blocks,
    H: tl.constexpr,
    Q: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0)
    block = program // num_column_blocks
    expert = tl.load(segments + block)
    if expert == E:
        return
    start, end = tl.load(starts + block), tl.load(id_first + expert + 1)
    pairs, tokens, inside = pairs_from(start, end, by_id, rows, BLOCK_N)
    columns = (program % num_column_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = columns < H
    tile = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for first in range(0, Q, BLOCK_Q):
        parts = first + tl.arange(0, BLOCK_Q)
        value = tl.load(
            values + pairs[:, None] * Q + parts[None, :], mask=inside[:, None] & (parts < Q)[None, :], other=0.0
        )
        w = tl.load(
            weight + (expert * Q + parts)[:, None] * H + columns[None, :],
            mask=(parts < Q)[:, None] & in_row[None, :],
            other=0.0,
        )
        tile = dot_wide(value, w, tile, DOT_DTYPE)
    out = sums + tokens[:, None] * H + columns[None, :]
    tl.atomic_add(out, tile, mask=inside[:, None] & in_row[None, :], sem="relaxed")


@triton.jit
def _granular_experts_bwd_kernel(
    grad_out,  # [R, H]
    weight,  # [E, F, H]
    inputs,  # [N, Q] fp32
    probs,  # [N]
    rows,  # [N]
    by_id,  # [N]
    id_first,  # [E + 1]
    segments,  # [B]
    starts,  # [B]
    values,  # [N, F] fp32, written
    grad_inputs,  # [N, Q] fp32, written
    grad_probs,  # [N], written
    E,
    H: tl.constexpr,
    F: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    Q: tl.constexpr = 2 * F if GATED else F
    block = tl.program_id(0)
    expert = tl.load(segments + block)
    if expert == E:
        return
    start, end = tl.load(starts + block), tl.load(id_first + expert + 1)
    pairs, tokens, inside = pairs_from(start, end, by_id, rows, BLOCK_N)
    grad_rows = grad_out + tokens[:, None] * H
    parts = tl.arange(0, BLOCK_F)
    weight_rows = weight + (expert * F + parts)[:, None] * H
    grad_value = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for first in range(0, H, BLOCK_H):
        columns = first + tl.arange(0, BLOCK_H)
        in_row = columns < H
        g = tl.load(grad_rows + columns[None, :], mask=inside[:, None] & in_row[None, :], other=0.0)
        w = tl.load(weight_rows + columns[None, :], mask=(parts < F)[:, None] & in_row[None, :], other=0.0)
        grad_value = dot(g.to(DOT_DTYPE), tl.trans(w.to(DOT_DTYPE)), grad_value)
    kept = inside[:, None] & (parts < F)[None, :]
    where = pairs[:, None] * Q + parts[None, :]
    gate = tl.load(inputs + where, mask=kept, other=0.0)
    prob = tl.load(probs + pairs, mask=inside, other=0.0).to(tl.float32)[:, None]
    active, slope = _activation(gate, ACTIVATION)
    grad_active = grad_value * prob
    if GATED:
        linear = tl.load(inputs + where + F, mask=kept, other=0.0)
        tl.store(grad_inputs + where + F, grad_active * active, mask=kept)
        tl.store(grad_inputs + where, grad_active * linear * slope, mask=kept)
        active *= linear
    else:
        tl.store(grad_inputs + where, grad_active * slope, mask=kept)
    tl.store(values + pairs[:, None] * F + parts[None, :], active * prob, mask=kept)
    tl.store(grad_probs + pairs, tl.sum(grad_value * active, axis=1), mask=inside)


@triton.jit
def _expert_weight_bwd_kernel(
    values,  # [N, Q] fp32
    source,  # [R, H]
    rows,  # [N]
    by_id,  # [N]
    id_first,  # [E + 1]
    segments,  # [B]
    grad_weight,  # [E, Q, H], added to
    E,
    num_column_blocks,
    H: tl.constexpr,
    Q: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0)
    expert = tl.load(segments + program // num_column_blocks)
    if expert == E:
        return
    parts = tl.arange(0, BLOCK_Q)
    columns = (program % num_column_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = columns < H
    sums = tl.zeros([BLOCK_Q, BLOCK_H], tl.float32)
    start, end = tl.load(id_first + expert), tl.load(id_first + expert + 1)
    while start < end:
        pairs, tokens, inside = pairs_from(start, end, by_id, rows, BLOCK_N)
        value = tl.load(
            values + pairs[None, :] * Q + parts[:, None],
            mask=(parts < Q)[:, None] & inside[None, :],
            other=0.0,
        )
        source_rows = source + tokens[:, None] * H
        x = tl.load(source_rows + columns[None, :], mask=inside[:, None] & in_row[None, :], other=0.0)
        sums = dot_wide(value, x, sums, DOT_DTYPE)
        start += BLOCK_N
    out = grad_weight + (expert * Q + parts)[:, None] * H + columns[None, :]
    kept = (parts < Q)[:, None] & in_row[None, :]
    tl.store(out, tl.load(out, mask=kept, other=0.0).to(tl.float32) + sums, mask=kept)


def _warps_of(block_rows: int, ffn_hidden_size: int) -> int:
    """Number of warps for a product of pairs by F: one per 256 elements, up to four."""
    return min(4, block_rows * block_of(ffn_hidden_size, MAX_FFN_HIDDEN_SIZE) // 256)


def launch_granular_values(
    hidden: torch.Tensor,
    weight1: torch.Tensor,
    probs: torch.Tensor,
    pairs: Pairs,
    ffn_hidden_size: int,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, Q] fp32 inputs of the activation, and [N, F] fp32 values: activation (times linear part) times probability.

    In bf16 a step takes 64 columns: a program reads 128 bytes of each of its rows at a time, pipelined.
    """
    num_pairs, hidden_size = pairs.ids.numel(), hidden.shape[1]
    num_inputs = weight1.shape[1]
    inputs = torch.empty(num_pairs, num_inputs, dtype=torch.float32, device=hidden.device)
    values = torch.empty(num_pairs, ffn_hidden_size, dtype=torch.float32, device=hidden.device)
    if num_pairs == 0:
        return inputs, values
    block_rows, dot_dtype = block_rows_of(num_pairs, pairs.num_ids), dot_dtype_of(hidden, weight1, torch.float32)
    segments, starts = segment_blocks(pairs.id_first, num_pairs, block_rows)
    _granular_experts_fwd_kernel[(segments.numel(),)](
        hidden, weight1, probs, pairs.rows, pairs.by_id, pairs.id_first, segments, starts, inputs, values,
        pairs.num_ids, hidden_size,
        F=ffn_hidden_size, GATED=num_inputs == 2 * ffn_hidden_size, ACTIVATION=activation, DOT_DTYPE=dot_dtype,
        BLOCK_N=block_rows, BLOCK_F=block_of(ffn_hidden_size, MAX_FFN_HIDDEN_SIZE),
        BLOCK_H=step_of(hidden_size, dot_dtype), num_warps=_warps_of(block_rows, ffn_hidden_size), num_stages=4,
    )  # fmt: skip
    return inputs, values


def launch_granular_sums(
    values: torch.Tensor, weight: torch.Tensor, pairs: Pairs, dtype: torch.dtype, deterministic: bool
) -> torch.Tensor:
    """[R, H] sums in ``dtype`` of weight rows [E, Q, H] weighted by values [N, Q], in one of the two ways above.

    In expert order a tile is a block of pairs by 128 columns.
    """
    num_parts, hidden_size = weight.shape[1:]
    if deterministic or num_parts < _ATOMIC_PARTS:
        return launch_pair_sums(values, weight, pairs, dtype, parts=num_parts)
    sums = torch.zeros(pairs.num_rows, hidden_size, dtype=torch.float32, device=weight.device)
    num_pairs = pairs.ids.numel()
    if num_pairs:
        block_rows, block_columns = block_rows_of(num_pairs, pairs.num_ids), block_of(hidden_size, 128)
        dot_dtype = dot_dtype_of(weight, weight, torch.float32)
        num_column_blocks = triton.cdiv(hidden_size, block_columns)
        segments, starts = segment_blocks(pairs.id_first, num_pairs, block_rows)
        _expert_sums_fwd_kernel[(segments.numel() * num_column_blocks,)](
            values, weight, pairs.rows, pairs.by_id, pairs.id_first, segments, starts, sums,
            pairs.num_ids, num_column_blocks, hidden_size,
            Q=num_parts, DOT_DTYPE=dot_dtype,
            BLOCK_N=block_rows, BLOCK_Q=step_of(num_parts, dot_dtype), BLOCK_H=block_columns,
        )  # fmt: skip
    return sums.to(dtype)


def launch_granular_gradients(
    grad_out: torch.Tensor,
    weight2: torch.Tensor,
    inputs: torch.Tensor,
    probs: torch.Tensor,
    pairs: Pairs,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[N, F] fp32 recomputed values; gradients of the inputs, [N, Q] fp32, and of the probabilities, [N]."""
    num_pairs, hidden_size = pairs.ids.numel(), grad_out.shape[1]
    ffn_hidden_size = weight2.shape[1]
    values = torch.empty(num_pairs, ffn_hidden_size, dtype=torch.float32, device=inputs.device)
    grad_inputs, grad_probs = torch.empty_like(inputs), torch.zeros_like(probs)
    if num_pairs == 0:
        return values, grad_inputs, grad_probs
    block_rows, dot_dtype = block_rows_of(num_pairs, pairs.num_ids), dot_dtype_of(grad_out, weight2, torch.float32)
    segments, starts = segment_blocks(pairs.id_first, num_pairs, block_rows)
    _granular_experts_bwd_kernel[(segments.numel(),)](
        grad_out, weight2, inputs, probs, pairs.rows, pairs.by_id, pairs.id_first, segments, starts,
        values, grad_inputs, grad_probs, pairs.num_ids, hidden_size,
        F=ffn_hidden_size, GATED=inputs.shape[1] == 2 * ffn_hidden_size, ACTIVATION=activation, DOT_DTYPE=dot_dtype,
        BLOCK_N=block_rows, BLOCK_F=block_of(ffn_hidden_size, MAX_FFN_HIDDEN_SIZE),
        BLOCK_H=step_of(hidden_size, dot_dtype), num_warps=_warps_of(block_rows, ffn_hidden_size), num_stages=4,
    )  # fmt: skip
    return values, grad_inputs, grad_probs


def launch_granular_weight_gradient(
    source: torch.Tensor, values: torch.Tensor, pairs: Pairs, grad_weight_out: torch.Tensor
) -> None:
    """Add ``values[n, q] * source[row]`` of each expert's pairs to its rows of ``grad_weight_out`` [E * Q, H].

    The output may have any float dtype: a row is summed in fp32 and rounded once. Experts without pairs stay untouched.
    A tile is Q by 64 to 512 columns, for 8192 elements, 64 registers per thread. With one row per expert there is no
    matrix product, which would pad the row to 16.
    """
    num_pairs, num_parts, hidden_size = *values.shape, source.shape[1]
    if num_parts == 1:
        launch_pair_weight_gradient(source, values.view(-1), pairs, grad_weight_out)
        return
    block_parts = block_of(num_parts, 2 * MAX_FFN_HIDDEN_SIZE)
    dot_dtype = dot_dtype_of(source, source, torch.float32)
    # The operands of fp32 products take registers too.
    block_columns = block_of(hidden_size, (4096 if dot_dtype == tl.float32 else 8192) // block_parts)
    num_column_blocks = triton.cdiv(hidden_size, block_columns)
    segments, _ = segment_blocks(pairs.id_first, num_pairs, max(1, num_pairs))
    _expert_weight_bwd_kernel[(segments.numel() * num_column_blocks,)](
        values, source, pairs.rows, pairs.by_id, pairs.id_first, segments, grad_weight_out,
        pairs.num_ids, num_column_blocks, hidden_size,
        Q=num_parts, DOT_DTYPE=dot_dtype, BLOCK_N=16, BLOCK_Q=block_parts, BLOCK_H=block_columns,
    )  # fmt: skip


class _GranularExpertsKernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight1: torch.Tensor,
        weight2: torch.Tensor,
        probs: torch.Tensor,
        pairs: Pairs,
        activation: str,
        deterministic: bool,
    ) -> torch.Tensor:
        ctx.weights = weight1, weight2  # the parameters themselves, for their main_grad
        ctx.pairs, ctx.activation, ctx.deterministic = pairs, activation, deterministic
        hidden, weight1, weight2, probs = contiguous(hidden, weight1, weight2, probs)
        inputs, values = launch_granular_values(hidden, weight1, probs, pairs, weight2.shape[1], activation)
        ctx.save_for_backward(hidden, weight1, weight2, probs, inputs)
        return launch_granular_sums(values, weight2, pairs, weight2.dtype, deterministic)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight1, weight2, probs, inputs = ctx.saved_tensors
        pairs, grad_out = ctx.pairs, grad_out.contiguous()
        need_hidden, need_weight1, need_weight2, need_probs = ctx.needs_input_grad[:4]
        values, grad_inputs, grad_probs = launch_granular_gradients(
            grad_out, weight2, inputs, probs, pairs, ctx.activation
        )
        grad_hidden = grad_weight1 = grad_weight2 = None
        if need_hidden:
            grad_hidden = launch_granular_sums(grad_inputs, weight1, pairs, hidden.dtype, ctx.deterministic)
        if need_weight1:
            grad_weight1 = add_weight_gradient(
                ctx.weights[0], lambda out: launch_granular_weight_gradient(hidden, grad_inputs, pairs, out)
            )
        if need_weight2:
            grad_weight2 = add_weight_gradient(
                ctx.weights[1], lambda out: launch_granular_weight_gradient(grad_out, values, pairs, out)
            )
        return grad_hidden, grad_weight1, grad_weight2, grad_probs if need_probs else None, None, None, None


def granular_experts(
    hidden: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    probs: torch.Tensor,
    pairs: Pairs,
    activation: str,
    deterministic: bool = False,
) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.granular_experts.granular_experts`, summed in fp32.

    If ``deterministic``, sums per token row are always made in row order. Otherwise experts with many weight rows use
    atomic additions.
    """
    return _GranularExpertsKernel.apply(hidden, weight1, weight2, probs, pairs, activation, deterministic)
