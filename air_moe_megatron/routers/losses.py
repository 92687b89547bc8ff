"""The losses of a router: balancing losses and z-loss, equal to those of one rank on all tokens.

A balancing loss weights each token's score of an expert by the expert's share of all selections::

    loss = coeff * E * sum over e of share_e * (sum over tokens of score_te) / num_tokens

Three kinds differ in the tokens that they sum over. "aux_loss" takes the microbatch of a data-parallel rank.
"seq_aux_loss" takes each sequence alone, and then the mean over sequences. "global_aux_loss" takes the microbatches of
all ranks, and its shares come from all microbatches of the global batch so far. Source: Fedus et al. 2021, arXiv
2101.03961, and Qiu et al. 2025, arXiv 2501.11873.

Names, logging and the scale of the main loss are Megatron's. Megatron's loss functions give other results if token
counts are unequal. They divide the selections of several microbatches or sequences by the mean number of tokens. They
average "global_aux_loss" over data-parallel ranks, although each rank holds only a part of it.

Without ``calculate_per_token_loss`` every microbatch has the same weight, and so has every sequence in it. With it,
every token has the same weight.

Legend: N candidates per token (M, or M + X with X explored ones), U groups of tokens (1, or one per sequence); others
as in ``ops/__init__.py``. Token t is in group t % U.
"""

from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from torch.autograd.function import FunctionCtx, once_differentiable

from air_moe_megatron.compat import get_moe_metrics_tracker
from air_moe_megatron.learned.recomputation import hidden_from_checkpoints
from air_moe_megatron.ops.dtypes import at_least_fp32
from air_moe_megatron.ops.score_functions import SCORE_FUNCTIONS
from air_moe_megatron.process_groups import group_size, sum_over_ranks

# Megatron's balancing losses, and their names in its logs.
_BALANCING_LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


@dataclass(frozen=True)
class Explored:
    """The explored candidates, each token's last ones. They are drawn at random, for the balancing losses alone."""

    number: int  # X
    stands_for: float  # number of slots of the token's lists that each of them represents


def layer_of(router: TopKRouter) -> int | None:
    """The number, from 1, by which every message and file names the layer of a router, Megatron's or ours.

    Layers of multi-token prediction follow the decoder's, as in Megatron's MoE metrics. None before it is set.
    """
    number = router.layer_number
    return number if number is None or not router.is_mtp_layer else number + router.config.num_layers


