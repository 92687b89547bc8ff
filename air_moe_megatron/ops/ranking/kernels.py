"""The experts ranked at each codeword, and the codewords at each expert: Triton kernels that stream over the experts.

Three steps; a *group* is G experts with consecutive ids:

1. One program per block of experts multiplies them by all codewords, one tile after another. It writes the best score
   of each (codeword, group), and each expert's best codeword. It sees all codewords, so there are no atomics.
2. ``topk`` finds the L best groups of each codeword. These contain the codeword's L best experts: any other group comes
   after L groups, each with an expert at least as good.
3. One program per group and block of codewords that chose the group recomputes the scores of its G experts. Pairs of
   (codeword, group) are sorted by group. So a group's weight rows are read once per block of codewords, as a tile for
   the tensor cores. If rows were gathered per codeword, each would be read 4 G times with C * L = 4 E. ``topk`` then
   finds the list, the L best of the L * G candidates.

All comparisons are of int64 keys of score and id (``order_key``). The lower id wins a tie, so every rank makes the same
lists, whatever ``topk`` does with equal values. Products are exact: fp32, or three summands on the tensor cores, as in
``ops/coarse``.

Memory: 8 bytes for each of the C * E/G keys of groups, and for each of the at most 2^26 keys of candidates
(C * L * G of them, in chunks of codewords). That is 512 MiB each at E = 2^20, C = L = 2^11. The [C, E] scores would
take 8 GiB.

Legend: G experts per group, S summands of a codeword, n codewords per chunk, k groups that a codeword keeps; others as
in ``ops/__init__.py``.
"""

import torch
import triton
import triton.language as tl

from air_moe_megatron.ops.blocks import contiguous
from air_moe_megatron.ops.ranking import GROUP_SIZE, MAX_CANDIDATE_KEYS
from air_moe_megatron.ops.segments import sort_into_segments
from air_moe_megatron.ops.tiles import (
    LOWEST_KEY,
    apply_score_function,
    codeword_products,
    ids_of_keys,
    order_key,
    split_codewords,
)


@triton.jit
def _ranked(products, factors, bias, expert_bias, experts, is_expert, HAS_BIAS: tl.constexpr, FUNCTION: tl.constexpr):
    """Scores by which experts are ranked, [.., experts], from their products with codewords; NaN becomes infinity."""
    scores = products * factors[:, None]
    if HAS_BIAS:
        scores += tl.load(bias + experts, mask=is_expert, other=0.0).to(tl.float32)[None, :]
    if FUNCTION is not None:
        scores = apply_score_function(scores, FUNCTION)
        scores += tl.load(expert_bias + experts, mask=is_expert, other=0.0).to(tl.float32)[None, :]
    return tl.where(scores != scores, float("inf"), scores)  # a maximum would ignore NaN


