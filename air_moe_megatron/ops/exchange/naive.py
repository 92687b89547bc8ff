"""Ground truth of the exchange: what the compact dispatcher sends to each rank, with sorts and plain autograd."""

import torch

from air_moe_megatron.ops.dtypes import at_least_fp32


def naive_ranks(topk_ids: torch.Tensor, num_ranks: int, num_local_experts: int) -> torch.Tensor:
    """[T, K] rank of each pair; D where the id is not that of an expert."""
    is_pair = (topk_ids >= 0) & (topk_ids < num_ranks * num_local_experts)
    return torch.where(is_pair, topk_ids.long() // num_local_experts, num_ranks)


def naive_counts(
    topk_ids: torch.Tensor, probs: torch.Tensor, num_ranks: int, num_local_experts: int, mismatch: bool = False
) -> torch.Tensor:
    """[D, 5] int64: rows and pairs for each rank, and invalid ids, probs and shapes on this rank."""
    ranks = naive_ranks(topk_ids, num_ranks, num_local_experts)
    here = torch.nn.functional.one_hot(ranks, num_ranks + 1)[..., :num_ranks]  # [T, K, D]
    invalid_ids = ((ranks == num_ranks) & (topk_ids != -1)).sum().expand(num_ranks)
    invalid_probs = (~probs.isfinite()).sum().expand(num_ranks)
    mismatches = torch.full_like(invalid_ids, mismatch)
    return torch.stack(
        (here.any(dim=1).sum(dim=0), here.sum(dim=(0, 1)), invalid_ids, invalid_probs, mismatches), dim=1
    )


def naive_row_tokens(topk_ids: torch.Tensor, num_ranks: int, num_local_experts: int) -> torch.Tensor:
    """[R] int64: the token of each row, rows in the order of (rank, token)."""
    ranks = naive_ranks(topk_ids, num_ranks, num_local_experts)
    is_wanted = torch.zeros(topk_ids.shape[0], num_ranks + 1, dtype=torch.bool, device=topk_ids.device)
    is_wanted.scatter_(1, ranks, True)
    return is_wanted[:, :num_ranks].t().nonzero()[:, 1]


def naive_pack(
    hidden: torch.Tensor, topk_ids: torch.Tensor, probs: torch.Tensor, num_ranks: int, num_local_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[R, H] rows in the order of (rank, token); [N] int32 codes and [N] probs in the order of (rank, token, slot)."""
    num_tokens, topk = topk_ids.shape
    pair_ranks = naive_ranks(topk_ids, num_ranks, num_local_experts).reshape(-1)
    order = pair_ranks.argsort(stable=True)[: (pair_ranks < num_ranks).sum()]
    keys = pair_ranks[order] * num_tokens + order // max(topk, 1)  # (rank, token)
    is_first = torch.ones_like(keys, dtype=torch.bool)
    is_first[1:] = keys[1:] != keys[:-1]
    local_ids = topk_ids.long().reshape(-1)[order] % num_local_experts
    codes = torch.where(is_first, ~local_ids, local_ids).int()
    rows = hidden[naive_row_tokens(topk_ids, num_ranks, num_local_experts)]
    return rows, codes, probs.reshape(-1)[order]


def naive_combine(partial_sums: torch.Tensor, row_tokens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """[T, H]: the sums of each token's rows, in fp32 or wider; zero for a token without rows."""
    wide = at_least_fp32(partial_sums.dtype)
    sums = torch.zeros(num_tokens, partial_sums.shape[1], dtype=wide, device=partial_sums.device)
    return sums.index_add(0, row_tokens, partial_sums.to(wide)).to(partial_sums.dtype)
