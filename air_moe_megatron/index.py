"""The inverted index, codeword -> shortlist of experts, and its rebuilds.

How lists of source 'tokens' are rebuilt, once there are some:

1. Each step, the first training forward ranks the next few codewords (:meth:`ShortlistIndex.refresh`): a share of those
   of the interval, of which each rank takes a part. What a codeword is given to choose from are the lists of the
   codewords nearest to it, and one of R slices of all experts; in R rebuilds every expert is tried at every codeword.
2. At the end of the step, the ranks exchange what they ranked (:meth:`ShortlistIndex.end_step`). The new lists are
   staged, and the old ones stay in force.
3. When all codewords have been ranked, the staged lists take their place at once, with the experts that none of them
   would hold (:func:`list_every_expert`).

Legend: H hidden, E experts, C clusters, L shortlist, R slices.
"""

from dataclasses import dataclass

import torch

from air_moe_megatron.codebook import Codebook
from air_moe_megatron.lists import inverted_lists, list_every_expert
from air_moe_megatron.ops.ranking import Ranking, rank_candidates, rank_experts

SOURCES = ("tokens", "experts")

# A rebuild costs 2CH(C + nL + E/R). Measured in docs/codebook.md#rebuilding-the-lists.
NUM_NEIGHBORS = 8  # codewords whose lists a codeword chooses from; it is the first of them
NUM_SLICES = 32  # R
BLOCK = 16  # codewords ranked by one product, so that its bits do not depend on the number of ranks and steps

_ID_BITS = 2**31 - 1


