"""Coarse assignment of tokens to codewords, with the statistics of the codebook, as Triton kernels.

One program takes a block of tokens and streams over the codewords, and inside over H. The similarities of a tile are in
registers, where the best P of each token are kept. So nothing of size [T, C] reaches memory. After the last tile the
program knows its tokens' codewords and adds their statistics in the same launch, with the tokens still in the L2 cache.
Where sums must not depend on the order in which programs finish, the tokens are sorted by codeword instead.

Exactness. The codewords are fp32, and fp32 tokens are multiplied in fp32. The tensor cores take 16-bit tokens exactly.
For these the codewords are split into three summands of the tokens' dtype, which add up to them exactly. Three products
of 16-bit numbers accumulated in fp32 then equal an fp32 product.

A candidate is one int64 key of similarity and id (``order_key``). So the maximum of keys is an arg-max with defined
results for ties and NaN.
"""

import torch
import triton
import triton.language as tl

from air_moe_megatron.ops.blocks import contiguous
from air_moe_megatron.ops.coarse import NUM_SCALARS
from air_moe_megatron.ops.segments import sort_into_segments
from air_moe_megatron.ops.tiles import (
    HIGHEST_KEY,
    LOWEST_KEY,
    codeword_products,
    id_of_key,
    order_key,
    split_codewords,
)
from air_moe_megatron.ops.unit_vectors import GROW, LARGE, LONGEST, SHRINK, SMALL

LIMITS = {"num_probes": 8}
"""The largest sizes that the kernels take."""

_SMALL, _LARGE = tl.constexpr(SMALL), tl.constexpr(LARGE)
_GROW, _SHRINK = tl.constexpr(GROW), tl.constexpr(SHRINK)
_LONGEST = tl.constexpr(LONGEST)
_NUM_SCALARS = tl.constexpr(NUM_SCALARS)


@triton.jit
def _scale_of_rows(hidden, tokens, is_token, H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """[BLOCK_T] powers of two by which ``scale_rows`` multiplies the tokens; undefined for non-finite tokens."""
    largest = tl.full([BLOCK_T], 1.0, tl.float32)
    if hidden.dtype.element_ty != tl.float16:  # squares of fp16 numbers are in fp32's range
        largest = tl.zeros([BLOCK_T], tl.float32)
        for start in range(0, H, BLOCK_H):
            columns = start + tl.arange(0, BLOCK_H)
            mask = is_token[:, None] & (columns < H)[None, :]
            h = tl.load(hidden + tokens[:, None] * H + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(h), axis=1))
    return tl.where(largest < _SMALL, _GROW, tl.where(largest > _LARGE, _SHRINK, 1.0))


