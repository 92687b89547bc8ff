"""The compact dispatcher: a token travels once to each expert-parallel rank that holds any of its experts.

    dispatch   tokens [T, H], their experts [T, K]  ->  rows [R, H] of tokens and N (row, local expert, prob) pairs
    experts    one partial sum per row
    combine    the partial sums return, and each token adds up those of its ranks

Communication per layer and forward, all-to-alls over the expert-parallel group:

- counts: 5 integers per rank
- rows: H numbers per token and distinct rank, and again on the way back
- pair ids: 4 bytes per pair
- probs: one number per pair

The backward repeats the all-to-alls of rows and probs in the other direction. Per token and direction, the rows have
``H * distinct ranks <= H * min(K, ranks)`` numbers; Megatron's all-to-all sends ``H * K``. The first dispatch of a
layer also makes one all-gather of sizes.

The host waits for the device once per forward, for the counts, even with one expert-parallel rank. The backward does
not wait. All waits of a layer: docs/compact-path.md.
"""

from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.learned.recomputation import ForwardCounter
from air_moe_megatron.ops.exchange import combine, make_plan, pack
from air_moe_megatron.ops.pair_products import Pairs, make_pairs
from air_moe_megatron.process_groups import HoldsProcessGroups, gather_sizes
from air_moe_megatron.routers.base import invalid_probs_error
from air_moe_megatron.routers.sharded import ShardedRoutes


@dataclass
class Traffic:
    """Bytes that this rank's training forwards have passed to the all-to-alls since the last reset.

    ``row_bytes`` are sent, and equally many come back for the same tokens. The backward repeats both. The ``remote``
    bytes go to other ranks. A dispatcher has a second count, of forwards whose tokens do not count: one of the two of a
    recomputed forward, and any other without gradients.
    """

    row_bytes: int = 0
    remote_row_bytes: int = 0
    pair_bytes: int = 0
    remote_pair_bytes: int = 0


