"""The inverted index, codeword -> shortlist of experts, and its rebuilds.

How lists of source 'tokens' are rebuilt, once there are some:

1. Each step, the first training forward ranks the experts at the next few blocks of codewords
   (:meth:`ShortlistIndex.refresh`). Each rank takes a part of the blocks.
2. A codeword keeps a *pool* of its best Q experts. It chooses from its pool, its list, and the pools of the nearest
   codewords that had their *turn* in the rebuild before. Whose turn it is chooses from all experts: one block in R.
   On a GPU every codeword chooses from all experts in every rebuild (:func:`schedule`).
3. At the end of the step, the ranks exchange what they ranked (:meth:`ShortlistIndex.commit`). The lists stay in force.
4. When all codewords have been ranked, the best L of each pool become the lists, at once, with the experts that none of
   them would hold (:func:`list_every_expert`).

Lists and pools come in S parts, each of consecutive experts, and every part is made by itself. So ranks that hold some
of the experts make the same lists as a rank that holds all of them.

Legend: H hidden, E experts, C clusters, L shortlist, Q pool, R turns, S parts.
"""

from dataclasses import dataclass
from typing import Any

import torch

from air_moe_megatron.learned.codebook import Codebook
from air_moe_megatron.learned.lists import inverted_lists, list_every_expert
from air_moe_megatron.learned.module_state import HostCopy
from air_moe_megatron.learned.parts import Part, Span, pack, parts_of, spans, unpack
from air_moe_megatron.ops.ranking import Ranking

SOURCES = ("tokens", "experts")

# What they cost and lose is measured in docs/codebook.md#rebuilding-the-lists.
NUM_TURNS = 8  # R
NUM_NEIGHBORS = 2  # codewords whose pools a codeword chooses from
POOL = 4  # Q / L
BLOCK = 32  # codewords ranked by one product, so that its bits do not depend on the number of ranks and steps
_GPU_BLOCK = 128  # the least of them on a GPU, the tile of the kernel
_GPU_SCORES = 2**24  # of a block on a GPU, which then waits little for the launches of its kernels


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


