"""The exchange with torch operations: pairs sorted by rank, rows found by ``nonzero_static``."""

from dataclasses import dataclass

import torch

from air_moe_megatron.ops.dtypes import at_least_fp32


@dataclass(frozen=True)
class SortedPlan:
    """The plan of the torch version; :class:`air_moe_megatron.ops.exchange.kernels.ExchangePlan` is the kernels'."""

    counts: torch.Tensor  # [D, 5] int64: rows and pairs for each rank; invalid ids, probs and shapes on this rank
    pair_ranks: torch.Tensor  # [T*K] int64, rank of each pair; D where there is no pair
    is_wanted: torch.Tensor  # [T, D] bool, whether a rank holds any expert of a token
    topk_ids: torch.Tensor  # [T, K] int64
    num_local_experts: int

    @property
    def shape(self) -> torch.Size:
        """[T, K]."""
        return self.topk_ids.shape

    def tokens_of_rows(self, num_rows: int) -> torch.Tensor:
        """[R] int64, the token of each row, rows in the order of (rank, token)."""
        return torch.nonzero_static(self.is_wanted.t(), size=num_rows)[:, 1]


@torch.no_grad()
def make_plan(
    topk_ids: torch.Tensor, probs: torch.Tensor, num_ranks: int, num_local_experts: int, mismatch: bool
) -> SortedPlan:
    """As :func:`air_moe_megatron.ops.exchange.make_plan`."""
    ids = topk_ids.long()
    is_pair = (ids >= 0) & (ids < num_ranks * num_local_experts)
    ranks = torch.where(is_pair, ids // num_local_experts, num_ranks)  # [T, K]
    pair_ranks = ranks.reshape(-1)
    if num_ranks == 1:  # atomic additions to a single count would be serialized
        is_wanted, num_pairs = is_pair.any(dim=1, keepdim=True), is_pair.sum().view(1)
    else:
        is_wanted = torch.zeros(ids.shape[0], num_ranks + 1, dtype=torch.bool, device=ids.device)
        is_wanted = is_wanted.scatter_(1, ranks, True)[:, :num_ranks]
        num_pairs = torch.zeros(num_ranks + 1, dtype=torch.int64, device=ids.device)
        num_pairs.scatter_add_(0, pair_ranks, torch.ones_like(pair_ranks))
    invalid_ids = (~is_pair & (ids != -1)).sum().expand(num_ranks)
    invalid_probs = (~probs.isfinite()).sum().expand(num_ranks)
    mismatches = torch.full_like(invalid_ids, mismatch)
    columns = (is_wanted.sum(dim=0), num_pairs[:num_ranks], invalid_ids, invalid_probs, mismatches)
    return SortedPlan(torch.stack(columns, dim=1), pair_ranks, is_wanted, ids, num_local_experts)


def pack(
    hidden: torch.Tensor, probs: torch.Tensor, plan: SortedPlan, num_rows: int, num_pairs: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`air_moe_megatron.ops.exchange.pack`."""
    order = plan.pair_ranks.argsort(stable=True)[:num_pairs]  # pairs without a rank come last
    return hidden[plan.tokens_of_rows(num_rows)], _encode(plan, order, probs.shape[1]), probs.reshape(-1)[order]


@torch.no_grad()
def _encode(plan: SortedPlan, order: torch.Tensor, topk: int) -> torch.Tensor:
    keys = plan.pair_ranks[order] * plan.topk_ids.shape[0] + order // topk  # (rank, token)
    is_first = torch.ones_like(keys, dtype=torch.bool)
    is_first[1:] = keys[1:] != keys[:-1]
    local_ids = plan.topk_ids.reshape(-1)[order] % plan.num_local_experts
    return torch.where(is_first, ~local_ids, local_ids).int()


def combine(partial_sums: torch.Tensor, plan: SortedPlan) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.exchange.combine`."""
    wide = at_least_fp32(partial_sums.dtype)
    sums = torch.zeros(plan.topk_ids.shape[0], partial_sums.shape[1], dtype=wide, device=partial_sums.device)
    sums = sums.index_add(0, plan.tokens_of_rows(partial_sums.shape[0]), partial_sums.to(wide))
    return sums.to(partial_sums.dtype)
