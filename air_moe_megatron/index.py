"""The inverted index: codeword -> shortlist of experts.

Legend: H hidden, E experts, C clusters, L shortlist.
"""

from typing import Any

import torch

from air_moe_megatron.codebook import Codebook
from air_moe_megatron.ops.ranking import Ranking, rank_experts
from air_moe_megatron.ops.unit_vectors import unit_rows

SOURCES = ("tokens", "experts")


def reserved_places(num_experts: int, num_clusters: int, shortlist_size: int, topk: int) -> int:
    """Places at the end of each list that go to experts which no list would hold: enough for all of them, where the
    top-k leaves room.

    Example: E = 16384, C = 512, L = 128 reserves 32 of the 128 places.
    """
    return min(-(-num_experts // num_clusters), shortlist_size - topk)


@torch.no_grad()
def list_every_expert(ranking: Ranking, reserved: int, turn: int = 0) -> torch.Tensor:
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


def _first_distinct(ids: torch.Tensor, count: int) -> torch.Tensor:
    """[C, count]: the first ids of each row that are not -1 and do not repeat an earlier one."""
    sorted_ids, places = ids.sort(dim=1, stable=True)
    out = sorted_ids < 0
    out[:, 1:] |= sorted_ids[:, 1:] == sorted_ids[:, :-1]
    where = places.masked_fill(out, ids.shape[1]).topk(count, dim=1, largest=False, sorted=True).values
    return ids.gather(1, where)


def inverted_lists(codewords: torch.Tensor, weight: torch.Tensor, capacity: int) -> torch.Tensor:
    """Put every expert into the list of its nearest codeword that has room: a classic inverted file, bounded.

    In each round the experts still outside propose to their nearest codeword with room, which takes the nearest of
    them. Every expert ends up in exactly one list.

    Args:
        codewords: [C, H] fp32, unit rows.
        weight: [E, H] expert centers.
        capacity: experts a list can hold; C * capacity must be at least E.
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
        place = used[codeword[order]] + rank
        taken = place < capacity
        lists[codeword[order][taken], place[taken]] = outside[order[taken]]
        used = (used + counts).clamp(max=capacity)
        outside = outside[order[~taken]].sort().values
    lists = lists.sort(dim=1).values
    return lists.masked_fill(lists == num_experts, -1).int()


def balanced_lists(num_clusters: int, shortlist_size: int, num_experts: int, device: torch.device) -> torch.Tensor:
    """Lists of consecutive experts, spread evenly over the ids whatever the weights; for load tests.

    Every expert has the same number of places if C * L is a multiple of E, otherwise one more or less; with fewer
    places than experts, some have none.

    Returns:
        [C, L] int32, ascending expert ids.
    """
    first = torch.arange(num_clusters, device=device) * num_experts // num_clusters
    lists = (first.unsqueeze(1) + torch.arange(shortlist_size, device=device)) % num_experts
    return lists.sort(dim=1).values.int()


def due_version(num_updates: int, interval: int) -> int:
    """The update after which the lists in force were due.

    The younger the codebook, the faster tokens and centers move, and the more often lists are rebuilt: with an interval
    of 10 every update makes a rebuild due at first, every second from 20 on, every third from 30 on, and every tenth
    from 100 on.

    Example: interval 10, updates 20 to 25: 20, 20, 22, 22, 24, 24.
    """
    start = num_updates // interval * interval
    step = min(max(1, num_updates // interval), interval)
    return start + (num_updates - start) // step * step


def versions_before(version: int, interval: int) -> int:
    """How many versions of the lists there were before this one: rebuilds in training until then."""
    blocks, rest = divmod(version, interval)
    young = sum(-(-interval // max(1, block)) for block in range(min(blocks, interval)))
    return young + max(0, blocks - interval) + rest // min(max(1, blocks), interval)


def num_rebuilds(num_steps: int, interval: int) -> int:
    """How often the first steps of a training rebuild the lists, with an update of the codebook after each.

    Example: interval 10: 29 in the first 40 steps (20 in twenty, 5 in ten, 4 in ten), then one in ten from step 100 on.
    """
    return 0 if num_steps < 1 else versions_before(due_version(num_steps - 1, interval), interval) + 1


class ShortlistIndex(torch.nn.Module):
    """The shortlists of one router: derived from codewords and expert centers, rebuilt lazily.

    They are saved with the model, because with a refresh interval above one they come from centers that are no longer
    there when a run resumes.

    Args:
        num_clusters: C.
        shortlist_size: L.
        source: "tokens" or "experts".
        refresh_interval: codebook updates, one per global batch, between two rebuilds once the codebook is old.
        num_reserved: places of each list, of the last ones, that orphans may take (:func:`list_every_expert`).
    """

    def __init__(
        self, num_clusters: int, shortlist_size: int, source: str, refresh_interval: int, num_reserved: int = 0
    ) -> None:
        super().__init__()
        self.num_reserved = num_reserved
        self.source = source
        self.refresh_interval = refresh_interval
        self.register_buffer("shortlist", torch.zeros(num_clusters, shortlist_size, dtype=torch.int32))
        self.register_buffer("built_at", torch.full((1,), -1, dtype=torch.int64))
        # Saved, because lists and codewords of one source mean nothing to the other.
        self.register_buffer("source_code", torch.tensor([SOURCES.index(source)]))
        self._built_at_on_host = -1
        self._provisional = None  # what provisional lists were made of

    @property
    def is_built(self) -> bool:
        """Whether training has made the lists; waits for the device only right after a checkpoint was loaded."""
        if self._built_at_on_host is None:
            self._built_at_on_host = int(self.built_at)
        return self._built_at_on_host >= 0

    def is_due(self, codebook: Codebook, weight: torch.Tensor, training: bool = True) -> bool:
        """Whether an update of the codebook has made a rebuild due.

        Asked at the start of a forward. A recomputed forward finds nothing due and sees the same lists. Evaluation
        takes the lists that there are. Where there are none yet, it makes provisional ones, and training begins anew.

        Args:
            codebook: whose updates count.
            weight: [E, H] expert centers.
            training: whether the forward trains.
        """
        if not self.is_built:
            return training or self._provisional != _made_of(codebook, weight)
        return training and self._built_at_on_host != due_version(codebook.updates_on_host, self.refresh_interval)

    @torch.no_grad()
    def rebuild(
        self,
        codebook: Codebook,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        score_function: str | None = None,
        expert_bias: torch.Tensor | None = None,
        training: bool = True,
    ) -> None:
        """Make the lists of the codebook's codewords anew.

        Args:
            codebook: read only.
            weight, bias, score_function, expert_bias: as :func:`rank_experts` takes them.
            training: whether the lists stay in force; otherwise they are provisional.
        """
        version = due_version(codebook.updates_on_host, self.refresh_interval)
        if self.source == "tokens":
            ranking = rank_experts(
                codebook.codewords,
                codebook.typical_projections(),
                weight,
                bias,
                self.shortlist.shape[1],
                score_function,
                expert_bias,
            )
            lists = list_every_expert(ranking, self.num_reserved, versions_before(version, self.refresh_interval))
        else:
            lists = inverted_lists(codebook.codewords, weight, self.shortlist.shape[1])
        self.shortlist.copy_(lists)
        self._provisional = None if training else _made_of(codebook, weight)
        if training:
            self.built_at.fill_(version)
            self._built_at_on_host = version

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
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
        self._built_at_on_host = self._provisional = None


def _made_of(codebook: Codebook, weight: torch.Tensor) -> tuple[int, int | None, int]:
    """What tells lists that would be made now from lists that were made before."""
    version = None if weight.is_inference() else weight._version  # a tensor of inference mode has none
    return weight.data_ptr(), version, codebook.updates_on_host