def num_turns(num_clusters: int) -> int:
    """R: in so many rebuilds every codeword is ranked once with all experts; all of them at once where they are few."""
    return min(NUM_TURNS, -(-num_clusters // BLOCK))


def schedule(num_experts: int, num_clusters: int, on_gpu: bool) -> tuple[int, int]:
    """Codewords of a block, and R.

    A GPU has the products of all experts sooner than the candidates of a codeword: on an H100 a rebuild with E = 65,536
    and C = 1024 took 53 ms by turns, in blocks of 32, and 4.4 ms of all experts in one block
    (docs/performance.md#on-an-h100).

    Example: E = 65,536, C = 1024: blocks of 32 and R = 8 on a CPU, of 256 and R = 1 on a GPU.
    """
    if not on_gpu:
        return BLOCK, num_turns(num_clusters)
    return max(_GPU_BLOCK, _GPU_SCORES // num_experts // _GPU_BLOCK * _GPU_BLOCK), 1


def rebuild_products(num_experts: int, num_clusters: int, shortlist_size: int, on_gpu: bool = False) -> float:
    """Products of a codeword with a codeword or an expert center that a rebuild takes on average, of all ranks.

    Example: E = 65,536, C = 1024, L = 128: 128 codewords with all experts and 896 with 128 codewords and 1664 experts,
    15% of the products of all codewords with all experts. A GPU takes all of these.
    """
    if on_gpu:
        return num_clusters * num_experts
    in_turn = num_clusters / num_turns(num_clusters)
    pool_size = min(POOL * shortlist_size, num_experts)
    num_candidates = min(shortlist_size + (1 + NUM_NEIGHBORS) * pool_size, num_experts)
    return in_turn * num_experts + (num_clusters - in_turn) * (in_turn + num_candidates)


_UNTRIED = int(pack(torch.tensor(-torch.inf), torch.tensor(0)))
REBUILDING = ("pool", "staged_keys", "progress")
"""Buffers that only rebuilds read; checkpoints from before they were spread over steps lack them."""

_OF_EXPERTS = ("shortlist", "pool")
"""Buffers of expert ids, which checkpoints hold as ids among all experts of the model."""


@dataclass
class Share:
    """What a rank has ranked in a step, until the ranks exchange it."""

    rows: slice  # the codewords of all ranks
    version: int  # updates of the codebook so far
    num_ranks: int
    pool: torch.Tensor  # [rows, Q] int64, best first; -1 at the codewords of other ranks
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
        num_reserved: slots of each part of a list, of the last ones, that orphans may take (:func:`list_every_expert`).
        num_parts: S, which divides E and L.
        shard, num_shards: which of so many equal shards of consecutive experts the E are. Checkpoints hold ids among
            all of them.
    """

    def __init__(
        self,
        num_experts: int,
        num_clusters: int,
        shortlist_size: int,
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
        # Saved, because lists and codewords of one source mean nothing to the other.
        self.register_buffer("source_code", torch.tensor([SOURCES.index(source)]))
        # What rebuilds read; lists of source 'experts' are made at once. Megatron cannot save a tensor without numbers.
        is_spread, pool_size = source == "tokens", min(POOL * shortlist_size, num_experts)
        pool = torch.zeros(is_spread * num_clusters, pool_size, dtype=torch.int32)
        self.register_buffer("pool", pool, persistent=is_spread)
        staged_keys = torch.full((is_spread * num_experts,), _UNTRIED, dtype=torch.int64)
        self.register_buffer("staged_keys", staged_keys, persistent=is_spread)
        self.register_buffer("progress", torch.zeros(2, dtype=torch.int64))  # rebuilds so far, codewords ranked
        self._on_host = HostCopy("built_at", "progress")
        self._on_host.note(self, [-1, 0, 0])
        self._share: Share | None = None
        self._provisional = None  # what provisional lists were made of

    @property
    def is_built(self) -> bool:
        """Whether training has made the lists; waits for the device only where another has written that."""
        return self._state()[0] >= 0

    @property
    def schedule(self) -> tuple[int, int]:
        """Codewords of a block, and R: as :func:`schedule`, for the device of the lists."""
        return schedule(self.num_experts * self.num_shards, self.shortlist.shape[0], self.shortlist.is_cuda)

    def _state(self) -> list[int]:
        """Update of the lists in force, rebuilds so far, and codewords that the rebuild under way has ranked."""
        return self._on_host.read(self)

    def _set_state(self, built_at: int, num_rebuilds: int, num_ranked: int) -> None:
        self.built_at.fill_(built_at)
        self.progress[0], self.progress[1] = num_rebuilds, num_ranked
        self._on_host.note(self, [built_at, num_rebuilds, num_ranked])

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
            weight, bias, score_function, expert_bias: as ``ops.ranking.rank_experts`` takes them.
            training: whether the forward trains.
            group: ranks with the same centers, which share the work; None means this rank alone.
        """
        centers = (weight, bias, score_function, expert_bias)
        if not training:
            if not self.is_built and self._provisional != _made_of(codebook, weight):
                self._make_lists(codebook, *centers)
                self._provisional = _made_of(codebook, weight)
            return
        (built_at, num_rebuilds, num_ranked), updates = self._state(), codebook.updates_on_host
        due = 0 if built_at < 0 else next_version(built_at, self.refresh_interval)
        # The first update replaces the random codewords: their pools are of no use to the new ones. An older checkpoint
        # holds no pools.
        is_at_once = self.source == "experts" or built_at < 1 or num_rebuilds == 0
        if updates >= due and is_at_once:
            self._make_lists(codebook, *centers)
            self._set_state(updates, num_rebuilds + 1, 0)
        elif self._share is None and not is_at_once:
            num_clusters, (block, _) = self.shortlist.shape[0], self.schedule
            share = num_clusters * (updates - built_at) // (due - built_at) // block * block
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
        scale = codebook.typical_projections()
        nearest = torch.empty(weight.shape[0], dtype=torch.int64, device=weight.device)
        score = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
        for part in parts_of(self._spans(), weight, bias, score_function, expert_bias):
            ranking = part.rank_experts(codebook.codewords, scale)
            self.pool[:, part.span.pool] = (ranking.lists + part.span.experts.start).int()
            nearest[part.span.experts], score[part.span.experts] = ranking.nearest, ranking.score
        self._list(nearest, score)

    def _spans(self) -> list[Span]:
        return spans(self.num_parts, self.num_experts, self.shortlist.shape[1], self.pool.shape[1])

    def _list(self, nearest: torch.Tensor, score: torch.Tensor) -> None:
        """Put the lists in force that the pools and each expert's best codeword make."""
        turn = self._state()[1]
        for span in self._spans():
            first, length = span.experts.start, span.lists.stop - span.lists.start
            best = self.pool[:, span.pool][:, :length].long() - first
            ranking = Ranking(best, nearest[span.experts], score[span.experts])
            self.shortlist[:, span.lists] = list_every_expert(ranking, self.num_reserved, turn) + first

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
        pool = torch.full((rows.stop - rows.start, self.pool.shape[1]), -1, device=weight.device)
        share = Share(rows, codebook.updates_on_host, num_ranks, pool, torch.full_like(self.staged_keys, _UNTRIED))
        scale = codebook.typical_projections()
        parts = parts_of(self._spans(), weight, bias, score_function, expert_bias)
        size, _ = self.schedule
        blocks = range(rows.start, rows.stop, size)
        try:
            for first in blocks[len(blocks) * rank // num_ranks : len(blocks) * (rank + 1) // num_ranks]:
                block = slice(first, min(first + size, rows.stop))
                pool[block.start - rows.start : block.stop - rows.start] = self._rank_block(
                    block, codebook.codewords, scale, parts, share.keys
                )
        except Exception as error:
            if num_ranks == self.num_shards == 1:
                raise
            share.failure = error  # the other ranks learn of it at the end of the step
        return share

    def _rank_block(
        self, block: slice, codewords: torch.Tensor, scale: torch.Tensor, parts: list[Part], keys: torch.Tensor
    ) -> torch.Tensor:
        """[n, Q] pools of the codewords of a block; what experts score there enters their keys [E]."""
        num_rebuilds, (size, turns) = self._state()[1], self.schedule
        ids = torch.arange(codewords.shape[0], device=codewords.device)
        has_its_turn = block.start // size % turns == num_rebuilds % turns
        if not has_its_turn:
            first = ids[(num_rebuilds - 1) % turns * size :: turns * size]
            had_their_turn = (first.unsqueeze(1) + ids[:size]).flatten().clamp(max=codewords.shape[0] - 1)
            similarity = codewords[block] @ codewords[had_their_turn].t()
            neighbors = had_their_turn[similarity.topk(min(NUM_NEIGHBORS, had_their_turn.numel()), dim=1).indices]
        pools = []
        for part in parts:
            part_keys, start = keys[part.span.experts], part.span.experts.start
            if has_its_turn:
                ranking = part.rank_experts(codewords[block], scale[block])
                torch.maximum(part_keys, pack(ranking.score, ranking.nearest + block.start), out=part_keys)
            else:
                pool, lists = self.pool[:, part.span.pool], self.shortlist[:, part.span.lists]
                candidates = torch.cat((pool[block], lists[block], pool[neighbors].flatten(1)), dim=1)
                ranking = part.rank_candidates(codewords[block], scale[block], candidates.long() - start)
                values = pack(ranking.scores, ids[block].unsqueeze(1))
                part_keys.scatter_reduce_(0, ranking.candidates.flatten(), values.flatten(), "amax")
            pools.append(ranking.lists + start)
        return torch.cat(pools, dim=1)

    @property
    def failure(self) -> Exception | None:
        """What kept this rank from ranking its share of the step."""
        return None if self._share is None else self._share.failure

    def discard(self) -> None:
        """Forget what was ranked in this step."""
        self._share = None

    @torch.no_grad()
    def commit(self, group: torch.distributed.ProcessGroup | None = None) -> None:
        """End a successful step: keep what the ranks have ranked; once they have ranked everything, change the lists.

        Every rank must call it. Communicates, in steps that rank codewords: one all-reduce (maximum) of the E keys and
        of the pools of the step's codewords, 8 bytes each. Waits for the device when the lists change.

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
        keys, pool = share.keys, share.pool
        if num_ranks > 1:
            values = torch.cat((keys, pool.flatten()))
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=group)
            keys, pool = values[: keys.numel()], values[keys.numel() :].view_as(pool)
        self.pool[share.rows] = pool.int()
        torch.maximum(self.staged_keys, keys, out=self.staged_keys)
        built_at, num_rebuilds, _ = self._state()
        if share.rows.stop < self.shortlist.shape[0]:
            self._set_state(built_at, num_rebuilds, share.rows.stop)
            return
        score, nearest = unpack(self.staged_keys)
        self._list(nearest, score)
        self.staged_keys.fill_(_UNTRIED)
        self._set_state(share.version, num_rebuilds + 1, 0)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.first_expert:
            for name in _OF_EXPERTS:
                destination[prefix + name] = destination[prefix + name] + self.first_expert

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
        has_lists = any(prefix + name in state_dict for name in ("shortlist", "built_at", "source_code"))
        is_whole = any(prefix + name in state_dict for name in REBUILDING)
        for name in self._non_persistent_buffers_set:  # older checkpoints hold them, without numbers
            state_dict.pop(prefix + name, None)
        num_missing = len(missing_keys)
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in _OF_EXPERTS:
            if prefix + name in state_dict:
                self._buffers[name] -= self.first_expert
        if loaded is not None and self.source == "tokens" and int(self.built_at) >= 0:
            self._require_parts(prefix)
        if strict and not has_lists and not is_whole:
            del missing_keys[num_missing:]  # plain top-k routing has no lists: they are built in the first forward
            self.built_at.fill_(-1)
        elif strict and not is_whole:  # the next lists are made at once
            missing_keys[num_missing:] = [
                key for key in missing_keys[num_missing:] if key[len(prefix) :] not in REBUILDING
            ]
        if not is_whole:
            self.staged_keys.fill_(_UNTRIED)
            self.progress.zero_()
        self._share = self._provisional = None

    def _require_parts(self, prefix: str) -> None:
        """Check that loaded lists hold in each part the experts of that part."""
        for span in self._spans():
            ids = self.shortlist[:, span.lists]
            if not bool(((ids >= span.experts.start) & (ids < span.experts.stop)).all()):
                raise ValueError(
                    f"checkpoint holds {prefix}shortlist in another number of parts than moe_air_list_parts; "
                    "train with the parts of the checkpoint"
                )


def _made_of(codebook: Codebook, weight: torch.Tensor) -> tuple[int, int | None, int]:
    """What tells lists that would be made now from lists that were made before."""
    version = None if weight.is_inference() else weight._version  # a tensor of inference mode has none
    return weight.data_ptr(), version, codebook.updates_on_host
