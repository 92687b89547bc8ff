"""What a forward of sharded routing holds: the rows, the candidates at their owners and homes, and the pairs.

Homes and owners are those of ``row_exchange.py``. An owner offers n candidates per row, from its experts. So at home a
token has D * n *slots*, n from each owner. The home chooses N of them as the token's candidates. A pair is a token and
one of its candidates.

All of it belongs to one forward. The router holds none of it.

Legend: D ranks, T tokens of this rank, R rows (the tokens of all ranks), n offers per row and owner, N candidates per
token, p pairs of this home, q pairs of this owner; others as in ``ops/__init__.py``.
"""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import all_to_all
from torch.autograd.function import FunctionCtx, once_differentiable

from air_moe_megatron.ops.pair_products import Pairs, make_pairs, pair_gradients
from air_moe_megatron.process_groups import group_size
from air_moe_megatron.routers.row_exchange import RowExchange


@dataclass(frozen=True)
class GatheredRows:
    """The tokens of all homes."""

    exchange: RowExchange
    tokens: torch.Tensor  # [R, H], without input norm, as the experts need them
    scored: torch.Tensor  # [R, H], after the input norm
    probed: torch.Tensor  # [R, P] int64


@dataclass(frozen=True)
class Offers:
    """What this owner offers for each row: its best candidates, and then those that it has drawn."""

    scores: torch.Tensor  # [R, n]
    ids: torch.Tensor  # [R, n] int32, local; -1 for none
    num_best: int  # number of columns with the best


@dataclass(frozen=True)
class PairExchange:
    """Pairs of tokens and candidates, at their homes and at their owners, in the same order on both sides."""

    group: torch.distributed.ProcessGroup | None
    pairs: Pairs  # this owner's pairs of rows (of all homes) and local experts
    sources: torch.Tensor  # [p] int64, indices of this home's pairs in a flat [T, K] or [T, N]
    sent: list[int]  # numbers of pairs from this home to each owner
    received: list[int]  # numbers of pairs that this owner gets from each home

    def send(self, values: torch.Tensor) -> torch.Tensor:
        """Send values of pairs to their owners, [T, K] or [T, N] -> [q]. Differentiable; one all-to-all each way."""
        values = values.reshape(-1).index_select(0, self.sources)
        return values if group_size(self.group) == 1 else all_to_all(self.group, values, self.received, self.sent)


