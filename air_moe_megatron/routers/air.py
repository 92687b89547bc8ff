"""AIRRouter: coarse assignment to codewords -> shortlist -> exact fine scores -> top-k.

Megatron's own functions select the top-k and compute the probabilities, from a token's candidates instead of all
experts. So with shortlists of all experts the router equals ``TopKRouter``. No tensor of size [T, E] is made up to
``Routes``; only ``_to_dense`` makes one, for Megatron's own dispatchers.

Legend: N candidates per token in a tensor (K, M, M + X or P*L), X explored candidates; others as in
``ops/__init__.py``.
"""

import argparse
import logging
import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import apply_random_logits
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.compat import probs_of_selected
from air_moe_megatron.config import balancing_losses, resolve_sizes
from air_moe_megatron.learned.centers import Centers
from air_moe_megatron.learned.codebook import Codebook
from air_moe_megatron.learned.index import ShortlistIndex
from air_moe_megatron.learned.learner import Learner
from air_moe_megatron.learned.lists import balanced_lists, draw_slots, reserved_slots, without_repeats
from air_moe_megatron.learned.module_state import HostCopy
from air_moe_megatron.learned.recomputation import hidden_from_checkpoints, is_in_backward
from air_moe_megatron.ops.coarse import assign, assign_with_statistics
from air_moe_megatron.ops.selected_scores import selected_scores
from air_moe_megatron.routers.base import CompactRouter, Routes
from air_moe_megatron.routers.flops import Rebuilds, RouterFlops, of_norm, of_rebuilds
from air_moe_megatron.routers.losses import Explored
from air_moe_megatron.routers.missing_state import MissingState
from air_moe_megatron.routers.token_ids import ids_in_order

logger = logging.getLogger(__name__)

SAMPLE_SIZE = 64  # tokens whose recall is measured, of one rank's microbatch
# Logit of an empty slot with sqrtsoftplus. It gives the score 4e-18; -inf would give a NaN gradient.
_NEXT_TO_NOTHING = -80.0


@dataclass(frozen=True)
class TokenSample:
    """A sample of tokens, with the codewords whose lists were searched for them."""

    hidden: torch.Tensor  # [n, H]
    probed: torch.Tensor  # [n, P] int64
    padding_mask: torch.Tensor | None  # [n] bool, True for padding; None if there is none


class TokenObserver(Protocol):
    """What takes the tokens of each counted forward for logs; ``diagnostics/observation.py`` has one."""

    token_ids: torch.Tensor | None  # [batch, sequence] of the microbatch; None if not known

    def observe(self, probes: torch.Tensor, padding_mask: torch.Tensor | None, token_ids: torch.Tensor | None) -> None:
        """Take a microbatch: the codewords whose lists are searched [T, P], padding [T], token ids [T]."""

    def discard(self) -> None:
        """Begin an attempt at the step."""


