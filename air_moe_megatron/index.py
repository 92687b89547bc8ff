"""The inverted index: codeword -> shortlist of experts.

Legend: H hidden, E experts, C clusters, L shortlist.
"""

import torch

from air_moe_megatron.codebook import Codebook

SOURCES = ("tokens", "experts")

_EXPERTS_PER_CHUNK = 65_536
_FIRST_LLOYD_STEPS = 10


def top_scoring_lists(
    codewords, scale, weight, bias, shortlist_size, selection=None, experts_per_chunk=_EXPERTS_PER_CHUNK
):
    """List the experts that score highest at each codeword: the top-L of ``scale_c * <w_e, c> + b_e``.

    The experts are streamed in chunks, so that no [C, E] tensor is held for large E.

    Args:
        codewords: [C, H] fp32, unit rows.
        scale: [C] fp32, typical ``<h, c>`` of a codeword's tokens; matters only beside a bias.
        weight: [E, H] expert centres, any float dtype.
        bias: [E] or None.
        shortlist_size: experts per list.
        selection: None, or a function (scores [C, n], slice of the n experts) -> [C, n] of what to rank by instead.
    Returns:
        [C, L] int32, ascending expert ids.
    """
    best_scores = best_ids = None
    for first in range(0, weight.shape[0], experts_per_chunk):
        experts = slice(first, first + experts_per_chunk)
        scores = codewords @ weight[experts].float().t()  # [C, chunk]
        if bias is not None or selection is not None:
            scores = scores * scale.unsqueeze(1)
        if bias is not None:
            scores = scores + bias[experts].float()
        if selection is not None:
            scores = selection(scores, experts)
        scores, ids = scores.topk(min(shortlist_size, scores.shape[1]), dim=1)
        ids += first
        if best_scores is not None:
            scores, ids = torch.cat((best_scores, scores), dim=1), torch.cat((best_ids, ids), dim=1)
            scores, places = scores.topk(min(shortlist_size, scores.shape[1]), dim=1)
            ids = ids.gather(1, places)
        best_scores, best_ids = scores, ids
    return best_ids.sort(dim=1).values.int()


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

    def __init__(self, num_clusters: int, shortlist_size: int, source: str, refresh_interval: int):
        super().__init__()
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
            lists = top_scoring_lists(
                codebook.codewords, codebook.typical_projections(), weight, bias, self.shortlist.shape[1], selection
            )
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
