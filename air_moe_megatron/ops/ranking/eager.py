"""Ranking with torch operations: of candidates, or of all experts, streamed so that no [C, E] tensor is held."""

import torch

from air_moe_megatron.ops.score_functions import selection_scores
from air_moe_megatron.ops.weight_gradient import sparse_rows

CHUNK_ELEMENTS = 2**26  # elements of the scores [C, n] of a chunk of experts: 256 MiB
_STRIPES = 8  # elements per group, in maxima over groups
_MANY_ROWS = 128  # least number of rows for which maxima over groups are taken first
_SPARE = 32  # candidates kept per chunk, beyond twice the expected number
_GATHERED_ELEMENTS = 2**22  # elements of the centers gathered at a time: 16 MiB


def rank_experts(
    codewords: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist_size: int,
    score_function: str | None,
    expert_bias: torch.Tensor | None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`air_moe_megatron.ops.ranking.rank_experts`. Waits for the device."""
    num_clusters, num_experts = codewords.shape[0], weight.shape[0]
    chunk = min(num_experts, max(chunk_elements // num_clusters, 1))
    chunks = [slice(first, min(first + chunk, num_experts)) for first in range(0, num_experts, chunk)]
    # One buffer for all chunks: on a CPU, allocating fresh memory takes longer than using it.
    buffer = torch.empty(num_clusters * chunk, dtype=codewords.dtype, device=weight.device)

    def score(experts: slice) -> torch.Tensor:
        size = experts.stop - experts.start
        scores = torch.mm(codewords, weight[experts].float().t(), out=buffer[: num_clusters * size].view(-1, size))
        return _ranked_by(scores, scale, bias, score_function, expert_bias, experts)

    # A chunk is expected to hold 1/len(chunks) of a list. Keep twice that, so that few lists need more from a chunk.
    kept = min(shortlist_size, 2 * -(-shortlist_size // len(chunks)) + _SPARE)
    values, ids, nearest, highest = [], [], [], []
    for experts in chunks:
        scores = score(experts)
        for parts, part in zip((highest, nearest), _max_per_column(scores), strict=True):
            parts.append(part)
        for parts, part in zip((values, ids), _topk(scores, kept), strict=True):
            parts.append(part)
    best, slots = torch.cat(values, dim=1).topk(shortlist_size, dim=1)
    fully_kept = [part.shape[1] == experts.stop - experts.start for part, experts in zip(values, chunks, strict=True)]
    asks_for_more = (torch.stack([part[:, -1] for part in values]) > best[:, -1]).any(dim=1).tolist()
    for number, experts in enumerate(chunks):
        if asks_for_more[number] and not fully_kept[number] and kept < shortlist_size:
            values[number], ids[number] = _topk(score(experts), shortlist_size)
    if any(asks_for_more):
        best, slots = torch.cat(values, dim=1).topk(shortlist_size, dim=1)
    ids = torch.cat([part + experts.start for part, experts in zip(ids, chunks, strict=True)], dim=1)
    return ids.gather(1, slots), torch.cat(nearest), torch.cat(highest)


def rank_candidates(
    codewords: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    candidates: torch.Tensor,
    shortlist_size: int,
    score_function: str | None,
    expert_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`air_moe_megatron.ops.ranking.rank_candidates`. Does not wait for the device."""
    candidates = candidates.sort(dim=1).values
    scores = _ranked_by(_products(codewords, weight, candidates), scale, bias, score_function, expert_bias, candidates)
    scores[:, 1:].masked_fill_(candidates[:, 1:] == candidates[:, :-1], float("-inf"))
    return candidates.gather(1, scores.topk(shortlist_size, dim=1).indices), candidates, scores


def _products(codewords: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[n, m] fp32 products of each of n codewords with the m centers whose ids are in its row of ``ids`` [n, m]."""
    num_codewords, num_ids = ids.shape
    if num_ids >= weight.shape[0]:  # with few experts the product with all of them is smaller
        return (codewords @ weight.float().t()).gather(1, ids)
    if weight.dtype == torch.float32 and not weight.is_cuda:  # read in place: gathered centers would exceed the cache
        first = torch.arange(0, ids.numel() + 1, num_ids)
        pattern = sparse_rows(first, ids.reshape(-1), codewords.new_zeros(ids.numel()), weight.shape[0])
        products = torch.sparse.sampled_addmm(pattern, codewords, weight.t(), beta=0.0)
        return products.values().view(num_codewords, num_ids)
    chunk = max(1, _GATHERED_ELEMENTS // (num_ids * weight.shape[1]))
    parts = zip(ids.split(chunk), codewords.split(chunk), strict=True)
    return torch.cat([torch.bmm(weight[part].float(), rows.unsqueeze(2)).squeeze(2) for part, rows in parts])


def _ranked_by(
    products: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    score_function: str | None,
    expert_bias: torch.Tensor | None,
    experts: slice | torch.Tensor,
) -> torch.Tensor:
    """[n, m] scores by which experts are ranked, from ``products`` [n, m], which may be overwritten."""
    if bias is not None or score_function is not None:
        products *= scale.unsqueeze(1)
    if bias is not None:
        products += bias[experts].float()
    return selection_scores(products, score_function, None if expert_bias is None else expert_bias[experts])


def _max_per_column(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum [n] and its row [n] of scores [C, n]. With many rows, the faster ``amax`` over groups comes first."""
    num_rows, size = scores.shape
    if num_rows % _STRIPES or num_rows < _MANY_ROWS:
        return scores.max(dim=0)
    grouped = scores.view(_STRIPES, num_rows // _STRIPES, size)
    values, group = grouped.amax(dim=0).max(dim=0)
    stripe = grouped.gather(1, group.expand(_STRIPES, 1, size)).squeeze(1).argmax(dim=0)
    return values, stripe * (num_rows // _STRIPES) + group


def _topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and columns of the k largest scores per row of [C, n], in descending order; of all n if k is larger.

    The columns are divided into groups. The k largest scores are in the k groups with the largest maxima.
    """
    num_rows, size = scores.shape
    k, num_groups = min(k, size), size // _STRIPES
    if size % _STRIPES or num_groups < 2 * k:
        return scores.topk(k, dim=1)
    grouped = scores.view(num_rows, _STRIPES, num_groups)
    groups = grouped.amax(dim=1).topk(k, dim=1).indices
    candidates = grouped.gather(2, groups.unsqueeze(1).expand(-1, _STRIPES, -1)).flatten(1)
    values, slots = candidates.topk(k, dim=1)
    return values, slots // k * num_groups + groups.gather(1, slots % k)
