"""AIRRouter: coarse assignment to codewords -> shortlist -> exact fine scores -> top-k.

Scores, top-k, probabilities and losses are Megatron's own functions, applied to the columns of the shortlist instead
of all experts; with a full shortlist the router therefore equals ``TopKRouter``. Nothing on the way to ``Routes`` is
of size [T, E]; ``_to_dense`` is the one place that densifies, for Megatron's own dispatchers.

Legend: S sequence, B batch, T = S*B tokens, H hidden, E experts, C clusters, L shortlist, P probes, K top-k, N = P*L
candidates.
"""

from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_utils import (
    apply_random_logits,
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter

from air_moe_megatron.codebook import Codebook
from air_moe_megatron.config import resolve_sizes, validate
from air_moe_megatron.index import ShortlistIndex, balanced_lists, reserved_places
from air_moe_megatron.ops.coarse import assign, assign_with_statistics
from air_moe_megatron.ops.fine_scores import fine_scores, fine_topk
from air_moe_megatron.ops.selected_scores import selected_scores

_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Routes:
    """The experts of each token, compactly."""

    topk_ids: torch.Tensor  # [T, K] int32, in no order; -1 where candidates ran out
    probs: torch.Tensor  # [T, K] router dtype, 0 where the id is -1; carries the gradients and the auxiliary losses
    codewords: torch.Tensor  # [T, P] int64, probed codewords, nearest first (in a load test: taken in turn)


class AIRRouter(TopKRouter):
    """Route each token to the top-k experts of its codewords' shortlists.

    Gradients reach tokens and expert centres through the fine scores only. The codebook is learned from the tokens of
    each global batch, without gradients; ``sync.update_codebooks`` applies the update after a successful step.
    """

    def __init__(self, config, pg_collection=None, is_mtp_layer: bool = False) -> None:
        validate(config)
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.sizes = resolve_sizes(config)
        self.codebook = Codebook(self.sizes.num_clusters, config.hidden_size, config.moe_air_codebook_ema)
        self.index = ShortlistIndex(
            self.sizes.num_clusters,
            self.sizes.shortlist_size,
            config.moe_air_codebook_source,
            config.moe_air_refresh_interval,
            reserved_places(self.num_experts, self.sizes.num_clusters, self.sizes.shortlist_size, self.topk),
        )
        # No place stays empty: lists of source 'tokens' are full. Inverted lists may be short, and with several probes
        # a repeated candidate may stand in for an expert whose score underflows.
        self.always_complete = config.moe_air_codebook_source == "tokens" and self.sizes.num_probes == 1
        # Set before a top-k checkpoint is loaded: the codebook is not asked of it. Loading sets it back.
        self.is_codebook_left_out = False
        # Tokens each expert got since the last health line; for logs only.
        self.register_buffer("expert_load", torch.zeros(self.num_experts, dtype=torch.int64), persistent=False)

    def route(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Routes:
        """Choose the experts of each token.

        Args:
            hidden_states: [S, B, H] or [T, H].
            padding_mask: [S, B] or [T] bool, True for padding: such tokens are routed, but count neither in the losses
                nor in the codebook.
        Returns:
            the routes of the T tokens, in the order of ``hidden_states``.
        Raises:
            ValueError: with ``moe_expert_capacity_factor``, which needs the dense maps of :meth:`forward`.
        """
        if self.config.moe_expert_capacity_factor is not None:
            raise ValueError(
                f"moe_expert_capacity_factor ({self.config.moe_expert_capacity_factor}) is not supported by compact "
                "routes: tokens are dropped on Megatron's dense maps"
            )
        routes = self._route(hidden_states, padding_mask)
        if self.enable_expert_bias and torch.is_grad_enabled():
            self.local_tokens_per_expert += self._count(routes.topk_ids, self._keep(padding_mask))
        return routes

    def forward(self, input: torch.Tensor, padding_mask: torch.Tensor | None = None):
        """What the layer's dispatcher takes: compactly probs and expert ids [T, K], as :meth:`route` gives them; for
        Megatron's own dispatchers, as ``TopKRouter.forward``, dense [T, E] probs and routing map.

        A layer must come this way: hooks of the module, such as that which gathers parameters, run only then.
        """
        if self.config.moe_dispatch == "compact":
            routes = self.route(input, padding_mask)
            return routes.probs, routes.topk_ids
        routes = self._route(input, padding_mask)
        probs, routing_map = self._to_dense(routes)
        if self.config.moe_expert_capacity_factor is not None:
            probs, routing_map = apply_router_token_dropping(
                probs,
                routing_map,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
        if self.enable_expert_bias and torch.is_grad_enabled():
            keep = self._keep(padding_mask)
            counted = routing_map if keep is None else routing_map & keep.unsqueeze(1)
            self.local_tokens_per_expert += counted.sum(dim=0)
        return probs, routing_map

    @torch.compiler.disable  # group sizes are read on the host, and the lists are rebuilt by Python's count of updates
    def _route(self, hidden_states, padding_mask) -> Routes:
        self._maintain_float32_expert_bias()
        batch_size = hidden_states.shape[1] if hidden_states.dim() == 3 else 1
        hidden = self.apply_input_jitter(hidden_states).reshape(-1, self.config.hidden_size)  # [T, H]
        keep = self._keep(padding_mask)
        self._follow_device(hidden)
        shortlist, codewords = self._coarse(hidden, keep, learning=self.training and torch.is_grad_enabled())
        if self._all_scores_matter() or self.expert_bias is not None or self.sizes.num_probes > 1:
            probs, topk_ids = self._choose_from_all(hidden, shortlist, codewords, keep, batch_size)
        else:
            probs, topk_ids = self._choose_best(hidden, shortlist, codewords)
        if not self.always_complete:
            probs = probs.masked_fill(topk_ids < 0, 0.0)
        if self.training and torch.is_grad_enabled():
            self.expert_load += self._count(topk_ids, keep)
        return Routes(topk_ids.int(), probs, codewords)

    def _choose_best(self, hidden, shortlist, codewords):
        """[T, K] probs and expert ids, where only the scores of the chosen ones reach the loss."""
        dtype = self._router_dtype(hidden)
        selected, topk_ids = fine_topk(hidden, self.weight, self.bias, shortlist, codewords, self.topk, dtype)
        return self._probs_of(selected), topk_ids

    def _choose_from_all(self, hidden, shortlist, codewords, keep, batch_size):
        """[T, K] probs and expert ids, all candidates scored first; auxiliary losses are attached to the probs."""
        shortlist = shortlist.long()
        all_scores_matter = self._all_scores_matter()
        with torch.set_grad_enabled(torch.is_grad_enabled() and all_scores_matter):
            logits, ids = self._score_candidates(hidden, shortlist, codewords)  # [T, N]
        padded = None if keep is None else ~keep
        logits = self.apply_z_loss(logits, padding_mask=padded)
        probs, columns = self._select(logits, ids)
        topk_ids = shortlist[codewords, columns] if ids is None else ids.gather(1, columns)
        if torch.is_grad_enabled() and not all_scores_matter:
            selected = selected_scores(hidden, self.weight, self.bias, topk_ids, logits.gather(1, columns))
            probs = self._probs_of(selected)
        if self._needs_aux_scores():
            probs = self._attach_aux_losses(probs, logits, ids, padded, batch_size)
        return probs, topk_ids

    def _score_candidates(self, hidden, shortlist, codewords):
        """[T, N] scores of the candidates, and their ids [T, N].

        With one probe the candidates of a token are the list of its codeword; the ids are then None, unless something
        beside the top-k asks for them.
        """
        scores = fine_scores(hidden, self.weight, self.bias, shortlist, codewords, self._router_dtype(hidden))
        if self.sizes.num_probes > 1:
            logits, ids = _merge_probes(scores, shortlist[codewords])
        else:
            needs_ids = self.expert_bias is not None or self._needs_aux_scores()
            logits, ids = scores.squeeze(1), shortlist[codewords.squeeze(1)] if needs_ids else None
        if self.config.moe_router_force_load_balancing:
            logits = apply_random_logits(logits)
            if ids is not None:
                logits = logits.masked_fill(ids < 0, float("-inf"))
        return logits, ids

    def _select(self, logits, ids):
        """[T, K] probs and columns of the selected candidates, as Megatron selects them."""
        expert_bias = None
        if self.expert_bias is not None:  # what is no candidate must not win by its bias
            expert_bias = self.expert_bias[ids.clamp(min=0)].masked_fill(ids < 0, float("-inf"))
        return topk_routing_with_score_function(
            logits, self.topk, expert_bias=expert_bias, dense_output=True, **self._score_settings()
        )

    def _probs_of(self, selected):
        """[T, K] probs of selected scores [T, K]; only where no other score enters them."""
        columns = torch.arange(self.topk, device=selected.device).expand_as(selected)
        return topk_routing_with_score_function(
            selected, self.topk, precomputed_indices=columns, dense_output=True, **self._score_settings()
        )[0]

    def _score_settings(self):
        return {
            "use_pre_softmax": self.config.moe_router_pre_softmax,
            "scaling_factor": self.config.moe_router_topk_scaling_factor,
            "score_function": self.score_function,
        }

    def _all_scores_matter(self) -> bool:
        """Whether scores beside the selected ones reach the loss, and so need gradients."""
        return (
            self._needs_aux_scores()
            or self.config.moe_z_loss_coeff is not None
            or (self.score_function == "softmax" and self.config.moe_router_pre_softmax)
            or self.config.moe_router_force_load_balancing  # its straight-through estimator hangs on all of them
        )

    @torch.no_grad()
    def _coarse(self, hidden, keep, learning):
        """The lists to search, [C, L] int32, and which of them each token searches, [T, P]."""
        ranked_by = () if self.expert_bias is None else (self.score_function, self.expert_bias)
        self.index.refresh(self.codebook, self.weight, self.bias, *ranked_by)
        shortlist = self.index.shortlist
        allowed = shortlist[:, 0] >= 0 if self.index.source == "experts" else None
        where = (hidden, self.codebook.codewords, self.sizes.num_probes, allowed)
        if learning and self.index.source == "tokens":
            codewords, statistics = assign_with_statistics(*where, keep)
            self.codebook.accumulate(statistics)
        else:
            codewords = assign(*where)
        if self.config.moe_router_force_load_balancing:
            # A load test: the cost of the coarse stage stays, but neither it nor the lists may favour an expert.
            num_clusters, shortlist_size = shortlist.shape
            shortlist = balanced_lists(num_clusters, shortlist_size, self.num_experts, hidden.device)
            tokens = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1)
            probes = torch.arange(codewords.shape[1], device=hidden.device) * num_clusters // codewords.shape[1]
            codewords = (tokens + probes) % num_clusters  # spread, so that a token's lists overlap little
        return shortlist, codewords

    def _attach_aux_losses(self, probs, logits, ids, padded, batch_size):
        """Megatron's auxiliary losses in O(T*N + E): its functions need only per-expert sums, given as one row.

        With ``with_padding_mask`` it derives the number of tokens from the counts, not from the number of rows; where
        inverted lists leave a token fewer than K candidates, it counts as the part of a token that it routes.
        """
        routing_map, scores = compute_routing_scores_for_aux_loss(
            logits, self.topk, self.score_function, padding_mask=padded
        )
        present = ids >= 0
        ids, counts, scores = ids.clamp(min=0), routing_map & present, scores * present

        def sum_per_expert(values, offsets, size):
            where = (ids + offsets).reshape(-1)
            return values.new_zeros(size).index_add(0, where, values.reshape(-1)).unsqueeze(0)

        num_experts = self.num_experts
        sums = sum_per_expert(scores, 0, num_experts)
        totals = sum_per_expert(counts.long(), 0, num_experts)
        probs = self._apply_aux_loss(probs, sums, totals, with_padding_mask=True)
        if self.get_aux_loss_coeff("seq_aux_loss") > 0:
            # Token t = s*B + b; Megatron lays the experts of each sequence b side by side.
            offsets = (torch.arange(ids.shape[0], device=ids.device) % batch_size).unsqueeze(1) * num_experts
            probs = self._apply_seq_aux_loss(
                probs,
                sum_per_expert(scores, offsets, batch_size * num_experts),
                sum_per_expert(counts.long(), offsets, batch_size * num_experts),
                1,
                batch_size,
                with_padding_mask=True,
            )
        return self._apply_global_aux_loss(probs, sums, totals, with_padding_mask=True)

    def _to_dense(self, routes: Routes):
        """[T, E] probs and routing map of the routes: linear in E, for the stock dispatchers only."""
        num_tokens, width = routes.topk_ids.shape[0], self.num_experts
        ids = routes.topk_ids.long()
        if not self.always_complete:
            ids = torch.where(ids < 0, width, ids)  # a column of its own, cut off below
            width += 1
        rows = torch.arange(num_tokens, device=ids.device).unsqueeze(1)
        probs = routes.probs.new_zeros(num_tokens, width).index_put((rows, ids), routes.probs)
        routing_map = torch.zeros(num_tokens, width, dtype=torch.bool, device=ids.device)
        routing_map[rows, ids] = True
        return probs[:, : self.num_experts], routing_map[:, : self.num_experts]

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """As Megatron's; without codebook and lists while a checkpoint that holds none is being loaded."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.is_codebook_left_out:
            left_out = (f"{prefix}codebook.", f"{prefix}index.")
            state = {key: value for key, value in state.items() if not key.startswith(left_out)}
        return state

    def _load_from_state_dict(self, *args, **kwargs):
        self.is_codebook_left_out = False
        return super()._load_from_state_dict(*args, **kwargs)

    def _needs_aux_scores(self) -> bool:
        return self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled()

    @torch.no_grad()
    def _count(self, topk_ids, keep):
        """[E] int64: tokens of each expert, padding left out."""
        counted = topk_ids >= 0
        if keep is not None:
            counted &= keep.unsqueeze(1)
        where = topk_ids.clamp(min=0).reshape(-1)
        return torch.zeros_like(self.expert_load).index_add_(0, where, counted.reshape(-1).long())

    def _router_dtype(self, hidden):
        return _ROUTER_DTYPES.get(self.config.moe_router_dtype, hidden.dtype)

    def _follow_device(self, hidden):
        # As Router.gating: with use_cpu_initialization the weight may still be on the host.
        for parameter in (self.weight, self.bias):
            if parameter is not None and parameter.device != hidden.device:
                parameter.data = parameter.data.to(hidden.device)

    @staticmethod
    def _keep(padding_mask):
        """[T] bool, True for tokens that count; None if all do."""
        return None if padding_mask is None else ~padding_mask.reshape(-1)


@torch.no_grad()
def _sort_candidates(ids):
    """Order of the candidates of each token by expert id, and which of them repeat the one before."""
    ids, places = ids.sort(dim=1, stable=True)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
    return ids, places, repeated


def _merge_probes(scores, ids):
    """Join the shortlists of a token's probes; an expert in two of them is one candidate.

    Args:
        scores: [T, P, L].
        ids: [T, P, L] int64, -1 for no expert.
    Returns:
        [T, P*L] scores, -inf for what is no candidate; [T, P*L] ids, ascending, -1 for what is no candidate.
    """
    ids, places, repeated = _sort_candidates(ids.flatten(1))
    scores = scores.flatten(1).gather(1, places).masked_fill(repeated, float("-inf"))
    return scores, ids.masked_fill(repeated, -1)