class RouterLosses(TopKRouter):
    """Megatron's router with the losses of this file.

    A training forward makes one all-reduce per balancing loss, of E + 1 integers, or E + 1 per sequence for
    "seq_aux_loss". With a padding mask the z-loss adds an all-reduce of one number. A forward that repeats a counted
    one (see ``_is_counted``) neither logs nor adds to the global counts.
    """

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attach the z-loss, the mean of ``logsumexp(logits)^2``.

        Args:
            logits: [T, M].
            padding_mask: [T] bool, True for padding, which does not count; None if there is none.
        Returns:
            [T, M], the logits with the loss attached.
        """
        coeff = self.config.moe_z_loss_coeff
        if coeff is None or not (self.training and torch.is_grad_enabled()):
            return logits
        squares = _without(logits, padding_mask).logsumexp(dim=1).to(at_least_fp32(logits.dtype)).square()
        num_tokens = self._num_tokens(logits, padding_mask)
        loss = _without(squares, padding_mask).sum() * (coeff / num_tokens.to(squares.dtype))
        return self._attach_loss(logits, loss, num_tokens, "z_loss", coeff, self.tp_cp_group)

    def _needs_aux_scores(self) -> bool:
        return self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled()

    def _aux_scores(
        self, logits: torch.Tensor, columns: torch.Tensor | None, explored: Explored | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, N] bool, whether a candidate is selected, and [T, N] scores, which sum to one for each token.

        The results are those of Megatron's ``compute_routing_scores_for_aux_loss``, which selects again, by scores
        alone. ``columns`` [T, K] are the selected candidates if the router selected them by scores alone, so that this
        need not be repeated. They are None if an expert bias took part or all experts are candidates.

        Explored candidates, the last X of N, are never selected. Each is weighted by the number of slots that it stands
        for, so that sums over them estimate sums over all candidates beyond the best M.
        """
        if columns is None:
            return compute_routing_scores_for_aux_loss(logits, self.topk, self.score_function)
        selected = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).scatter_(1, columns, True)
        numbers = None
        if explored is not None:
            numbers = torch.ones(logits.shape[1], dtype=torch.float32, device=logits.device)
            numbers[-explored.number :] = explored.stands_for
        if self.score_function == "softmax":
            logits = logits if numbers is None else logits + numbers.log()
            return selected, torch.softmax(logits, dim=-1, dtype=torch.float32)
        scores = SCORE_FUNCTIONS[self.score_function](logits.float())
        scores = scores if numbers is None else scores * numbers
        return selected, scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)

    def _attach_aux_losses(
        self,
        probs: torch.Tensor,
        logits: torch.Tensor,
        ids: torch.Tensor | None,
        padding_mask: torch.Tensor | None,
        batch_size: int,
        columns: torch.Tensor | None = None,
        explored: Explored | None = None,
    ) -> torch.Tensor:
        """Attach the balancing losses, in O(T*N + E).

        Args:
            probs: [T, K], to which the losses are attached.
            logits: [T, N] logits of the candidates.
            ids: [T, N] int64 experts of the candidates, -1 for none; None if the candidates are all experts in order.
            padding_mask: [T] bool, True for padding, which does not count; None if there is none.
            batch_size: number of sequences.
            columns: [T, K] columns of the candidates selected by scores alone; None to select again.
            explored: describes the explored candidates; None if there are none.
        Returns:
            [T, K], the probs with the losses attached.
        """
        selected, scores = self._aux_scores(_without(logits, padding_mask), columns, explored)
        selected, scores = _without(selected, padding_mask), _without(scores, padding_mask)
        if ids is not None:
            absent = ids < 0
            selected, scores = selected.masked_fill(absent, False), scores.masked_fill(absent, 0.0)
            ids = ids.clamp(min=0)
        for kind, name in _BALANCING_LOSSES.items():
            coeff = self.get_aux_loss_coeff(kind)
            if coeff > 0:
                num_groups = batch_size if kind == "seq_aux_loss" else 1
                group = self.tp_dp_cp_group if kind == "global_aux_loss" else self.tp_cp_group
                flat_indices = None if ids is None else _flat_expert_indices(ids, num_groups, self.num_experts)
                counts, num_tokens = self._count_selections(
                    selected, flat_indices, columns, padding_mask, num_groups, group
                )
                if kind == "global_aux_loss":
                    counts = self._add_to_global_counts(counts)
                shares = counts.to(scores.dtype) / counts.sum(dim=1, keepdim=True).clamp_min(1)
                weights = shares * (coeff * self.num_experts / num_tokens.to(scores.dtype)).unsqueeze(1)
                loss = _WeightedScores.apply(scores, flat_indices, weights)
                probs = self._attach_loss(probs, loss, num_tokens, name, coeff, group)
        return probs

    def _add_to_global_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """Add a counted forward's selections [1, E] to Megatron's counts of the global batch, and return these, [1, E].

        The result shares its memory with Megatron's buffer.
        """
        if self._is_counted:
            with hidden_from_checkpoints():
                self.global_tokens_per_expert += counts[0]
                self.ga_steps += 1
        return self.global_tokens_per_expert.unsqueeze(0)

    @torch.no_grad()
    def _count_selections(
        self,
        selected: torch.Tensor,
        flat_indices: torch.Tensor | None,
        columns: torch.Tensor | None,
        padding_mask: torch.Tensor | None,
        num_groups: int,
        group: torch.distributed.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[U, E] numbers of selections, and [U] numbers of counted tokens, at least 1, over all ranks of the group."""
        shape = (selected.shape[0] // num_groups, num_groups)
        if flat_indices is None:
            counts = selected.view(*shape, self.num_experts).sum(dim=0)
        else:
            if columns is not None:  # these are all selected candidates
                selected, flat_indices = selected.gather(1, columns), flat_indices.gather(1, columns)
            counts = torch.zeros(num_groups * self.num_experts, dtype=torch.int64, device=selected.device)
            counts.scatter_add_(0, flat_indices.reshape(-1).long(), selected.reshape(-1).long())
        if padding_mask is None:
            num_tokens = torch.full((num_groups,), shape[0], device=selected.device)
        else:
            num_tokens = (~padding_mask).view(shape).sum(dim=0)
        both = torch.cat((counts.view(num_groups, -1), num_tokens.unsqueeze(1)), dim=1)
        both = sum_over_ranks(both, group)
        return both[:, :-1], both[:, -1].clamp_min(1)

    @torch.no_grad()
    def _num_tokens(self, tokens: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """Number of counted tokens of this microbatch, at least 1, over the ranks that hold parts of its sequences."""
        if padding_mask is None:  # all ranks hold equally many
            num_tokens = torch.full((), tokens.shape[0] * group_size(self.tp_cp_group), device=tokens.device)
        else:
            num_tokens = sum_over_ranks((~padding_mask).sum(), self.tp_cp_group)
        return num_tokens.clamp_min(1)

    def _attach_loss(
        self,
        activation: torch.Tensor,
        loss: torch.Tensor,
        num_tokens: torch.Tensor,
        name: str,
        coeff: float,
        group: torch.distributed.ProcessGroup | None,
    ) -> torch.Tensor:
        """Attach a loss to an activation and log it, as Megatron's ``attach_and_log_load_balancing_loss`` does.

        Megatron later sums the gradients over microbatches and ranks. It divides them by the numbers of microbatches
        and data-parallel ranks, or with ``calculate_per_token_loss`` by the number of tokens of the global batch.

        Args:
            activation: the tensor that the loss is attached to.
            loss: [U] or scalar, this rank's part of the loss of each group of tokens, coefficient included.
            num_tokens: [U] or scalar, number of tokens on all ranks of ``group`` over which the loss is a mean.
            name: name of the loss in the log.
            coeff: coefficient of the loss; the log shows the loss without it.
            group: the ranks whose parts sum up to the loss: ``tp_cp_group`` or ``tp_dp_cp_group``.
        Returns:
            the activation.
        """
        config = self.config
        if self.is_mtp_layer and config.mtp_use_repeated_layer and config.mtp_num_layers is not None:
            loss = loss / config.mtp_num_layers  # the layer runs this many times per microbatch
        if self._is_counted and self.layer_number is not None:
            with hidden_from_checkpoints():
                get_moe_metrics_tracker().record(
                    name,
                    loss.detach().mean() / coeff,
                    layer_of(self),
                    config.num_layers + (config.mtp_num_layers or 0),
                    reduce_group=group,
                    needs_dp_avg=group is self.tp_cp_group,
                )
        if self.calculate_per_token_loss:
            loss = (loss * num_tokens).sum()
        else:  # undo the average over data-parallel ranks if the loss is spread over them
            loss = loss.mean() * (group_size(group) / group_size(self.tp_cp_group))
        return MoEAuxLossAutoScaler.apply(activation, loss)


class _WeightedScores(torch.autograd.Function):
    """[U] sums of ``score * weight`` over the tokens of each group, with one weight per group and expert.

    The weights are kept as an attribute instead of a saved tensor. With ``torch.utils.checkpoint`` a backward gets the
    tensors saved by the recomputed forward, whose weights would include the counts of later microbatches.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        scores: torch.Tensor,
        flat_indices: torch.Tensor | None,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Sum scores [T, N] times weights [U, E].

        The ``flat_indices`` [T, N] index the flat weights; None means all E experts in order.
        """
        ctx.weights, ctx.shape = weights, scores.shape
        ctx.save_for_backward(flat_indices)
        grouped = (scores.shape[0] // weights.shape[0], weights.shape[0], scores.shape[1])
        if flat_indices is None:
            return (scores.view(grouped).sum(dim=0) * weights).sum(dim=1)
        return (scores * weights.view(-1)[flat_indices]).view(grouped).sum(dim=(0, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient of the scores is their weight, times ``grad`` [U]."""
        (flat_indices,) = ctx.saved_tensors
        weights = ctx.weights * grad.unsqueeze(1)
        if flat_indices is not None:
            return weights.view(-1)[flat_indices], None, None
        return weights.repeat(ctx.shape[0] // weights.shape[0], 1), None, None


def _flat_expert_indices(ids: torch.Tensor, num_groups: int, num_experts: int) -> torch.Tensor:
    """[T, N] indices of experts ``ids`` [T, N] in a flat [U, E], in the row of each token's group."""
    if num_groups == 1:
        return ids
    groups = torch.arange(ids.shape[0], device=ids.device) % num_groups
    return ids + (groups * num_experts).unsqueeze(1)


def _without(values: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """Set the values [T, ...] of padding tokens to zero; multiplying by the mask would keep a NaN."""
    if padding_mask is None:
        return values
    return values.masked_fill(padding_mask.view(-1, *(1,) * (values.dim() - 1)), 0)
