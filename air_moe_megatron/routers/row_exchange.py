"""The communication of sharded routing: rows of tokens to all expert-parallel ranks, and values of pairs.

A token's *home* is the rank that it comes from. Every rank holds the rows of all homes, those of rank 0 first. It is
the *owner* of its experts, and keeps n candidates per row among them. So at home a token has D * n slots for
candidates, n from each owner. A pair is a token and one of its candidates.

Legend: D ranks, T tokens of this rank, R rows (the tokens of all ranks), n candidates per row that an owner keeps,
N pairs; others as in ``ops/__init__.py``.
"""

from dataclasses import dataclass, field

import torch
from megatron.core.tensor_parallel import all_to_all
from torch.autograd.function import FunctionCtx, once_differentiable

from air_moe_megatron.ops.pair_products import Pairs, make_pairs, pair_gradients
from air_moe_megatron.process_groups import group_size


class RowExchange:
    """The collectives of one forward of a layer; every rank of the group calls them in the same order.

    Args:
        group: the D expert-parallel ranks; None means this rank alone.
        num_tokens: T, which may differ between the ranks.
        sizes: named sizes that must be equal on all ranks.
        device: device of the tokens.
    Raises:
        ValueError: on every rank, if a size differs.
    """

    def __init__(
        self,
        group: torch.distributed.ProcessGroup | None,
        num_tokens: int,
        sizes: dict[str, int],
        device: torch.device,
    ) -> None:
        self.group, self.num_ranks = group, group_size(group)
        self.rank = 0 if group is None else group.rank()
        self.num_tokens, self.counts = num_tokens, [num_tokens]  # counts: number of tokens of each rank
        if self.num_ranks > 1:
            own = torch.tensor([num_tokens, *sizes.values()], device=device)
            gathered = own.new_empty(self.num_ranks * own.numel())
            torch.distributed.all_gather_into_tensor(gathered, own, group=group)
            gathered = gathered.view(self.num_ranks, -1).t().tolist()  # waits for the device
            self.counts = gathered[0]
            for name, values in zip(sizes, gathered[1:], strict=True):
                if len(set(values)) > 1:
                    raise ValueError(f"{name} differs between the expert-parallel ranks: {values}")

    @property
    def num_rows(self) -> int:
        """R, the number of tokens of all ranks."""
        return sum(self.counts)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Gather the values of all ranks, [T, w] -> [R, w]. Differentiable: the backward is :meth:`sum`."""
        return values if self.num_ranks == 1 else _Gather.apply(values, self)

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum over the owners, at each row's home, [R, w] -> [T, w]; in fp32 or wider.

        Differentiable: the backward is :meth:`gather`.
        """
        return partial if self.num_ranks == 1 else _Sum.apply(partial, self)

    def to_homes(self, values: torch.Tensor) -> torch.Tensor:
        """Send each home what the owners hold of its tokens, [R, w] -> [D, T, w]. Not differentiable."""
        received = values.new_empty(self.num_ranks, self.num_tokens, values.shape[1])
        if self.num_ranks == 1:
            return values.view_as(received)
        self._all_to_all(received.flatten(0, 1), values, self._own_counts, self.counts)
        return received

    def to_owners(self, values: torch.Tensor) -> torch.Tensor:
        """Send each owner what the homes hold for it, [D, T, w] -> [R, w]. Not differentiable."""
        values = values.flatten(0, 1)
        if self.num_ranks == 1:
            return values
        received = values.new_empty(self.num_rows, values.shape[1])
        self._all_to_all(received, values, self.counts, self._own_counts)
        return received

    @property
    def _own_counts(self) -> list[int]:
        return [self.num_tokens] * self.num_ranks

    def _all_to_all(self, received: torch.Tensor, sent: torch.Tensor, *splits: list[int]) -> None:
        torch.distributed.all_to_all_single(received, sent.contiguous(), *splits, group=self.group)

    def all_rows(self, values: torch.Tensor) -> torch.Tensor:
        """:meth:`gather` without gradients; sends padding if ranks have unequal numbers of tokens."""
        most, width = max(self.counts), values.shape[1]
        if self.num_tokens < most:
            values = torch.cat((values, values.new_zeros(most - self.num_tokens, width)))
        gathered = values.new_empty(self.num_ranks * most, width)
        torch.distributed.all_gather_into_tensor(gathered, values.contiguous(), group=self.group)
        if min(self.counts) == most:
            return gathered
        parts = zip(gathered.split(most), self.counts, strict=True)
        return torch.cat([part[:count] for part, count in parts])

    def sums(self, partial: torch.Tensor) -> torch.Tensor:
        """:meth:`sum` without gradients."""
        wide = torch.promote_types(partial.dtype, torch.float32)
        return self.to_homes(partial).sum(dim=0, dtype=wide).to(partial.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, values: torch.Tensor, exchange: RowExchange) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange.all_rows(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.exchange.sums(grad), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, partial: torch.Tensor, exchange: RowExchange) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange.sums(partial)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.exchange.all_rows(grad), None


@dataclass(frozen=True)
class PairExchange:
    """Pairs of tokens and candidates, at their homes and at their owners, in the same order on both sides."""

    group: torch.distributed.ProcessGroup | None
    pairs: Pairs  # this owner's pairs of rows (of all homes) and local experts
    sources: torch.Tensor  # [N] int64, indices of this home's pairs in a flat [T, K] or [T, M]
    sent: list[int]  # numbers of pairs from this home to each owner
    received: list[int]  # numbers of pairs that this owner gets from each home

    def send(self, values: torch.Tensor) -> torch.Tensor:
        """Send values of pairs to their owners, [T, K] or [T, M] -> [N']. Differentiable; one all-to-all each way."""
        values = values.reshape(-1).index_select(0, self.sources)
        return values if group_size(self.group) == 1 else all_to_all(self.group, values, self.received, self.sent)


