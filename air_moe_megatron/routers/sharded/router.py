"""ShardedAIRRouter and its routes. The four steps of a forward, and the legend, are those of the folder."""

from dataclasses import dataclass, replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.expert_weights import mark_expert_weight, sharded_by_expert
from air_moe_megatron.initialization import is_normal
from air_moe_megatron.learned.centers import Centers
from air_moe_megatron.learned.index import ShortlistIndex
from air_moe_megatron.learned.lists import without_repeats
from air_moe_megatron.learned.recomputation import hidden_from_checkpoints
from air_moe_megatron.ops.score_functions import selection_scores
from air_moe_megatron.process_groups import sum_over_ranks
from air_moe_megatron.routers.air import AIRRouter
from air_moe_megatron.routers.base import Routes, invalid_probs_error
from air_moe_megatron.routers.losses import layer_of
from air_moe_megatron.routers.sharded.candidates import Candidates, GatheredRows, Offers
from air_moe_megatron.routers.sharded.exchange import RowExchange
from air_moe_megatron.routers.sharded.pairs import KeptPairs, PairExchange

_CENTERS_AT_A_TIME = 256  # when they are initialized

_SPLIT_ALONG = {"weight": 0, "index.shortlist": 1, "index.pool": 1, "index.staged_keys": 0}
"""State that is sharded over the ranks, and along which axis. Checkpoints hold it with the replicated router's keys and
shapes."""


@dataclass(frozen=True, kw_only=True)
class ShardedRoutes(Routes):
    """Routes, with the rows that the router has gathered and the pairs that are selected, for the dispatcher."""

    exchange: RowExchange
    rows: torch.Tensor  # [R, H], the tokens of all homes, without input norm
    selected: PairExchange  # the pairs of the top-k
    bytes_to_owner: int  # per token and owner, beside the row: int32 codewords, and a byte for each offer
    bytes_to_home: int  # per row: scores and int32 ids of the offers


