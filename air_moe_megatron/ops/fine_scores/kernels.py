"""Fine scores as Triton kernels: tiles of tokens of one codeword against its shortlist, with or without the top-k.

Rows are (token, probe) pairs, sorted by codeword. A program takes up to BLOCK_N rows of one codeword and gathers the
centres of its list, which all of them share; how many blocks a codeword has is known on the device only
(``segment_blocks``). The products are memory bound on the gathered centres as long as a codeword has few hundred rows.

``fine_topk_kernel`` keeps the scores of 16 rows on the chip, one tile of the list after another, and lets out only the
selected ones and the normaliser. A candidate is one int64: the bits of what it is ranked by, mapped so that integers
have the order of the floats, above its place in the list, inverted so that the lower place wins a tie. A bitonic
network keeps the largest K of a tile: runs of K are sorted in turn up and down, the larger of each two opposite
elements are the K largest of both, and so on; across tiles likewise.

Gradients in fp32 of bf16 centres are multiplied as two bf16 numbers, high and low part (16 bits of mantissa), because
fp32 products do not use the tensor cores.

Legend: T tokens, H hidden, E experts, C clusters, L shortlist, P probes, K top-k, R = T*P rows, B blocks of rows.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from air_moe_megatron.ops.pair_products import make_pairs
from air_moe_megatron.ops.pair_products.kernels import (
    add_weight_gradient,
    launch_pair_sums,
    launch_pair_weight_gradient,
    require_kernel_dtypes,
    segment_blocks,
)

MAX_TOPK = 512
SELECTION_FUNCTIONS = ("identity", "sigmoid", "sqrtsoftplus")

_TILE_COLUMNS = 512  # of a list whose scores are on the chip at once
_TILE_ELEMENTS = 2**26  # of the fp32 gradients of centres that wait for a sum in order: 256 MiB
_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_ABSENT = tl.constexpr(-(2**63))  # ranks below every candidate


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` in fp32 for two tiles of one dtype."""
    if _INTERPRETED:  # NumPy has no bf16; the products are exact in fp32 all the same
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot_wide(a, b, acc, DOT_DTYPE: tl.constexpr):
    """``acc + a @ b`` for an a that may be fp32 beside a b that is exact in DOT_DTYPE."""
    if a.dtype == tl.float32 and DOT_DTYPE == tl.bfloat16:
        high = a.to(tl.bfloat16)
        low = (a - high.to(tl.float32)).to(tl.bfloat16)
        b = b.to(tl.bfloat16)
        return dot(high, b, dot(low, b, acc))
    else:
        return dot(a.to(DOT_DTYPE), b.to(DOT_DTYPE), acc)


@triton.jit
def _rows_of_block(block, codeword, order, row_first, starts, num_probes, BLOCK_N: tl.constexpr):
    """[BLOCK_N] rows of a block and their tokens, and which of them there are."""
    places = tl.load(starts + block) + tl.arange(0, BLOCK_N)
    inside = places < tl.load(row_first + codeword + 1)
    rows = tl.load(order + places, mask=inside, other=0)
    return rows, rows // num_probes, inside


@triton.jit
def _experts_of_list(shortlist, codeword, columns, shortlist_size: tl.constexpr):
    """[BLOCK_L] experts at the columns of a codeword's list; -1 after its end."""
    experts = tl.load(shortlist + codeword * shortlist_size + columns, mask=columns < shortlist_size, other=-1)
    return experts.to(tl.int64)


