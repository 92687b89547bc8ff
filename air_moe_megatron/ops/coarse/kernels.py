"""Coarse assignment of tokens to codewords, with the statistics of the codebook, as Triton kernels.

One program owns a block of tokens and streams over the codewords, and over H inside: the similarities of a tile live in
registers, where the best P of each token are kept, so that nothing of size [T, C] reaches memory. With the last tile
the program knows its tokens' codewords and adds their statistics in the same launch; it finds the tokens in the L2
cache. Where sums must not depend on the order in which programs finish, the tokens are sorted by codeword instead.

Exactness. The codewords are fp32. fp32 tokens are multiplied in fp32. 16-bit tokens are exact in the tensor cores
already, so the codewords are split into three summands of the tokens' dtype that add up to them exactly: three products
of 16-bit numbers accumulated in fp32 give what an fp32 product gives, for one and a half times the cost of a tf32 one.

A candidate is one int64 *key*: its similarity in the upper half, so that integers order as similarities do, and its id
in the lower, so that the lower id wins a tie. The maximum of keys is an arg-max that no tie and no NaN can disturb.

Legend: T tokens, H hidden, C clusters, P probes, S summands of a codeword.
"""

import torch
import triton
import triton.language as tl

PRECISIONS = ("ieee", "tf32")
MAX_PROBES = 8

_LOWEST_KEY = tl.constexpr(-(2**63))
_HIGHEST_KEY = tl.constexpr(2**63 - 1)
_ID_BITS = tl.constexpr(2**31 - 1)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_NUM_SCALARS = tl.constexpr(3)  # count, sum of cosines, sum of lengths

# An entry of a unit row is at most 1, and small ones fall out of fp16's range: scaled so, what is lost is below 2^-38.
_FP16_SCALE = 2.0**14


