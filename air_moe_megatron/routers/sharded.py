"""ShardedAIRRouter: each expert-parallel rank holds the centers and the parts of the lists of its own experts.

A token's *home* is the rank that it comes from. An expert's *owner* is the rank that holds its center and its slots in
the lists, and rebuilds these slots. The home does all work per token: coarse stage, selection, probabilities, losses. A
forward over the D expert-parallel ranks:

1. Each home finds its tokens' codewords. Rows and codewords go to all ranks (all-gathers).
2. Each owner scores its parts of the lists, and keeps the best n candidates of every row. It also draws the explored
   candidates from its parts.
3. Scores and ids return to the homes (all-to-alls). The home chooses the best M of D * n candidates, and the top-k of
   these.
4. The owners learn which candidates were kept and selected (an all-to-all of bytes). The dispatcher sends the probs.

For any D the candidates are those of a replicated router whose lists have as many parts.

Legend: D ranks, R rows (the tokens of all ranks), n candidates per row that an owner keeps; others as in
``ops/__init__.py``.
"""

from dataclasses import replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.compat import is_normal
from air_moe_megatron.learned.centers import Centers
from air_moe_megatron.learned.index import ShortlistIndex
from air_moe_megatron.learned.lists import without_repeats
from air_moe_megatron.ops.score_functions import SCORE_FUNCTIONS
from air_moe_megatron.process_groups import sum_over_ranks
from air_moe_megatron.routers.air import AIRRouter
from air_moe_megatron.routers.base import Routes
from air_moe_megatron.routers.row_exchange import RowExchange, ShardedRows

_BLOCK = 256  # centers that are initialized at a time