class ShardedAIRRouter(AIRRouter):
    """An :class:`AIRRouter` with the centers and lists of this rank's experts only.

    ``weight`` is [E / D, H]. It is marked as an expert weight: its gradient comes from the tokens of all D ranks, and
    is summed over the ranks that hold the same experts.

    Args:
        config, pg_collection, is_mtp_layer: as :class:`AIRRouter`; ``ep`` and ``expt_dp`` are used too.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection, is_mtp_layer: bool = False
    ) -> None:
        self.ep_group, self.expt_dp_group = pg_collection.ep, pg_collection.expt_dp
        self.num_local_experts = config.num_moe_experts // self.ep_group.size()
        self.first_expert = self.ep_group.rank() * self.num_local_experts
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.center_group = self.ep_group if self.ep_group.size() > 1 else None

    def reset_parameters(self) -> None:
        """Initialize this rank's centers to those that a replicated router would have.

        They are made a block at a time. A method that looks at the shape gets the whole weight [E, H].
        """
        weight = torch.empty(self.num_local_experts, self.config.hidden_size, dtype=self.config.params_dtype)
        if self.config.perform_initialization:
            own = range(self.first_expert, self.first_expert + self.num_local_experts)
            size = _CENTERS_AT_A_TIME if is_normal(self.config.init_method) else self.num_experts
            for first in range(0, self.num_experts, size):
                block = torch.empty(min(size, self.num_experts - first), weight.shape[1], dtype=torch.float32)
                self.config.init_method(block)
                start, stop = max(first, own.start), min(first + len(block), own.stop)
                if start < stop:
                    weight[start - own.start : stop - own.start] = block[start - first : stop - first]
        self.weight, self.bias = torch.nn.Parameter(weight), None
        mark_expert_weight(self.weight)
        # Muon finds the tensor-parallel group of a weight by this mark. Megatron sets it, but only on parameters with
        # "experts" in their names.
        self.weight.expert_tp = True

    def mean_over_shards(self, share: torch.Tensor) -> torch.Tensor:
        """Average over the shards; communicates over the expert-parallel group."""
        return sum_over_ranks(share.clone(), self.ep_group) / self.ep_group.size()

    def _make_index(self) -> ShortlistIndex:
        return self._make_shard_of_index(self.ep_group.size(), self.ep_group.rank())

    def _list_group(self) -> torch.distributed.ProcessGroup:
        return self.expt_dp_group

    @property
    def centers(self) -> Centers:
        """See the base class; the expert bias is that of this rank's experts."""
        centers = super().centers
        if centers.expert_bias is None:
            return centers
        own = slice(self.first_expert, self.first_expert + self.num_local_experts)
        return replace(centers, expert_bias=centers.expert_bias[own])

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ShardedRoutes]:
        """Route the tokens. Return the probs [T, K], and the routes for the dispatcher.

        Args, raises: as :meth:`route`.
        """
        routes = self.route(input, padding_mask)
        return routes.probs, routes

    def _norm_and_choose(
        self, tokens: torch.Tensor, padding_mask: torch.Tensor | None, batch_size: int
    ) -> ShardedRoutes:
        """Choose the experts in the four steps of a forward. Communicates over the expert-parallel group.

        Raises:
            ValueError: on every rank, if a size differs between ranks, or any has probs that are NaN or infinite.
        """
        hidden = self.as_scored(tokens)
        with hidden_from_checkpoints():
            shortlist, probes = self._coarse(hidden, padding_mask)  # [C, L / D], [T, P]
        num_best, num_explored = self._num_candidates()
        rows = self._gather(tokens, probes, num_best, num_explored)  # step 1
        offers = self._score_rows(rows, shortlist, num_best, num_explored)  # step 2
        candidates = self._choose_offers(rows, offers, num_best)  # step 3
        del offers  # of all rows; the candidates hold what is still needed
        routes = self._choose_candidates(candidates.scores, candidates.ids, probes, padding_mask, batch_size)
        self._record(hidden, probes, padding_mask, batch_size)
        return self._tell_owners(rows, candidates, routes, padding_mask)  # step 4

    def _gather(self, tokens: torch.Tensor, probes: torch.Tensor, num_best: int, num_explored: int) -> GatheredRows:
        """Step 1: send tokens and codewords to all ranks. Waits for each rank's number of tokens.

        Tokens are sent without input norm, as the experts need them; owners normalize again.
        """
        sizes = {
            "hidden size": tokens.shape[1],
            "bytes per hidden number": tokens.element_size(),
            "moe_air_num_probes": probes.shape[1],
            "candidates": num_best,
            "explored candidates": num_explored,
            "experts per rank": self.num_local_experts,
        }
        exchange = RowExchange(self.ep_group, tokens.shape[0], sizes, tokens.device)
        rows = exchange.gather(tokens)
        with torch.no_grad():
            probes = exchange.gather(probes.int()).long()
        return GatheredRows(exchange, rows, self.as_scored(rows), probes)

    @torch.no_grad()
    def _score_rows(self, rows: GatheredRows, shortlist: torch.Tensor, num_best: int, num_explored: int) -> Offers:
        """Step 2: score this rank's parts of the lists, keep the best candidates of every row, and draw some."""
        num_best = min(num_best, rows.probed.shape[1] * shortlist.shape[1])
        dtype = self._router_dtype(rows.scored)
        scores, ids = self.centers.fine_topk(rows.scored, shortlist, rows.probed, num_best, dtype)
        if num_explored:
            drawn = self._draw(shortlist, rows.probed, num_explored // rows.exchange.num_ranks)
            scores = torch.cat((scores, self._scores_of(rows.scored, drawn, scores.dtype)), dim=1)
            ids = torch.cat((ids, drawn), dim=1)
        return Offers(scores, ids, num_best)

    def _choose_offers(self, rows: GatheredRows, offers: Offers, num_best: int) -> Candidates:
        """Step 3: return all offers to the homes. Of each token's, choose the best, and all that were drawn."""
        exchange, (_, num_offers) = rows.exchange, offers.ids.shape
        with torch.no_grad():
            scores, ids = exchange.to_homes(offers.scores), exchange.to_homes(offers.ids)  # [D, T, n]
            ranks = torch.arange(exchange.num_ranks, dtype=ids.dtype, device=ids.device)
            ids = torch.where(ids < 0, ids, ids + (ranks * self.num_local_experts).view(-1, 1, 1))
            scores, ids = (values.transpose(0, 1) for values in (scores, ids))  # [T, D, n]
            slots = self._best_slots(scores, ids, offers.num_best, num_best)
            scores, ids = scores.flatten(1), ids.flatten(1)  # [T, D * n]
            chosen = ids.gather(1, slots)
            if num_offers > offers.num_best:
                columns = torch.arange(offers.num_best, num_offers, device=slots.device)
                drawn = (ranks.long().unsqueeze(1) * num_offers + columns).flatten()
                slots = torch.cat((slots, drawn.expand(slots.shape[0], -1)), dim=1)
                chosen = torch.cat((chosen, without_repeats(ids[:, drawn], chosen)), dim=1)
            scores = scores.gather(1, slots).masked_fill(chosen < 0, float("-inf"))
        kept = KeptPairs()
        scores = kept.attach(rows.scored, self.weight, scores)
        return Candidates(exchange, self.num_local_experts, offers.ids, slots, chosen, scores, kept)

    def _best_slots(self, scores: torch.Tensor, ids: torch.Tensor, width: int, number: int) -> torch.Tensor:
        """[T, number] slots of the best candidates in the first ``width`` offers [T, D, n] of all owners."""
        stride, scores, ids = scores.shape[2], scores[:, :, :width], ids[:, :, :width]
        if self.expert_bias is not None:
            scores = selection_scores(scores, self.score_function, self.expert_bias[ids.clamp(min=0)])
            scores = scores.masked_fill(ids < 0, float("-inf"))
        best = scores.flatten(1).topk(number, dim=1, sorted=False).indices
        return best // width * stride + best % width

    def _tell_owners(
        self, rows: GatheredRows, candidates: Candidates, routes: Routes, padding_mask: torch.Tensor | None
    ) -> ShardedRoutes:
        """Step 4: tell the owners which of their offers are kept and selected. Raises as :meth:`_norm_and_choose`."""
        is_kept, is_invalid = candidates.ids >= 0, ~routes.probs.isfinite()
        if padding_mask is not None:
            is_kept, is_invalid = (values & ~padding_mask.unsqueeze(1) for values in (is_kept, is_invalid))
        selected, num_invalid = candidates.tell_owners(is_kept, routes.columns, is_invalid.sum())
        for rank, number in enumerate(num_invalid):
            if number:
                raise invalid_probs_error(number, rank, layer_of(self))
        num_probes, num_offers = rows.probed.shape[1], candidates.offered.shape[1]
        return ShardedRoutes(
            **vars(routes),
            exchange=rows.exchange,
            rows=rows.tokens,
            selected=selected,
            bytes_to_owner=4 * num_probes + num_offers,
            bytes_to_home=num_offers * (candidates.scores.element_size() + 4),
        )

    def commit_lists(self, group: torch.distributed.ProcessGroup | None) -> None:
        """See the base class; the ranks that hold the same experts share the rebuild of their lists."""
        super().commit_lists(self.expt_dp_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Shard centers and lists by global expert id, so that checkpoints load at any D, and without sharding."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, axis in _SPLIT_ALONG.items():
            if prefix + name in state:
                replicated = state[prefix + name]
                state[prefix + name] = sharded_by_expert(
                    replicated.key, replicated.data, sharded_offsets, self.ep_group, self.expt_dp_group, axis
                )
        return state