@dataclass
class ShardedRows:
    """The rows that a router has gathered for the experts, and the pairs that its tokens keep and select.

    The home knows the scores before the owners know the pairs. So :meth:`attach` makes the scores differentiable first,
    and :meth:`choose` must follow before the backward.
    """

    exchange: RowExchange
    rows: torch.Tensor  # [R, H]
    local_ids: torch.Tensor  # [R, n] int32, this owner's candidates of each row; -1 for none
    num_local_experts: int
    num_probes: int
    score_bytes: int  # bytes per score that is sent
    topk_ids: torch.Tensor | None = None  # [T, K] int32, as in the routes
    selected: PairExchange | None = None  # the pairs of the top-k
    kept: list[PairExchange] = field(default_factory=list)  # empty, then the one exchange of pairs that get gradients

    @property
    def width(self) -> int:
        """n, the number of candidates per row that an owner keeps."""
        return self.local_ids.shape[1]

    def attach(self, scored: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the candidates' scores [T, N], differentiable: the owners compute the gradients of ``<w_e, h>``.

        Args:
            scored: [R, H], the rows as they were scored.
            weight: [E / D, H].
            scores: [T, N].
        """
        return _HomeScores.apply(scored, weight, scores, self.kept)

    @torch.no_grad()
    def choose(
        self, slots: torch.Tensor, is_kept: torch.Tensor, columns: torch.Tensor, num_invalid: torch.Tensor
    ) -> list[int]:
        """Tell the owners which of their candidates this home keeps and selects; waits for the device once.

        Communicates: one all-to-all of D * n bytes per token, and one all-gather of a number.

        Args:
            slots: [T, M] int64, slots of the candidates among the token's D * n, in the order of the scores.
            is_kept: [T, M] bool, False where there is no candidate or the token is padding.
            columns: [T, K] int64, columns of ``slots`` that are the top-k.
            num_invalid: [] int64, number of probs on this rank that are not finite.
        Returns:
            ``num_invalid`` of every rank.
        """
        exchange, (num_tokens, num_kept) = self.exchange, slots.shape
        num_ranks, device = exchange.num_ranks, slots.device
        is_selected = torch.zeros_like(is_kept).scatter_(1, columns, True) & is_kept
        codes = torch.zeros(num_tokens, num_ranks * self.width, dtype=torch.uint8, device=device)
        codes.scatter_(1, slots, is_kept.to(torch.uint8) + is_selected)
        codes = codes.view(num_tokens, num_ranks, self.width).transpose(0, 1).contiguous()  # [D, T, n]
        received = exchange.to_owners(codes)  # [R, n]
        invalid = num_invalid.view(1)
        if num_ranks > 1:
            invalid = invalid.new_empty(num_ranks)
            torch.distributed.all_gather_into_tensor(invalid, num_invalid.view(1), group=exchange.group)
        of_homes = received.split(exchange.counts)
        counts = [invalid]
        for code in (1, 2):
            counts.append((codes >= code).sum(dim=(1, 2)))
            counts.append(torch.stack([(part >= code).sum() for part in of_homes]))
        invalid, *counts = torch.stack(counts).tolist()  # the one wait for the device
        # For each candidate that a home keeps: its index in the flat [T, M] of scores, and in the flat [T, K] of top-k.
        places = torch.arange(num_tokens * num_kept, device=device).view(num_tokens, num_kept)
        in_topk = torch.arange(columns.numel(), device=device).view_as(columns)
        in_topk = torch.zeros_like(places).scatter_(1, columns, in_topk)
        of_kept, of_selected = (
            torch.zeros(num_tokens, num_ranks * self.width, dtype=torch.int64, device=device)
            .scatter_(1, slots, values)
            .view(num_tokens, num_ranks, self.width)
            .transpose(0, 1)
            .flatten()
            for values in (places, in_topk)
        )
        self.kept.append(self._pairs(codes >= 1, of_kept, received >= 1, *counts[:2]))
        self.selected = self._pairs(codes >= 2, of_selected, received >= 2, *counts[2:])
        return invalid

    def _pairs(
        self, codes: torch.Tensor, places: torch.Tensor, received: torch.Tensor, sent: list[int], got: list[int]
    ) -> PairExchange:
        at_home = torch.nonzero_static(codes.flatten(), size=sum(sent)).flatten()
        at_owner = torch.nonzero_static(received.flatten(), size=sum(got)).flatten()
        rows, ids = at_owner // self.width, self.local_ids.flatten()[at_owner]
        pairs = make_pairs(rows, ids, self.exchange.num_rows, self.num_local_experts)
        return PairExchange(self.exchange.group, pairs, places[at_home], sent, got)


class _HomeScores(torch.autograd.Function):
    """Scores whose centers and rows are at their owners. The backward sends the kept scores' gradients there."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, rows: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor, kept: list[PairExchange]
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.weight, ctx.kept = weight, kept  # the parameter itself, for its main_grad
        return scores.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, _ = ctx.saved_tensors
        (kept,) = ctx.kept
        need_rows, need_weight = ctx.needs_input_grad[:2]
        grads = pair_gradients(rows, ctx.weight, kept.pairs, kept.send(grad), need_rows, need_weight)
        return *grads, None, None