_SPLIT_ALONG = {"weight": 0, "index.shortlist": 1, "index.pool": 1, "index.staged_keys": 0}
"""State that is sharded over the ranks, and along which axis. Checkpoints hold it with the replicated router's keys and
shapes."""


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
        # State of the current forward: the tokens before the input norm; rows, slots, and which of these are kept.
        self._tokens: torch.Tensor | None = None
        self._chosen: tuple[ShardedRows, torch.Tensor, torch.Tensor] | None = None

    def reset_parameters(self) -> None:
        """Initialize this rank's centers to those that a replicated router would have.

        They are made a block at a time. A method that looks at the shape gets the whole weight [E, H].
        """
        weight = torch.empty(self.num_local_experts, self.config.hidden_size, dtype=self.config.params_dtype)
        if self.config.perform_initialization:
            own = range(self.first_expert, self.first_expert + self.num_local_experts)
            size = _BLOCK if is_normal(self.config.init_method) else self.num_experts
            for first in range(0, self.num_experts, size):
                block = torch.empty(min(size, self.num_experts - first), weight.shape[1], dtype=torch.float32)
                self.config.init_method(block)
                start, stop = max(first, own.start), min(first + len(block), own.stop)
                if start < stop:
                    weight[start - own.start : stop - own.start] = block[start - first : stop - first]
        self.weight, self.bias = torch.nn.Parameter(weight), None
        # The marks that expert weights have.
        self.weight.allreduce = False
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

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
    ) -> tuple[torch.Tensor, ShardedRows]:
        """Route the tokens. Return the probs [T, K], and the rows and pairs for the dispatcher.

        Args, raises: as :meth:`route`.
        """
        routes = self.route(input, padding_mask)
        routes.sharded.topk_ids = routes.topk_ids
        return routes.probs, routes.sharded

    def _choose(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None, batch_size: int) -> Routes:
        """Choose the experts, and tell the owners. Communicates over the expert-parallel group.

        Raises:
            ValueError: on every rank, if any has probs that are NaN or infinite.
        """
        routes = super()._choose(hidden, padding_mask, batch_size)
        (sharded, slots, is_kept), self._chosen = self._chosen, None
        is_invalid = ~routes.probs.isfinite()
        if padding_mask is not None:
            is_kept, is_invalid = is_kept & ~padding_mask.unsqueeze(1), is_invalid & ~padding_mask.unsqueeze(1)
        num_invalid = sharded.choose(slots, is_kept, routes.columns, is_invalid.sum())
        for rank, number in enumerate(num_invalid):
            if number:
                raise ValueError(
                    f"layer {self.layer_number}: {number} of the routing probs of expert-parallel rank {rank} are NaN "
                    "or infinite; the hidden states or the router's weights are not finite"
                )
        return replace(routes, sharded=sharded)

    def _as_scored(self, hidden: torch.Tensor) -> torch.Tensor:
        """See the base class. Tokens are sent without input norm, as the experts need them; owners normalize again."""
        self._tokens = hidden
        return super()._as_scored(hidden)

    def _score(
        self,
        hidden: torch.Tensor,
        shortlist: torch.Tensor,
        codewords: torch.Tensor,
        num_candidates: int,
        num_explored: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score on all ranks; see the base class. Communicates, and waits for each rank's number of tokens."""
        sizes = {
            "hidden size": hidden.shape[1],
            "bytes per hidden number": hidden.element_size(),
            "moe_air_num_probes": codewords.shape[1],
            "candidates": num_candidates,
            "explored candidates": num_explored,
            "experts per rank": self.num_local_experts,
        }
        exchange = RowExchange(self.ep_group, hidden.shape[0], sizes, hidden.device)
        tokens, self._tokens = self._tokens, None
        rows = exchange.gather(tokens)
        scored = super()._as_scored(rows)
        with torch.no_grad():
            codewords = exchange.gather(codewords.int()).long()  # [R, P]
            width = min(num_candidates, codewords.shape[1] * shortlist.shape[1])
            dtype = self._router_dtype(hidden)
            scores, local_ids = self.centers.fine_topk(scored, shortlist, codewords, width, dtype)
            if num_explored:
                drawn = self._draw(shortlist, codewords, num_explored // exchange.num_ranks)
                scores = torch.cat((scores, self._scores_of(scored, drawn, scores.dtype)), dim=1)
                local_ids = torch.cat((local_ids, drawn), dim=1)
            sharded = ShardedRows(
                exchange, rows, local_ids, self.num_local_experts, codewords.shape[1], scores.element_size()
            )
            scores, ids = exchange.to_homes(scores), exchange.to_homes(local_ids)  # [D, T, n]
            first = torch.arange(exchange.num_ranks, dtype=ids.dtype, device=ids.device) * self.num_local_experts
            ids = torch.where(ids < 0, ids, ids + first.view(-1, 1, 1))
            scores, ids = (values.transpose(0, 1) for values in (scores, ids))  # [T, D, n]
            slots = self._best_slots(scores[:, :, :width], ids[:, :, :width], num_candidates, sharded.width)
            scores, ids = scores.flatten(1), ids.flatten(1)  # [T, D * n]
            best_ids = ids.gather(1, slots)
            if num_explored:
                of_rank = torch.arange(width, sharded.width, device=slots.device)
                of_ranks = (torch.arange(exchange.num_ranks, device=slots.device) * sharded.width).unsqueeze(1)
                drawn = (of_ranks + of_rank).flatten()
                slots = torch.cat((slots, drawn.expand(slots.shape[0], -1)), dim=1)
                ids = torch.cat((best_ids, without_repeats(ids[:, drawn], best_ids)), dim=1)
            else:
                ids = best_ids
            scores = scores.gather(1, slots).masked_fill(ids < 0, float("-inf"))
        self._chosen = sharded, slots, ids >= 0
        return sharded.attach(scored, self.weight, scores), ids

    def _best_slots(self, scores: torch.Tensor, ids: torch.Tensor, number: int, stride: int) -> torch.Tensor:
        """[T, number] slots of the best of all owners' candidates [T, D, n]; an owner has ``stride`` slots a token."""
        if self.expert_bias is not None:
            scores = SCORE_FUNCTIONS[self.score_function](scores) + self.expert_bias[ids.clamp(min=0)]
            scores = scores.masked_fill(ids < 0, float("-inf"))
        best, width = scores.flatten(1).topk(number, dim=1, sorted=False).indices, scores.shape[2]
        return best // width * stride + best % width

    def commit_lists(self, group: torch.distributed.ProcessGroup | None) -> None:
        """See the base class; the ranks that hold the same experts share the rebuild of their lists."""
        super().commit_lists(self.expt_dp_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Shard centers and lists by global expert id, so that checkpoints load at any D, and without sharding."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        num_offsets = len(sharded_offsets)
        for name, axis in _SPLIT_ALONG.items():
            if prefix + name in state:
                replicated = state[prefix + name]
                state[prefix + name] = ShardedTensor.from_rank_offsets(
                    replicated.key,
                    replicated.data,
                    *sharded_offsets,
                    (num_offsets + axis, self.ep_group.rank(), self.ep_group.size()),
                    replica_id=(0, 0, self.expt_dp_group.rank()),
                    prepend_axis_num=num_offsets,
                )
        return state