class AIRRouter(CompactRouter):
    """Route each token to the top-k experts of its codewords' shortlists.

    Gradients reach tokens and expert centers through the fine scores only. The codebook is learned from the tokens of
    each global batch, without gradients; ``sync.update_codebooks`` applies the update after a successful step.
    """

    router_type = "air"
    has_lists = True
    center_group: torch.distributed.ProcessGroup | None = None
    """Ranks over which centers and lists are sharded by expert; None if this rank holds all of them."""
    first_expert = 0
    """Global id of the expert in the first row of ``weight``."""

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, is_mtp_layer: bool = False
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.sizes = resolve_sizes(config)
        self.codebook = Codebook(self.sizes.num_clusters, config.hidden_size, config.moe_air_codebook_ema)
        self.index = self._make_index()
        # A list of source 'tokens' is full, so it fills every slot of the routes. Inverted lists may be short, and
        # several lists may hold fewer than M distinct experts: then an empty slot can beat a score that underflows.
        self.always_complete = config.moe_air_codebook_source == "tokens" and self.sizes.num_probes == 1
        self.missing_state = MissingState.NOTHING  # of the checkpoint to load; loading resets it
        # For logs only: ``sample`` has tokens of the last training forward; ``observer`` counts the tokens of a step.
        self.keeps_sample = config.moe_air_diagnostics_interval > 0
        self.sample: TokenSample | None = None
        self.observer: TokenObserver | None = None

    def mean_over_shards(self, share: torch.Tensor) -> torch.Tensor:
        """Turn a fraction [] of this rank's experts or slots into the fraction over all ranks of ``center_group``."""
        return share

    def _make_index(self) -> ShortlistIndex:
        return self._make_shard_of_index(1, 0)

    def _make_shard_of_index(self, num_shards: int, shard: int) -> ShortlistIndex:
        """Make the lists of one of ``num_shards`` equal shards of consecutive experts."""
        sizes, num_parts = self.sizes, self.config.moe_air_list_parts
        part_sizes = sizes.num_experts // num_parts, sizes.num_clusters, sizes.shortlist_size // num_parts
        return ShortlistIndex(
            sizes.num_experts // num_shards,
            sizes.num_clusters,
            sizes.shortlist_size // num_shards,
            source=self.config.moe_air_codebook_source,
            refresh_interval=self.config.moe_air_refresh_interval,
            num_reserved=reserved_slots(*part_sizes, -(-self.topk // num_parts)),
            num_parts=num_parts // num_shards,
            shard=shard,
            num_shards=num_shards,
        )

    def _list_group(self) -> torch.distributed.ProcessGroup | None:
        """Ranks that hold the same lists and share the work of rebuilding them."""
        return self.tp_dp_cp_group

    @property
    def centers(self) -> Centers:
        """The centers that this rank holds."""
        return Centers.of(self)

    @torch.no_grad()
    def sample_of(self, hidden: torch.Tensor) -> TokenSample:
        """Route tokens [n, H], and return them as scored, with the codewords whose lists were searched.

        In evaluation mode no state changes. A sharded router communicates as in any forward.
        """
        return TokenSample(self.as_scored(hidden), self._route(hidden, None).probed, None)

    def _choose(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None, batch_size: int) -> Routes:
        with hidden_from_checkpoints():
            shortlist, probes = self._coarse(hidden, padding_mask)  # [C, L], [T, P]
        if self.config.moe_router_force_load_balancing:
            return self._choose_at_random(hidden, probes.shape[1], padding_mask, batch_size)
        scores, ids = self._score(hidden, shortlist, probes, *self._num_candidates())
        routes = self._choose_candidates(scores, ids, probes, padding_mask, batch_size)
        self._record(hidden, probes, padding_mask, batch_size)
        return routes

    def _choose_at_random(
        self, hidden: torch.Tensor, num_probes: int, padding_mask: torch.Tensor | None, batch_size: int
    ) -> Routes:
        """Choose experts for a load test, ``moe_router_force_load_balancing``: at the usual cost, and favoring none.

        The P lists of a token hold consecutive experts, round robin over the tokens. All P*L slots are candidates, and
        their scores become random. Logs get no sample of the tokens.
        """
        (num_clusters, shortlist_size), device = self.index.shortlist.shape, hidden.device
        shortlist = balanced_lists(num_clusters, shortlist_size, self.num_experts, device)
        tokens = torch.arange(hidden.shape[0], device=device).unsqueeze(1)
        offsets = torch.arange(num_probes, device=device) * num_clusters // num_probes
        probes = (tokens + offsets) % num_clusters  # spread, so that a token's lists overlap little
        scores, ids = self._score(hidden, shortlist, probes, num_probes * shortlist_size, 0)
        ids, order = ids.sort(dim=1)
        scores = apply_random_logits(scores.gather(1, order)).masked_fill(ids < 0, float("-inf"))
        routes = self._choose_among(self._as_logits(scores, ids), ids.long(), padding_mask, batch_size)
        return self._completed(routes, probes)

    def _choose_candidates(
        self,
        scores: torch.Tensor,
        ids: torch.Tensor,
        probes: torch.Tensor,
        padding_mask: torch.Tensor | None,
        batch_size: int,
    ) -> Routes:
        """Choose among the candidates that :meth:`_score` returns."""
        logits = self._as_logits(scores, ids)
        if _all_scores_matter(self.config, self.training):
            routes = self._choose_among(logits, ids.long(), padding_mask, batch_size, self._explored())
        else:  # the candidates are the top-k
            routes = Routes(ids, self._probs_of(logits), columns=_columns(logits))
        return self._completed(routes, probes)

    def _record(
        self, hidden: torch.Tensor, probes: torch.Tensor, padding_mask: torch.Tensor | None, batch_size: int
    ) -> None:
        """Record for logs the tokens [T, H] of a counted forward, and the codewords [T, P] whose lists are searched."""
        if not self._is_counted:
            return
        with hidden_from_checkpoints():
            if self.keeps_sample:
                self.sample = _take_sample(hidden, probes, padding_mask, batch_size)
            if self.observer is not None:
                self.observer.observe(probes, padding_mask, self._token_ids(hidden.shape[0], batch_size))

    def _completed(self, routes: Routes, probes: torch.Tensor) -> Routes:
        """The routes with the probed codewords [T, P], and with a prob of zero in each empty slot."""
        probs = routes.probs if self.always_complete else routes.probs.masked_fill(routes.topk_ids < 0, 0.0)
        return replace(routes, probs=probs, probed=probes)

    def _token_ids(self, num_tokens: int, batch_size: int) -> torch.Tensor | None:
        """[T] token ids of this forward; None if the observer has none, or none that match the tokens one by one."""
        if is_in_backward() and self.config.pipeline_model_parallel_size > 1:  # those of a later microbatch
            return None
        ids = self.observer.token_ids
        if ids is None or ids.shape[0] != batch_size:  # packed microbatches are flattened after the embedding
            return None
        ids = ids_in_order(ids, self)
        return ids if ids.numel() == num_tokens else None

    def _num_candidates(self) -> tuple[int, int]:
        """How many candidates of a token probabilities and losses use: of the best ones, and of explored ones.

        The best are the top-k if only the selected scores reach the loss, and otherwise M. The balancing losses also
        use X explored candidates.
        """
        explored = self._explored()
        num_best = self.sizes.num_candidates if _all_scores_matter(self.config, self.training) else self.topk
        return num_best, explored.number if explored else 0

    def _as_logits(self, scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """[T, N] logits of candidates with the scores and ids [T, N]; finite in empty slots if they must be."""
        return scores.masked_fill(ids < 0, _NEXT_TO_NOTHING) if self.score_function == "sqrtsoftplus" else scores

    def _explored(self) -> Explored | None:
        """Describe the explored candidates, which are each token's last; None if there are none.

        As in :func:`_all_scores_matter`, the answer does not depend on whether gradients are enabled.
        """
        if not (self.training and balancing_losses(self.config)) or not self.sizes.num_explored:
            return None
        searched = self.sizes.num_probes * self.sizes.shortlist_size
        return Explored(self.sizes.num_explored, searched / self.sizes.num_explored)

    def _score(
        self,
        hidden: torch.Tensor,
        shortlist: torch.Tensor,
        probes: torch.Tensor,
        num_candidates: int,
        num_explored: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, N] differentiable scores of the best candidates; [T, N] int32 expert ids, -1 for an empty slot.

        The last ``num_explored`` candidates are not the best, but drawn from the lists.
        """
        best, best_ids = self.centers.fine_topk(hidden, shortlist, probes, num_candidates, self._router_dtype(hidden))
        if not num_explored:
            return best, best_ids
        with torch.no_grad():
            drawn = without_repeats(self._draw(shortlist, probes, num_explored), best_ids)
            scores = self._scores_of(hidden, drawn, best.dtype)
        scores = selected_scores(hidden, self.weight, self.bias, drawn, scores)
        return torch.cat((best, scores), dim=1), torch.cat((best_ids, drawn), dim=1)

    def _draw(self, shortlist: torch.Tensor, probes: torch.Tensor, number: int) -> torch.Tensor:
        """[T, number] int32 experts drawn from the lists, equally many from each part of a list."""
        num_parts = self.index.num_parts  # on this rank
        size = shortlist.shape[1] // num_parts
        slots = draw_slots(probes, size, number // num_parts, self.codebook.updates_on_host)
        lists = probes.gather(1, slots // size)
        first = torch.arange(num_parts, device=slots.device) * size
        return shortlist[lists.unsqueeze(2), (slots % size).unsqueeze(2) + first].flatten(1)

    def _scores_of(self, hidden: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[T, n] scores of the experts ``ids`` [T, n], -inf for id -1; by columns, so that no [T, n, H] is made."""
        columns = []
        for expert in ids.clamp(min=0).unbind(dim=1):
            column = (hidden.to(dtype) * self.weight[expert].to(dtype)).sum(dim=1)
            columns.append(column if self.bias is None else column + self.bias[expert].to(dtype))
        return torch.stack(columns, dim=1).masked_fill(ids < 0, float("-inf"))

    def _probs_of(self, selected: torch.Tensor) -> torch.Tensor:
        """[T, K] probs of the selected scores [T, K]; valid only if probs depend on no other score."""
        return probs_of_selected(selected, **self._score_settings())

    @torch.no_grad()
    def _coarse(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """[C, L] int32 lists, and [T, P] int64 probes, the codewords whose lists each token searches."""
        self.refresh_lists(self.training and not self._is_frozen())
        shortlist = self.index.shortlist
        allowed = shortlist[:, 0] >= 0 if self.index.source == "experts" else None
        num_probes = self.sizes.num_probes
        if self._learns and self.index.source == "tokens":
            probes, statistics = assign_with_statistics(
                hidden,
                self.codebook.codewords,
                num_probes,
                allowed,
                padding_mask,
            )
            self.codebook.accumulate(statistics)
        else:
            probes = assign(hidden, self.codebook.codewords, num_probes, allowed)
        return shortlist, probes

    @torch.no_grad()
    def refresh_lists(self, training: bool) -> None:
        """Make the first lists, or select this rank's share of the next ones; see ``ShortlistIndex.refresh``."""
        self.index.refresh(self.codebook, self.centers, training=training, group=self._list_group())

    @staticmethod
    def checkpoint_fields(config: TransformerConfig | argparse.Namespace) -> dict[str, Any]:
        """See the base class."""
        return {
            "moe_air_codebook_source": config.moe_air_codebook_source,
            "moe_air_list_parts": config.moe_air_list_parts,
        }

    @staticmethod
    def flops(config: TransformerConfig, rebuilds: Rebuilds | None = None) -> RouterFlops:
        """See the base class: 2H(C + PL) forward; 4HK backward, or 4HM if all candidates get gradients.

        With balancing losses, X explored candidates add 2HX forward and 4HX backward. Rebuilds cost what
        ``flops.rebuild_flops`` says.
        """
        hidden, sizes = config.hidden_size, resolve_sizes(config)
        searched = sizes.num_clusters + sizes.num_probes * sizes.shortlist_size
        with_gradient = sizes.num_candidates if _all_scores_matter(config, training=True) else config.moe_router_topk
        explored = sizes.num_explored if balancing_losses(config) else 0
        return RouterFlops(
            2 * hidden * (searched + explored),
            4 * hidden * (with_gradient + explored),
            of_rebuilds(config, rebuilds),
            of_norm(config),
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Make Megatron's sharded state dict, without what the checkpoint that is being loaded does not hold."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        skipped = tuple(prefix + name for name in self.missing_state.prefixes)
        return {key: value for key, value in state.items() if not key.startswith(skipped)}

    def learners(self) -> list[Learner]:
        """List the base's learners, and the codebook if it learns from tokens."""
        return super().learners() + ([self.codebook] if self.index.source == "tokens" else [])

    def host_copies(self) -> list[HostCopy]:
        """List those of the base, of the codebook, and of the lists."""
        others = [] if self.codebook in self.learners() else [self.codebook.on_host]
        return [*super().host_copies(), *others, self.index.on_host]

    def discard(self) -> None:
        """Forget what the base class forgets, and what was selected for the next lists."""
        super().discard()
        self.index.discard()
        if self.observer is not None:
            self.observer.discard()

    def commit_lists(self, group: torch.distributed.ProcessGroup | None) -> None:
        """End a successful step in which every rank of the group has run the router; may communicate over the group.

        A codebook of source 'experts' counts the step, but learns only when lists are rebuilt.
        """
        if self.index.source == "experts":
            self.codebook.count_update()
        self.index.commit(group)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.missing_state = MissingState.NOTHING
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "weight" not in state_dict:  # of another part of the model, which leaves this router as it is
            return
        of_codebook, of_lists = (
            [name for name in state_dict if name.startswith(f"{prefix}{part}.")] for part in ("codebook", "index")
        )
        if not of_codebook:
            strict, missing_keys = args[1], args[2]
            if strict and of_lists:
                missing_keys += [f"{prefix}codebook.{name}" for name in self.codebook.state_dict()]
            for name in of_lists:  # lists mean nothing to another codebook
                del state_dict[name]
            of_lists = []
        if not of_lists:
            self.index.start_anew()
        if not of_codebook:
            lost = self.codebook.updates_on_host
            text = "%scodebook: none in what is loaded; it is learned anew, and %d updates are lost"
            logger.log(logging.WARNING if lost else logging.INFO, text, prefix, lost)
            self.codebook.start_anew()


def _all_scores_matter(config: TransformerConfig, training: bool) -> bool:
    """Whether scores other than the selected ones reach the loss, and so need gradients.

    The answer must not depend on whether gradients are enabled: a checkpointed forward runs first without and then with
    gradients, and both passes must break ties alike.
    """
    return (
        (training and bool(balancing_losses(config)))
        or config.moe_z_loss_coeff is not None
        or (config.moe_router_score_function == "softmax" and config.moe_router_pre_softmax)
        or config.moe_router_force_load_balancing  # its straight-through estimator uses all scores
    )


def _columns(selected: torch.Tensor) -> torch.Tensor:
    """[T, K] columns 0 to K - 1 for each token: all K candidates are selected."""
    return torch.arange(selected.shape[1], device=selected.device).expand_as(selected)


def sample_step(num_tokens: int, batch_size: int) -> int:
    """How many tokens apart the sampled ones are: up to 64 of T = S*B tokens [S, B], and of all sequences alike.

    Example: with B = 2 every 9th of 512 tokens. Every 8th would be of the first sequence.
    """
    step = max(1, -(-num_tokens // SAMPLE_SIZE))
    while math.gcd(step, batch_size) > 1:
        step += 1
    return step


@torch.no_grad()
def _take_sample(
    hidden: torch.Tensor, probes: torch.Tensor, padding_mask: torch.Tensor | None, batch_size: int
) -> TokenSample:
    """Clone up to 64 tokens, spread evenly over [T, H]; a view would keep all of them in memory."""
    step = sample_step(hidden.shape[0], batch_size)
    return TokenSample(
        hidden=hidden[::step].clone(),
        probed=probes[::step].clone(),
        padding_mask=None if padding_mask is None else padding_mask[::step].clone(),
    )
