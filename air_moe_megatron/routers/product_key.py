"""ProductKeyRouter: an expert is a pair of sub-keys, and the best pairs are found without scoring all pairs.

Expert ``i * n2 + j`` has the key (first sub-key i, second sub-key j) and the score ``<q1, k1_i> + <q2, k2_j>``. The
best k pairs are among the pairs of the best k sub-keys of each half, so the search is exact.

Source: He 2024, "Mixture of A Million Experts" (PEER), arXiv 2407.04153, after Lample et al. 2019, arXiv 1907.05242.
Each head has its own queries, and all heads share one set of keys. Queries are batch-normalized. Each head has a
softmax over its k experts, so the probs of a token sum to the number of heads.

With ``moe_product_key_on_tokens``, one head and ``moe_router_pre_softmax`` it is the Cartesian product router of
OmniMoE, arXiv 2602.05711. Sub-keys have the hidden size and are compared with the token itself. The scores of each
sub-key are batch-normalized, without gain and bias. Probs are products of two softmaxes, each over all sub-keys of a
half. That product is the softmax over all experts, which is what ``moe_router_pre_softmax`` means for every router.

Deviations: the halves are unequal if the number of experts is not a square. On tokens several heads have separate keys,
because they would otherwise be one head. Megatron's options for scores and losses apply.

Cost per token, with J heads and sub-keys of size d: forward ``4*H*J*d`` FLOPs for the queries (none on tokens) and
``2*J*d*(n1 + n2)`` for the keys, backward twice that.

Legend: J heads, d size of a sub-key, n1 and n2 numbers of sub-keys of the two halves, k = K/J; others as in
``ops/__init__.py``.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import FunctionCtx, once_differentiable

from air_moe_megatron.config import resolve_product_keys
from air_moe_megatron.learned.learner import Learner
from air_moe_megatron.learned.recomputation import hidden_from_checkpoints
from air_moe_megatron.learned.running_norm import EPSILON, RunningNorm
from air_moe_megatron.ops.dtypes import at_least_fp32
from air_moe_megatron.ops.norm import batch_sums, moments
from air_moe_megatron.process_groups import sum_over_ranks
from air_moe_megatron.routers.base import CompactRouter, Routes
from air_moe_megatron.routers.flops import Rebuilds, RouterFlops
from air_moe_megatron.routers.losses import Explored


class ProductKeyRouter(CompactRouter):
    """Route each token to each head's best k experts; several heads may find the same expert.

    With batch norm a training forward makes one all-reduce over ``tp_dp_cp``, the ranks that hold different tokens, and
    its backward another. So many ranks equal one rank on all their tokens. The statistics for evaluation are learned at
    the step boundary (``sync.py``).
    """

    router_type = "product_key"
    checkpoint_key = "keys1"
    keys1: torch.nn.Parameter
    keys2: torch.nn.Parameter
    vectors_per_expert = 0

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, is_mtp_layer: bool = False
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.sizes = sizes = resolve_product_keys(config)
        self.may_repeat = sizes.num_heads > 1
        self.on_tokens = config.moe_product_key_on_tokens
        num_inputs = config.hidden_size if self.on_tokens else 2 * sizes.num_heads * sizes.key_dim
        if self.on_tokens:
            self.query_weight = None
        else:
            self.add_parameter("query_weight", num_inputs, config.hidden_size)
        num_sets = sizes.num_heads if self.on_tokens else 1
        for name, num_keys in zip(("keys1", "keys2"), sizes.num_keys, strict=True):
            self.add_parameter(name, num_sets, num_keys, sizes.key_dim)
        self.normalizes_scores = self.on_tokens and sizes.query_norm == "batchnorm"
        if self.normalizes_scores:
            num_inputs = sizes.num_heads * sum(sizes.num_keys)
        elif sizes.query_norm != "none":
            self.add_parameter("norm_weight", num_inputs, init_method=torch.nn.init.ones_)
            self.add_parameter("norm_bias", num_inputs, init_method=torch.nn.init.zeros_)
        self.query_norm = RunningNorm(num_inputs) if sizes.query_norm == "batchnorm" else None

    @staticmethod
    def checkpoint_fields(config: TransformerConfig | argparse.Namespace) -> dict[str, Any]:
        """See the base class."""
        keys = resolve_product_keys(config)
        return {
            "moe_product_key_on_tokens": config.moe_product_key_on_tokens,
            "moe_product_key_heads": keys.num_heads,
            "moe_product_key_dim": keys.key_dim,
            "moe_product_key_query_norm": keys.query_norm,
        }

    @staticmethod
    def flops(config: TransformerConfig, rebuilds: Rebuilds | None = None) -> RouterFlops:
        """See the base class: 4HJd + 2Jd(n1 + n2) forward, without the first term on tokens; twice that backward."""
        sizes = resolve_product_keys(config)
        width = sizes.num_heads * sizes.key_dim
        queries = 0 if config.moe_product_key_on_tokens else 4 * config.hidden_size * width
        forward = queries + 2 * width * sum(sizes.num_keys)
        return RouterFlops(forward, 2 * forward)

    def learners(self) -> list[Learner]:
        """List the base's learners, and the running norm of queries or scores if these are batch-normalized."""
        return super().learners() + ([] if self.query_norm is None else [self.query_norm])

    def _choose(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None, batch_size: int) -> Routes:
        sizes = self.sizes
        halves = self._scores(hidden, padding_mask)
        (scores1, ids1), (scores2, ids2) = (
            scores.topk(min(sizes.topk_per_head, scores.shape[2]), dim=2) for scores in halves
        )
        logits = (scores1.unsqueeze(3) + scores2.unsqueeze(2)).flatten(1)  # [T, M]
        ids = (ids1.unsqueeze(3) * sizes.num_keys[1] + ids2.unsqueeze(2)).flatten(1)
        routes = self._choose_among(logits, ids, padding_mask, batch_size)
        if not (self.config.moe_router_pre_softmax and self.score_function == "softmax"):
            return routes
        # The probs are a softmax over the candidates. Times the candidates' total prob, they are one over all experts.
        log1, log2 = (half.log_softmax(dim=2).gather(2, ids) for half, ids in zip(halves, (ids1, ids2), strict=True))
        log_share = (log1.unsqueeze(3) + log2.unsqueeze(2)).flatten(2).logsumexp(dim=2)  # [T, J]
        return replace(routes, probs=routes.probs * log_share.exp().repeat_interleave(sizes.topk_per_head, dim=1))

    def _scores(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None) -> Sequence[torch.Tensor]:
        """Scores of each head's query against the first and the second sub-keys, [T, J, n1] and [T, J, n2]."""
        scores = [  # a single set of keys serves all heads
            torch.einsum("trd,rnd->trn", queries, keys.to(queries.dtype))
            for queries, keys in zip(self._queries(hidden, padding_mask), (self.keys1, self.keys2), strict=True)
        ]
        if not self.normalizes_scores:
            return scores
        both = torch.cat(scores, dim=2)
        wide = both.flatten(1).to(at_least_fp32(both.dtype))
        normal = self._batch_normalize(wide, padding_mask).to(both.dtype)
        return normal.view_as(both).split(self.sizes.num_keys, dim=2)

    def _queries(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """First and second halves of each head's query, normalized, [T, J, d] each; on tokens, both are the token."""
        if self.on_tokens:
            tokens = hidden.to(self._router_dtype(hidden))
            if not self.normalizes_scores:
                tokens = self._normalize(tokens, padding_mask)
            return (tokens.unsqueeze(1).expand(-1, self.sizes.num_heads, -1),) * 2
        queries = self._linear(hidden, self.query_weight)
        shape = (hidden.shape[0], self.sizes.num_heads, 2, self.sizes.key_dim)
        return self._normalize(queries, padding_mask).view(shape).unbind(dim=2)

    def _normalize(self, queries: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """[T, features] queries, normalized in fp32 or wider."""
        norm = self.sizes.query_norm
        if norm == "none":
            return queries
        wide = queries.to(at_least_fp32(queries.dtype))
        if norm == "layernorm":  # over each half of a query; in fp64, where squares of fp32 numbers do not overflow
            parts = wide.view(-1, self.sizes.key_dim).double()
            normal = torch.nn.functional.layer_norm(parts, parts.shape[1:], eps=EPSILON).view_as(wide).to(wide.dtype)
        else:
            normal = self._batch_normalize(wide, padding_mask)
        return (normal * self.norm_weight + self.norm_bias).to(queries.dtype)

    def _batch_normalize(self, queries: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """Normalize queries [T, features] by mean and variance of the tokens on all ranks, without padding.

        Evaluation uses the running mean and variance instead.
        """
        if not self.training:
            return self.query_norm(queries)
        if self._learns:
            with hidden_from_checkpoints():
                self.query_norm.accumulate(queries.detach(), padding_mask)
        return _BatchNorm.apply(queries, self.query_norm.mean, padding_mask, self.tp_dp_cp_group)

    def _select(self, logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, K] probs and columns of the best k candidates of each head, head after head."""
        heads, topk = self.sizes.num_heads, self.sizes.topk_per_head
        logits = self._per_head(logits)
        probs, columns = topk_routing_with_score_function(logits, topk, dense_output=True, **self._score_settings())
        columns = columns.view(-1, heads, topk) + self._first_columns(logits)
        return probs.view(-1, self.topk), columns.view(-1, self.topk)

    def _aux_scores(
        self, logits: torch.Tensor, columns: torch.Tensor | None, explored: Explored | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See the base class. Each head is treated as a token of its own; the scores are averaged over heads."""
        per_head = self._per_head(logits)
        columns = columns.unflatten(1, (self.sizes.num_heads, -1)) - self._first_columns(per_head)
        selected, scores = super()._aux_scores(per_head, columns.flatten(0, 1), explored)
        return selected.view_as(logits), scores.view_as(logits) / self.sizes.num_heads

    def _first_columns(self, per_head: torch.Tensor) -> torch.Tensor:
        """[J, 1] first column of each head in logits [T, M]; ``per_head`` is the view [T * J, M/J] of these logits."""
        return torch.arange(self.sizes.num_heads, device=per_head.device).unsqueeze(1) * per_head.shape[1]

    def _per_head(self, logits: torch.Tensor) -> torch.Tensor:
        """Reshape logits [T, M] to [T * J, M/J], one row per token and head."""
        return logits.unflatten(1, (self.sizes.num_heads, -1)).flatten(0, 1)


class _BatchNorm(torch.autograd.Function):
    """``(q - mean) / sqrt(variance + 1e-5)``, with mean and variance over the tokens of all ranks, without padding.

    Sums are taken around the running mean, which all ranks share.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        queries: torch.Tensor,
        running_mean: torch.Tensor,
        padding_mask: torch.Tensor | None,
        group: torch.distributed.ProcessGroup | None,
    ) -> torch.Tensor:
        shift, variance, count = moments(sum_over_ranks(batch_sums(queries, running_mean, padding_mask), group))
        ctx.group, ctx.count = group, count.clamp_min(1.0)
        scale = (variance + EPSILON).rsqrt().to(queries.dtype)
        normal = (queries - running_mean - shift.to(queries.dtype)) * scale
        ctx.save_for_backward(normal, scale, padding_mask)
        return normal

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        normal, scale, padding_mask = ctx.saved_tensors
        sums = torch.cat((grad.sum(dim=0), (grad * normal).sum(dim=0)))
        of_mean, of_scale = (sum_over_ranks(sums, ctx.group) / ctx.count).to(grad.dtype).chunk(2)
        through = of_mean + normal * of_scale  # the gradient through mean and variance; none for padding
        if padding_mask is not None:
            through = through.masked_fill(padding_mask.unsqueeze(1), 0.0)
        return (grad - through) * scale, None, None, None
