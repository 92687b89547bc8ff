"""Pairs of a token and one of its candidates, at the token's home and at the candidate's owner.

The legend is that of the folder.
"""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import all_to_all
from torch.autograd.function import FunctionCtx, once_differentiable

from air_moe_megatron.ops.pair_products import Pairs, pair_gradients
from air_moe_megatron.process_groups import group_size


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
