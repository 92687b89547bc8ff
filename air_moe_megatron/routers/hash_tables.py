"""The tables of the hash router: K distinct experts for each token id.

By default (:func:`balanced_table`) the numbers of ids per expert differ by at most one. With ``moe_hash_balance``
"frequency" (:func:`frequency_table`) the tokens per expert are as equal as K experts per id allow.

Legend: V token ids; others as in ``ops/__init__.py``.
"""

import torch


def balanced_table(num_ids: int, topk: int, num_experts: int, seed: int) -> torch.Tensor:
    """Table of K distinct experts for each id, whose numbers of ids per expert differ by at most one.

    The experts are dealt out in a random order, K per row, and the rows are then shuffled. A new order is drawn when a
    row ends with the last expert of the order.

    Args:
        num_ids: V.
        topk: K.
        num_experts: E.
        seed: seed of the random order; tables of equal arguments are equal.
    Returns:
        [V, K] int32.

    Example: 4 ids, K = 1 and 4 experts: a permutation of the experts.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = torch.arange(1, num_experts + 1) * topk % num_experts  # 0 where a row ends with the last expert
    rows_per_deal = int((ends == 0).nonzero()[0]) + 1
    num_deals = -(-num_ids // rows_per_deal)
    orders = torch.rand(num_deals, num_experts, generator=generator, dtype=torch.float32).argsort(dim=1)
    row = torch.arange(num_ids).unsqueeze(1)
    slots = (row % rows_per_deal * topk + torch.arange(topk)) % num_experts
    table = orders[row // rows_per_deal, slots]
    return table[torch.randperm(num_ids, generator=generator)].int()


_SAME_FREQUENCY = 16
"""One deal takes at most 1/16 as many ids as came before it in the order of frequency: their counts hardly differ."""

_DEALT_SHARE = 4
"""One deal takes at most 1/4 of the experts, those with the fewest tokens."""


def frequency_table(counts: torch.Tensor, topk: int, num_experts: int, seed: int) -> torch.Tensor:
    """Table of K distinct experts for each id, with numbers of tokens per expert as equal as K per id allow.

    Longest-processing-time rule: ids, the most frequent first, take the experts that have the fewest tokens so far. The
    experts are dealt out in random order to several ids of about equal frequency at once. One id at a time would take
    the K experts of one earlier id, because these have equal loads, and both ids would share all experts. Each id
    counts half a token more than ``counts`` says. Source: Graham 1969, "Bounds on Multiprocessing Timing Anomalies".

    Args:
        counts: [V] number of tokens of each id.
        topk, num_experts, seed: as for :func:`balanced_table`.
    Returns:
        [V, K] int32.

    Example: with counts 6, 2, 2, 2, K = 1 and two experts, id 0 has one expert, and the others share the other.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = counts.double() + 0.5
    ids = weights.argsort(descending=True, stable=True)
    loads = torch.zeros(num_experts, dtype=torch.float64)
    table = torch.empty(counts.numel(), topk, dtype=torch.int32)
    most = max(1, num_experts // (_DEALT_SHARE * topk))
    first = 0
    while first < ids.numel():
        dealt = ids[first : first + min(most, max(1, first // _SAME_FREQUENCY))]
        shuffled = torch.rand(num_experts, generator=generator, dtype=torch.float32).argsort(stable=True)
        least = shuffled[loads[shuffled].argsort(stable=True)[: dealt.numel() * topk]]
        experts = least[torch.randperm(least.numel(), generator=generator)].view(-1, topk)
        table[dealt] = experts.int()
        loads[experts] += weights[dealt].unsqueeze(1)
        first += dealt.numel()
    return table