@triton.jit
def _score_tile(
    hidden,
    weight,
    bias,
    tokens,
    inside,
    experts,
    hidden_size: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """[BLOCK_N, BLOCK_L] fp32 scores; -inf where there is no expert, any where there is no token."""
    present = experts >= 0
    hidden_rows = hidden + tokens[:, None] * hidden_size
    weight_rows = weight + experts[:, None] * hidden_size
    scores = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        columns = start + tl.arange(0, BLOCK_H)
        in_row = columns < hidden_size
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
    logsumexp,  # [R] fp32 or None
    grad_logsumexp,  # [R] fp32 or None
    scores,  # [R, L], written
    num_clusters,
    num_probes,
    num_list_blocks,
    hidden_size: tl.constexpr,
    shortlist_size: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OF_LOGSUMEXP: tl.constexpr,  # write the gradient of the logsumexp at the scores instead of the scores
    DOT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0)
    block = program // num_list_blocks
    codeword = tl.load(segments + block)
    if codeword == num_clusters:
        return
    rows, tokens, inside = _rows_of_block(block, codeword, order, row_first, starts, num_probes, BLOCK_N)
    columns = (program % num_list_blocks) * BLOCK_L + tl.arange(0, BLOCK_L)
    experts = _experts_of_list(shortlist, codeword, columns, shortlist_size)
    tile = _score_tile(
        hidden, weight, bias, tokens, inside, experts, hidden_size, HAS_BIAS, DOT_DTYPE, BLOCK_N, BLOCK_L, BLOCK_H
    )
    if OF_LOGSUMEXP:
        normaliser = tl.load(logsumexp + rows, mask=inside, other=0.0)
        grad = tl.load(grad_logsumexp + rows, mask=inside, other=0.0)
        probs = tl.exp(tile - normaliser[:, None])
        tile = tl.where((experts >= 0)[None, :], grad[:, None] * probs, 0.0)
    out = scores + rows[:, None] * shortlist_size + columns[None, :]
    tl.store(out, tile, mask=inside[:, None] & (columns < shortlist_size)[None, :])


@triton.jit
def _exchange(keys, payload, descending, AXIS: tl.constexpr, PAYLOAD: tl.constexpr):
    """Put the two elements along an axis of a hypercube, counted from the last, in order."""
    num_axes: tl.constexpr = len(keys.shape)
    is_second = tl.reshape(tl.arange(0, 2), [1] * (num_axes - AXIS - 1) + [2] + [1] * AXIS)
    other = tl.sum(keys, num_axes - 1 - AXIS, keep_dims=True) - keys  # integers wrap around
    swap = (keys > other) != (descending ^ is_second)
    if PAYLOAD:
        payload = tl.where(swap, tl.sum(payload, num_axes - 1 - AXIS, keep_dims=True) - payload, payload)
    return tl.where(swap, other, keys), payload


@triton.jit
def _merge_runs(keys, payload, LOG_RUN: tl.constexpr, order: tl.constexpr, PAYLOAD: tl.constexpr):
    """Sort bitonic runs of 2**LOG_RUN elements: order 0 upwards, 1 downwards, 2 in turn up and down."""
    num_axes: tl.constexpr = len(keys.shape)
    if order == 2:
        descending = tl.reshape(tl.arange(0, 2), [1] * (num_axes - LOG_RUN - 1) + [2] + [1] * LOG_RUN)
    else:
        descending = order
    for i in tl.static_range(LOG_RUN):
        keys, payload = _exchange(keys, payload, descending, LOG_RUN - 1 - i, PAYLOAD)
    return keys, payload


@triton.jit
def _largest(
    keys,
    payload,
    LOG_N: tl.constexpr,
    LOG_L: tl.constexpr,
    LOG_K: tl.constexpr,
    descending: tl.constexpr,
    PAYLOAD: tl.constexpr,
):
    """[2**LOG_N, 2**LOG_K] largest of int64 keys [2**LOG_N, 2**LOG_L], sorted, and their payload if there is one."""
    keys = tl.reshape(keys, [2] * (LOG_N + LOG_L))
    if PAYLOAD:
        payload = tl.reshape(payload, [2] * (LOG_N + LOG_L))
    for i in tl.static_range(1, LOG_K + 1):
        keys, payload = _merge_runs(keys, payload, i, 2 if i < LOG_L else descending, PAYLOAD)
    for i in tl.static_range(LOG_K + 1, LOG_L + 1):
        # The axis of the two runs: there is one axis less in each turn.
        if PAYLOAD:  # of two absent candidates, whose keys are equal, the payload does not matter
            larger = tl.max(keys, LOG_N + LOG_L - i, keep_dims=True)
            payload = tl.sum(tl.where(keys == larger, payload, 0), LOG_N + LOG_L - i)
        keys = tl.max(keys, LOG_N + LOG_L - i)
        keys, payload = _merge_runs(keys, payload, LOG_K, 2 if i < LOG_L else descending, PAYLOAD)
    keys = tl.reshape(keys, [2**LOG_N, 2**LOG_K])
    if PAYLOAD:
        payload = tl.reshape(payload, [2**LOG_N, 2**LOG_K])
    return keys, payload


