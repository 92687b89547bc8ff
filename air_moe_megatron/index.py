"""The inverted index: codeword -> shortlist of experts.

Legend: H hidden, E experts, C clusters, L shortlist.
"""

from dataclasses import dataclass

import torch

from air_moe_megatron.codebook import Codebook

SOURCES = ("tokens", "experts")

_CHUNK_ELEMENTS = 2**26  # of the scores [C, n] of a chunk of experts: 256 MiB
_STRIPES = 8  # experts that one maximum stands for in the first step of a top-k
_SPARE = 32  # candidates of a chunk beyond twice those expected
_FIRST_LLOYD_STEPS = 10


@dataclass(frozen=True)
class Ranking:
    """What one pass over all experts finds out."""

    lists: torch.Tensor  # [C, L] int64, the experts that score highest at each codeword, best first
    nearest: torch.Tensor  # [E] int64, the codeword at which each expert scores highest
    score: torch.Tensor  # [E] fp32, that score


@torch.no_grad()
def rank_experts(codewords, scale, weight, bias, shortlist_size, selection=None, chunk_elements=_CHUNK_ELEMENTS):
    """Rank the experts at each codeword by ``scale_c * <w_e, c> + b_e``, and the codewords at each expert.

    The experts are streamed in chunks, so that no [C, E] tensor is held for large E. Waits for the device.

    Args:
        codewords: [C, H] fp32, unit rows.
        scale: [C] fp32, typical ``<h, c>`` of a codeword's tokens; matters only beside a bias.
        weight: [E, H] expert centres, any float dtype.
        bias: [E] or None.
        shortlist_size: experts per list.
        selection: None, or a function (scores [C, n], slice of the n experts) -> [C, n] of what to rank by instead.
        chunk_elements: scores held at a time.
    """
    num_clusters, num_experts = codewords.shape[0], weight.shape[0]
    chunk = min(num_experts, max(chunk_elements // num_clusters, 1))
    chunks = [slice(first, min(first + chunk, num_experts)) for first in range(0, num_experts, chunk)]
    buffer = torch.empty(num_clusters * chunk, device=weight.device)  # on a CPU, fresh memory costs more than its use

    def score(experts):
        size = experts.stop - experts.start
        scores = torch.mm(codewords, weight[experts].float().t(), out=buffer[: num_clusters * size].view(-1, size))
        if bias is not None or selection is not None:
            scores *= scale.unsqueeze(1)
        if bias is not None:
            scores += bias[experts].float()
        return scores if selection is None else selection(scores, experts)

    # About one in so many of a list's experts is in each chunk; twice that, and few lists ask for more.
    kept = min(shortlist_size, 2 * -(-shortlist_size // len(chunks)) + _SPARE)
    values, ids, nearest, highest = [], [], [], []
    for experts in chunks:
        scores = score(experts)
        for parts, part in zip((highest, nearest), _max_per_column(scores), strict=True):
            parts.append(part)
        for parts, part in zip((values, ids), _topk(scores, kept), strict=True):
            parts.append(part)
    best, places = torch.cat(values, dim=1).topk(shortlist_size, dim=1)
    fully_kept = [part.shape[1] == experts.stop - experts.start for part, experts in zip(values, chunks, strict=True)]
    asks_for_more = (torch.stack([part[:, -1] for part in values]) > best[:, -1]).any(dim=1).tolist()
    for number, experts in enumerate(chunks):
        if asks_for_more[number] and not fully_kept[number] and kept < shortlist_size:
            values[number], ids[number] = _topk(score(experts), shortlist_size)
    if any(asks_for_more):
        best, places = torch.cat(values, dim=1).topk(shortlist_size, dim=1)
    ids = torch.cat([part + experts.start for part, experts in zip(ids, chunks, strict=True)], dim=1)
    return Ranking(ids.gather(1, places), torch.cat(nearest), torch.cat(highest))


def _max_per_column(scores):
    """Maximum [n] and its row [n] of scores [C, n]; over groups of rows first, as ``amax`` is the quick part."""
    num_rows, size = scores.shape
    if num_rows % _STRIPES:
        return scores.max(dim=0)
    grouped = scores.view(_STRIPES, num_rows // _STRIPES, size)
    values, group = grouped.amax(dim=0).max(dim=0)
    stripe = grouped.gather(1, group.expand(_STRIPES, 1, size)).squeeze(1).argmax(dim=0)
    return values, stripe * (num_rows // _STRIPES) + group


def _topk(scores, k):
    """Values and columns of the k largest per row of scores [C, n], in descending order; of all n if k is larger.

    The columns are divided into groups: the k largest lie in the k groups of the largest maxima.
    """
    num_rows, size = scores.shape
    k, num_groups = min(k, size), size // _STRIPES
    if size % _STRIPES or num_groups < 2 * k:
        return scores.topk(k, dim=1)
    grouped = scores.view(num_rows, _STRIPES, num_groups)
    groups = grouped.amax(dim=1).topk(k, dim=1).indices
    candidates = grouped.gather(2, groups.unsqueeze(1).expand(-1, _STRIPES, -1)).flatten(1)
    values, places = candidates.topk(k, dim=1)
    return values, places // k * num_groups + groups.gather(1, places % k)


def reserved_places(num_experts: int, num_clusters: int, shortlist_size: int, topk: int) -> int:
    """Places at the end of each list that go to experts which no list would hold: enough for all of them, where the
    top-k leaves room.

    Example: E = 16384, C = L = 256 reserves 64 of the 256 places.
    """
    return min(-(-num_experts // num_clusters), shortlist_size - topk)


@torch.no_grad()
def list_every_expert(ranking: Ranking, reserved: int, turn: int = 0):
    """Shortlists that hold every expert: the *orphan rule*.

    A list keeps the experts that score highest at its codeword, up to its reserved places. The experts that no list
    keeps are the orphans. Each goes into a reserved place of the codeword at which it scores highest, the highest
    scores first; those that find it full go where there is room, in order. Places that no orphan takes go to the
    experts that score highest next. So an expert that the model has left is still scored for the tokens that it suits
    best, and can come back. Where there are more orphans than reserved places, they take turns.

    Args:
        ranking: lists best first.
        reserved: places per list, see :func:`reserved_places`; 0 leaves the lists as they are.
        turn: number of the rebuild; whose turn it is.
    Returns:
        [C, L] int32, ascending expert ids.

    Example: two codewords that both rank the experts 0, 1, 2, 3, lists of 3 with 2 places reserved: both keep 0; the
    orphans 1, 2, 3 take three of the four places.
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
        orphans = orphans.roll(-turn * room)[:room]
    by_score = orphans[ranking.score[orphans].argsort(descending=True, stable=True)]
    codeword = ranking.nearest[by_score]
    order = codeword.argsort(stable=True)
    orphans, codeword = by_score[order], codeword[order]
    first = torch.searchsorted(codeword, torch.arange(num_clusters, device=lists.device))
    place = torch.arange(orphans.numel(), device=lists.device) - first[codeword]
    places = lists.new_full((num_clusters, reserved), -1)
    fits = place < reserved
    places[codeword[fits], place[fits]] = orphans[fits]
    homeless = orphans[~fits]
    free = torch.nonzero(places.flatten() < 0).flatten()[: homeless.numel()]
    places.view(-1)[free] = homeless
    rest = _first_distinct(torch.cat((places, tail), dim=1), reserved)
    return torch.cat((kept, rest), dim=1).sort(dim=1).values.int()


def _first_distinct(ids, count):
    """[C, count]: the first ids of each row that are not -1 and do not repeat an earlier one."""
    sorted_ids, places = ids.sort(dim=1, stable=True)
    out = sorted_ids < 0
    out[:, 1:] |= sorted_ids[:, 1:] == sorted_ids[:, :-1]
    where = places.masked_fill(out, ids.shape[1]).topk(count, dim=1, largest=False, sorted=True).values
    return ids.gather(1, where)


def inverted_lists(codewords, weight, capacity):
    """Put every expert into the list of its nearest codeword that has room: a classic inverted file, bounded.

    In each round the experts still outside propose to their nearest codeword with room, which takes the nearest of
    them. Every expert ends up in exactly one list.

    Args:
        codewords: [C, H] fp32, unit rows.
        weight: [E, H] expert centres.
        capacity: experts a list can hold; C * capacity must be at least E.
    Returns:
        [C, capacity] int32, ascending expert ids, -1 at the end of a shorter list.
    """
    num_clusters, num_experts = codewords.shape[0], weight.shape[0]
    similarity = torch.nn.functional.normalize(weight.float(), dim=1) @ codewords.t()  # [E, C]
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
        place = used[codeword[order]] + rank
        taken = place < capacity
        lists[codeword[order][taken], place[taken]] = outside[order[taken]]
        used = (used + counts).clamp(max=capacity)
        outside = outside[order[~taken]].sort().values
    lists = lists.sort(dim=1).values
    return lists.masked_fill(lists == num_experts, -1).int()


def balanced_lists(num_clusters, shortlist_size, num_experts, device):
    """Lists of consecutive experts, spread evenly over the ids whatever the weights; for load tests.

    Every expert has the same number of places if C * L is a multiple of E, otherwise one more or less; with fewer
    places than experts, some have none.

    Returns:
        [C, L] int32, ascending expert ids.
    """
    first = torch.arange(num_clusters, device=device) * num_experts // num_clusters
    lists = (first.unsqueeze(1) + torch.arange(shortlist_size, device=device)) % num_experts
    return lists.sort(dim=1).values.int()


class ShortlistIndex(torch.nn.Module):
    """The shortlists of one router: derived from codewords and expert centres, rebuilt lazily.

    They are saved with the model, because with a refresh interval above one they come from centres that are no longer
    there when a run resumes.
    """

    def __init__(
        self, num_clusters: int, shortlist_size: int, source: str, refresh_interval: int, num_reserved: int = 0
    ):
        super().__init__()
        self.num_reserved = num_reserved
        self.source = source
        self.refresh_interval = refresh_interval
        self.register_buffer("shortlist", torch.zeros(num_clusters, shortlist_size, dtype=torch.int32))
        self.register_buffer("built_at", torch.full((1,), -1, dtype=torch.int64))
        # Saved, because lists and codewords of one source mean nothing to the other.
        self.register_buffer("source_code", torch.tensor([SOURCES.index(source)]))
        self._built_at_on_host = -1

    def version(self, num_updates: int) -> int:
        """The update after which the lists in force were due: each of the first ``refresh_interval``, then every such
        many, so that a young codebook is followed closely."""
        interval = self.refresh_interval
        return num_updates if num_updates <= interval else num_updates // interval * interval

    def _turn(self, version: int) -> int:
        """How many versions there were before this one."""
        interval = self.refresh_interval
        return version if version <= interval else interval - 1 + version // interval

    @torch.no_grad()
    def refresh(self, codebook: Codebook, weight: torch.Tensor, bias: torch.Tensor | None, selection=None) -> bool:
        """Rebuild the lists if an update made that due; tells whether it did.

        Called at the start of a forward; a recomputed forward finds nothing due and sees the same lists.
        """
        if self._built_at_on_host is None:
            self._built_at_on_host = int(self.built_at)
        version = self.version(codebook.updates_on_host)
        if self._built_at_on_host == version:
            return False
        if self.source == "tokens":
            ranking = rank_experts(
                codebook.codewords, codebook.typical_projections(), weight, bias, self.shortlist.shape[1], selection
            )
            lists = list_every_expert(ranking, self.num_reserved, self._turn(version))
        else:
            if self._built_at_on_host < 0:
                # Start from expert centres spread over the ids instead of from random directions.
                num_clusters = codebook.codewords.shape[0]
                ids = torch.arange(num_clusters, device=weight.device) * weight.shape[0] // num_clusters
                codebook.codewords.copy_(torch.nn.functional.normalize(weight[ids].float(), dim=1))
            codebook.fit_experts(weight, _FIRST_LLOYD_STEPS if self._built_at_on_host < 0 else 1)
            lists = inverted_lists(codebook.codewords, weight, self.shortlist.shape[1])
        self.shortlist.copy_(lists)
        self.built_at.fill_(version)
        self._built_at_on_host = version
        return True

    def _load_from_state_dict(self, state_dict, prefix, *args):
        strict, missing_keys = args[1], args[2]
        loaded = state_dict.get(prefix + "shortlist")
        if loaded is not None and loaded.shape != self.shortlist.shape:
            raise ValueError(
                f"checkpoint holds {prefix}shortlist of shape {tuple(loaded.shape)}, but moe_air_num_clusters and "
                f"moe_air_shortlist_size make it {tuple(self.shortlist.shape)}; train with the sizes of the checkpoint"
            )
        source_code = state_dict.get(prefix + "source_code")
        if source_code is not None and SOURCES[int(source_code)] != self.source:
            raise ValueError(
                f"moe_air_codebook_source ({self.source!r}) must be that of the checkpoint, "
                f"{SOURCES[int(source_code)]!r}: codebooks and lists of one source mean nothing to the other"
            )
        num_missing = len(missing_keys)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if strict and not any(prefix + name in state_dict for name in ("shortlist", "built_at", "source_code")):
            del missing_keys[num_missing:]  # plain top-k routing has no lists: they are built in the first forward
        self._built_at_on_host = None