class CompactTokenDispatcher(HoldsProcessGroups, MoETokenDispatcher):
    """Megatron's dispatcher interface for compact routes; every rank of the expert-parallel group takes part.

    It takes ``topk_ids [T, K]`` (-1 for none) in place of Megatron's dense routing map. It gives the experts
    :class:`Pairs` in place of the number of tokens per expert.

    Args:
        num_local_experts: number of experts on this rank.
        config: transformer config.
        pg_collection: process groups; ``ep`` is used.

    Attributes:
        layer_number: appears in the error about probs that are not finite; :class:`AIRMoELayer` sets it, as
            :func:`layer_of` gives it.
        training: whether forwards count as traffic; :class:`AIRMoELayer` sets it.
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts
        self.ep_rank = pg_collection.ep.rank()  # the base class sets it only from Megatron-Core 0.18 on
        self.num_experts = num_local_experts * self.ep_size
        self.layer_number: int | None = None
        self.training = True
        self._forwards = ForwardCounter()  # counts the same forwards as the router's
        self.reset_log()
        self._have_ranks_agreed = False
        self._mismatch = None
        self._release()

    def _release(self) -> None:
        self._shape = self._plan = self._pairs = None
        self._row_splits: tuple[list[int], list[int]] = [], []  # rows sent and received, per rank

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Plan which tokens and pairs go to which rank; does not communicate or wait for the device.

        Invalid arguments raise no error here, but in :meth:`token_dispatch`, on every rank.

        Args:
            hidden_states: [..., H], T tokens.
            topk_ids: [T, K] integer, global expert ids; -1 for none. The probs of a repeated id are added.
            probs: [T, K].
        Returns:
            [T, H] tokens, [T, K] probs.
        """
        self._shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        num_tokens = hidden_states.shape[0]
        self._mismatch = None
        if topk_ids.dim() != 2 or topk_ids.shape != probs.shape or topk_ids.shape[0] != num_tokens:
            # The other ranks will wait for this one in the all-to-all. So it plans nothing, and tells them there.
            self._mismatch = f"topk_ids {tuple(topk_ids.shape)}, probs {tuple(probs.shape)}, {num_tokens} tokens"
            probs = probs.new_zeros(num_tokens, max(1, probs.shape[-1]) if probs.dim() else 1)
            topk_ids = torch.full(probs.shape, -1, device=probs.device)
        mismatch = self._mismatch is not None
        self._plan = make_plan(topk_ids, probs, self.ep_size, self.num_local_experts, mismatch)
        return hidden_states, probs

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Send tokens and pairs to their ranks: all-to-alls over the expert-parallel group; waits for the counts.

        Args:
            hidden_states: [T, H].
            probs: [T, K].
        Returns:
            [R, H] rows and [N] probs of the received pairs.
        Raises:
            ValueError: on every rank, if any rank has ids and probs of a wrong shape, ids out of range, or probs that
                are NaN or infinite. At the first dispatch also if the ranks disagree about the sizes of the layer.
        """
        self._require_agreement(hidden_states, probs)
        plan = self._plan
        received = plan.counts  # [D, 5]
        if self.ep_size > 1:
            received = torch.empty_like(plan.counts)
            torch.distributed.all_to_all_single(received, plan.counts, group=self.ep_group)
        sent, received = torch.stack((plan.counts, received)).tolist()  # the one wait for the device
        self._require_valid(received)
        rows_sent, pairs_sent, *_ = (list(of_ranks) for of_ranks in zip(*sent, strict=True))
        rows_received, pairs_received, *_ = (list(of_ranks) for of_ranks in zip(*received, strict=True))
        self._count_traffic(hidden_states, probs, rows_sent, pairs_sent)
        self._row_splits = rows_sent, rows_received
        num_pairs, topk = sum(pairs_sent), probs.shape[1]
        if self.ep_size == 1:  # all tokens stay in place as rows, even those without experts
            local_ids, probs = plan.topk_ids.reshape(-1), probs.reshape(-1)
            order = torch.arange(probs.numel(), device=probs.device)
            if num_pairs < order.numel():
                order = torch.nonzero_static(plan.pair_ranks == 0, size=num_pairs).flatten()
                local_ids, probs = local_ids[order], probs[order]
            rows = order // topk
        else:
            hidden_states, codes, probs = pack(hidden_states, probs, plan, sum(rows_sent), num_pairs)
            codes = all_to_all(self.ep_group, codes, pairs_received, pairs_sent)
            hidden_states = all_to_all(self.ep_group, hidden_states, rows_received, rows_sent)
            probs = all_to_all(self.ep_group, probs, pairs_received, pairs_sent)
            starts_row = codes < 0
            rows, local_ids = starts_row.long().cumsum(0) - 1, torch.where(starts_row, ~codes, codes)
        self._pairs = make_pairs(rows, local_ids, hidden_states.shape[0], self.num_local_experts)
        return hidden_states, probs

    def dispatch_postprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, Pairs, torch.Tensor]:
        """Return the experts' input: rows [R, H], :class:`Pairs` of rows and local experts, probs [N]."""
        return hidden_states, self._pairs, probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the experts' partial sums [R, H] unchanged, one per row."""
        return hidden_states

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Send the partial sums back by an all-to-all: [R, H] -> [rows sent, H]. Does not wait for the device."""
        if self.ep_size == 1:
            return hidden_states
        return all_to_all(self.ep_group, hidden_states, *self._row_splits)

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Sum each token's partial sums in fp32 or wider, [rows sent, H] -> [..., H]; zero without experts."""
        shape, plan = self._shape, self._plan
        self._release()  # otherwise ids and pairs would stay in memory until the next forward
        if self.ep_size > 1:
            hidden_states = combine(hidden_states, plan)
        return hidden_states.view(shape)

    def set_shared_experts(self, shared_experts: torch.nn.Module) -> NoReturn:
        """Not supported: the layer adds the shared experts itself."""
        raise ValueError("moe_shared_expert_overlap (True) is not supported with moe_dispatch 'compact'")

    def discard(self) -> None:
        """Begin an attempt at a step: forget the traffic since the end of the last step."""
        self.traffic, self.recomputed_traffic = map(replace, self._logged_before)
        self._forwards.reset()

    def end_step(self) -> None:
        """End a step, successful or not: keep the traffic of its forwards."""
        self._logged_before = replace(self.traffic), replace(self.recomputed_traffic)
        self._forwards.reset()

    def reset_log(self) -> None:
        """Reset the traffic for the next log line."""
        self.traffic, self.recomputed_traffic = Traffic(), Traffic()
        self.end_step()

    def _require_valid(self, received: list[list[int]]) -> None:
        for rank, (_, _, invalid_ids, invalid_probs, mismatches) in enumerate(received):
            if mismatches:
                shapes = f": {self._mismatch}" if rank == self.ep_rank else ""
                raise ValueError(
                    f"topk_ids and probs of expert-parallel rank {rank} must both be [T, K] for its T tokens{shapes}"
                )
            if invalid_ids:
                raise ValueError(
                    f"{invalid_ids} of the topk_ids of expert-parallel rank {rank} are out of range: "
                    f"an expert id must be between 0 and {self.num_experts - 1}, or -1 for none"
                )
            if invalid_probs:
                raise invalid_probs_error(invalid_probs, rank, self.layer_number)

    @torch.no_grad()
    def _require_agreement(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> None:
        """At the first dispatch, check that the sizes of the layer are the same on all ranks."""
        if self._have_ranks_agreed:
            return
        sizes = {
            "hidden size": hidden_states.shape[1],
            "bytes per hidden number": hidden_states.element_size(),
            "moe_router_topk": probs.shape[1],
            "bytes per prob": probs.element_size(),
            "experts per rank": self.num_local_experts,
        }
        gather_sizes(sizes, self.ep_group, hidden_states.device)
        self._have_ranks_agreed = True

    def _traffic_of_forward(self) -> Traffic:
        """The counters to which the current forward adds."""
        if not self.training:
            return Traffic()
        return self.traffic if self._forwards.counts() else self.recomputed_traffic

    def _count_traffic(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, rows_sent: list[int], pairs_sent: list[int]
    ) -> None:
        row_bytes = hidden_states.shape[1] * hidden_states.element_size()
        pair_bytes = 4 + probs.element_size()  # int32 id, prob
        traffic = self._traffic_of_forward()
        traffic.row_bytes += sum(rows_sent) * row_bytes
        traffic.remote_row_bytes += (sum(rows_sent) - rows_sent[self.ep_rank]) * row_bytes
        traffic.pair_bytes += sum(pairs_sent) * pair_bytes
        traffic.remote_pair_bytes += (sum(pairs_sent) - pairs_sent[self.ep_rank]) * pair_bytes


class ShardedTokenDispatcher(CompactTokenDispatcher):
    """The dispatcher of sharded routing: the experts use the rows that the router has already gathered.

    So only two things are sent: the probs, one number per pair, and the partial sums of all rows on their way back.

    Args:
        num_local_experts, config, pg_collection: as :class:`CompactTokenDispatcher`.
    """

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routes: ShardedRoutes, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the rows; no communication.

        Args:
            hidden_states: [..., H], the T tokens that were routed.
            routes: with the rows that the router has gathered, and the selected pairs.
            probs: [T, K].
        Returns:
            [T, H] tokens, [T, K] probs.
        """
        self._shape, self._plan = hidden_states.shape, routes
        return hidden_states.reshape(-1, hidden_states.shape[-1]), probs

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Send the probs to the owners of their experts: one all-to-all; does not wait for the device.

        Args:
            hidden_states: [T, H].
            probs: [T, K].
        Returns:
            [R, H] rows of all ranks and [N] probs of this rank's pairs.
        """
        routes = self._plan
        self._pairs = routes.selected.pairs
        self._count_sharded_traffic(hidden_states, probs, routes)
        return routes.rows, routes.selected.send(probs)

    def token_combine(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Sum partial sums at each token's home, [R, H] -> [T, H], in fp32 or wider. Does not wait for the device."""
        return self._plan.exchange.sum(hidden_states)

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Restore the shape of the tokens, [T, H] -> [..., H]."""
        shape = self._shape
        self._release()
        return hidden_states.view(shape)

    def _count_sharded_traffic(self, hidden_states: torch.Tensor, probs: torch.Tensor, routes: ShardedRoutes) -> None:
        """Count the bytes that this rank sends in a forward: its rows, codewords and marks of kept candidates to all
        ranks; scores and ids of all rows to their homes; probs to the owners."""
        num_tokens, num_ranks = hidden_states.shape[0], self.ep_size
        traffic = self._traffic_of_forward()
        row_bytes = num_tokens * hidden_states.shape[1] * hidden_states.element_size()
        traffic.row_bytes += num_ranks * row_bytes
        traffic.remote_row_bytes += (num_ranks - 1) * row_bytes
        to_owner, to_home = num_tokens * routes.bytes_to_owner, routes.bytes_to_home
        sent, num_rows = routes.selected.sent, routes.exchange.num_rows
        traffic.pair_bytes += num_ranks * to_owner + num_rows * to_home
        traffic.pair_bytes += sum(sent) * probs.element_size()
        traffic.remote_pair_bytes += (num_ranks - 1) * to_owner + (num_rows - num_tokens) * to_home
        traffic.remote_pair_bytes += (sum(sent) - sent[self.ep_rank]) * probs.element_size()
