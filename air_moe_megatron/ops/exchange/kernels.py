"""The two permutations of the compact dispatcher as Triton kernels: tokens to rows for each rank, and back.

    make_plan experts [T, K]  ->  counts [D, 5], and where each token's rows and pairs go
    pack      tokens [T, H]   ->  rows [R, H], codes [N], probs [N], sorted by rank: what the all-to-alls send
    combine   rows [R, H]     ->  tokens [T, H]: sums of each token's rows, in the order of the ranks

A token has one row for each rank that holds any of its experts. The plan lists the rows of each token, at most W =
min(K, D). So pack reads a token once and writes its rows; combine has one program per token, which reads its rows and
writes once. There are no atomics, and the bits are equal in every run. Each of the two is the other's gradient.

Nothing is sorted: the order of (rank, token) is a prefix sum over counts of pairs [D, T]. Making a plan takes 13 bytes
for each of D * T. Keeping it takes 4 bytes for each of T * W rows and 8 for each of T * K pairs. Nothing waits for the
device. The caller reads R and N from the counts, which it needs for the all-to-alls anyway.

Legend: W largest number of rows of a token; others as in ``ops/__init__.py``.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.autograd.function import FunctionCtx, once_differentiable

LIMITS = {"num_ranks": 1024, "topk": 512, "num_pairs": 2**31 - 1}
"""The largest sizes that the kernels take."""

_TILE_ELEMENTS = 8192  # elements of a program's tile of [tokens, slots, ranks] comparisons: 64 per thread
_MAX_BLOCK = 16  # most slots or ranks in such a tile
_MAX_COLUMNS = 2048  # columns of a row that one program copies or adds: 16 per thread, two to four 16-byte accesses


@dataclass(frozen=True)
class ExchangePlan:
    """The plan of the kernels: counts, and the positions of rows and pairs in the buffers that are sent."""

    counts: torch.Tensor  # [D, 5] int64: rows and pairs for each rank; invalid ids, probs and shapes on this rank
    token_rows: torch.Tensor  # [T, W] int32, rows of each token, in the order of the ranks; then -1
    pair_slots: torch.Tensor  # [T, K] int32, slot of each pair; -1 where there is no pair
    codes: torch.Tensor  # [T, K] int32, local expert of each pair, bits inverted for the first of a row; -1 for none

    @property
    def shape(self) -> torch.Size:
        """[T, K]."""
        return self.pair_slots.shape


@triton.jit
def _ranks_of(ids, num_local_experts, D):
    """Rank of each expert id, D if it is not the id of an expert; the local id; and whether it is such an id."""
    is_pair = (ids >= 0) & (ids < num_local_experts * D)
    ids = tl.where(is_pair, ids, 0).to(tl.int32)
    return tl.where(is_pair, ids // num_local_experts, D), ids % num_local_experts, is_pair


@triton.jit
def _count_fwd_kernel(
    topk_ids,  # [T, K]
    probs,  # [T, K]
    pair_counts,  # [D, T] int32
    invalid,  # [T / BLOCK_T, 2] int32
    T,
    num_local_experts,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = tokens < T
    own = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    counts = tl.zeros([BLOCK_T, BLOCK_D], tl.int32)
    invalid_ids = tl.zeros([BLOCK_T], tl.int32)
    invalid_probs = tl.zeros([BLOCK_T], tl.int32)
    for first in range(0, K, BLOCK_K):
        slots = first + tl.arange(0, BLOCK_K)
        mask = is_token[:, None] & (slots < K)[None, :]
        where = tokens[:, None] * K + slots[None, :]
        ids = tl.load(topk_ids + where, mask=mask, other=-1)
        ranks, _, is_pair = _ranks_of(ids, num_local_experts, D)
        counts += tl.sum((ranks[:, :, None] == own[None, None, :]).to(tl.int32), axis=1)
        invalid_ids += tl.sum((~is_pair & (ids != -1)).to(tl.int32), axis=1)
        values = tl.load(probs + where, mask=mask, other=0.0).to(tl.float32)
        is_finite = tl.abs(values) < float("inf")  # false for NaN
        invalid_probs += tl.sum((~is_finite).to(tl.int32), axis=1)
    tl.store(
        pair_counts + own.to(tl.int64)[None, :] * T + tokens[:, None],
        counts,
        mask=is_token[:, None] & (own < D)[None, :],
    )
    if tl.program_id(1) == 0:
        tl.store(invalid + block * 2, tl.sum(invalid_ids, axis=0))
        tl.store(invalid + block * 2 + 1, tl.sum(invalid_probs, axis=0))


@triton.jit
def _plan_fwd_kernel(
    topk_ids,  # [T, K]
    pair_counts,  # [D, T] int32
    pair_ends,  # [D, T] int32, sums of the counts up to and with each
    row_ends,  # [D, T] int32, of the rows
    token_rows,  # [T, W] int32
    pair_slots,  # [T, K] int32
    codes,  # [T, K] int32
    T,
    num_local_experts,
    K: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = tokens < T
    num_rows = tl.zeros([BLOCK_T], tl.int32)
    for first in range(0, D, BLOCK_D):
        ranks = first + tl.arange(0, BLOCK_D)
        where = ranks.to(tl.int64)[None, :] * T + tokens[:, None]
        mask = is_token[:, None] & (ranks < D)[None, :]
        is_wanted = tl.load(pair_counts + where, mask=mask, other=0) > 0
        rows = tl.load(row_ends + where, mask=is_wanted, other=0) - 1
        columns = num_rows[:, None] + tl.cumsum(is_wanted.to(tl.int32), axis=1) - 1
        tl.store(token_rows + tokens[:, None] * W + columns, rows, mask=is_wanted)
        num_rows += tl.sum(is_wanted.to(tl.int32), axis=1)
    for first in range(0, W, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)[None, :]
        is_free = is_token[:, None] & (columns < W) & (columns >= num_rows[:, None])
        tl.store(token_rows + tokens[:, None] * W + columns, tl.full([BLOCK_T, BLOCK_D], -1, tl.int32), mask=is_free)

    for first in range(0, K, BLOCK_K):
        slots = first + tl.arange(0, BLOCK_K)
        mask = is_token[:, None] & (slots < K)[None, :]
        where = tokens[:, None] * K + slots[None, :]
        ranks, local_ids, is_pair = _ranks_of(tl.load(topk_ids + where, mask=mask, other=-1), num_local_experts, D)
        num_before = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)  # pairs of the same row
        for other in range(0, first + BLOCK_K, BLOCK_K):
            others = other + tl.arange(0, BLOCK_K)
            other_ids = tl.load(
                topk_ids + tokens[:, None] * K + others[None, :],
                mask=is_token[:, None] & (others < K)[None, :],
                other=-1,
            )
            other_ranks, _, _ = _ranks_of(other_ids, num_local_experts, D)
            is_before = (others[None, :] < slots[:, None])[None, :, :]  # [1, BLOCK_K, BLOCK_K]
            is_same = ranks[:, :, None] == other_ranks[:, None, :]
            num_before += tl.sum((is_same & is_before).to(tl.int32), axis=2)
        row = ranks.to(tl.int64) * T + tokens[:, None]
        first_pair = tl.load(pair_ends + row, mask=is_pair, other=0) - tl.load(pair_counts + row, mask=is_pair, other=0)
        tl.store(pair_slots + where, tl.where(is_pair, first_pair + num_before, -1), mask=mask)
        code = tl.where(num_before == 0, -1 - local_ids, local_ids)
        tl.store(codes + where, tl.where(is_pair, code, -1), mask=mask)


@triton.jit
def _pack_fwd_kernel(
    hidden,  # [T, H]
    probs,  # [T, K]
    token_rows,  # [T, W] int32
    pair_slots,  # [T, K] int32
    codes,  # [T, K] int32
    rows,  # [R, H]
    row_codes,  # [N] int32
    row_probs,  # [N]
    H: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_column = columns < H
    values = tl.load(hidden + token * H + columns, mask=is_column)
    slots = tl.arange(0, BLOCK_W)
    num_rows = tl.sum((tl.load(token_rows + token * W + slots, mask=slots < W, other=-1) >= 0).to(tl.int32), axis=0)
    slot = num_rows * 0
    while slot < num_rows:
        row = tl.load(token_rows + token * W + slot).to(tl.int64)
        tl.store(rows + row * H + columns, values, mask=is_column)
        slot += 1
    if HAS_PAIRS:
        if tl.program_id(1) == 0:
            pairs = tl.arange(0, BLOCK_K)
            indices = tl.load(pair_slots + token * K + pairs, mask=pairs < K, other=-1)
            is_pair = indices >= 0
            tl.store(row_codes + indices, tl.load(codes + token * K + pairs, mask=is_pair, other=0), mask=is_pair)
            tl.store(row_probs + indices, tl.load(probs + token * K + pairs, mask=is_pair, other=0.0), mask=is_pair)


@triton.jit
def _combine_fwd_kernel(
    rows,  # [R, H]
    row_probs,  # [N]
    token_rows,  # [T, W] int32
    pair_slots,  # [T, K] int32
    hidden,  # [T, H]
    probs,  # [T, K]
    H: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    HAS_PAIRS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_column = columns < H
    slots = tl.arange(0, BLOCK_W)
    num_rows = tl.sum((tl.load(token_rows + token * W + slots, mask=slots < W, other=-1) >= 0).to(tl.int32), axis=0)
    sums = tl.zeros([BLOCK_H], WIDE)
    slot = num_rows * 0
    while slot < num_rows:
        row = tl.load(token_rows + token * W + slot).to(tl.int64)
        sums += tl.load(rows + row * H + columns, mask=is_column, other=0.0).to(WIDE)
        slot += 1
    tl.store(hidden + token * H + columns, sums.to(hidden.dtype.element_ty), mask=is_column)
    if HAS_PAIRS:
        if tl.program_id(1) == 0:
            pairs = tl.arange(0, BLOCK_K)
            indices = tl.load(pair_slots + token * K + pairs, mask=pairs < K, other=-1)
            values = tl.load(row_probs + indices, mask=indices >= 0, other=0.0)
            tl.store(probs + token * K + pairs, values, mask=pairs < K)


def _pair_blocks(num_ranks: int, topk: int) -> dict[str, int]:
    """Block sizes of tokens, slots and ranks for a tile with 64 comparisons per thread.

    Few slots and ranks leave room for many tokens, up to 128. Tokens are neighbors in the [D, T] tensors, so accesses
    there are coalesced, although one token's own entries are T apart.
    """
    block_slots = min(triton.next_power_of_2(topk), _MAX_BLOCK)
    block_ranks = min(triton.next_power_of_2(num_ranks), _MAX_BLOCK)
    block_tokens = min(_TILE_ELEMENTS // (block_slots * max(block_slots, block_ranks)), 128)
    return {"BLOCK_T": block_tokens, "BLOCK_K": block_slots, "BLOCK_D": block_ranks, "num_warps": 4}


def _row_blocks(hidden_size: int, width: int, topk: int) -> dict[str, int]:
    """Block sizes: a program takes one token and up to 2,048 columns, so each step of its loop moves a whole row."""
    return {
        "BLOCK_H": min(triton.next_power_of_2(hidden_size), _MAX_COLUMNS),
        "BLOCK_W": triton.next_power_of_2(width),
        "BLOCK_K": triton.next_power_of_2(topk),
        "num_warps": 4,
    }


def launch_plan(
    topk_ids: torch.Tensor, probs: torch.Tensor, num_ranks: int, num_local_experts: int, mismatch: bool
) -> ExchangePlan:
    """Make the plan, by two kernel launches with prefix sums in between."""
    (num_tokens, topk), device = topk_ids.shape, topk_ids.device
    topk_ids, probs = topk_ids.contiguous(), probs.contiguous()
    blocks = _pair_blocks(num_ranks, topk)
    grid = (triton.cdiv(num_tokens, blocks["BLOCK_T"]), triton.cdiv(num_ranks, blocks["BLOCK_D"]))
    pair_counts = torch.empty(num_ranks, num_tokens, dtype=torch.int32, device=device)
    invalid = torch.empty(grid[0], 2, dtype=torch.int32, device=device)
    _count_fwd_kernel[grid](
        topk_ids, probs, pair_counts, invalid, num_tokens, num_local_experts, K=topk, D=num_ranks, **blocks
    )
    is_wanted = pair_counts > 0
    invalid_ids, invalid_probs = invalid.sum(dim=0).unsqueeze(1).expand(2, num_ranks)
    mismatches = torch.full_like(invalid_ids, mismatch)
    columns = (is_wanted.sum(dim=1), pair_counts.sum(dim=1), invalid_ids, invalid_probs, mismatches)
    pair_ends = pair_counts.view(-1).cumsum(0, dtype=torch.int32)
    row_ends = is_wanted.view(-1).cumsum(0, dtype=torch.int32)
    width = min(topk, num_ranks)
    token_rows = torch.empty(num_tokens, width, dtype=torch.int32, device=device)
    pair_slots = torch.empty(num_tokens, topk, dtype=torch.int32, device=device)
    codes = torch.empty(num_tokens, topk, dtype=torch.int32, device=device)
    _plan_fwd_kernel[grid[:1]](
        topk_ids,
        pair_counts,
        pair_ends,
        row_ends,
        token_rows,
        pair_slots,
        codes,
        num_tokens,
        num_local_experts,
        K=topk,
        D=num_ranks,
        W=width,
        **blocks,
    )
    return ExchangePlan(torch.stack(columns, dim=1), token_rows, pair_slots, codes)


def launch_pack(
    hidden: torch.Tensor,
    token_rows: torch.Tensor,
    num_rows: int,
    probs: torch.Tensor | None = None,
    pair_slots: torch.Tensor | None = None,
    codes: torch.Tensor | None = None,
    num_pairs: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """[R, H] rows; if pairs are packed too, [N] codes and [N] probs."""
    (num_tokens, hidden_size), device = hidden.shape, hidden.device
    has_pairs = pair_slots is not None
    width, topk = token_rows.shape[1], pair_slots.shape[1] if has_pairs else 1
    rows = torch.empty(num_rows, hidden_size, dtype=hidden.dtype, device=device)
    row_codes = torch.empty(num_pairs, dtype=torch.int32, device=device) if has_pairs else None
    row_probs = torch.empty(num_pairs, dtype=probs.dtype, device=device) if has_pairs else None
    blocks = _row_blocks(hidden_size, width, topk)
    _pack_fwd_kernel[(num_tokens, triton.cdiv(hidden_size, blocks["BLOCK_H"]))](
        hidden.contiguous(),
        probs.contiguous() if has_pairs else None,
        token_rows,
        pair_slots,
        codes,
        rows,
        row_codes,
        row_probs,
        H=hidden_size,
        K=topk,
        W=width,
        HAS_PAIRS=has_pairs,
        **blocks,
    )
    return rows, row_codes, row_probs


def launch_combine(
    rows: torch.Tensor,
    token_rows: torch.Tensor,
    row_probs: torch.Tensor | None = None,
    pair_slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[T, H] sums of each token's rows; if pairs are combined too, [T, K] probs, zero where there is no pair."""
    (num_tokens, width), hidden_size, device = token_rows.shape, rows.shape[1], rows.device
    has_pairs = pair_slots is not None
    topk = pair_slots.shape[1] if has_pairs else 1
    hidden = torch.empty(num_tokens, hidden_size, dtype=rows.dtype, device=device)
    probs = torch.empty(num_tokens, topk, dtype=row_probs.dtype, device=device) if has_pairs else None
    blocks = _row_blocks(hidden_size, width, topk)
    _combine_fwd_kernel[(num_tokens, triton.cdiv(hidden_size, blocks["BLOCK_H"]))](
        rows.contiguous(),
        row_probs.contiguous() if has_pairs else None,
        token_rows,
        pair_slots,
        hidden,
        probs,
        H=hidden_size,
        K=topk,
        W=width,
        HAS_PAIRS=has_pairs,
        WIDE=tl.float64 if rows.dtype == torch.float64 else tl.float32,
        **blocks,
    )
    return hidden, probs


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: torch.Tensor, probs: torch.Tensor, plan: ExchangePlan, num_rows: int, num_pairs: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(plan.token_rows, plan.pair_slots)
        rows, codes, row_probs = launch_pack(
            hidden, plan.token_rows, num_rows, probs, plan.pair_slots, plan.codes, num_pairs
        )
        ctx.mark_non_differentiable(codes)
        return rows, codes, row_probs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_rows: torch.Tensor, _: torch.Tensor, grad_row_probs: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        token_rows, pair_slots = ctx.saved_tensors
        grad_hidden, grad_probs = launch_combine(grad_rows, token_rows, grad_row_probs, pair_slots)
        return grad_hidden, grad_probs, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, partial_sums: torch.Tensor, token_rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(token_rows)
        ctx.num_rows = partial_sums.shape[0]
        return launch_combine(partial_sums, token_rows)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_hidden: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (token_rows,) = ctx.saved_tensors
        return launch_pack(grad_hidden, token_rows, ctx.num_rows)[0], None


@torch.no_grad()
def make_plan(
    topk_ids: torch.Tensor, probs: torch.Tensor, num_ranks: int, num_local_experts: int, mismatch: bool = False
) -> ExchangePlan:
    """As :func:`air_moe_megatron.ops.exchange.make_plan`; the plan holds the slot of every row and pair.

    Example: ids [[0, 3, 1], [2, -1, -1]] over 2 ranks of 2 experts make the pairs 0, 1 | 3 | 2: token_rows
    [[0, 1], [2, -1]], pair_slots [[0, 2, 1], [3, -1, -1]] and codes [[~0, ~1, 1], [~0, -1, -1]]. (A code of -1 is ~0,
    or no pair where the slot is -1.)
    """
    return launch_plan(topk_ids, probs, num_ranks, num_local_experts, mismatch)


def pack(
    hidden: torch.Tensor, probs: torch.Tensor, plan: ExchangePlan, num_rows: int, num_pairs: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`air_moe_megatron.ops.exchange.pack`, deterministic."""
    return _Pack.apply(hidden, probs, plan, num_rows, num_pairs)


def combine(partial_sums: torch.Tensor, plan: ExchangePlan) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.exchange.combine`, deterministic."""
    return _Combine.apply(partial_sums, plan.token_rows)