@triton.jit
def order_key(values, ids):
    """int64 that orders fp32 values with their ids (below 2^31): by value, NaN first, then by lower id."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    bits = tl.where(values != values, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (bits.to(tl.int64) << 32) | (_ID_BITS - ids.to(tl.int64))


@triton.jit
def _id_of(keys):
    return _ID_BITS - (keys & _ID_BITS)


@triton.jit
def _assign_fwd_kernel(
    hidden,  # [T, H]
    summands,  # [S, C, H]
    codewords,  # [C, H] fp32
    allowed,  # [C] bool
    keep,  # [T] bool
    assignments,  # [T, P] int64
    statistics,  # [C, H + 3] fp32, zero
    T,
    C: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    P_PAD: tl.constexpr,
    S: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_ALLOWED: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    WITH_STATISTICS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BH: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    is_token = tokens < T
    slots = tl.arange(0, P_PAD)[:, None]
    # Distinct keys below all real ones; slots beyond P are never the worst, so never replaced.
    best = tl.where(slots < P, _LOWEST_KEY + slots.to(tl.int64), _HIGHEST_KEY) + tl.zeros([1, BT], tl.int64)  # [P, BT]
    for first in range(0, C, BC):
        ids = first + tl.arange(0, BC)
        is_codeword = ids < C
        similarity = tl.zeros(
            [BC, BT], tl.float32
        )  # codewords are the rows: a product's M is at least 64, BT need not be
        for start in range(0, H, BH):
            columns = start + tl.arange(0, BH)
            h = tl.load(
                hidden + tokens[None, :] * H + columns[:, None],
                mask=is_token[None, :] & (columns < H)[:, None],
                other=0.0,
            )
            for s in tl.static_range(S):
                c = tl.load(
                    summands + s * C * H + ids.to(tl.int64)[:, None] * H + columns[None, :],
                    mask=is_codeword[:, None] & (columns < H)[None, :],
                    other=0.0,
                )
                similarity = tl.dot(c, h.to(c.dtype), similarity, input_precision=PRECISION)
        if HAS_ALLOWED:
            is_allowed = tl.load(allowed + ids, mask=is_codeword, other=0) != 0
            similarity = tl.where(is_allowed[:, None], similarity, float("-inf"))
        keys = tl.where(is_codeword[:, None], order_key(similarity, ids[:, None]), _LOWEST_KEY)
        for _ in tl.static_range(P):
            candidate = tl.max(keys, axis=0)[None, :]
            worst = tl.min(best, axis=0)[None, :]
            best = tl.where((best == worst) & (candidate > worst), candidate, best)
            keys = tl.where(keys == candidate, _LOWEST_KEY, keys)

    best = tl.where(slots < P, best, _LOWEST_KEY)
    nearest = _id_of(tl.max(best, axis=0))  # [BT] int64
    for p in tl.static_range(P):
        key = tl.max(best, axis=0)
        tl.store(assignments + tokens * P + p, _id_of(key), mask=is_token)
        best = tl.where(best == key[None, :], _LOWEST_KEY, best)

    if WITH_STATISTICS:
        counts = is_token
        if HAS_KEEP:
            counts = counts & (tl.load(keep + tokens, mask=is_token, other=0) != 0)
        squares = tl.zeros([BT], tl.float32)
        for start in range(0, H, BH):
            columns = start + tl.arange(0, BH)
            mask = counts[:, None] & (columns < H)[None, :]
            h = tl.load(hidden + tokens[:, None] * H + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            squares += tl.sum(h * h, axis=1)
        lengths = tl.sqrt_rn(squares)
        divisors = tl.maximum(lengths, _TINY)
        cosines = tl.zeros([BT], tl.float32)
        rows = statistics + nearest * (H + _NUM_SCALARS)
        for start in range(0, H, BH):
            columns = start + tl.arange(0, BH)
            mask = counts[:, None] & (columns < H)[None, :]
            h = tl.load(hidden + tokens[:, None] * H + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            unit = h / divisors[:, None]
            c = tl.load(codewords + nearest[:, None] * H + columns[None, :], mask=mask, other=0.0)
            cosines += tl.sum(unit * c, axis=1)
            tl.atomic_add(rows[:, None] + columns[None, :], unit, mask=mask, sem="relaxed")
        tl.atomic_add(rows + H, tl.full([BT], 1.0, tl.float32), mask=counts, sem="relaxed")
        tl.atomic_add(rows + H + 1, cosines, mask=counts, sem="relaxed")
        tl.atomic_add(rows + H + 2, lengths, mask=counts, sem="relaxed")


@triton.jit
def _sorted_statistics_fwd_kernel(
    hidden,  # [T, H]
    lengths,  # [T] fp32
    order,  # [T] int64, tokens sorted by codeword
    first_places,  # [C + 1] int64, of each codeword in order
    statistics,  # [C, H + 3] fp32; the sums of cosines are left out
    H: tl.constexpr,
    BT: tl.constexpr,
    BH: tl.constexpr,
):
    codeword = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BH + tl.arange(0, BH)
    place, end = tl.load(first_places + codeword), tl.load(first_places + codeword + 1)
    count = (end - place).to(tl.float32)
    sums = tl.zeros([BT, BH], tl.float32)
    summed_lengths = tl.zeros([BT], tl.float32)
    while place < end:  # each of BT lanes adds every BT-th token; the lanes are added up last
        places = place + tl.arange(0, BT)
        is_place = places < end
        tokens = tl.load(order + places, mask=is_place, other=0)
        length = tl.load(lengths + tokens, mask=is_place, other=0.0)
        mask = is_place[:, None] & (columns < H)[None, :]
        h = tl.load(hidden + tokens[:, None] * H + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += h / tl.maximum(length, _TINY)[:, None]
        summed_lengths += length
        place += BT
    row = statistics + codeword * (H + _NUM_SCALARS)
    tl.store(row + columns, tl.sum(sums, axis=0), mask=columns < H)
    if tl.program_id(1) == 0:
        tl.store(row + H, count)
        tl.store(row + H + 2, tl.sum(summed_lengths, axis=0))


def split_codewords(codewords: torch.Tensor, dtype: torch.dtype):
    """Split fp32 unit rows into three 16-bit summands, for exact products with 16-bit numbers on the tensor cores.

    Args:
        codewords: [C, H] fp32, unit rows.
        dtype: bf16 or fp16.
    Returns:
        [3, C, H] in ``dtype``, largest summand first; and the power of two by which their sum is too large.

    Example: 1 + 2^-9 in bf16 (8 bits) is 1, 2^-9 and 0, times 1.
    """
    scale = _FP16_SCALE if dtype == torch.float16 else 1.0
    summands = torch.empty(3, *codewords.shape, dtype=dtype, device=codewords.device)
    rest = codewords * scale
    for summand in summands:
        summand.copy_(rest)
        rest = rest - summand
    return summands, scale


def _blocks(hidden, num_probes, precision):
    """Block sizes and launch options as a function of T, P and the kind of product.

    - 16-bit tensor cores: [128, 64] tiles of the three summands and [64, BT] of the tokens are 56 or 64 KiB, three
      stages of them fit the 227 KiB of a multiprocessor. Every program reads all codewords through the L2 cache, which
      limits small blocks of tokens: 128 from 8,192 tokens on, although only 64 programs run then, else 64. With more
      than two probes the keys of 128 would not fit the registers.
    - tf32: one summand, of twice the bytes.
    - fp32 without tensor cores: limited by arithmetic; small tiles fill the multiprocessors.
    """
    if hidden.dtype == torch.float32:
        return {"BT": 64, "BC": 64, "BH": 32, "num_warps": 4, "num_stages": 2}
    if precision == "tf32":
        return {"BT": 64, "BC": 128, "BH": 32, "num_warps": 8, "num_stages": 3}
    block = 128 if hidden.shape[0] >= 8192 and num_probes <= 2 else 64
    return {"BT": block, "BC": 128, "BH": 64, "num_warps": 8, "num_stages": 3}


def _launch_assign(hidden, codewords, num_probes, allowed, keep, precision, with_statistics):
    (num_tokens, hidden_size), num_clusters = hidden.shape, codewords.shape[0]
    hidden, codewords = hidden.contiguous(), codewords.contiguous()
    if hidden.dtype == torch.float32 or precision == "tf32":
        summands = codewords.unsqueeze(0)
    else:
        summands, _ = split_codewords(codewords, hidden.dtype)  # a common factor does not change an arg-max
    assignments = torch.empty(num_tokens, num_probes, dtype=torch.int64, device=hidden.device)
    statistics = None
    if with_statistics:
        shape = (num_clusters, hidden_size + _NUM_SCALARS.value)
        statistics = torch.zeros(shape, dtype=torch.float32, device=hidden.device)
    blocks = _blocks(hidden, num_probes, precision)
    _assign_fwd_kernel[(triton.cdiv(num_tokens, blocks["BT"]),)](
        hidden,
        summands,
        codewords,
        allowed,
        keep,
        assignments,
        statistics,
        num_tokens,
        C=num_clusters,
        H=hidden_size,
        P=num_probes,
        P_PAD=triton.next_power_of_2(num_probes),
        S=summands.shape[0],
        PRECISION=precision,
        HAS_ALLOWED=allowed is not None,
        HAS_KEEP=keep is not None,
        WITH_STATISTICS=with_statistics,
        **blocks,
    )
    return assignments, statistics


def _launch_sorted_statistics(hidden, codewords, assignments, keep):
    hidden, (num_clusters, hidden_size) = hidden.contiguous(), codewords.shape
    if keep is not None:
        assignments = assignments.masked_fill(~keep, num_clusters)  # behind all codewords
    sorted_codewords, order = assignments.sort(stable=True)
    first_places = torch.searchsorted(sorted_codewords, torch.arange(num_clusters + 1, device=hidden.device))
    lengths = torch.linalg.vector_norm(hidden, dim=1, dtype=torch.float32)
    shape = (num_clusters, hidden_size + _NUM_SCALARS.value)
    statistics = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    block = min(triton.next_power_of_2(hidden_size), 256)  # a warp reads 16 bytes per lane and token, 8 tokens at once
    _sorted_statistics_fwd_kernel[(num_clusters, triton.cdiv(hidden_size, block))](
        hidden, lengths, order, first_places, statistics, H=hidden_size, BT=8, BH=block, num_warps=4
    )
    sums = statistics[:, :hidden_size]
    statistics[:, hidden_size + 1] = (sums * codewords).sum(dim=1)  # of a sum of vectors: the sum of their cosines
    return statistics


def assign_tokens(
    hidden: torch.Tensor,
    codewords: torch.Tensor,
    num_probes: int,
    allowed: torch.Tensor | None = None,
    precision: str = "ieee",
) -> torch.Tensor:
    """Find the codewords nearest in angle to each token, without [T, C] in memory. Does not wait for the device.

    Which codeword a token gets that is not finite is not defined, beyond that it is one of the C.

    Args:
        hidden: [T, H] fp32, bf16 or fp16.
        codewords: [C, H] fp32, unit rows.
        num_probes: P, codewords per token, at most 8 and at most C.
        allowed: [C] bool or None; a codeword that is not allowed is chosen only where fewer than P are.
        precision: of the products with 16-bit tokens. "ieee": as in fp32. "tf32": codewords rounded to 11 bits, two
            thirds of the tensor cores' time; near ties may fall otherwise than on the exact path.
    Returns:
        [T, P] int64, nearest first; the lower of two codewords that are equally near.
    Raises:
        ValueError: if shapes, dtypes or precision do not fit.

    Example: hidden [[0, 3]], codewords [[1, 0], [0, 1]], one probe gives [[1]].
    """
    _validate(hidden, codewords, num_probes, allowed, None, precision)
    return _launch_assign(hidden, codewords, num_probes, allowed, None, precision, with_statistics=False)[0]


def token_statistics_sorted(
    hidden: torch.Tensor, codewords: torch.Tensor, assignments: torch.Tensor, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum the statistics of each codeword's tokens in an order that only the tokens decide: equal bits in every run.

    The tokens are sorted by codeword; one program adds those of one codeword, for a block of H. A codeword with very
    many tokens takes long, which is the price of the fixed order. Does not wait for the device.

    Args:
        hidden: [T, H] fp32, bf16 or fp16.
        codewords: [C, H] fp32, unit rows.
        assignments: [T] int64, nearest codeword.
        keep: [T] bool or None; tokens that count.
    Returns:
        [C, H + 3] fp32: sum of unit tokens, count, sum of cosines, sum of lengths; not finite for a codeword that got
        a token which is not.
    Raises:
        ValueError: if shapes or dtypes do not fit.

    Example: hidden [[0, 2]], codewords [[1, 0], [0, 1]], assignments [1] gives [[0, 0, 0, 0, 0], [0, 1, 1, 1, 2]].
    """
    _validate(hidden, codewords, 1, None, keep, "ieee")
    if assignments.shape != hidden.shape[:1]:
        raise ValueError(f"assignments {tuple(assignments.shape)} must be [T] with T = {hidden.shape[0]}")
    return _launch_sorted_statistics(hidden, codewords, assignments, keep)