@triton.jit
def _group_maxima_fwd_kernel(
    summands,  # [S, C, H]
    factors,  # [C] fp32
    weight,  # [E, H]
    bias,  # [E]
    expert_bias,  # [E]
    group_keys,  # [C, E / G] int64
    nearest,  # [E] int64
    best_scores,  # [E] fp32
    E,
    num_groups,
    C: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    experts = block * BLOCK_E + tl.arange(0, BLOCK_E)
    is_expert = experts < E
    groups = block * (BLOCK_E // G) + tl.arange(0, BLOCK_E // G)
    best = tl.full([BLOCK_E], float("-inf"), tl.float32)
    best_ids = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, C, BLOCK_C):
        ids = first + tl.arange(0, BLOCK_C)
        is_codeword = ids < C
        products = codeword_products(
            summands, ids, is_codeword, weight, experts, is_expert, 1.0, C, H, S, False, BLOCK_C, BLOCK_E, BLOCK_H
        )
        factor = tl.load(factors + ids, mask=is_codeword, other=0.0)
        scores = _ranked(products, factor, bias, expert_bias, experts, is_expert, HAS_BIAS, FUNCTION)
        scores = tl.where(is_codeword[:, None] & is_expert[None, :], scores, float("-inf"))
        tile_best = tl.max(scores, axis=0)
        tile_best_ids = tl.min(tl.where(scores == tile_best[None, :], ids[:, None], C), axis=0)
        is_better = tile_best > best
        best, best_ids = tl.where(is_better, tile_best, best), tl.where(is_better, tile_best_ids, best_ids)
        maxima = tl.max(tl.reshape(scores, [BLOCK_C, BLOCK_E // G, G]), axis=2)
        tl.store(
            group_keys + ids.to(tl.int64)[:, None] * num_groups + groups[None, :],
            order_key(maxima, groups[None, :]),
            mask=is_codeword[:, None] & (groups < num_groups)[None, :],
        )
    tl.store(nearest + experts, best_ids.to(tl.int64), mask=is_expert)
    tl.store(best_scores + experts, best, mask=is_expert)


@triton.jit
def _candidates_fwd_kernel(
    summands,  # [S, C, H]
    factors,  # [C] fp32
    weight,  # [E, H]
    bias,  # [E]
    expert_bias,  # [E]
    pairs,  # [n * k] int64, (codeword, slot among its groups) sorted by group
    first_pairs,  # [E / G + 1] int64, first slot of each group in pairs
    candidates,  # [n, k, G] int64 keys
    first_codeword,
    k,
    E,
    num_tiles,
    C: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    program = tl.program_id(0)
    group = program // num_tiles  # tiles of a group are neighbors: the second finds its weight rows in the L2 cache
    first = tl.load(first_pairs + group) + (program % num_tiles) * BLOCK_C
    end = tl.load(first_pairs + group + 1)
    if first >= end:
        return
    slots = first + tl.arange(0, BLOCK_C)
    is_pair = slots < end
    pair = tl.load(pairs + slots, mask=is_pair, other=0)
    ids = first_codeword + pair // k
    experts = group.to(tl.int64) * G + tl.arange(0, G)
    is_expert = experts < E
    products = codeword_products(
        summands, ids, is_pair, weight, experts, is_expert, 1.0, C, H, S, False, BLOCK_C, G, BLOCK_H
    )
    factor = tl.load(factors + ids, mask=is_pair, other=0.0)
    scores = _ranked(products, factor, bias, expert_bias, experts, is_expert, HAS_BIAS, FUNCTION)
    keys = tl.where(is_expert[None, :], order_key(scores, experts[None, :]), LOWEST_KEY)
    tl.store(candidates + pair[:, None] * G + tl.arange(0, G)[None, :], keys, mask=is_pair[:, None])


def _blocks(weight: torch.Tensor, group_size: int) -> dict[str, int]:
    """Block sizes and launch options of the first step as a function of E and the dtype.

    - 16-bit: [128, 64] tiles of the three summands and [64, 128] of the weight take 64 KiB. Three stages of them fit
      the 227 KiB of a multiprocessor. With few experts a program takes 64 instead of 128, so that no multiprocessor is
      idle.
    - fp32: no tensor cores, limited by arithmetic; small tiles.
    """
    if weight.dtype == torch.float32:
        return {"BLOCK_C": 64, "BLOCK_E": max(64, group_size), "BLOCK_H": 32, "num_warps": 4, "num_stages": 2}
    block = max(128 if weight.shape[0] >= 16384 else 64, group_size)
    return {"BLOCK_C": 128, "BLOCK_E": block, "BLOCK_H": 64, "num_warps": 8, "num_stages": 3}


def _candidate_blocks(weight: torch.Tensor) -> dict[str, int]:
    """Block sizes of the third step. About 4 G codewords choose a group: with G = 32, two tiles of 64."""
    if weight.dtype == torch.float32:
        return {"BLOCK_C": 64, "BLOCK_H": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_C": 64, "BLOCK_H": 64, "num_warps": 4, "num_stages": 3}


def _best_groups(group_keys: torch.Tensor, num_kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[n * k] pairs (codeword, slot among its best groups) sorted by group; [E / G + 1] first pair of each group."""
    groups = ids_of_keys(group_keys.topk(num_kept, dim=1).values)
    return sort_into_segments(groups.flatten(), group_keys.shape[1])


def launch_ranking(
    codewords: torch.Tensor,
    factors: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist_size: int,
    function: str | None,
    expert_bias: torch.Tensor | None,
    group_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the three steps above: lists [C, L], and each expert's best codeword [E] and its score [E]."""
    (num_clusters, hidden_size), num_experts, device = codewords.shape, weight.shape[0], weight.device
    weight, bias, expert_bias = contiguous(weight, bias, expert_bias)
    summands, too_large = split_codewords(codewords, weight.dtype)
    factors = (factors / too_large).contiguous()  # by a power of two: exact
    tensors = (summands, factors, weight, bias, expert_bias)
    constants = {
        "C": num_clusters,
        "H": hidden_size,
        "S": summands.shape[0],
        "HAS_BIAS": bias is not None,
        "FUNCTION": function,
        "G": group_size,
    }
    num_groups = triton.cdiv(num_experts, group_size)
    group_keys = torch.empty(num_clusters, num_groups, dtype=torch.int64, device=device)
    nearest = torch.empty(num_experts, dtype=torch.int64, device=device)
    score = torch.empty(num_experts, dtype=torch.float32, device=device)
    blocks = _blocks(weight, group_size)
    _group_maxima_fwd_kernel[(triton.cdiv(num_experts, blocks["BLOCK_E"]),)](
        *tensors, group_keys, nearest, score, num_experts, num_groups, **constants, **blocks
    )

    num_kept = min(shortlist_size, num_groups)
    chunk = min(num_clusters, max(MAX_CANDIDATE_KEYS // (num_kept * group_size), 1))
    candidates = torch.empty(chunk, num_kept * group_size, dtype=torch.int64, device=device)
    lists = torch.empty(num_clusters, shortlist_size, dtype=torch.int64, device=device)
    blocks = _candidate_blocks(weight)
    for first in range(0, num_clusters, chunk):
        part = slice(first, min(first + chunk, num_clusters))
        size = part.stop - part.start
        pairs, first_pairs = _best_groups(group_keys[part], num_kept)
        # A codeword chooses a group at most once, so these tiles suffice; those without pairs return at once.
        num_tiles = triton.cdiv(size, blocks["BLOCK_C"])
        _candidates_fwd_kernel[(num_groups * num_tiles,)](
            *tensors, pairs, first_pairs, candidates, first, num_kept, num_experts, num_tiles, **constants, **blocks
        )
        lists[part] = ids_of_keys(candidates[:size].topk(shortlist_size, dim=1).values)
    return lists, nearest, score


def rank_experts(
    codewords: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist_size: int,
    score_function: str | None = None,
    expert_bias: torch.Tensor | None = None,
    group_size: int = GROUP_SIZE,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`air_moe_megatron.ops.ranking.rank_experts`; deterministic, and does not wait for the device.

    Without bias and score function the scale is left out, because it changes no order. ``group_size`` is G: 16, 32, 64
    or 128, which are sides of tiles for the tensor cores. Larger groups take less memory for the maxima and more work
    for the candidates.
    """
    scale = scale.float()
    factors = scale if bias is not None or score_function is not None else torch.ones_like(scale)
    return launch_ranking(codewords, factors, weight, bias, shortlist_size, score_function, expert_bias, group_size)
