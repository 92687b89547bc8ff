"""What the compact dispatcher sends to each rank, and what it makes of the answers: each token once per rank.

Legend: T tokens, H hidden, K top-k, D expert-parallel ranks, R rows to send, N pairs to send.
"""

import torch

from air_moe_megatron.ops.backend import use_kernels
from air_moe_megatron.ops.exchange.sorted import SortedPlan, make_sorted_plan, sorted_combine, sorted_pack

__all__ = ["combine", "make_plan", "pack"]


@torch.compiler.disable
def make_plan(topk_ids: torch.Tensor, probs: torch.Tensor, num_ranks: int, num_local_experts: int, misfit: bool):
    """Count what each rank gets. Does not wait for the device.

    Rows lie in the order of (rank, token), pairs in that of (rank, token, place among the K).

    Args:
        topk_ids: [T, K] int32 or int64, global expert ids; -1 for none. One may stand twice in a row: two pairs.
        probs: [T, K], any float dtype; looked at only to count those that are not finite.
        num_ranks: D.
        num_local_experts: experts of each rank.
        misfit: whether the shapes of this rank's ids and probs were wrong, which the others learn from the counts. Then
            the ids are stand-ins, all -1.
    Returns:
        a plan, whose ``counts`` [D, 5] int64 hold the rows and pairs for each rank, and what is invalid on this one:
        ids, probs, shapes.

    Example: ids [[0, 3, 1], [2, -1, -1]] over 2 ranks of 2 experts make the rows (rank 0, token 0), (1, 0), (1, 1) and
    the counts [[1, 2, 0, 0, 0], [2, 2, 0, 0, 0]].
    """
    # Rows of one rank stay where they are: nothing is packed, and the plan only counts.
    if num_ranks > 1 and use_kernels("exchange", probs, num_ranks=num_ranks, topk=topk_ids.shape[1]):
        from air_moe_megatron.ops.exchange import kernels

        return kernels.make_plan(topk_ids, probs, num_ranks, num_local_experts, misfit)
    return make_sorted_plan(topk_ids, probs, num_ranks, num_local_experts, misfit)


@torch.compiler.disable
def pack(hidden: torch.Tensor, probs: torch.Tensor, plan, num_rows: int, num_pairs: int):
    """Gather each token's row for every rank that wants it, and each pair, in the order in which they are sent.

    Differentiable in hidden and probs. Does not wait for the device.

    Args:
        hidden: [T, H], any float dtype.
        probs: [T, K], any float dtype.
        plan: of these tokens.
        num_rows: R, the sum of ``plan.counts[:, 0]``.
        num_pairs: N, the sum of ``plan.counts[:, 1]``.
    Returns:
        [R, H] rows; [N] int32 codes: the local expert id, its bits inverted for the first pair of a row, so that the
        receiver knows the rows without being told; [N] probs.

    Example: hidden [[7], [8]] with the plan of :func:`make_plan`'s example gives the rows [[7], [7], [8]], the codes
    [~0, 1, ~1, ~0] and of probs [[a, b, c], [d, 0, 0]] the pairs [a, c, b, d].
    """
    if isinstance(plan, SortedPlan):
        return sorted_pack(hidden, probs, plan, num_rows, num_pairs)
    from air_moe_megatron.ops.exchange import kernels

    return kernels.pack(hidden, probs, plan, num_rows, num_pairs)


@torch.compiler.disable
def combine(partial_sums: torch.Tensor, plan) -> torch.Tensor:
    """Add up the rows of each token, in fp32 or wider. Differentiable; does not wait for the device.

    The kernels add in the order of the ranks, with equal bits in every run; torch's atomic additions on a GPU do so
    only while its deterministic algorithms are on.

    Args:
        partial_sums: [R, H], any float dtype, in the order of :func:`pack`'s rows.
        plan: of these rows.
    Returns:
        [T, H] in the dtype of the partial sums; zero for a token without rows.

    Example: rows [[1], [2], [3]] with the plan of :func:`make_plan`'s example give [[3], [3]].
    """
    if isinstance(plan, SortedPlan):
        return sorted_combine(partial_sums, plan)
    from air_moe_megatron.ops.exchange import kernels

    return kernels.combine(partial_sums, plan)
