"""The norm as Triton kernels: the tokens are read once for the sums and once for the result, in their own dtype.

With torch operations each step is a pass over fp32 copies of the tokens; the sums take a dozen passes.

Legend: as in ``ops/__init__.py``; B blocks of rows.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import FunctionCtx, once_differentiable

from air_moe_megatron.ops.norm import eager

_ROWS = 128  # rows per block; one program makes the sums of a block
_LARGE, _SCALE = tl.constexpr(eager.LARGE), tl.constexpr(eager.SCALE)


@triton.jit
def _normalize_kernel(
    source,  # [T, H]
    mean,  # [H] or None
    scale,  # [H]
    out,  # [T, H], written
    T,
    H: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offsets = rows[:, None] * H + columns[None, :]
    inside = (rows < T)[:, None] & (columns < H)[None, :]
    values = tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32)
    if HAS_MEAN:
        values -= tl.load(mean + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    values *= tl.load(scale + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    tl.store(out + offsets, values, mask=inside)


@triton.jit
def _batch_sums_kernel(
    hidden,  # [T, H]
    mean,  # [H] fp32
    is_padding,  # [T] bool or None
    sums,  # [B, 3, H] fp32, written
    T,
    H: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    center = tl.load(mean + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    small = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    large = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for start in range(0, ROWS, BLOCK_T):
        rows = block * ROWS + start + tl.arange(0, BLOCK_T)
        kept = rows < T
        if HAS_PADDING:
            kept &= tl.load(is_padding + rows, mask=kept, other=1) == 0
        inside = kept[:, None] & (columns < H)[None, :]
        values = tl.load(hidden + rows[:, None] * H + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        centered = tl.where(inside, values - center, 0.0)
        is_large = tl.abs(centered) > _LARGE
        scaled = tl.where(is_large, centered * _SCALE, 0.0)
        rest = tl.where(is_large, 0.0, centered)
        total += centered
        small += rest * rest
        large += scaled * scaled
    out = sums + block * 3 * H + columns
    tl.store(out, tl.sum(total, axis=0), mask=columns < H)
    tl.store(out + H, tl.sum(small, axis=0), mask=columns < H)
    tl.store(out + 2 * H, tl.sum(large, axis=0), mask=columns < H)


def _launch_normalize(source: torch.Tensor, mean: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    num_rows, hidden_size = source.shape
    out = torch.empty_like(source)
    if out.numel():
        block = min(triton.next_power_of_2(hidden_size), 256)
        _normalize_kernel[(triton.cdiv(num_rows, 8), triton.cdiv(hidden_size, block))](
            source, mean, scale, out, num_rows, H=hidden_size, HAS_MEAN=mean is not None, BLOCK_T=8, BLOCK_H=block,
            num_warps=4,
        )  # fmt: skip
    return out


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scale)
        return _launch_normalize(hidden.contiguous(), mean, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _launch_normalize(grad.contiguous(), None, *ctx.saved_tensors), None, None


def normalize(hidden: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.norm.normalize`."""
    return _Normalize.apply(hidden, mean, scale)


def batch_sums(hidden: torch.Tensor, mean: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.norm.batch_sums`; the order of the sums is fixed."""
    num_tokens, hidden_size = hidden.shape
    num_blocks = triton.cdiv(num_tokens, _ROWS)
    sums = torch.empty(num_blocks, 3, hidden_size, dtype=torch.float32, device=hidden.device)
    block = min(triton.next_power_of_2(hidden_size), 128)
    if sums.numel():
        _batch_sums_kernel[(num_blocks, triton.cdiv(hidden_size, block))](
            hidden.contiguous(), mean, None if padding_mask is None else padding_mask.contiguous(), sums, num_tokens,
            H=hidden_size, HAS_PADDING=padding_mask is not None, ROWS=_ROWS, BLOCK_T=16, BLOCK_H=block, num_warps=4,
        )  # fmt: skip
    return torch.cat((sums.sum(dim=0).flatten(), eager.count_of(hidden, padding_mask)))
