"""What a forward holds from one step to the next: rows and offers of an owner, candidates of a home.

An owner offers n candidates per row, from its experts. So at home a token has D * n *slots*, n from each owner. The
home chooses N of them as the token's candidates. The router keeps none of it. The legend is that of the folder.
"""

from dataclasses import dataclass

import torch

from air_moe_megatron.ops.pair_products import make_pairs
from air_moe_megatron.routers.sharded.exchange import RowExchange
from air_moe_megatron.routers.sharded.pairs import KeptPairs, PairExchange


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
class Candidates:
    """The candidates of this home's tokens, and what this owner has offered to all homes."""

    exchange: RowExchange
    num_local_experts: int  # E / D
    offered: torch.Tensor  # [R, n] int32, local ids of this owner's offers; -1 for none
    slots: torch.Tensor  # [T, N] int64, each candidate's among the D * n of its token
    ids: torch.Tensor  # [T, N] int32, global; -1 for none
    scores: torch.Tensor  # [T, N], differentiable
    kept: KeptPairs

    @torch.no_grad()
    def tell_owners(
        self, is_kept: torch.Tensor, columns: torch.Tensor, num_invalid: torch.Tensor
    ) -> tuple[PairExchange, list[int]]:
        """Tell the owners which of their offers this home keeps and selects; waits for the device once.

        Communicates: one all-to-all of D * n bytes per token, and one all-gather of a number.

        Args:
            is_kept: [T, N] bool, False where there is no candidate or the token is padding.
            columns: [T, K] int64, columns of the candidates that are the top-k.
            num_invalid: [] int64, number of probs on this rank that are not finite.
        Returns:
            the selected pairs, and ``num_invalid`` of every rank. The kept pairs are set.
        """
        exchange = self.exchange
        is_selected = torch.zeros_like(is_kept).scatter_(1, columns, True) & is_kept
        marks = self._by_slot(is_kept.to(torch.uint8) + is_selected)  # 1 for a kept pair, 2 for a selected one
        received = exchange.to_owners(marks)  # [R, n]
        counts = [exchange.gather_number(num_invalid)]
        of_homes = received.split(exchange.counts)
        for mark in (1, 2):
            counts.append((marks >= mark).sum(dim=(1, 2)))  # pairs to each owner
            counts.append(torch.stack([(part >= mark).sum() for part in of_homes]))  # and from each home
        # The one wait for the device.
        invalid, kept_to, kept_from, selected_to, selected_from = torch.stack(counts).tolist()
        # For each candidate that a home keeps: its index in the flat [T, N] of scores, and in the flat [T, K] of top-k.
        in_scores = torch.arange(is_kept.numel(), device=is_kept.device).view_as(is_kept)
        in_topk = torch.arange(columns.numel(), device=columns.device).view_as(columns)
        in_topk = torch.zeros_like(in_scores).scatter_(1, columns, in_topk)
        self.kept.exchange = self._pairs(marks >= 1, in_scores, received >= 1, kept_to, kept_from)
        return self._pairs(marks >= 2, in_topk, received >= 2, selected_to, selected_from), invalid

    def _by_slot(self, values: torch.Tensor) -> torch.Tensor:
        """[D, T, n] values of the candidates [T, N], each in its slot; 0 in the other slots."""
        num_tokens, num_ranks, num_offers = len(values), self.exchange.num_ranks, self.offered.shape[1]
        slots = values.new_zeros(num_tokens, num_ranks * num_offers).scatter_(1, self.slots, values)
        return slots.view(num_tokens, num_ranks, num_offers).transpose(0, 1).contiguous()

    def _pairs(
        self, marked: torch.Tensor, indices: torch.Tensor, received: torch.Tensor, sent: list[int], got: list[int]
    ) -> PairExchange:
        """The pairs that are marked at home [D, T, n] and at the owner [R, n]; ``indices`` [T, N] become sources."""
        at_home = torch.nonzero_static(marked.flatten(), size=sum(sent)).flatten()
        at_owner = torch.nonzero_static(received.flatten(), size=sum(got)).flatten()
        rows, ids = at_owner // self.offered.shape[1], self.offered.flatten()[at_owner]
        pairs = make_pairs(rows, ids, self.exchange.num_rows, self.num_local_experts)
        return PairExchange(self.exchange.group, pairs, self._by_slot(indices).flatten()[at_home], sent, got)