@triton.jit
def _merge_sorted(
    keys, payload, other_keys, other_payload, LOG_N: tl.constexpr, LOG_K: tl.constexpr, PAYLOAD: tl.constexpr
):
    """The largest of two tiles [2**LOG_N, 2**LOG_K], the first sorted downwards, the other upwards; downwards again."""
    if PAYLOAD:
        payload = tl.reshape(tl.where(keys >= other_keys, payload, other_payload), [2] * (LOG_N + LOG_K))
    keys = tl.reshape(tl.maximum(keys, other_keys), [2] * (LOG_N + LOG_K))
    keys, payload = _merge_runs(keys, payload, LOG_K, 1, PAYLOAD)
    if PAYLOAD:
        payload = tl.reshape(payload, [2**LOG_N, 2**LOG_K])
    return tl.reshape(keys, [2**LOG_N, 2**LOG_K]), payload


@triton.jit
def _rank(scores, selection_bias, experts, FUNCTION: tl.constexpr, HAS_SELECTION_BIAS: tl.constexpr):
    """What candidates are ranked by."""
    if FUNCTION == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-scores))
    elif FUNCTION == "sqrtsoftplus":
        # log(1 + e) without the digits of e that 1 + e loses, after W. Kahan
        small = tl.exp(-tl.abs(scores))
        rounded = 1.0 + small
        logarithm = tl.where(rounded == 1.0, small, tl.log(rounded) * (small / (rounded - 1.0)))
        scores = tl.sqrt(tl.maximum(scores, 0.0) + logarithm)
    if HAS_SELECTION_BIAS:
        added = tl.load(selection_bias + experts, mask=experts >= 0, other=0.0).to(tl.float32)
        scores += added[None, :]
    return scores


