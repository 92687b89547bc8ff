"""Functions that kernels share: products of tiles, sortable keys, and blocks of segments.

The bounds of a ``for`` loop in a kernel are known at compile time, or follow from the index of an outer loop. So sizes
of a layer are ``tl.constexpr``, and a loop over a count that only the device knows is a ``while``. Triton's interpreter
does not take a tensor as the bound of a ``range`` (NumPy 2.5), and the compiler pipelines only loops with a matrix
product anyway.

The interpreter has no 16-bit products, because NumPy has no bf16: there :func:`dot` widens the tiles. Products of
16-bit numbers are exact in fp32, so both ways agree except for the order of a sum.
"""

import torch
import triton
import triton.language as tl

from air_moe_megatron.ops.blocks import block_of

LOWEST_KEY = tl.constexpr(-(2**63))  # ranks below every candidate
HIGHEST_KEY = tl.constexpr(2**63 - 1)

_MOST_BLOCKS = tl.constexpr(2**62)  # more blocks than there can be
_ID_MASK = 2**31 - 1
_ID_BITS = tl.constexpr(_ID_MASK)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Entries of a unit row are at most 1, and small ones underflow in fp16. With this scale the loss is below 2^-38.
_FP16_SCALE = 2.0**14


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` in fp32 for two tiles of one dtype."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot_wide(a, b, acc, DOT_DTYPE: tl.constexpr):
    """``acc + a @ b``, where a may be fp32, and b is exact in DOT_DTYPE.

    fp32 products do not use the tensor cores. So with a 16-bit b, an fp32 a is split into two bf16 numbers, a high and
    a low part, which keep 16 bits. They are bf16 because an fp32 a may exceed fp16's range. An fp16 b is then split
    into two bf16 numbers as well, which is exact.
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
def codeword_products(
    summands,  # [S, C, H]
    ids,
    is_codeword,
    rows,  # [.., H] tokens or expert centers
    row_ids,
    is_row,
    scales,
    C: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """[BLOCK_C, BLOCK_R] fp32 products of codewords and rows; if SCALED, of rows times their scales.

    The codewords are the M dimension of the product, which must be at least 64; BLOCK_R may be smaller.
    """
    products = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    for start in range(0, H, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        in_row = columns < H
        r = tl.load(rows + row_ids[None, :] * H + columns[:, None], mask=is_row[None, :] & in_row[:, None], other=0.0)
        if SCALED:
            r = (r.to(tl.float32) * scales[None, :]).to(r.dtype)  # by a power of two: exact
        for s in tl.static_range(S):
            c = tl.load(
                summands + s * C * H + ids.to(tl.int64)[:, None] * H + columns[None, :],
                mask=is_codeword[:, None] & in_row[None, :],
                other=0.0,
            )
            products = dot(c, r.to(c.dtype), products)
    return products


@triton.jit
def order_key(values, ids):
    """int64 keys of fp32 values and ids (below 2^31): a higher value has a higher key, NaN the highest; on a tie the
    lower id has the higher key."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    bits = tl.where(values != values, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (bits.to(tl.int64) << 32) | (ids.to(tl.int64) ^ _ID_BITS)


@triton.jit
def id_of_key(keys):
    """int64 ids in keys."""
    return (keys & _ID_BITS) ^ _ID_BITS


@triton.jit
def value_of_key(keys):
    """fp32 values in keys."""
    bits = (keys >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


def ids_of_keys(keys: torch.Tensor) -> torch.Tensor:
    """:func:`id_of_key` outside of kernels."""
    return (keys & _ID_MASK) ^ _ID_MASK


@triton.jit
def apply_score_function(scores, NAME: tl.constexpr):
    """Scores unchanged (NAME is None), their sigmoid, or the square root of their softplus."""
    if NAME == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-scores))
    elif NAME == "sqrtsoftplus":
        # log(1 + x), exact where 1 + x loses the digits of x. Source: Kahan; Goldberg 1991, theorem 4.
        x = tl.exp(-tl.abs(scores))
        y = 1.0 + x
        logarithm = tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))
        scores = tl.sqrt_rn(tl.maximum(scores, 0.0) + logarithm)
    return scores


def step_of(size: int, dot_dtype: tl.dtype) -> int:
    """Elements per step along the summed dimension: up to 64 (128 bytes); 16 in fp32, whose operands take registers."""
    return block_of(size, 16 if dot_dtype == tl.float32 else 64)


def dot_dtype_of(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> tl.dtype:
    """The narrowest dtype whose products of tokens and weights equal those in ``dtype``."""
    if dtype == torch.float32 and hidden.dtype == weight.dtype:
        dtype = hidden.dtype
    return _TRITON_DTYPES[dtype]


def split_codewords(codewords: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """Split fp32 unit rows into three 16-bit summands, for exact products with 16-bit numbers on the tensor cores.

    Args:
        codewords: [C, H] fp32, unit rows.
        dtype: bf16 or fp16; or fp32, which needs no split.
    Returns:
        [3, C, H] in ``dtype``, largest summand first ([1, C, H] in fp32); and the power of two by which the codewords
        were multiplied.

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


@triton.jit
def _segment_blocks_kernel(
    first,  # [Z + 1] first item of each segment
    ends,  # [Z] blocks of the segments up to each
    segments,  # [B], written
    starts,  # [B], written
    B,
    Z,
    block_size,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the segment of each block by binary search, and the block's first item."""
    blocks = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    segment = tl.zeros_like(blocks)  # segments whose blocks all come before
    for step in range(STEPS):
        half = 1 << (STEPS - 1 - step)
        where = segment + half - 1
        end = tl.load(ends + where, mask=where < Z, other=_MOST_BLOCKS)
        segment = tl.where(end <= blocks, segment + half, segment)
    near = tl.minimum(segment, Z - 1)
    before = tl.load(ends + near - 1, mask=near > 0, other=0)
    tl.store(segments + blocks, segment, mask=blocks < B)
    tl.store(starts + blocks, tl.load(first + near) + (blocks - before) * block_size, mask=blocks < B)


def segment_blocks(first: torch.Tensor, num_items: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut segments of consecutive items into blocks, without waiting for the device.

    B is the largest number of blocks that ``num_items`` items in Z segments can need. With n segments in use, each full
    except for its last block, that is ``(num_items + (block_size - 1) * n) / block_size``.

    Args:
        first: [Z + 1] int64, first item of each segment, and the end of the last segment. Z is at least 1.
        num_items: largest number of items. If ``block_size`` is at least this, each segment in use is one block.
        block_size: items per block.
    Returns:
        [B] int64 segment of each block, Z for an unused block; [B] int64 first item of each block.

    Example: first [0, 3, 3, 4], 4 items, blocks of 2: segments [0, 0, 2], starts [0, 2, 3].
    """
    num_segments = first.numel() - 1
    num_blocks = (num_items + (block_size - 1) * min(num_segments, num_items)) // block_size
    ends = ((first.diff() + (block_size - 1)) // block_size).cumsum(0)
    segments, starts = torch.empty(2, num_blocks, dtype=torch.int64, device=first.device)
    if num_blocks:
        _segment_blocks_kernel[(triton.cdiv(num_blocks, 128),)](
            first, ends, segments, starts, num_blocks, num_segments, block_size,
            STEPS=num_segments.bit_length(), BLOCK=128,
        )  # fmt: skip
    return segments, starts
