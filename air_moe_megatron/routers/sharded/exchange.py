"""The collectives of sharded routing: rows of tokens to all expert-parallel ranks, and values of rows back home.

Every rank holds the rows of all homes, those of rank 0 first. The legend is that of the folder.
"""

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from air_moe_megatron.ops.dtypes import at_least_fp32
from air_moe_megatron.process_groups import gather_sizes, group_size


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
        self.num_tokens = num_tokens
        gathered = gather_sizes({"tokens": num_tokens, **sizes}, group, device, may_differ=("tokens",))
        self.counts = gathered["tokens"]  # number of tokens of each rank

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

    def gather_number(self, number: torch.Tensor) -> torch.Tensor:
        """Gather one number [] of every rank, [D]. Not differentiable."""
        gathered = number.new_empty(self.num_ranks)
        if self.num_ranks == 1:
            return number.view_as(gathered)
        torch.distributed.all_gather_into_tensor(gathered, number.view(1), group=self.group)
        return gathered

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
        wide = at_least_fp32(partial.dtype)
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