@triton.jit
def _ordered(bits):
    """The bits of fp32 numbers as int32 in the order of the numbers, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _fine_topk_fwd_kernel(
    hidden,  # [T, H]
    weight,  # [E, H]
    bias,  # [E] or None
    selection_bias,  # [E] or None
    shortlist,  # [C, L]
    order,  # [T] tokens sorted by codeword
    row_first,  # [C + 1]
    segments,  # [B]
    starts,  # [B]
    topk_scores,  # [T, K] fp32, written
    topk_ids,  # [T, K] int32, written
    topk_columns,  # [T, K] int32 places in the list, written
    logsumexp,  # [T] fp32, written
    num_clusters,
    topk,
    hidden_size: tl.constexpr,
    shortlist_size: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SELECTION_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    LOG_N: tl.constexpr,
    LOG_L: tl.constexpr,
    LOG_K: tl.constexpr,
    NUM_TILES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    BLOCK_N: tl.constexpr = 2**LOG_N
    BLOCK_L: tl.constexpr = 2**LOG_L
    BLOCK_K: tl.constexpr = 2**LOG_K
    # A score can be read off its key, unless the candidates are ranked by something else: then it travels along.
    PAYLOAD: tl.constexpr = HAS_SELECTION_BIAS or FUNCTION != "identity"
    block = tl.program_id(0)
    codeword = tl.load(segments + block)
    if codeword == num_clusters:
        return
    rows, tokens, inside = _rows_of_block(block, codeword, order, row_first, starts, 1, BLOCK_N)
    best = tl.full([BLOCK_N, BLOCK_K], _ABSENT, tl.int64)
    best_bits = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    highest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(NUM_TILES):
        columns = tile * BLOCK_L + tl.arange(0, BLOCK_L)
        experts = _experts_of_list(shortlist, codeword, columns, shortlist_size)
        scores = _score_tile(
            hidden, weight, bias, tokens, inside, experts, hidden_size, HAS_BIAS, DOT_DTYPE, BLOCK_N, BLOCK_L, BLOCK_H
        )
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        shift = tl.where(tl.abs(new_highest) == float("inf"), 0.0, new_highest)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(scores - shift[:, None]), axis=1)
        highest = new_highest
        rank = _rank(scores, selection_bias, experts, FUNCTION, HAS_SELECTION_BIAS)
        rank = tl.where(rank == 0.0, 0.0, rank)  # -0 ties with 0
        keys = _ordered(rank.to(tl.int32, bitcast=True)).to(tl.int64) << 32
        keys = tl.where((experts >= 0)[None, :], keys | (0x7FFFFFFF - columns)[None, :], _ABSENT)
        bits = best_bits
        if PAYLOAD:
            bits = scores.to(tl.int32, bitcast=True)
        if NUM_TILES == 1:
            best, best_bits = _largest(keys, bits, LOG_N, LOG_L, LOG_K, 1, PAYLOAD)
        else:
            keys, bits = _largest(keys, bits, LOG_N, LOG_L, LOG_K, 0, PAYLOAD)
            best, best_bits = _merge_sorted(best, best_bits, keys, bits, LOG_N, LOG_K, PAYLOAD)
    if not PAYLOAD:
        best_bits = _ordered((best >> 32).to(tl.int32))
    present = best != _ABSENT
    places = (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32)
    ids = tl.load(shortlist + codeword * shortlist_size + places, mask=present, other=-1).to(tl.int32)
    choices = tl.arange(0, BLOCK_K)
    out = rows[:, None] * topk + choices[None, :]
    kept = inside[:, None] & (choices < topk)[None, :]
    tl.store(topk_scores + out, tl.where(present, best_bits.to(tl.float32, bitcast=True), float("-inf")), mask=kept)
    tl.store(topk_ids + out, ids, mask=kept)
    tl.store(topk_columns + out, tl.where(present, places, 0), mask=kept)
    shift = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)
    tl.store(logsumexp + rows, shift + tl.log(total), mask=inside)


@triton.jit
def _fine_scores_bwd_hidden_kernel(
    grad_scores,  # [R, L]
    weight,  # [E, H]
    shortlist,  # [C, L]
    order,  # [R]
    row_first,  # [C + 1]
    segments,  # [B]
    starts,  # [B]
    grad_rows,  # [R, H], written
    num_clusters,
    num_column_blocks,
    hidden_size: tl.constexpr,
    shortlist_size: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0)
    block = program // num_column_blocks
    codeword = tl.load(segments + block)
    if codeword == num_clusters:
        return
    rows, _, inside = _rows_of_block(block, codeword, order, row_first, starts, 1, BLOCK_N)
    columns = (program % num_column_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = columns < hidden_size
    sums = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for start in range(0, shortlist_size, BLOCK_L):
        places = start + tl.arange(0, BLOCK_L)
        experts = _experts_of_list(shortlist, codeword, places, shortlist_size)
        present = experts >= 0
        where = rows[:, None] * shortlist_size + places[None, :]
        grad = tl.load(grad_scores + where, mask=inside[:, None] & present[None, :], other=0.0)
        w = tl.load(
            weight + experts[:, None] * hidden_size + columns[None, :],
            mask=present[:, None] & in_row[None, :],
            other=0.0,
        )
        sums = dot_wide(grad, w, sums, DOT_DTYPE)
    out = grad_rows + rows[:, None] * hidden_size + columns[None, :]
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
    num_probes,
    num_list_blocks,
    num_column_blocks,
    hidden_size: tl.constexpr,
    shortlist_size: tl.constexpr,
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
    in_row = columns < hidden_size
    places = list_block * BLOCK_L + tl.arange(0, BLOCK_L)
    experts = _experts_of_list(shortlist, codeword, places, shortlist_size)
    present = experts >= 0
    sums = tl.zeros([BLOCK_L, BLOCK_H], tl.float32)
    while first < end:
        where = first + tl.arange(0, BLOCK_N)
        inside = where < end
        rows = tl.load(order + where, mask=inside, other=0)
        grad = tl.load(
            grad_scores + rows[None, :] * shortlist_size + places[:, None],
            mask=present[:, None] & inside[None, :],
            other=0.0,
        )
        x = tl.load(
            hidden + (rows // num_probes)[:, None] * hidden_size + columns[None, :],
            mask=inside[:, None] & in_row[None, :],
            other=0.0,
        )
        sums = dot_wide(grad, x, sums, DOT_DTYPE)
        first += BLOCK_N
    kept = present[:, None] & in_row[None, :]
    if ATOMIC:
        tl.atomic_add(out + experts[:, None] * hidden_size + columns[None, :], sums, mask=kept, sem="relaxed")
    else:
        tile_rows = chunk_codeword * shortlist_size + places
        tl.store(out + tile_rows[:, None] * hidden_size + columns[None, :], sums, mask=kept)


@dataclass(frozen=True)
class _Rows:
    """The rows sorted by codeword."""

    order: torch.Tensor  # [R] int64
    row_first: torch.Tensor  # [C + 1] int64, first place of each codeword in ``order``; the last is R

    @property
    def num_rows(self) -> int:
        return self.order.numel()

    @property
    def num_clusters(self) -> int:
        return self.row_first.numel() - 1

    @property
    def block_size(self) -> int:
        """Rows of a block: about those of a codeword, from the 16 of a matrix product to 64."""
        per_codeword = self.num_rows // max(1, min(self.num_rows, self.num_clusters))
        return min(64, max(16, triton.next_power_of_2(per_codeword)))

    def blocks(self, block_size):
        """(segments [B], starts [B]) as ``segment_blocks``."""
        return segment_blocks(self.row_first, self.num_rows, block_size)


def _sort_rows(assignments, num_clusters):
    sorted_codewords, order = assignments.reshape(-1).sort(stable=True)
    codewords = torch.arange(num_clusters + 1, device=assignments.device)
    return _Rows(order, torch.searchsorted(sorted_codewords, codewords))


def dot_dtype_of(hidden, weight, dtype):
    """The narrowest dtype in which the products of tokens and weights are those of ``dtype``."""
    if dtype == torch.float32 and hidden.dtype == weight.dtype:
        dtype = hidden.dtype
    return _TRITON_DTYPES[dtype]


def wide_dot_dtype(gradient, dot_dtype):
    """The dtype for products with a gradient: an fp32 one splits into two bf16 numbers, but not into fp16 ones."""
    return tl.float32 if gradient.dtype == torch.float32 and dot_dtype == tl.float16 else dot_dtype


def block_of(size, largest):
    """Power of two for a matrix product over ``size`` elements."""
    return min(largest, max(16, triton.next_power_of_2(size)))


def step_of(size, dot_dtype):
    """Elements of a step along the summed dimension: 128 bytes, but few in fp32, whose operands are in registers."""
    return block_of(size, 16 if dot_dtype == tl.float32 else 64)


def launch_fine_scores(hidden, weight, bias, shortlist, rows, num_probes, dot_dtype, scores, of_logsumexp=None):
    """Write scores [R, L]; with ``of_logsumexp``, a pair (logsumexp, its gradient) [R], the gradients at the scores.

    Tiles of 16 to 64 rows, as many as a codeword has on average, and 128 list entries: the gathered centres of a step
    take 16 KiB in bf16, so that several programs fit on a multiprocessor and hide each other's gathers.
    """
    block_rows, block_list = rows.block_size, block_of(shortlist.shape[1], 128)
    if scores.numel() == 0:
        return
    num_list_blocks = triton.cdiv(shortlist.shape[1], block_list)
    segments, starts = rows.blocks(block_rows)
    logsumexp, grad_logsumexp = of_logsumexp or (None, None)
    _fine_scores_fwd_kernel[(segments.numel() * num_list_blocks,)](
        hidden, weight, bias, shortlist, rows.order, rows.row_first, segments, starts,
        logsumexp, grad_logsumexp, scores, rows.num_clusters, num_probes, num_list_blocks,
        hidden.shape[1], shortlist.shape[1],
        HAS_BIAS=bias is not None, OF_LOGSUMEXP=of_logsumexp is not None, DOT_DTYPE=dot_dtype,
        BLOCK_N=block_rows, BLOCK_L=block_list, BLOCK_H=step_of(hidden.shape[1], dot_dtype),
        num_warps=4, num_stages=3,
    )  # fmt: skip


def launch_fine_topk(hidden, weight, bias, selection_bias, function, shortlist, rows, topk, dot_dtype):
    """Top-k [T, K] scores, ids and columns, and the logsumexp [T].

    16 rows by a list of up to 512 are one tile, a warp for each 32 columns: 32 KiB of fp32 scores and 64 KiB of keys,
    of which a thread holds 16. A longer list takes several tiles of 512, merged into the best K so far, which are up to
    another 64 KiB; beyond K = 256 that spills some registers.
    """
    num_tokens, shortlist_size = hidden.shape[0], shortlist.shape[1]
    empty = dict(device=hidden.device)
    scores = torch.empty(num_tokens, topk, dtype=torch.float32, **empty)
    ids, columns = (torch.empty(num_tokens, topk, dtype=torch.int32, **empty) for _ in range(2))
    logsumexp = torch.empty(num_tokens, dtype=torch.float32, **empty)
    if num_tokens == 0:
        return scores, ids, columns, logsumexp
    block_topk = block_of(topk, MAX_TOPK)
    block_list = max(block_topk, block_of(shortlist_size, _TILE_COLUMNS))
    segments, starts = rows.blocks(16)
    _fine_topk_fwd_kernel[(segments.numel(),)](
        hidden, weight, bias, selection_bias, shortlist, rows.order, rows.row_first, segments, starts,
        scores, ids, columns, logsumexp, rows.num_clusters, topk, hidden.shape[1], shortlist_size,
        HAS_BIAS=bias is not None, HAS_SELECTION_BIAS=selection_bias is not None, FUNCTION=function,
        DOT_DTYPE=dot_dtype, LOG_N=4, LOG_L=block_list.bit_length() - 1, LOG_K=block_topk.bit_length() - 1,
        NUM_TILES=triton.cdiv(shortlist_size, block_list), BLOCK_H=step_of(hidden.shape[1], dot_dtype),
        num_warps=min(16, max(4, block_list // 32)), num_stages=3,
    )  # fmt: skip
    return scores, ids, columns, logsumexp


def launch_fine_scores_grad_hidden(grad_scores, weight, shortlist, rows, dot_dtype, grad_rows):
    """Write ``grad_scores [R, L] @ centres`` into grad_rows [R, H]: tiles as forward, 128 columns of H each."""
    if grad_rows.numel() == 0:
        return
    dot_dtype = wide_dot_dtype(grad_scores, dot_dtype)
    block_rows, block_columns = rows.block_size, block_of(grad_rows.shape[1], 128)
    num_column_blocks = triton.cdiv(grad_rows.shape[1], block_columns)
    segments, starts = rows.blocks(block_rows)
    _fine_scores_bwd_hidden_kernel[(segments.numel() * num_column_blocks,)](
        grad_scores, weight, shortlist, rows.order, rows.row_first, segments, starts, grad_rows,
        rows.num_clusters, num_column_blocks, grad_rows.shape[1], shortlist.shape[1],
        DOT_DTYPE=dot_dtype, BLOCK_N=block_rows, BLOCK_L=step_of(shortlist.shape[1], dot_dtype),
        BLOCK_H=block_columns, num_warps=4, num_stages=3,
    )  # fmt: skip


def launch_fine_scores_grad_weight(
    grad_scores, hidden, shortlist, rows, num_probes, dot_dtype, deterministic, grad_weight_out
):
    """Add ``grad_scores.T @ tokens`` of each list place to its expert's row of ``grad_weight_out`` [E, H].

    One program makes the sum of 64 places by 128 columns over all rows of a codeword. An expert is in the lists of
    several codewords: their sums meet by fp32 atomic additions, or, if ``deterministic``, they are written down for a
    chunk of codewords at a time and added in their order. Rows of experts that got no token are not touched, unless
    the buffer is not fp32: then the sums are made beside it.
    """
    if grad_scores.numel() == 0:
        return
    if grad_weight_out.dtype != torch.float32:
        sums = torch.zeros_like(grad_weight_out, dtype=torch.float32)
        launch_fine_scores_grad_weight(grad_scores, hidden, shortlist, rows, num_probes, dot_dtype, deterministic, sums)
        grad_weight_out += sums
        return
    dot_dtype = wide_dot_dtype(grad_scores, dot_dtype)
    (num_clusters, shortlist_size), hidden_size = shortlist.shape, hidden.shape[1]
    block_list, block_columns = block_of(shortlist_size, 64), block_of(hidden_size, 128)
    num_list_blocks = triton.cdiv(shortlist_size, block_list)
    num_column_blocks = triton.cdiv(hidden_size, block_columns)

    def launch(out, first_codeword, num_codewords):
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
        places = torch.arange(experts.numel(), device=experts.device)
        pairs = make_pairs(places, experts, experts.numel(), grad_weight_out.shape[0])
        launch_pair_weight_gradient(tiles, torch.ones_like(places, dtype=torch.float32), pairs, grad_weight_out)


def _dense_gradients(ctx, grad_scores, hidden, weight, bias, shortlist, num_probes):
    """Gradients of hidden, weight and bias from those of all scores, [R, L]."""
    rows, deterministic = ctx.rows, ctx.deterministic
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_hidden = grad_weight = grad_bias = None
    if need_hidden:
        dtype = hidden.dtype if num_probes == 1 else torch.float32
        grad_hidden = torch.empty(rows.num_rows, hidden.shape[1], dtype=dtype, device=hidden.device)
        launch_fine_scores_grad_hidden(grad_scores, weight, shortlist, rows, ctx.dot_dtype, grad_hidden)
        if num_probes > 1:
            grad_hidden = grad_hidden.view(-1, num_probes, hidden.shape[1]).sum(dim=1).to(hidden.dtype)
    if need_weight:
        grad_weight = add_weight_gradient(
            ctx.weight,
            lambda out: launch_fine_scores_grad_weight(
                grad_scores, hidden, shortlist, rows, num_probes, ctx.dot_dtype, deterministic, out
            ),
        )
    if need_bias:  # a column of the weight that meets a one in every token
        ones = torch.ones(hidden.shape[0], 1, dtype=torch.float32, device=hidden.device)
        grad_bias = torch.zeros_like(bias)
        launch_fine_scores_grad_weight(
            grad_scores, ones, shortlist, rows, num_probes, tl.float32, deterministic, grad_bias.unsqueeze(1)
        )
    return grad_hidden, grad_weight, grad_bias


class _FineScoresKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, shortlist, assignments, dtype, deterministic):
        ctx.rows = _sort_rows(assignments, shortlist.shape[0])
        ctx.dot_dtype, ctx.deterministic = dot_dtype_of(hidden, weight, dtype), deterministic
        ctx.weight = weight  # the parameter itself, for its main_grad
        hidden, weight, shortlist = hidden.contiguous(), weight.contiguous(), shortlist.contiguous()
        scores = torch.empty(*assignments.shape, shortlist.shape[1], dtype=dtype, device=hidden.device)
        launch_fine_scores(hidden, weight, bias, shortlist, ctx.rows, assignments.shape[1], ctx.dot_dtype, scores)
        ctx.save_for_backward(hidden, weight, bias, shortlist)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_scores):
        return *_dense_gradients(ctx, grad_scores.contiguous(), *ctx.saved_tensors, grad_scores.shape[1]), *[None] * 4


class _FineTopkKernel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, shortlist, assignments, dtype, topk, selection_bias, function, deterministic
    ):
        ctx.rows = _sort_rows(assignments, shortlist.shape[0])
        ctx.dot_dtype, ctx.deterministic = dot_dtype_of(hidden, weight, dtype), deterministic
        ctx.weight = weight
        hidden, weight, shortlist = hidden.contiguous(), weight.contiguous(), shortlist.contiguous()
        scores, ids, columns, logsumexp = launch_fine_topk(
            hidden, weight, bias, selection_bias, function, shortlist, ctx.rows, topk, ctx.dot_dtype
        )
        ctx.save_for_backward(hidden, weight, bias, shortlist, ids, columns, logsumexp)
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        return scores, ids, logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_topk, _, grad_logsumexp):
        *inputs, ids, columns, logsumexp = ctx.saved_tensors
        if grad_topk is not None:
            grad_topk = grad_topk.masked_fill(ids < 0, 0.0)
        if grad_logsumexp is not None:
            grads = _gradients_of_all(ctx, grad_topk, grad_logsumexp, columns, logsumexp, *inputs)
        elif grad_topk is not None:
            grads = _gradients_of_selected(ctx, grad_topk, ids, *inputs)
        else:
            grads = (None, None, None)
        return *grads, *[None] * 7


def _gradients_of_all(ctx, grad_topk, grad_logsumexp, columns, logsumexp, hidden, weight, bias, shortlist):
    """Through the normaliser every candidate gets a gradient: recompute the scores, [T, L] for as long as it takes."""
    rows = ctx.rows
    grad_scores = torch.empty(hidden.shape[0], shortlist.shape[1], dtype=torch.float32, device=hidden.device)
    of_logsumexp = (logsumexp, grad_logsumexp.contiguous())
    launch_fine_scores(hidden, weight, bias, shortlist, rows, 1, ctx.dot_dtype, grad_scores, of_logsumexp)
    if grad_topk is not None:
        grad_scores.scatter_add_(1, columns.long(), grad_topk)
    return _dense_gradients(ctx, grad_scores, hidden, weight, bias, shortlist, 1)


def _gradients_of_selected(ctx, grad_topk, ids, hidden, weight, bias, shortlist):
    """Only selected candidates have a gradient: sums over the (token, expert) pairs."""
    num_tokens, topk = ids.shape
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    tokens = torch.arange(num_tokens, device=ids.device).repeat_interleave(topk)
    pairs = make_pairs(tokens, ids.reshape(-1), num_tokens, weight.shape[0])
    values = grad_topk.reshape(-1)
    grad_hidden = grad_weight = grad_bias = None
    if need_hidden:
        grad_hidden = launch_pair_sums(values, weight, pairs, hidden.dtype)
    if need_weight:
        grad_weight = add_weight_gradient(
            ctx.weight, lambda out: launch_pair_weight_gradient(hidden, values, pairs, out)
        )
    if need_bias:
        grad_bias = torch.zeros_like(bias)
        ones = torch.ones(num_tokens, 1, dtype=torch.float32, device=ids.device)
        launch_pair_weight_gradient(ones, values, pairs, grad_bias.unsqueeze(1))
    return grad_hidden, grad_weight, grad_bias


def fine_scores_kernel(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    assignments: torch.Tensor,
    dtype: torch.dtype,
    deterministic: bool = False,
) -> torch.Tensor:
    """Score every token against the experts of its codewords' shortlists: ``z_e = <w_e, h> + b_e``.

    As :func:`air_moe_megatron.ops.fine_scores.fine_scores`, whose caller has validated the shapes. Differentiable in
    hidden, weight and bias; the weight's gradient goes into ``weight.main_grad`` where there is one
    (``ops/weight_gradient.py``). Does not wait for the device.

    Args:
        hidden: [T, H], tokens; fp32, bf16 or fp16.
        weight: [E, H], expert centres; likewise.
        bias: [E] or None.
        shortlist: [C, L] integer expert ids, distinct in a row; -1 fills the end of a shorter list.
        assignments: [T, P] int64, codewords of each token.
        dtype: of the arithmetic and of the result: fp32, bf16 or fp16. Sums are made in fp32.
        deterministic: add the gradients of the weight in a fixed order, with up to 256 MiB of sums in between.
    Returns:
        [T, P, L] scores in ``dtype``; -inf where the shortlist holds -1.
    Raises:
        ValueError: for another dtype.

    Example: hidden [[1, 2]], weight [[1, 0], [0, 1], [1, 1]], shortlist [[0, 2]], assignments [[0]] gives [[[1, 3]]].
    """
    require_kernel_dtypes(hidden=hidden, weight=weight, dtype=dtype)
    return _FineScoresKernel.apply(hidden, weight, bias, shortlist, assignments, dtype, deterministic)


def fine_topk_kernel(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    assignments: torch.Tensor,
    dtype: torch.dtype,
    topk: int,
    selection_bias: torch.Tensor | None = None,
    selection_function: str = "identity",
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score every token against its codeword's shortlist and keep the best: no [T, L] scores in memory.

    Differentiable in hidden, weight and bias through the scores and the logsumexp. While nothing asks for a gradient
    of the logsumexp, the backward costs K rows per token and is deterministic; otherwise it recomputes all scores. The
    weight's gradient goes into ``weight.main_grad`` where there is one. Does not wait for the device.

    A list of up to 512 is one tile on the chip, a longer one several (:func:`launch_fine_topk`).

    Args:
        hidden: [T, H], tokens; fp32, bf16 or fp16.
        weight: [E, H], expert centres; likewise.
        bias: [E] or None.
        shortlist: [C, L] integer expert ids, distinct in a row; -1 fills the end of a shorter list.
        assignments: [T, 1] int64, codeword of each token.
        dtype: of the arithmetic: fp32, bf16 or fp16. Sums are made in fp32 and not rounded to it.
        topk: K, from 1 to 512; may be more than L.
        selection_bias: [E] or None; candidates are ranked by ``selection_function(score) + selection_bias``.
        selection_function: "identity", or the score function to which Megatron's expert bias is added: "sigmoid",
            "sqrtsoftplus". Of equal ranks, the lower place in the list wins. Neither changes the scores returned.
        deterministic: as :func:`fine_scores_kernel`.
    Returns:
        [T, K] fp32 scores, those ranked highest first, -inf where candidates ran out; [T, K] int32 expert ids, -1
        there; [T] fp32 logsumexp of the scores of all candidates, -inf where there are none.
    Raises:
        ValueError: for another dtype, number of probes, K or selection function.

    Example: hidden [[1, 2]], weight [[1, 0], [0, 1], [1, 1]], shortlist [[0, 2]], assignments [[0]] and K = 1 give the
    scores [[3]], ids [[2]] and the logsumexp log(e + e^3) = 3.127.
    """
    require_kernel_dtypes(hidden=hidden, weight=weight, dtype=dtype)
    if assignments.dim() != 2 or assignments.shape[1] != 1:
        raise ValueError(f"assignments {tuple(assignments.shape)} must be [T, 1]: one probe")
    if not 1 <= topk <= MAX_TOPK:
        raise ValueError(f"topk ({topk}) must be from 1 to {MAX_TOPK}")
    if selection_function not in SELECTION_FUNCTIONS:
        raise ValueError(f"selection_function ({selection_function!r}) must be one of {', '.join(SELECTION_FUNCTIONS)}")
    return _FineTopkKernel.apply(
        hidden, weight, bias, shortlist, assignments, dtype, topk, selection_bias, selection_function, deterministic
    )
