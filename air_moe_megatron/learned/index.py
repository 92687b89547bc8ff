"""The inverted index, codeword -> shortlist of experts, and its rebuilds.

How lists of source 'tokens' are rebuilt, once there are some:

1. In each step, the first training forward selects experts for the next few blocks of codewords
   (:meth:`ShortlistIndex.refresh`). Each rank takes a part of the blocks.
2. A codeword keeps a *pool* of its best Q experts. In each rebuild one block in B has its *turn*: its codewords choose
   their pools from all experts. Any other codeword chooses from its pool, its list, and the pools of the nearest
   codewords that had their turn in the previous rebuild. On a GPU every codeword chooses from all experts in every
   rebuild (``rebuild_schedule.py``).
3. At the end of the step the ranks exchange what they selected (:meth:`ShortlistIndex.commit`). The old lists stay in
   force.
4. When all codewords are done, all lists are replaced at once. A list gets the best L experts of its pool, and
   a share of the experts that no list would hold (:func:`list_every_expert`).

Lists and pools have S parts, one for each range of E/S consecutive experts. Every part is made independently. So ranks
that hold some of the experts make the same parts as a rank that holds all of them.

Legend: H hidden, E experts, C clusters, L shortlist, Q pool, B blocks of which one has its turn in a rebuild, S parts.
"""

from dataclasses import dataclass
from typing import Any

import torch

from air_moe_megatron.learned.centers import Centers
from air_moe_megatron.learned.codebook import Codebook
from air_moe_megatron.learned.expert_keys import pack_keys, unpack_keys
from air_moe_megatron.learned.lists import inverted_lists, list_every_expert
from air_moe_megatron.learned.module_state import HostCopy
from air_moe_megatron.learned.parts import Span, spans
from air_moe_megatron.learned.rebuild_schedule import NUM_NEIGHBORS, POOL, RebuildState, Schedule, schedule
from air_moe_megatron.ops.ranking import Ranking

SOURCES = ("tokens", "experts")

_UNTRIED = int(pack_keys(torch.tensor(-torch.inf), torch.tensor(0)))  # key of an expert tried at no codeword
REBUILDING = ("pool", "staged_keys", "progress")
"""Buffers that only rebuilds read; checkpoints from before rebuilds were spread over steps lack them."""

_OF_EXPERTS = ("shortlist", "pool")
"""Buffers of expert ids: local ids in memory, global ids in checkpoints."""


@dataclass
class Share:
    """What a rank has selected in a step and not yet exchanged with the other ranks."""

    rows: slice  # the codewords for which all ranks together select experts in this step
    num_updates: int  # number of codebook updates so far
    num_ranks: int
    pool: torch.Tensor  # [rows, Q] int64, best first; -1 at the codewords of other ranks
    keys: torch.Tensor  # [E] int64, each expert's best score and its codeword, as made by pack_keys
    failure: Exception | None = None