class KeptPairs:
    """The pairs whose scores get gradients.

    The home needs the scores before the owners know the pairs. So :meth:`attach` makes the scores differentiable first,
    and ``exchange`` must be set before the backward.
    """

    def __init__(self) -> None:
        self.exchange: PairExchange | None = None

    def attach(self, scored: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the candidates' scores [T, N], differentiable: the owners compute the gradients of ``<w_e, h>``.

        Args:
            scored: [R, H], the rows as they were scored.
            weight: [E / D, H].
            scores: [T, N].
        """
        return _HomeScores.apply(scored, weight, scores, self)


class _HomeScores(torch.autograd.Function):
    """Scores whose centers and rows are at their owners. The backward sends the kept scores' gradients there."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, rows: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor, kept: KeptPairs
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.weight, ctx.kept = weight, kept  # the parameter itself, for its main_grad
        return scores.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, _ = ctx.saved_tensors
        kept = ctx.kept.exchange
        assert kept is not None, "the backward of scores came before their owners were told the pairs"
        need_rows, need_weight = ctx.needs_input_grad[:2]
        grads = pair_gradients(rows, ctx.weight, kept.pairs, kept.send(grad), need_rows, need_weight)
        return *grads, None, None


@dataclass(frozen=True)
class ShardedRows:
    """What experts and dispatcher need: the rows that the router has gathered, and the pairs that are selected."""

    exchange: RowExchange
    rows: torch.Tensor  # [R, H], without input norm
    selected: PairExchange  # the pairs of the top-k
    num_probes: int  # P
    num_offers: int  # n
    score_bytes: int  # bytes per score that is sent
    topk_ids: torch.Tensor | None = None  # [T, K] int32, as in the routes; set by the router's forward


@dataclass(frozen=True)
class Candidates:
    """The candidates of this home's tokens, and what this owner has offered to all homes."""

    rows: GatheredRows
    offered: torch.Tensor  # [R, n] int32, local ids of this owner's offers; -1 for none
    slots: torch.Tensor  # [T, N] int64, each candidate's among the D * n of its token
    ids: torch.Tensor  # [T, N] int32, global; -1 for none
    scores: torch.Tensor  # [T, N], differentiable
    kept: KeptPairs

    @torch.no_grad()
    def tell_owners(
        self, is_kept: torch.Tensor, columns: torch.Tensor, num_invalid: torch.Tensor, num_local_experts: int
    ) -> tuple[ShardedRows, list[int]]:
        """Tell the owners which of their offers this home keeps and selects; waits for the device once.

        Communicates: one all-to-all of D * n bytes per token, and one all-gather of a number.

        Args:
            is_kept: [T, N] bool, False where there is no candidate or the token is padding.
            columns: [T, K] int64, columns of the candidates that are the top-k.
            num_invalid: [] int64, number of probs on this rank that are not finite.
            num_local_experts: E / D.
        Returns:
            the rows and the selected pairs; ``num_invalid`` of every rank.
        """
        exchange = self.rows.exchange
        is_selected = torch.zeros_like(is_kept).scatter_(1, columns, True) & is_kept
        marks = self._by_slot(is_kept.to(torch.uint8) + is_selected)  # 1 for a kept pair, 2 for a selected one
        received = exchange.to_owners(marks)  # [R, n]
        counts = [exchange.gather_number(num_invalid)]
        of_homes = received.split(exchange.counts)
        for mark in (1, 2):
            counts.append((marks >= mark).sum(dim=(1, 2)))  # pairs to each owner
            counts.append(torch.stack([(part >= mark).sum() for part in of_homes]))  # and from each home
        invalid, *counts = torch.stack(counts).tolist()  # the one wait for the device
        # For each candidate that a home keeps: its index in the flat [T, N] of scores, and in the flat [T, K] of top-k.
        in_scores = torch.arange(is_kept.numel(), device=is_kept.device).view_as(is_kept)
        in_topk = torch.arange(columns.numel(), device=columns.device).view_as(columns)
        in_topk = torch.zeros_like(in_scores).scatter_(1, columns, in_topk)
        self.kept.exchange = self._pairs(marks >= 1, in_scores, received >= 1, *counts[:2], num_local_experts)
        selected = self._pairs(marks >= 2, in_topk, received >= 2, *counts[2:], num_local_experts)
        num_probes, num_offers = self.rows.probed.shape[1], self.offered.shape[1]
        score_bytes = self.scores.element_size()
        return ShardedRows(exchange, self.rows.tokens, selected, num_probes, num_offers, score_bytes), invalid

    def _by_slot(self, values: torch.Tensor) -> torch.Tensor:
        """[D, T, n] values of the candidates [T, N], each in its slot; 0 in the other slots."""
        num_tokens, num_ranks, num_offers = len(values), self.rows.exchange.num_ranks, self.offered.shape[1]
        slots = values.new_zeros(num_tokens, num_ranks * num_offers).scatter_(1, self.slots, values)
        return slots.view(num_tokens, num_ranks, num_offers).transpose(0, 1).contiguous()

    def _pairs(
        self,
        marked: torch.Tensor,
        indices: torch.Tensor,
        received: torch.Tensor,
        sent: list[int],
        got: list[int],
        num_local_experts: int,
    ) -> PairExchange:
        """The pairs that are marked at home [D, T, n] and at the owner [R, n]; ``indices`` [T, N] become sources."""
        at_home = torch.nonzero_static(marked.flatten(), size=sum(sent)).flatten()
        at_owner = torch.nonzero_static(received.flatten(), size=sum(got)).flatten()
        rows, ids = at_owner // self.offered.shape[1], self.offered.flatten()[at_owner]
        exchange = self.rows.exchange
        pairs = make_pairs(rows, ids, exchange.num_rows, num_local_experts)
        return PairExchange(exchange.group, pairs, self._by_slot(indices).flatten()[at_home], sent, got)
