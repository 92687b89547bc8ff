"""The contents of shortlists: pure functions from scores to lists, and draws from lists.

Legend: T tokens, H hidden, E experts, C clusters, L shortlist, P probes, X explored candidates.
"""

import torch

from air_moe_megatron.ops.ranking import Ranking
from air_moe_megatron.ops.unit_vectors import unit_rows


def reserved_slots(num_experts: int, num_clusters: int, shortlist_size: int, topk: int) -> int:
    """Number of slots at the end of each list that are reserved for experts that no list would hold otherwise.

    The reserved slots suffice for all experts, unless the top-k leaves too little room. For lists in parts, pass the
    experts, slots and top-k of one part.

    Example: E = 16384, C = 512, L = 128 reserves 32 of the 128 slots.
    """
    return min(-(-num_experts // num_clusters), shortlist_size - topk)


@torch.no_grad()
def list_every_expert(ranking: Ranking, reserved: int, num_rebuilds: int = 0) -> torch.Tensor:
    """Make shortlists that together hold every expert: the *orphan rule*.

    The slots before the reserved ones go to the experts that score highest at the codeword. Experts that are then in no
    list are orphans. In the order of their scores, the best first, an orphan takes a reserved slot at its best
    codeword, or any free reserved slot if that list is full. Slots that no orphan takes go to the next-best experts. So
    an expert that no token selects any more is still scored, and can be selected again. If there are more orphans than
    reserved slots, each rebuild gives them to other orphans.

    Args:
        ranking: its lists are [C, L], best first.
        reserved: slots per list, see :func:`reserved_slots`; 0 leaves the lists as they are.
        num_rebuilds: number of rebuilds so far, which decides which orphans get reserved slots.
    Returns:
        [C, L] int32, ascending expert ids.

    Example: two codewords both rank the experts 0, 1, 2, 3, and lists have 3 slots, 2 of them reserved. Both lists keep
    expert 0; the orphans 1, 2, 3 take three of the four reserved slots.
    """
    lists = ranking.lists
    num_clusters, num_experts = lists.shape[0], ranking.nearest.numel()
    kept, tail = lists[:, : lists.shape[1] - reserved], lists[:, lists.shape[1] - reserved :]
    is_orphan = torch.ones(num_experts, dtype=torch.bool, device=lists.device)
    is_orphan[kept.flatten()] = False
    orphans = torch.nonzero(is_orphan).flatten()
    if reserved == 0 or orphans.numel() == 0:
        return lists.sort(dim=1).values.int()
    room = num_clusters * reserved
    if orphans.numel() > room:
        orphans = orphans.roll(-num_rebuilds * room)[:room]
    by_score = orphans[ranking.score[orphans].argsort(descending=True, stable=True)]
    codeword = ranking.nearest[by_score]
    order = codeword.argsort(stable=True)
    orphans, codeword = by_score[order], codeword[order]
    first = torch.searchsorted(codeword, torch.arange(num_clusters, device=lists.device))
    slot = torch.arange(orphans.numel(), device=lists.device) - first[codeword]
    slots = lists.new_full((num_clusters, reserved), -1)
    fits = slot < reserved
    slots[codeword[fits], slot[fits]] = orphans[fits]
    unplaced = orphans[~fits]
    free = torch.nonzero(slots.flatten() < 0).flatten()[: unplaced.numel()]
    slots.view(-1)[free] = unplaced
    rest = _first_distinct(torch.cat((slots, tail), dim=1), reserved)
    return torch.cat((kept, rest), dim=1).sort(dim=1).values.int()


def _first_distinct(ids: torch.Tensor, count: int) -> torch.Tensor:
    """[C, count] first ids of each row that are not -1 and do not repeat an earlier one."""
    sorted_ids, slots = ids.sort(dim=1, stable=True)
    out = sorted_ids < 0
    out[:, 1:] |= sorted_ids[:, 1:] == sorted_ids[:, :-1]
    where = slots.masked_fill(out, ids.shape[1]).topk(count, dim=1, largest=False, sorted=True).values
    return ids.gather(1, where)


def inverted_lists(codewords: torch.Tensor, weight: torch.Tensor, capacity: int) -> torch.Tensor:
    """Put every expert into the list of its nearest codeword that has room: an inverted file with a list capacity.

    In each round every expert without a list proposes to its nearest codeword with room, and each codeword takes the
    nearest of these experts. Every expert ends up in exactly one list.

    Args:
        codewords: [C, H] fp32, unit rows.
        weight: [E, H] expert centers.
        capacity: most experts per list; C * capacity must be at least E.
    Returns:
        [C, capacity] int32, ascending expert ids, -1 at the end of a shorter list.
    """
    num_clusters, num_experts = codewords.shape[0], weight.shape[0]
    similarity = unit_rows(weight) @ codewords.t()  # [E, C]
    lists = torch.full((num_clusters, capacity), num_experts, dtype=torch.int64, device=weight.device)
    used = torch.zeros(num_clusters, dtype=torch.int64, device=weight.device)
    outside = torch.arange(num_experts, device=weight.device)
    while outside.numel():
        scores = similarity[outside].masked_fill(used >= capacity, float("-inf"))
        score, codeword = scores.max(dim=1)
        # Nearest first within each codeword: a stable sort by codeword of the experts sorted by score.
        by_score = score.argsort(descending=True, stable=True)
        order = by_score[codeword[by_score].argsort(stable=True)]
        counts = torch.bincount(codeword, minlength=num_clusters)
        rank = torch.arange(order.numel(), device=order.device) - (counts.cumsum(0) - counts)[codeword[order]]
        slot = used[codeword[order]] + rank
        taken = slot < capacity
        lists[codeword[order][taken], slot[taken]] = outside[order[taken]]
        used = (used + counts).clamp(max=capacity)
        outside = outside[order[~taken]].sort().values
    lists = lists.sort(dim=1).values
    return lists.masked_fill(lists == num_experts, -1).int()


@torch.no_grad()
def draw_slots(probes: torch.Tensor, shortlist_size: int, number: int, num_updates: int) -> torch.Tensor:
    """Draw X of the P * L slots that each token searches, equally spaced from a start that moves with every update.

    The start depends on the token's codewords and not on its position in the batch. So tokens draw the same slots
    however a batch is spread over ranks. In P * L updates each draw visits every slot once, because its step is a prime
    above P * L. The hash and its constants are those of xxHash (github.com/Cyan4973/xxHash), shortened.

    Args:
        probes: [T, P] int64, the codewords whose lists each token searches.
        shortlist_size: L.
        number: X, at most P * L.
        num_updates: number of codebook updates so far.
    Returns:
        [T, X] int64, slots from 0 to P * L - 1.
    """
    total = probes.shape[1] * shortlist_size
    mixed = (probes + 1) * 0x9E3779B1 % 2**32
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77 % 2**32
    offset = (mixed ^ (mixed >> 13)).sum(dim=1, keepdim=True) + num_updates * 0x27D4EB2F
    first = torch.arange(number, device=probes.device) * total // number
    return (first + offset) % total


@torch.no_grad()
def without_repeats(drawn: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """[T, X] ids ``drawn``, with -1 for an id that is also in that row of ``others`` [T, M] or earlier in ``drawn``."""
    kept = drawn.clone()
    for column in range(drawn.shape[1]):
        ids = drawn[:, column : column + 1]
        is_repeat = (others == ids).any(dim=1) | (drawn[:, :column] == ids).any(dim=1)
        kept[:, column].masked_fill_(is_repeat, -1)
    return kept


def balanced_lists(num_clusters: int, shortlist_size: int, num_experts: int, device: torch.device) -> torch.Tensor:
    """Lists of consecutive experts, spread evenly over the ids and independent of the weights; for load tests.

    Every expert has the same number of slots if C * L is a multiple of E, otherwise one more or less. If there are
    fewer slots than experts, some experts have none.

    Returns:
        [C, L] int32, ascending expert ids.
    """
    first = torch.arange(num_clusters, device=device) * num_experts // num_clusters
    lists = (first.unsqueeze(1) + torch.arange(shortlist_size, device=device)) % num_experts
    return lists.sort(dim=1).values.int()