class ShortlistIndex(torch.nn.Module):
    """The shortlists of one router, derived from codewords and expert centers.

    Lists and unfinished rebuilds are saved with the model, because the centers that they were made from no longer exist
    when a run resumes.

    Args:
        num_experts: E, the experts of this shard.
        num_clusters: C.
        shortlist_size: L.
        source: "tokens" or "experts".
        refresh_interval: codebook updates, one per global batch, between two rebuilds once the codebook is old.
        num_reserved: number of last slots in each part of a list that orphans may take (:func:`list_every_expert`).
        num_parts: S, which divides E and L.
        shard, num_shards: number of this shard, and number of equal shards of consecutive experts. Checkpoints hold
            global expert ids.
    """

    def __init__(
        self,
        num_experts: int,
        num_clusters: int,
        shortlist_size: int,
        *,
        source: str,
        refresh_interval: int,
        num_reserved: int = 0,
        num_parts: int = 1,
        shard: int = 0,
        num_shards: int = 1,
    ) -> None:
        super().__init__()
        self.num_experts, self.num_parts, self.num_shards = num_experts, num_parts, num_shards
        self.first_expert = shard * num_experts
        self.num_reserved = num_reserved
        self.source = source
        self.refresh_interval = refresh_interval
        self.register_buffer("shortlist", torch.zeros(num_clusters, shortlist_size, dtype=torch.int32))
        self.register_buffer("built_at", torch.full((1,), -1, dtype=torch.int64))
        # Saved, because codewords and lists of one source are meaningless to the other.
        self.register_buffer("source_code", torch.tensor([SOURCES.index(source)]))
        # State of rebuilds. Source 'experts' makes all lists at once and needs none: its tensors are empty and not
        # saved, because Megatron cannot save empty tensors.
        is_spread, pool_size = source == "tokens", min(POOL * shortlist_size, num_experts)
        pool = torch.zeros(num_clusters if is_spread else 0, pool_size, dtype=torch.int32)
        self.register_buffer("pool", pool, persistent=is_spread)
        staged_keys = torch.full((num_experts if is_spread else 0,), _UNTRIED, dtype=torch.int64)
        self.register_buffer("staged_keys", staged_keys, persistent=is_spread)
        self.register_buffer("progress", torch.zeros(2, dtype=torch.int64))  # finished rebuilds; codewords done
        self.on_host = HostCopy(self, "built_at", "progress")
        self.on_host.note(list(RebuildState(built_at=-1, num_rebuilds=0, num_done=0)))
        self._share: Share | None = None
        self._provisional: bytes | None = None  # the provisional lists and what they were made from, see identify

    @property
    def is_built(self) -> bool:
        """Whether training has made the lists; waits for the device only after other code has written the buffers."""
        return self._state.built_at >= 0

    @property
    def failure(self) -> Exception | None:
        """The error that kept this rank from selecting its share in this step; None if there was none."""
        return None if self._share is None else self._share.failure

    @property
    def schedule(self) -> Schedule:
        """The blocks of codewords and their turns on the device of the lists."""
        return schedule(self.num_experts * self.num_shards, self.shortlist.shape[0], self.shortlist.is_cuda)

    @torch.no_grad()
    def refresh(
        self,
        codebook: Codebook,
        centers: Centers,
        *,
        training: bool = True,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        """Begin a forward: make the first lists, or select this rank's share of the next ones.

        Later forwards of the step and recomputed ones find nothing to do and see the same lists. Evaluation uses the
        lists in force. If there are none yet, it makes provisional lists, which training replaces by its own.
        Does not communicate.

        Args:
            codebook: its number of updates decides when lists are due. With source 'experts' it is fitted first.
            centers: of the experts of this shard.
            training: whether the forward is one of training, of a router that is not frozen.
            group: ranks with the same centers, which share the work; None means this rank alone.
        """
        state, updates = self._state, codebook.updates_on_host
        has_own_lists = 0 <= state.built_at <= updates  # other code may have put an earlier codebook there
        if not training:
            if not has_own_lists and self._provisional != self.identify(codebook, centers):
                self._make_lists(codebook, centers)
                self._provisional = self.identify(codebook, centers)
            return
        if not has_own_lists:
            self.start_anew()
            state = self._state
        due = state.due(self.refresh_interval)
        # Without usable pools the rebuild is full. The first update replaces the random codewords, and so makes their
        # pools useless; an older checkpoint holds no pools.
        is_at_once = self.source == "experts" or state.built_at < 1 or state.num_rebuilds == 0
        if is_at_once:
            if updates >= due:
                self._make_lists(codebook, centers)
                self._set_state(RebuildState(updates, state.num_rebuilds + 1, num_done=0))
        elif self._share is None:
            rows = self.schedule.rows_due(state, updates, due, self.shortlist.shape[0])
            if rows.start < rows.stop:
                self._share = self._select_share(rows, codebook, centers, group)

    @torch.no_grad()
    def commit(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """End a successful step: keep what the ranks have selected, and replace the lists once all codewords are done.

        Every rank must call it. In steps that select experts it makes one all-reduce (maximum) of the E keys and of the
        pools of the step's codewords, 8 bytes per number. Waits for the device when the lists change.

        Args:
            group: the group that :meth:`refresh` was given.
        Raises:
            ValueError: if the number of ranks in the group is not that of the ranks that shared the work.
        """
        share, self._share = self._share, None
        if share is None:
            return
        num_ranks = 1 if group is None else group.size()
        if share.num_ranks != num_ranks:
            raise ValueError(
                f"the next lists were made by {share.num_ranks} ranks together, so the codebooks must be updated with "
                f"their group, not with one of {num_ranks}"
            )
        keys, pool = share.keys, share.pool
        if num_ranks > 1:
            values = torch.cat((keys, pool.flatten()))
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=group)
            keys, pool = values[: keys.numel()], values[keys.numel() :].view_as(pool)
        self.pool[share.rows] = pool.int()
        torch.maximum(self.staged_keys, keys, out=self.staged_keys)
        state = self._state
        if share.rows.stop < self.shortlist.shape[0]:
            self._set_state(state._replace(num_done=share.rows.stop))
            return
        score, nearest = unpack_keys(self.staged_keys)
        self._list_from_pools(nearest, score)
        self.staged_keys.fill_(_UNTRIED)
        self._set_state(RebuildState(share.num_updates, state.num_rebuilds + 1, num_done=0))

    def discard(self) -> None:
        """Forget what was selected in this step."""
        self._share = None

    def start_anew(self) -> None:
        """Forget all lists: the next forward makes them."""
        self.built_at.fill_(-1)
        self._forget_rebuild()

    def _make_lists(self, codebook: Codebook, centers: Centers) -> None:
        """Make all lists at once, from the scores of all experts."""
        weight = centers.weight
        if self.source == "experts":
            codebook.fit_experts(weight, is_first=not self.is_built)
            self.shortlist.copy_(inverted_lists(codebook.codewords, weight, self.shortlist.shape[1]))
            return
        scale = codebook.typical_projections()
        nearest = torch.empty(weight.shape[0], dtype=torch.int64, device=weight.device)
        score = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
        for span in self._spans():
            ranking = centers[span.experts].rank_experts(codebook.codewords, scale, span.pool_size)
            self.pool[:, span.pool] = (ranking.lists + span.experts.start).int()
            nearest[span.experts], score[span.experts] = ranking.nearest, ranking.score
        self._list_from_pools(nearest, score)

    @torch.no_grad()
    def identify(self, codebook: Codebook, centers: Centers) -> bytes:
        """A number for each list, and for each row and number that lists are made from: O(EH); waits for the device.

        Contents are compared, because other code may write to all of these without a trace, or put other tensors in
        their places for a forward (``torch.func.functional_call``, a parametrization).
        """
        numbers = [_number_rows(rows) for rows in (self.shortlist, codebook.codewords, centers.weight)]
        numbers += [codebook.typical_projections(), centers.bias, centers.expert_bias]
        return torch.cat([one.double() for one in numbers if one is not None]).cpu().numpy().tobytes()

    def _select_share(
        self, rows: slice, codebook: Codebook, centers: Centers, group: torch.distributed.ProcessGroup | None
    ) -> Share:
        """Select the experts for this rank's blocks of the codewords ``rows``."""
        rank, num_ranks = (0, 1) if group is None else (group.rank(), group.size())
        pool = torch.full((rows.stop - rows.start, self.pool.shape[1]), -1, device=centers.weight.device)
        share = Share(rows, codebook.updates_on_host, num_ranks, pool, torch.full_like(self.staged_keys, _UNTRIED))
        scale = codebook.typical_projections()
        parts = [(span, centers[span.experts]) for span in self._spans()]
        block_size = self.schedule.block_size
        blocks = range(rows.start, rows.stop, block_size)
        try:
            for first in blocks[len(blocks) * rank // num_ranks : len(blocks) * (rank + 1) // num_ranks]:
                block = slice(first, min(first + block_size, rows.stop))
                pool[block.start - rows.start : block.stop - rows.start] = self._select_pools(
                    block, codebook.codewords, scale, parts, share.keys
                )
        except Exception as error:
            if num_ranks == self.num_shards == 1:
                raise
            share.failure = error  # the other ranks learn of it at the end of the step
        return share

    def _select_pools(
        self,
        block: slice,
        codewords: torch.Tensor,
        scale: torch.Tensor,
        parts: list[tuple[Span, Centers]],
        keys: torch.Tensor,
    ) -> torch.Tensor:
        """[n, Q] new pools of a block's codewords; updates the experts' ``keys`` [E] with their scores there."""
        has_its_turn = self.schedule.has_turn(block.start, self._state.num_rebuilds)
        neighbors = None if has_its_turn else self._neighbors(block, codewords)
        ids, pools = torch.arange(block.start, block.stop, device=codewords.device), []
        for span, centers in parts:
            part_keys, start = keys[span.experts], span.experts.start
            if has_its_turn:
                ranking = centers.rank_experts(codewords[block], scale[block], span.pool_size)
                torch.maximum(part_keys, pack_keys(ranking.score, ranking.nearest + block.start), out=part_keys)
            else:
                pool, lists = self.pool[:, span.pool], self.shortlist[:, span.lists]
                candidates = torch.cat((pool[block], lists[block], pool[neighbors].flatten(1)), dim=1)
                candidates = candidates.long() - start
                ranking = centers.rank_candidates(codewords[block], scale[block], candidates, span.pool_size)
                values = pack_keys(ranking.scores, ids.unsqueeze(1))
                part_keys.scatter_reduce_(0, ranking.candidates.flatten(), values.flatten(), "amax")
            pools.append(ranking.lists + start)
        return torch.cat(pools, dim=1)

    def _neighbors(self, block: slice, codewords: torch.Tensor) -> torch.Tensor:
        """[n, 2] codewords nearest to those of a block, among the ones that had their turn in the last rebuild."""
        block_size, num_turns = self.schedule
        ids = torch.arange(codewords.shape[0], device=codewords.device)
        first = ids[(self._state.num_rebuilds - 1) % num_turns * block_size :: num_turns * block_size]
        had_their_turn = (first.unsqueeze(1) + ids[:block_size]).flatten().clamp(max=codewords.shape[0] - 1)
        similarity = codewords[block] @ codewords[had_their_turn].t()
        return had_their_turn[similarity.topk(min(NUM_NEIGHBORS, had_their_turn.numel()), dim=1).indices]

    def _list_from_pools(self, nearest: torch.Tensor, score: torch.Tensor) -> None:
        """Replace the lists by those made from the pools, and from each expert's best codeword [E] and score [E]."""
        num_rebuilds = self._state.num_rebuilds
        for span in self._spans():
            first, length = span.experts.start, span.lists.stop - span.lists.start
            best = self.pool[:, span.pool][:, :length].long() - first
            ranking = Ranking(best, nearest[span.experts], score[span.experts])
            self.shortlist[:, span.lists] = list_every_expert(ranking, self.num_reserved, num_rebuilds) + first

    def _spans(self) -> list[Span]:
        return spans(self.num_parts, self.num_experts, self.shortlist.shape[1], self.pool.shape[1])

    @property
    def _state(self) -> RebuildState:
        return RebuildState(*self.on_host.read())

    def _set_state(self, state: RebuildState) -> None:
        self.built_at.fill_(state.built_at)
        self.progress[0], self.progress[1] = state.num_rebuilds, state.num_done
        self.on_host.note(list(state))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.first_expert:
            for name in _OF_EXPERTS:
                destination[prefix + name] = destination[prefix + name] + self.first_expert

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        strict, missing_keys = args[1], args[2]
        self._require_sizes_and_source(state_dict, prefix)
        has_lists = any(prefix + name in state_dict for name in ("shortlist", "built_at", "source_code"))
        has_rebuild = any(prefix + name in state_dict for name in REBUILDING)
        for name in self._non_persistent_buffers_set:  # older checkpoints hold them, as empty tensors
            state_dict.pop(prefix + name, None)
        for name in _OF_EXPERTS if self.first_expert else ():
            if prefix + name in state_dict:  # not in place: with assign=True the tensors are the caller's
                state_dict[prefix + name] = state_dict[prefix + name] - self.first_expert
        num_missing = len(missing_keys)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "shortlist" in state_dict and self.source == "tokens" and int(self.built_at) >= 0:
            self._require_parts(prefix)
        if strict and not has_lists and not has_rebuild:
            del missing_keys[num_missing:]  # plain top-k routing has no lists
        elif strict and not has_rebuild:  # an older checkpoint: the next rebuild is full
            missing_keys[num_missing:] = [
                key for key in missing_keys[num_missing:] if key[len(prefix) :] not in REBUILDING
            ]
        if has_lists and not has_rebuild:
            self._forget_rebuild()
        self._share = self._provisional = None

    def _require_sizes_and_source(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Check that loaded lists are of the shape and the source of these."""
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

    def _require_parts(self, prefix: str) -> None:
        """Check that each part of the loaded lists holds only experts of that part."""
        for span in self._spans():
            ids = self.shortlist[:, span.lists]
            if not bool(((ids >= span.experts.start) & (ids < span.experts.stop)).all()):
                raise ValueError(
                    f"checkpoint holds {prefix}shortlist in another number of parts than moe_air_list_parts; "
                    "train with the parts of the checkpoint"
                )

    def _forget_rebuild(self) -> None:
        self.staged_keys.fill_(_UNTRIED)
        self.progress.zero_()


def _number_rows(rows: torch.Tensor) -> torch.Tensor:
    """[V], a number for each row [V, H] that changes with it in practice: its product with a fixed vector.

    It is fp32; for expert ids it is fp64, because sums of ids beyond 2^24 do not show a change by one in fp32.
    """
    dtype = torch.float32 if rows.is_floating_point() else torch.float64
    direction = torch.arange(rows.shape[1], dtype=dtype, device=rows.device).cos()
    return rows.to(dtype) @ direction
