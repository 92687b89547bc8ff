"""The two permutations of the compact dispatcher: from tokens to one row per destination rank, and back."""

from typing import TYPE_CHECKING, Union

import torch

from air_moe_megatron.ops.backend import use_kernels
from air_moe_megatron.ops.exchange import eager

if TYPE_CHECKING:
    from air_moe_megatron.ops.exchange.kernels import ExchangePlan

__all__ = ["Plan", "combine", "make_plan", "pack"]

Plan = Union[eager.SortedPlan, "ExchangePlan"]
"""Which rank gets which rows and pairs; the plan of the torch version, or that of the kernels."""


@torch.compiler.disable
def make_plan(
    topk_ids: torch.Tensor, probs: torch.Tensor, num_ranks: int, num_local_experts: int, mismatch: bool = False
) -> Plan:
    """Plan which rows and pairs each rank gets. Does not wait for the device.

    Rows are in the order of (rank, token), and pairs in the order of (rank, token, slot among the K).

    Args:
        topk_ids: [T, K] int32 or int64, global expert ids; -1 for none. An id that is in a row twice makes two pairs.
        probs: [T, K], any float dtype; read only to count those that are not finite.
        num_ranks: D.
        num_local_experts: number of experts on each rank.
        mismatch: whether the shapes of this rank's ids and probs were wrong. If so, ``topk_ids`` must be all -1, and
            the counts tell the other ranks.
    Returns:
        a plan. Its ``counts`` [D, 5] int64 hold the numbers of rows and pairs for each rank, and the numbers of invalid
        ids, probs and shapes on this rank.
    Raises:
        ValueError: if shapes do not fit, or there are 2^31 experts or more.

    Example: ids [[0, 3, 1], [2, -1, -1]] over 2 ranks of 2 experts make the rows (rank 0, token 0), (1, 0), (1, 1) and
    the counts [[1, 2, 0, 0, 0], [2, 2, 0, 0, 0]].
    """
    if topk_ids.dim() != 2 or topk_ids.shape != probs.shape or topk_ids.shape[1] == 0:
        raise ValueError(
            f"topk_ids {tuple(topk_ids.shape)} and probs {tuple(probs.shape)} must both be [T, K] with K at least 1"
        )
    if num_ranks * num_local_experts >= 2**31:
        raise ValueError(f"experts ({num_ranks} * {num_local_experts}) must be fewer than 2^31")
    sizes = dict(num_ranks=num_ranks, topk=topk_ids.shape[1], num_pairs=topk_ids.numel())
    # With one rank all rows stay in place: nothing is packed, and the plan only counts.
    if num_ranks > 1 and use_kernels("exchange", probs, **sizes):
        from air_moe_megatron.ops.exchange import kernels

        return kernels.make_plan(topk_ids, probs, num_ranks, num_local_experts, mismatch)
    return eager.make_plan(topk_ids, probs, num_ranks, num_local_experts, mismatch)


@torch.compiler.disable
def pack(
    hidden: torch.Tensor, probs: torch.Tensor, plan: Plan, num_rows: int, num_pairs: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gather rows and pairs in the order in which they are sent: a row for each token and rank that has its experts.

    Differentiable in hidden and probs. Does not wait for the device.

    Args:
        hidden: [T, H], any float dtype.
        probs: [T, K], any float dtype.
        plan: the plan of these tokens.
        num_rows: R, the sum of ``plan.counts[:, 0]``.
        num_pairs: N, the sum of ``plan.counts[:, 1]``.
    Returns:
        [R, H] rows; [N] int32 codes; [N] probs. A code is the local expert id. Its bits are inverted for the first pair
        of a row, so that the receiver can tell which pairs belong to which row.
    Raises:
        ValueError: if the shapes do not fit together.

    Example: hidden [[7], [8]] with the plan of :func:`make_plan`'s example gives the rows [[7], [7], [8]], the codes
    [~0, 1, ~1, ~0] and of probs [[a, b, c], [d, 0, 0]] the pairs [a, c, b, d].
    """
    if hidden.dim() != 2 or hidden.shape[0] != probs.shape[0] or probs.shape != plan.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} must be [T, H] and probs {tuple(probs.shape)} [T, K] "
            f"with the plan's T and K, {tuple(plan.shape)}"
        )
    if isinstance(plan, eager.SortedPlan):
        return eager.pack(hidden, probs, plan, num_rows, num_pairs)
    from air_moe_megatron.ops.exchange import kernels

    return kernels.pack(hidden, probs, plan, num_rows, num_pairs)


@torch.compiler.disable
def combine(partial_sums: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Sum the rows of each token, in fp32 or wider. Differentiable; does not wait for the device.

    The kernels add in the order of the ranks, so the bits are equal in every run. On a GPU torch uses atomic additions,
    unless its deterministic algorithms are on.

    Args:
        partial_sums: [R, H], any float dtype, in the order of :func:`pack`'s rows.
        plan: the plan of these rows.
    Returns:
        [T, H] in the dtype of the partial sums; zero for a token without rows.
    Raises:
        ValueError: if the partial sums are not a matrix.

    Example: rows [[1], [2], [3]] with the plan of :func:`make_plan`'s example give [[3], [3]].
    """
    if partial_sums.dim() != 2:
        raise ValueError(f"partial_sums {tuple(partial_sums.shape)} must be [R, H]")
    if isinstance(plan, eager.SortedPlan):
        return eager.combine(partial_sums, plan)
    from air_moe_megatron.ops.exchange import kernels

    return kernels.combine(partial_sums, plan)
