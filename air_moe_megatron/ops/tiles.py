"""Parts that kernels share: products of tiles, keys that order, blocks of segments, and what launchers compute.

A ``for`` loop in a kernel has bounds that are known when it is compiled: sizes of a layer are ``tl.constexpr``, and a
loop over what only the device can count is a ``while``. Triton pipelines no loop without a matrix product anyway, and
its interpreter does not take a tensor as the bound of a ``range`` (NumPy 2.5).

The interpreter has no 16-bit products either, since NumPy has no bf16: :func:`dot` widens the tiles there. Products of
16-bit numbers are exact in fp32, so that both ways agree but for the order of a sum.

Legend: N items, S segments, B blocks, M weight rows, H hidden.
"""

import torch
import triton
import triton.language as tl

from air_moe_megatron.ops.weight_gradient import added_to_main_grad, main_grad_of

SCORE_FUNCTIONS = (None, "sigmoid", "sqrtsoftplus")
"""Functions through which Megatron's expert bias is added to a score; see :func:`apply_score_function`."""

LOWEST_KEY = tl.constexpr(-(2**63))  # ranks below every candidate
HIGHEST_KEY = tl.constexpr(2**63 - 1)

_ID_MASK = 2**31 - 1
_ID_BITS = tl.constexpr(_ID_MASK)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# An entry of a unit row is at most 1, and small ones fall out of fp16's range: scaled so, what is lost is below 2^-38.
_FP16_SCALE = 2.0**14


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` in fp32 for two tiles of one dtype."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot_wide(a, b, acc, DOT_DTYPE: tl.constexpr):
    """``acc + a @ b`` for an a that may be fp32 beside a b that is exact in DOT_DTYPE.

    fp32 products do not use the tensor cores: beside a 16-bit b, an fp32 a is two bf16 numbers, its high and its low
    part, and keeps 16 bits. So is an fp16 b, exactly: an fp32 a would not fit fp16's range.
    """
    if a.dtype == tl.float32 and DOT_DTYPE != tl.float32:
        high = a.to(tl.bfloat16)
        low = (a - high.to(tl.float32)).to(tl.bfloat16)
        b = b.to(DOT_DTYPE)
        b_high = b.to(tl.bfloat16)
        acc = dot(high, b_high, dot(low, b_high, acc))
        if DOT_DTYPE == tl.float16:
            acc = dot(high, (b.to(tl.float32) - b_high.to(tl.float32)).to(tl.bfloat16), acc)
    else:
        acc = dot(a.to(DOT_DTYPE), b.to(DOT_DTYPE), acc)
    return acc


@triton.jit
def order_key(values, ids):
    """int64 that orders fp32 values with their ids (below 2^31): by value, NaN first, then by lower id."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    bits = tl.where(values != values, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (bits.to(tl.int64) << 32) | (ids.to(tl.int64) ^ _ID_BITS)


@triton.jit
def id_of_key(keys):
    """int64 id in a key."""
    return (keys & _ID_BITS) ^ _ID_BITS


@triton.jit
def value_of_key(keys):
    """fp32 value in a key."""
    bits = (keys >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


def ids_of_keys(keys: torch.Tensor) -> torch.Tensor:
    """:func:`id_of_key` outside of kernels."""
    return (keys & _ID_MASK) ^ _ID_MASK


@triton.jit
def apply_score_function(scores, NAME: tl.constexpr):
    """``scores`` themselves (None), their sigmoid, or the root of their softplus."""
    if NAME == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-scores))
    elif NAME == "sqrtsoftplus":
        # log(1 + x), exact where 1 + x loses the digits of x. Source: Kahan; Goldberg 1991, theorem 4.
        x = tl.exp(-tl.abs(scores))
        y = 1.0 + x
        logarithm = tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))
        scores = tl.sqrt_rn(tl.maximum(scores, 0.0) + logarithm)
    return scores


def block_of(size: int, largest: int) -> int:
    """Power of two for a matrix product over ``size`` elements: 16, the least of one, to ``largest``."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def step_of(size: int, dot_dtype: tl.dtype) -> int:
    """Elements of a step along the summed dimension: 128 bytes, but few in fp32, whose operands are in registers."""
    return block_of(size, 16 if dot_dtype == tl.float32 else 64)


def block_rows_of(num_items: int, num_segments: int) -> int:
    """Items of a block for a matrix product: about those of a segment, from 16 to 64."""
    return block_of(num_items // max(1, min(num_items, num_segments)), 64)


def dot_dtype_of(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> tl.dtype:
    """The narrowest dtype in which the products of tokens and weights are those of ``dtype``."""
    if dtype == torch.float32 and hidden.dtype == weight.dtype:
        dtype = hidden.dtype
    return _TRITON_DTYPES[dtype]


def contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as kernels address them, None left alone."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def sort_into_segments(ids: torch.Tensor, num_segments: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort items by segment, those of one segment in their order. Does not wait for the device.

    Args:
        ids: [N] int64, segment of each item; an item of a segment beyond the last is in none.
        num_segments: S.
    Returns:
        [N] int64 items, sorted; [S + 1] int64 place of each segment's first; the last is where the last segment ends.

    Example: ids [1, 0, 1] of 2 segments give [1, 0, 2] and [0, 1, 3].
    """
    sorted_ids, order = ids.sort(stable=True)
    return order, torch.searchsorted(sorted_ids, torch.arange(num_segments + 1, device=ids.device))


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


def split_codewords(codewords: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """Split fp32 unit rows into three 16-bit summands, for exact products with 16-bit numbers on the tensor cores.

    Args:
        codewords: [C, H] fp32, unit rows.
        dtype: bf16 or fp16; or fp32, which needs no split.
    Returns:
        [3, C, H] in ``dtype``, largest summand first ([1, C, H] in fp32); and the power of two by which their sum is
        too large.

    Example: 1 + 2^-9 in bf16 (8 bits) is 1, 2^-9 and 0, times 1.
    """
    if dtype == torch.float32:
        return codewords.contiguous().unsqueeze(0), 1.0
    scale = _FP16_SCALE if dtype == torch.float16 else 1.0
    summands = torch.empty(3, *codewords.shape, dtype=dtype, device=codewords.device)
    rest = codewords * scale
    for summand in summands:
        summand.copy_(rest)
        rest = rest - summand
    return summands, scale


def add_weight_gradient(weight: torch.Tensor, add) -> torch.Tensor:
    """Have ``add`` add to ``main_grad`` [M, H] where there is one, otherwise to zeros; give what backward returns."""
    main_grad = main_grad_of(weight)
    if main_grad is None:
        grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        add(grad_weight.view(-1, weight.shape[-1]))
        return grad_weight
    add(main_grad)
    return added_to_main_grad(weight)


def require_kernel_dtypes(**tensors_or_dtypes) -> None:
    """Refuse what the kernels do not compute with: they accumulate in fp32.

    Raises:
        ValueError: naming the first that is not fp32, bf16 or fp16.
    """
    for name, value in tensors_or_dtypes.items():
        dtype = getattr(value, "dtype", value)
        if dtype not in _TRITON_DTYPES:
            raise ValueError(f"{name} is {dtype}, but the kernels take {', '.join(map(str, _TRITON_DTYPES))}")