@triton.jit
def _norms_of_rows(hidden, scales, tokens, is_token, H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr):
    """[BLOCK_T] lengths of the tokens times their scales; 0 where there is no token."""
    squares = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, H, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        mask = is_token[:, None] & (columns < H)[None, :]
        h = tl.load(hidden + tokens[:, None] * H + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        h *= scales[:, None]
        squares += tl.sum(h * h, axis=1)
    return tl.sqrt_rn(squares)


@triton.jit
def _nearest_keys(
    hidden,
    scales,
    tokens,
    is_token,
    summands,
    allowed,
    C: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    P_PAD: tl.constexpr,
    S: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """[P_PAD, BLOCK_T] keys of the P codewords nearest to each token, in no order; LOWEST_KEY beyond P."""
    slots = tl.arange(0, P_PAD)[:, None]
    # Distinct keys below all real ones; slots beyond P are never the worst, so never replaced.
    zeros = tl.zeros([1, BLOCK_T], tl.int64)
    best = tl.where(slots < P, LOWEST_KEY + slots.to(tl.int64), HIGHEST_KEY) + zeros  # [P_PAD, BLOCK_T]
    for first in range(0, C, BLOCK_C):
        ids = first + tl.arange(0, BLOCK_C)
        is_codeword = ids < C
        similarity = codeword_products(
            summands, ids, is_codeword, hidden, tokens, is_token, scales, C, H, S, SCALED, BLOCK_C, BLOCK_T, BLOCK_H
        )
        if HAS_ALLOWED:
            is_allowed = tl.load(allowed + ids, mask=is_codeword, other=0) != 0
            similarity = tl.where(is_allowed[:, None], similarity, float("-inf"))
        keys = tl.where(is_codeword[:, None], order_key(similarity, ids[:, None]), LOWEST_KEY)
        for _ in tl.static_range(P):
            candidate = tl.max(keys, axis=0)[None, :]
            worst = tl.min(best, axis=0)[None, :]
            best = tl.where((best == worst) & (candidate > worst), candidate, best)
            keys = tl.where(keys == candidate, LOWEST_KEY, keys)
    return tl.where(slots < P, best, LOWEST_KEY)


@triton.jit
def _assign_fwd_kernel(
    hidden,  # [T, H]
    summands,  # [S, C, H]
    codewords,  # [C, H] fp32
    allowed,  # [C] bool
    padding_mask,  # [T] bool
    probes,  # [T, P] int64
    statistics,  # [C, H + 3] fp32, zero
    T,
    C: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    P_PAD: tl.constexpr,
    S: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    WITH_STATISTICS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = tokens < T
    # Operands of 16-bit products are in shared memory, where they cannot be scaled. So the products are made unscaled,
    # and again with scales for a block with a token so short or long that its products would leave fp32's range.
    if hidden.dtype.element_ty == tl.float32:
        scales = _scale_of_rows(hidden, tokens, is_token, H, BLOCK_T, BLOCK_H)
        best = _nearest_keys(
            hidden, scales, tokens, is_token, summands, allowed,
            C, H, P, P_PAD, S, HAS_ALLOWED, True, BLOCK_T, BLOCK_C, BLOCK_H,
        )  # fmt: skip
    else:
        best = _nearest_keys(
            hidden, 1.0, tokens, is_token, summands, allowed,
            C, H, P, P_PAD, S, HAS_ALLOWED, False, BLOCK_T, BLOCK_C, BLOCK_H,
        )  # fmt: skip
        scales = _scale_of_rows(hidden, tokens, is_token, H, BLOCK_T, BLOCK_H)
        if hidden.dtype.element_ty == tl.bfloat16:
            if tl.max((scales != 1.0).to(tl.int32), axis=0) > 0:
                best = _nearest_keys(
                    hidden, scales, tokens, is_token, summands, allowed,
                    C, H, P, P_PAD, S, HAS_ALLOWED, True, BLOCK_T, BLOCK_C, BLOCK_H,
                )  # fmt: skip
    nearest = id_of_key(tl.max(best, axis=0))  # [BLOCK_T] int64
    for p in tl.static_range(P):
        key = tl.max(best, axis=0)
        tl.store(probes + tokens * P + p, id_of_key(key), mask=is_token)
        best = tl.where(best == key[None, :], LOWEST_KEY, best)

    if WITH_STATISTICS:
        counts = is_token
        if HAS_PADDING:
            counts = counts & (tl.load(padding_mask + tokens, mask=is_token, other=1) == 0)
        norms = _norms_of_rows(hidden, scales, tokens, counts, H, BLOCK_T, BLOCK_H)
        counts = counts & (norms != 0.0)  # a token of zeros has no direction
        cosines = tl.zeros([BLOCK_T], tl.float32)
        rows = statistics + nearest * (H + _NUM_SCALARS)
        for start in range(0, H, BLOCK_H):
            columns = start + tl.arange(0, BLOCK_H)
            mask = counts[:, None] & (columns < H)[None, :]
            h = tl.load(hidden + tokens[:, None] * H + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            unit = h * scales[:, None] / tl.where(counts, norms, 1.0)[:, None]
            c = tl.load(codewords + nearest[:, None] * H + columns[None, :], mask=mask, other=0.0)
            cosines += tl.sum(unit * c, axis=1)
            tl.atomic_add(rows[:, None] + columns[None, :], unit, mask=mask, sem="relaxed")
        tl.atomic_add(rows + H, tl.full([BLOCK_T], 1.0, tl.float32), mask=counts, sem="relaxed")
        tl.atomic_add(rows + H + 1, cosines, mask=counts, sem="relaxed")
        tl.atomic_add(rows + H + 2, tl.minimum(norms / scales, _LONGEST), mask=counts, sem="relaxed")


@triton.jit
def _lengths_fwd_kernel(
    hidden,  # [T, H]
    scales,  # [T] fp32, written
    norms,  # [T] fp32, written
    T,
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = tokens < T
    scale = _scale_of_rows(hidden, tokens, is_token, H, BLOCK_T, BLOCK_H)
    tl.store(scales + tokens, scale, mask=is_token)
    tl.store(norms + tokens, _norms_of_rows(hidden, scale, tokens, is_token, H, BLOCK_T, BLOCK_H), mask=is_token)


@triton.jit
def _sorted_statistics_fwd_kernel(
    hidden,  # [T, H]
    scales,  # [T] fp32
    norms,  # [T] fp32, lengths times scales
    order,  # [T] int64, tokens sorted by codeword
    first_slots,  # [C + 1] int64, first slot of each codeword in order
    statistics,  # [C, H + 3] fp32, written, except the sums of cosines
    H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    codeword = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    slot, end = tl.load(first_slots + codeword), tl.load(first_slots + codeword + 1)
    count = (end - slot).to(tl.float32)
    sums = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    summed_lengths = tl.zeros([BLOCK_T], tl.float32)
    while slot < end:  # each of BLOCK_T lanes adds every BLOCK_T-th token; the lanes are added up last
        slots = slot + tl.arange(0, BLOCK_T)
        is_slot = slots < end
        tokens = tl.load(order + slots, mask=is_slot, other=0)
        scale = tl.load(scales + tokens, mask=is_slot, other=1.0)
        norm = tl.load(norms + tokens, mask=is_slot, other=0.0)
        mask = is_slot[:, None] & (columns < H)[None, :]
        h = tl.load(hidden + tokens[:, None] * H + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += h * scale[:, None] / tl.where(is_slot, norm, 1.0)[:, None]
        summed_lengths += tl.minimum(norm / scale, _LONGEST)
        slot += BLOCK_T
    row = statistics + codeword * (H + _NUM_SCALARS)
    tl.store(row + columns, tl.sum(sums, axis=0), mask=columns < H)
    if tl.program_id(1) == 0:
        tl.store(row + H, count)
        tl.store(row + H + 2, tl.sum(summed_lengths, axis=0))


def _blocks(hidden: torch.Tensor, num_probes: int) -> dict[str, int]:
    """Block sizes and launch options as a function of T, P and the kind of product.

    - 16-bit, tensor cores: [128, 64] tiles of the three summands and [64, BLOCK_T] of the tokens take 56 or 64 KiB.
      Three stages of them fit the 227 KiB of a multiprocessor. Every program reads all codewords through the L2 cache,
      which makes small blocks of tokens slow. So BLOCK_T is 128 from 8,192 tokens on, although only 64 programs run
      then, and 64 below. With more than two probes the keys of 128 tokens would not fit the registers.
    - fp32, no tensor cores: limited by arithmetic; small tiles fill the multiprocessors.
    """
    if hidden.dtype == torch.float32:
        return {"BLOCK_T": 64, "BLOCK_C": 64, "BLOCK_H": 32, "num_warps": 4, "num_stages": 2}
    block = 128 if hidden.shape[0] >= 8192 and num_probes <= 2 else 64
    return {"BLOCK_T": block, "BLOCK_C": 128, "BLOCK_H": 64, "num_warps": 8, "num_stages": 3}


def launch_assign(
    hidden: torch.Tensor,
    codewords: torch.Tensor,
    num_probes: int,
    allowed: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    with_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codewords [T, P] int64, and statistics [C, H + 3] made by atomic additions, or None if not wanted."""
    (num_tokens, hidden_size), num_clusters = hidden.shape, codewords.shape[0]
    hidden, codewords, allowed, padding_mask = contiguous(hidden, codewords, allowed, padding_mask)
    summands, _ = split_codewords(codewords, hidden.dtype)  # a common factor does not change an arg-max
    probes = torch.empty(num_tokens, num_probes, dtype=torch.int64, device=hidden.device)
    statistics = None
    if with_statistics:
        shape = (num_clusters, hidden_size + NUM_SCALARS)
        statistics = torch.zeros(shape, dtype=torch.float32, device=hidden.device)
    blocks = _blocks(hidden, num_probes)
    _assign_fwd_kernel[(triton.cdiv(num_tokens, blocks["BLOCK_T"]),)](
        hidden,
        summands,
        codewords,
        allowed,
        padding_mask,
        probes,
        statistics,
        num_tokens,
        C=num_clusters,
        H=hidden_size,
        P=num_probes,
        P_PAD=triton.next_power_of_2(num_probes),
        S=summands.shape[0],
        HAS_ALLOWED=allowed is not None,
        HAS_PADDING=padding_mask is not None,
        WITH_STATISTICS=with_statistics,
        **blocks,
    )
    return probes, statistics


def launch_lengths(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [T] as :func:`scale_rows` gives them, and lengths times scales [T], both fp32."""
    num_tokens, hidden_size = hidden.shape
    scales, norms = torch.empty(2, num_tokens, dtype=torch.float32, device=hidden.device)
    block = min(triton.next_power_of_2(hidden_size), 256)
    _lengths_fwd_kernel[(triton.cdiv(num_tokens, 8),)](
        hidden, scales, norms, num_tokens, H=hidden_size, BLOCK_T=8, BLOCK_H=block, num_warps=4
    )
    return scales, norms


def assign(
    hidden: torch.Tensor, codewords: torch.Tensor, num_probes: int, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.coarse.assign`, deterministic."""
    return launch_assign(hidden, codewords, num_probes, allowed, None, with_statistics=False)[0]


def token_statistics(
    hidden: torch.Tensor, codewords: torch.Tensor, nearest: torch.Tensor, padding_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.coarse.token_statistics`.

    The tokens are sorted by codeword. One program sums the tokens of one codeword, for a block of H. The fixed order
    makes a codeword with very many tokens slow. Does not wait for the device.
    """
    hidden, (num_clusters, hidden_size) = hidden.contiguous(), codewords.shape
    scales, norms = launch_lengths(hidden)
    is_left_out = norms == 0.0  # a token of zeros has no direction
    if padding_mask is not None:
        is_left_out |= padding_mask
    nearest = nearest.masked_fill(is_left_out, num_clusters)  # sorted after all codewords, into no segment
    order, first_slots = sort_into_segments(nearest, num_clusters)
    shape = (num_clusters, hidden_size + NUM_SCALARS)
    statistics = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    block = min(triton.next_power_of_2(hidden_size), 256)
    _sorted_statistics_fwd_kernel[(num_clusters, triton.cdiv(hidden_size, block))](
        hidden, scales, norms, order, first_slots, statistics, H=hidden_size, BLOCK_T=8, BLOCK_H=block, num_warps=4
    )
    sums = statistics[:, :hidden_size]
    statistics[:, hidden_size + 1] = (sums * codewords).sum(dim=1)  # <sum of unit tokens, c> is the sum of cosines
    return statistics


def assign_with_statistics(
    hidden: torch.Tensor,
    codewords: torch.Tensor,
    num_probes: int,
    allowed: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`air_moe_megatron.ops.coarse.assign_with_statistics`, in one launch unless ``deterministic``."""
    if not deterministic:
        return launch_assign(hidden, codewords, num_probes, allowed, padding_mask, with_statistics=True)
    probes = assign(hidden, codewords, num_probes, allowed)
    return probes, token_statistics(hidden, codewords, probes[:, 0], padding_mask)