def next_version(version: int, interval: int) -> int:
    """The update after which the lists are due that follow those of another update.

    The younger the codebook, the faster tokens and centers move: with an interval of 20, the lists are made anew
    whenever a tenth of its age has passed.

    Example: interval 20, from 18 on: 19, 20, 22, 24, 26, 28, 30, 33, ..., 196, 215, 235, 255.
    """
    return version + min(max(1, 2 * version // interval), interval)


def num_rebuilds(num_steps: int, interval: int) -> int:
    """How often the first steps of a training make lists, with an update of the codebook after each step.

    Example: interval 20: 29 in the first 40 steps, 57 in 400.
    """
    count, version = 0, 0
    while version < num_steps:
        count, version = count + 1, next_version(version, interval)
    return count


NUM_FULL_REBUILDS = 2
"""Of lists of source 'tokens': the first one, and the one after the first update, which replaces all codewords."""


def rebuild_products(num_experts: int, num_clusters: int, shortlist_size: int) -> int:
    """Products of a codeword with a codeword or an expert center that one rebuild takes, of all ranks together."""
    num_candidates = min(min(NUM_NEIGHBORS, num_clusters) * shortlist_size, num_experts)
    return num_clusters * (num_clusters + num_candidates + num_experts // min(NUM_SLICES, num_experts))


def pack(score: torch.Tensor, codeword: torch.Tensor) -> torch.Tensor:
    """int64 keys that order fp32 scores, and codewords where scores are equal: NaN first, the lower codeword first."""
    bits = score.nan_to_num(torch.inf, torch.inf, -torch.inf).view(torch.int32)
    bits = bits ^ ((bits >> 31) & _ID_BITS)  # negative floats are ordered the other way round
    return (bits.long() << 32) | (codeword ^ _ID_BITS)


def unpack(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and codewords of keys; codeword 0 with the score -inf for an expert that was tried nowhere."""
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & _ID_BITS)).view(torch.float32), (keys & _ID_BITS) ^ _ID_BITS


_UNTRIED = int(pack(torch.tensor(-torch.inf), torch.tensor(0)))
STAGED = ("staged_lists", "staged_keys", "progress")
"""Buffers that hold a rebuild under way."""


@dataclass
class Share:
    """What a rank has ranked in a step, until the ranks exchange it."""

    rows: slice  # the codewords of all ranks
    version: int  # updates of the codebook so far
    num_ranks: int
    lists: torch.Tensor  # [rows, L] int64, best first; -1 at the codewords of other ranks
    keys: torch.Tensor  # [E] int64, of each expert the best score and its codeword
    failure: Exception | None = None


class ShortlistIndex(torch.nn.Module):
    """The shortlists of one router: derived from codewords and expert centers.

    They are saved with the model, and so is a rebuild under way: both come from centers that are no longer there when a
    run resumes.

    Args:
        num_experts: E.
        num_clusters: C.
        shortlist_size: L.
        source: "tokens" or "experts".
        refresh_interval: codebook updates, one per global batch, between two rebuilds once the codebook is old.
        num_reserved: places of each list, of the last ones, that orphans may take (:func:`list_every_expert`).
    """

    def __init__(
        self,
        num_experts: int,
        num_clusters: int,
        shortlist_size: int,
        source: str,
        refresh_interval: int,
        num_reserved: int = 0,
    ):
        super().__init__()
        self.num_reserved = num_reserved
        self.source = source
        self.refresh_interval = refresh_interval
        self.num_neighbors = min(NUM_NEIGHBORS, num_clusters)
        self.num_slices = min(NUM_SLICES, num_experts)
        self.register_buffer("shortlist", torch.zeros(num_clusters, shortlist_size, dtype=torch.int32))
        self.register_buffer("built_at", torch.full((1,), -1, dtype=torch.int64))
        # Saved, because lists and codewords of one source mean nothing to the other.
        self.register_buffer("source_code", torch.tensor([SOURCES.index(source)]))
        # A rebuild under way; lists of experts are made at once.
        is_staged = source == "tokens"
        self.register_buffer("staged_lists", torch.zeros(is_staged * num_clusters, shortlist_size, dtype=torch.int32))
        self.register_buffer("staged_keys", torch.full((is_staged * num_experts,), _UNTRIED, dtype=torch.int64))
        self.register_buffer("progress", torch.zeros(2, dtype=torch.int64))  # rebuilds so far, codewords ranked
        self._on_host = [-1, 0, 0]  # built_at and progress
        self._share: Share | None = None
        self._provisional = None  # what provisional lists were made of

    @property
    def is_built(self) -> bool:
        """Whether training has made the lists; waits for the device only right after a checkpoint was loaded."""
        return self._state()[0] >= 0

    def _state(self) -> list[int]:
        """Update of the lists in force, rebuilds so far, and codewords that the rebuild under way has ranked."""
        if self._on_host is None:
            self._on_host = [*self.built_at.tolist(), *self.progress.tolist()]
        return self._on_host

    def _set_state(self, built_at: int, num_rebuilds: int, num_ranked: int) -> None:
        self._on_host = [built_at, num_rebuilds, num_ranked]
        self.built_at.fill_(built_at)
        self.progress[0], self.progress[1] = num_rebuilds, num_ranked

    @torch.no_grad()
    def refresh(
        self,
        codebook: Codebook,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        score_function: str | None = None,
        expert_bias: torch.Tensor | None = None,
        training: bool = True,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        """Begin a forward: make the first lists, or rank this rank's share of the next ones.

        A second forward of the step and a recomputed one find nothing to do and see the same lists. Evaluation takes
        the lists that there are. Where there are none yet, it makes provisional ones, and training begins anew.
        Does not communicate.

        Args:
            codebook: whose updates count; one of source 'experts' is fitted to the centers first.
            weight, bias, score_function, expert_bias: as :func:`rank_experts` takes them.
            training: whether the forward trains.
            group: ranks with the same centers, which share the work; None means this rank alone.
        """
        centers = (weight, bias, score_function, expert_bias)
        if not training:
            if not self.is_built and self._provisional != _made_of(codebook, weight):
                self._make_lists(codebook, *centers)
                self._provisional = _made_of(codebook, weight)
            return
        (built_at, turn, num_ranked), updates = self._state(), codebook.updates_on_host
        due = 0 if built_at < 0 else next_version(built_at, self.refresh_interval)
        # The first update replaces the random codewords: what is near the lists of old is not near those of the new.
        if updates >= due and (self.source == "experts" or built_at < 1):
            self._make_lists(codebook, *centers)
            self._set_state(updates, turn + 1, 0)
        elif self._share is None and self.source == "tokens":
            num_clusters = self.shortlist.shape[0]
            share = num_clusters * (updates - built_at) // (due - built_at) // BLOCK * BLOCK
            rows = slice(num_ranked, num_clusters if updates >= due else share)
            if rows.start < rows.stop:
                self._share = self._rank_share(rows, codebook, *centers, group)

    def _make_lists(
        self,
        codebook: Codebook,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        score_function: str | None,
        expert_bias: torch.Tensor | None,
    ) -> None:
        """Make all lists at once, of all experts."""
        if self.source == "experts":
            codebook.fit_experts(weight, is_first=not self.is_built)
            self.shortlist.copy_(inverted_lists(codebook.codewords, weight, self.shortlist.shape[1]))
            return
        scale, size = codebook.typical_projections(), self.shortlist.shape[1]
        ranking = rank_experts(codebook.codewords, scale, weight, bias, size, score_function, expert_bias)
        self.shortlist.copy_(list_every_expert(ranking, self.num_reserved, self._state()[1]))

    def _rank_share(
        self,
        rows: slice,
        codebook: Codebook,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        score_function: str | None,
        expert_bias: torch.Tensor | None,
        group: torch.distributed.ProcessGroup | None,
    ) -> Share:
        """Rank this rank's part of the codewords ``rows``, in blocks."""
        rank, num_ranks = (0, 1) if group is None else (group.rank(), group.size())
        lists = torch.full((rows.stop - rows.start, self.shortlist.shape[1]), -1, device=weight.device)
        share = Share(rows, codebook.updates_on_host, num_ranks, lists, torch.full_like(self.staged_keys, _UNTRIED))
        codewords, scale, num_experts = codebook.codewords, codebook.typical_projections(), weight.shape[0]
        turn = self._state()[1] % self.num_slices
        experts = slice(num_experts * turn // self.num_slices, num_experts * (turn + 1) // self.num_slices)
        blocks = range(rows.start, rows.stop, BLOCK)
        try:
            for first in blocks[len(blocks) * rank // num_ranks : len(blocks) * (rank + 1) // num_ranks]:
                block = slice(first, min(first + BLOCK, rows.stop))
                ids = torch.arange(block.start, block.stop, device=weight.device)
                neighbors = (codewords[block] @ codewords.t()).topk(self.num_neighbors, dim=1).indices
                candidates = self.shortlist[neighbors].flatten(1).long()
                ranking = rank_candidates(
                    codewords[block], scale[block], weight, bias, candidates, experts, lists.shape[1], score_function,
                    expert_bias,
                )  # fmt: skip
                lists[block.start - rows.start : block.stop - rows.start] = ranking.lists
                keys = pack(ranking.scores, ids.unsqueeze(1))
                share.keys.scatter_reduce_(0, ranking.candidates.flatten(), keys.flatten(), "amax")
                in_slice = share.keys[experts]
                torch.maximum(in_slice, pack(ranking.score, ids[ranking.nearest]), out=in_slice)
        except Exception as error:
            if num_ranks == 1:
                raise
            share.failure = error  # the other ranks learn of it at the end of the step
        return share

    @property
    def failure(self) -> Exception | None:
        """What kept this rank from ranking its share of the step."""
        return None if self._share is None else self._share.failure

    def discard(self) -> None:
        """Forget what was ranked in this step."""
        self._share = None

    @torch.no_grad()
    def commit(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """End a successful step: stage what the ranks have ranked; once all is there, the staged lists come into force.

        Every rank must call it. Communicates, in steps that rank codewords: one all-reduce (maximum) of the E keys and
        of the lists of the step's codewords, 8 bytes each. Waits for the device when lists come into force.

        Args:
            group: as :meth:`refresh` took it.
        Raises:
            ValueError: if the group has another number of ranks than those that shared the work.
        """
        share, self._share = self._share, None
        if share is None:
            return
        num_ranks = 1 if group is None else group.size()
        if share.num_ranks != num_ranks:
            raise ValueError(
                f"the lists were ranked by {share.num_ranks} ranks together, so the codebooks must be updated with "
                f"their group, not with one of {num_ranks}"
            )
        keys, lists = share.keys, share.lists
        if num_ranks > 1:
            values = torch.cat((keys, lists.flatten()))
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=group)
            keys, lists = values[: keys.numel()], values[keys.numel() :].view_as(lists)
        self.staged_lists[share.rows] = lists.int()
        torch.maximum(self.staged_keys, keys, out=self.staged_keys)
        built_at, turn, _ = self._state()
        if share.rows.stop < self.shortlist.shape[0]:
            self._set_state(built_at, turn, share.rows.stop)
            return
        score, nearest = unpack(self.staged_keys)
        ranking = Ranking(self.staged_lists.long(), nearest, score)
        self.shortlist.copy_(list_every_expert(ranking, self.num_reserved, turn))
        self.staged_keys.fill_(_UNTRIED)
        self._set_state(share.version, turn + 1, 0)

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
        has_lists = any(prefix + name in state_dict for name in ("shortlist", "built_at", "source_code"))
        has_staged = any(prefix + name in state_dict for name in STAGED)
        num_missing = len(missing_keys)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if strict and not has_lists and not has_staged:
            del missing_keys[num_missing:]  # plain top-k routing has no lists: they are built in the first forward
        elif strict and not has_staged:  # lists from before anything was staged: the interval begins anew
            missing_keys[num_missing:] = [key for key in missing_keys[num_missing:] if key[len(prefix) :] not in STAGED]
        if not has_staged:
            self.staged_keys.fill_(_UNTRIED)
            self.progress.zero_()
        self._on_host = self._share = self._provisional = None


def _made_of(codebook: Codebook, weight: torch.Tensor) -> tuple[int, int | None, int]:
    """What tells lists that would be made now from lists that were made before."""
    version = None if weight.is_inference() else weight._version  # a tensor of inference mode has none
    return weight.data_ptr(), version, codebook.updates_on_host