def assign_with_statistics(
    hidden: torch.Tensor,
    codewords: torch.Tensor,
    num_probes: int,
    allowed: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    deterministic: bool = False,
    precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find each token's nearest codewords and sum the statistics of the tokens of each, in one launch.

    The sums are made by fp32 atomic additions, unless ``deterministic`` asks for :func:`token_statistics_sorted`. Does
    not wait for the device.

    Args:
        hidden: [T, H] fp32, bf16 or fp16.
        codewords: [C, H] fp32, unit rows.
        num_probes: P, codewords per token, at most 8 and at most C.
        allowed: [C] bool or None, see :func:`assign_tokens`.
        keep: [T] bool or None; tokens that count in the statistics. All are assigned.
        deterministic: whether the statistics must have equal bits in every run.
        precision: see :func:`assign_tokens`.
    Returns:
        [T, P] int64 codewords, nearest first; [C, H + 3] fp32: sum of unit tokens, count, sum of cosines, sum of
        lengths ``|h|`` over the tokens whose nearest codeword it is. A token that is not finite makes its codeword's
        row not finite.
    Raises:
        ValueError: if shapes, dtypes or precision do not fit.

    Example: hidden [[0, 2]], codewords [[1, 0], [0, 1]], one probe gives [[1]] and [[0, 0, 0, 0, 0], [0, 1, 1, 1, 2]].
    """
    _validate(hidden, codewords, num_probes, allowed, keep, precision)
    if not deterministic:
        return _launch_assign(hidden, codewords, num_probes, allowed, keep, precision, with_statistics=True)
    assignments, _ = _launch_assign(hidden, codewords, num_probes, allowed, None, precision, with_statistics=False)
    return assignments, _launch_sorted_statistics(hidden, codewords, assignments[:, 0], keep)


def _validate(hidden, codewords, num_probes, allowed, keep, precision):
    if hidden.dim() != 2 or codewords.dim() != 2 or hidden.shape[1] != codewords.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and codewords {tuple(codewords.shape)} must be [T, H] and [C, H] "
            "with the same H"
        )
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16) or codewords.dtype != torch.float32:
        raise ValueError(
            f"hidden ({hidden.dtype}) must be fp32, bf16 or fp16, and codewords ({codewords.dtype}) must be fp32"
        )
    if not 1 <= num_probes <= min(MAX_PROBES, codewords.shape[0]):
        raise ValueError(f"num_probes ({num_probes}) must be between 1 and {MAX_PROBES} and C = {codewords.shape[0]}")
    for name, mask, size in (("allowed", allowed, codewords.shape[0]), ("keep", keep, hidden.shape[0])):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (size,)):
            raise ValueError(f"{name} {tuple(mask.shape)} ({mask.dtype}) must be [{size}] bool")
    if precision not in PRECISIONS:
        raise ValueError(f"precision ({precision!r}) must be one of {PRECISIONS}")
    if precision == "tf32" and hidden.dtype == torch.float32:
        raise ValueError("precision 'tf32' is for 16-bit tokens: hidden is fp32")
