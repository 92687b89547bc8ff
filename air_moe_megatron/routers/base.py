"""CompactRouter, the base class of our routers: compact routes, made with Megatron's own functions.

A router either scores candidates, [T, M] logits with expert ids, and calls ``_choose_among``, or it chooses experts
itself. Megatron's functions select among the candidates and compute the probabilities. The losses are in losses.py.
No tensor of size [T, E] is made up to ``Routes``, unless the router scores all experts. Only ``_to_dense`` makes dense
maps, for Megatron's own dispatchers.
"""

import argparse
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    router_gating_linear,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config import validate
from air_moe_megatron.learned.learner import Learner
from air_moe_megatron.learned.low_rank_whitening_norm import LowRankWhiteningNorm
from air_moe_megatron.learned.module_state import HostCopy, PreservedState
from air_moe_megatron.learned.recomputation import ForwardCounter, hidden_from_checkpoints
from air_moe_megatron.learned.running_norm import RunningNorm
from air_moe_megatron.learned.whitening_norm import WhiteningNorm
from air_moe_megatron.modules import find_modules
from air_moe_megatron.ops.dtypes import router_dtype_of
from air_moe_megatron.process_groups import HoldsProcessGroups
from air_moe_megatron.routers.flops import Rebuilds, RouterFlops
from air_moe_megatron.routers.losses import Explored, RouterLosses, layer_of

logger = logging.getLogger(__name__)

INPUT_NORMS = {
    "none": None,
    "running": RunningNorm,
    "low_rank_whitening": LowRankWhiteningNorm,
    "whitening": WhiteningNorm,
}
_MANY_FORWARDS = 1000  # after so many without the end of a step, a training loop probably reports none


@dataclass(frozen=True)
class Routes:
    """The experts of each token in compact form, without tensors of size [T, E]."""

    topk_ids: torch.Tensor  # [T, K] int32, in no order; -1 where candidates ran out, and for padding
    probs: torch.Tensor  # [T, K] router dtype, 0 where the id is -1; carries the gradients and the auxiliary losses
    # [T, P] int64, AIR only: the codewords whose lists are searched, nearest first (in a load test: round robin)
    probed: torch.Tensor | None = None
    columns: torch.Tensor | None = None  # [T, K] int64, the experts' columns among the candidates; None without these


class CompactRouter(HoldsProcessGroups, PreservedState, RouterLosses):
    """A router that returns :class:`Routes`; a subclass defines how experts are chosen.

    A subclass defines ``router_type``, ``checkpoint_key``, ``flops`` and ``_choose``. One without a center per expert
    sets ``vectors_per_expert`` to 0: the [E, H] weight of ``TopKRouter`` is then never touched.

    A training forward with gradients counts its tokens, and counts them once even if activations are recomputed
    (``learned/recomputation.py``). Evaluation changes no state. A router whose parameters are all frozen learns
    nothing.
    """

    router_type: ClassVar[str]
    """The ``moe_router_type`` that selects this class."""
    checkpoint_key: ClassVar[str | None] = None
    """Parameter or buffer that only routers of this type have in a checkpoint; None for top-k and AIR, which load into
    each other."""
    vectors_per_expert = 1
    """Number of vectors of the hidden size per expert; with 0 the router has no [E, H] weight."""
    has_lists = False
    """Whether forwards rebuild lists of experts, which must be the same on all ranks."""
    always_complete = True
    """Whether every slot of the routes holds an expert."""
    may_repeat = False
    """Whether an expert may take several slots of the same token."""

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, is_mtp_layer: bool = False
    ) -> None:
        validate(config)
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        norm = INPUT_NORMS[config.moe_router_input_norm]
        self.input_norm = None if norm is None else norm(config.hidden_size)
        # Megatron registers its counts of a global batch as buffers.
        for name in ("local_tokens_per_expert", "global_tokens_per_expert", "ga_steps"):
            if getattr(self, name) is not None:
                self.add_accumulator(name, getattr(self, name))
        # For logs only: tokens per expert and routed tokens since the last health line, and the values of both at the
        # end of the last step.
        self.add_accumulator("expert_load", torch.zeros(self.num_experts, dtype=torch.int64))
        self.add_accumulator("num_routed", torch.zeros(1, dtype=torch.int64))
        self.add_accumulator("logged_before", torch.zeros(self.num_experts + 1, dtype=torch.int64))
        self._forwards = ForwardCounter()
        self._is_counted = False  # whether the tokens of the current forward count
        self._learns = False  # whether they are also added to what is learned without gradients
        self.has_learned = False  # whether a forward has learned since the last step
        self._num_unreported, self._has_warned = 0, False  # forwards that have learned since the last step

    @staticmethod
    def checkpoint_fields(config: TransformerConfig | argparse.Namespace) -> dict[str, Any]:
        """Config fields, automatic sizes resolved, that must be the same when a checkpoint of this router is loaded."""
        return {}

    @staticmethod
    def flops(config: TransformerConfig, rebuilds: Rebuilds | None = None) -> RouterFlops:
        """FLOPs of this router per token.

        Args:
            config: a valid config with our fields.
            rebuilds: how AIR rebuilds its shortlists; None leaves out their cost.

        Example: H = 8, E = 100, K = 2 and topk: forward 1600, backward 3200.
        """
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialize as Megatron does; a router without a center per expert drops the weight before it is filled."""
        if self.vectors_per_expert:
            super().reset_parameters()
        else:
            self.weight = self.bias = None

    def add_parameter(
        self, name: str, *shape: int, init_method: Callable[[torch.Tensor], object] | None = None
    ) -> None:
        """Register a parameter, initialized and marked as ``Router.reset_parameters`` does it for the weight."""
        values = torch.empty(shape, dtype=torch.float32)
        if self.config.perform_initialization:
            (init_method or self.config.init_method)(values)
        parameter = torch.nn.Parameter(values.to(self.config.params_dtype))
        parameter.sequence_parallel = self.config.sequence_parallel
        self.register_parameter(name, parameter)

    def route(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Routes:
        """Choose the experts of each token.

        Args:
            hidden_states: [sequence, batch, H] or [T, H].
            padding_mask: [sequence, batch] or [T] bool, True for padding. Such tokens get no experts, and count neither
                in losses nor in statistics.
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
        if padding_mask is None:
            return routes
        is_padding = padding_mask.reshape(-1, 1)
        return replace(
            routes,
            topk_ids=routes.topk_ids.masked_fill(is_padding, -1),
            probs=routes.probs.masked_fill(is_padding, 0.0),
        )

    def forward(
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route the tokens, and return what the layer's dispatcher takes.

        A layer must call this and not :meth:`route`: only this runs the module's hooks, such as those that gather
        parameters.

        Args: as :meth:`route`.
        Returns:
            with compact dispatch [T, K] probs and expert ids of :meth:`route`; otherwise, as ``TopKRouter.forward``,
            dense [T, E] probs and routing map.
        """
        if self.config.moe_dispatch == "compact":
            routes = self.route(input, padding_mask)
            return routes.probs, routes.topk_ids
        routes = self._route(input, padding_mask)
        probs, routing_map = self._to_dense(routes)
        if self.config.moe_expert_capacity_factor is None:
            return probs, routing_map
        probs, routing_map = apply_router_token_dropping(
            probs,
            routing_map,
            router_topk=self.topk,
            capacity_factor=self.config.moe_expert_capacity_factor,
            drop_policy=self.config.moe_token_drop_policy,
            pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
        )
        is_padding = routing_map.new_zeros(()) if padding_mask is None else padding_mask.reshape(-1, 1)
        served = routing_map.masked_fill(is_padding, False)  # the map also has pairs that fill up a capacity, of prob 0
        self._count_experts((served & (probs > 0)).sum(dim=0), for_bias=served.sum(dim=0))
        return probs, routing_map

    @torch.compiler.disable  # the host reads group sizes, and the count of updates that decides when lists are rebuilt
    def _route(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None) -> Routes:
        # Scores have the dtype that moe_router_dtype says, and what is learned is fp32, under autocast too.
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self._route_without_autocast(hidden_states, padding_mask)

    def _route_without_autocast(self, hidden_states: torch.Tensor, padding_mask: torch.Tensor | None) -> Routes:
        self._is_counted = self.training and self._forwards.counts()
        self._learns = self._is_counted and not self._is_frozen()
        self._maintain_float32_expert_bias()
        batch_size = hidden_states.shape[1] if hidden_states.dim() == 3 else 1
        hidden = self.apply_input_jitter(hidden_states).reshape(-1, self.config.hidden_size)  # [T, H]
        if padding_mask is not None:  # padding may hold anything, and NaN times zero is NaN
            if padding_mask.shape not in (hidden_states.shape[:-1], hidden.shape[:1]):
                raise ValueError(
                    f"padding_mask {list(padding_mask.shape)} must be [sequence, batch] or [tokens], as hidden_states "
                    f"{list(hidden_states.shape)}"
                )
            padding_mask = padding_mask.reshape(-1)  # [T]
            hidden = self._without_padding(hidden, padding_mask)
        self._follow_device(hidden)
        if self.input_norm is not None and self._learns:
            with hidden_from_checkpoints():
                self.input_norm.accumulate(hidden, padding_mask)
        routes = self._norm_and_choose(hidden, padding_mask, batch_size)
        if self._is_counted:
            with hidden_from_checkpoints():
                self.num_routed += hidden.shape[0] if padding_mask is None else (~padding_mask).sum()
                counts = self._count(routes.topk_ids, padding_mask)
            self._note_learning()
            if self.config.moe_expert_capacity_factor is None:  # otherwise forward counts, after it has dropped tokens
                self._count_experts(counts, for_bias=counts)
        return routes

    def _note_learning(self) -> None:
        """Remember that the current forward has learned, and warn if no step ever ends."""
        if not self._learns:
            return
        self.has_learned = True
        self._num_unreported += 1
        if self._num_unreported == _MANY_FORWARDS and self.learners() and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "layer %s: %d training forwards since the last step, and the router learns at the end of a step only; "
                "call sync.update_codebooks(model, group) after each optimizer step (docs/what-learns-when.md)",
                layer_of(self),
                self._num_unreported,
            )

    def _norm_and_choose(self, tokens: torch.Tensor, padding_mask: torch.Tensor | None, batch_size: int) -> Routes:
        """:meth:`_choose` for tokens [T, H] before the input norm; a router that sends tokens overrides it."""
        return self._choose(self.as_scored(tokens), padding_mask, batch_size)

    def as_scored(self, hidden: torch.Tensor) -> torch.Tensor:
        """Turn tokens [T, H] into what the router scores: [T, H] after the input norm, if there is one."""
        return hidden if self.input_norm is None else self.input_norm(hidden)

    def _without_padding(self, hidden: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
        """[T, H] tokens with padding made finite; with compact dispatch it becomes zero.

        Dense maps dispatch padding too. There only its non-finite entries become zero, because equal rows would all go
        to the same experts.
        """
        padding = hidden.new_zeros(()) if self.config.moe_dispatch == "compact" else hidden.nan_to_num(0.0, 0.0, 0.0)
        return torch.where(padding_mask.unsqueeze(1), padding, hidden)

    def _is_frozen(self) -> bool:
        """Whether no parameter of the router is trained.

        FSDP of torch may have replaced the parameters by plain tensors. Without gradients these do not say whether they
        are trained, and the answer is then False.
        """
        weights = list(self.parameters())
        if not weights and torch.is_grad_enabled():
            weights = [one for one in vars(self).values() if isinstance(one, torch.Tensor)]
        return bool(weights) and not any(weight.requires_grad for weight in weights)

    @torch.compiler.disable
    def _count_experts(self, counts: torch.Tensor, for_bias: torch.Tensor) -> None:
        """Add tokens of each expert, [E], to the counts of the log, and to those of Megatron's expert-bias update."""
        with hidden_from_checkpoints():
            if self._is_counted:
                self.expert_load += counts
            if self.enable_expert_bias and self._learns:
                self.local_tokens_per_expert += for_bias

    def learners(self) -> list[Learner]:
        """List the modules that learn from each global batch without gradients."""
        return [] if self.input_norm is None else [self.input_norm]

    def host_copies(self) -> list[HostCopy]:
        """List the copies on the host of what the router has learned, or counted of it."""
        return [learner.on_host for learner in self.learners()]

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as torch does. What other code has written to the router's buffers takes effect."""
        if mode != self.training:
            for one in self.host_copies():
                one.forget()
        return super().train(mode)

    def discard(self) -> None:
        """Begin an attempt at a step: forget what forwards have added since the last step."""
        for learner in self.learners():
            learner.discard()
        self.expert_load.copy_(self.logged_before[:-1])
        self.num_routed.copy_(self.logged_before[-1:])
        if self.local_tokens_per_expert is not None:
            self.local_tokens_per_expert.zero_()
        self.reset_global_aux_loss_tracker()
        self.has_learned = False
        self._forwards.reset()

    def end_step(self) -> None:
        """End a step, successful or not: keep what its forwards have added to the logs."""
        self.logged_before.copy_(torch.cat((self.expert_load, self.num_routed)))
        self.reset_global_aux_loss_tracker()  # Megatron's loop does so too, but other loops may not
        self.has_learned, self._num_unreported = False, 0
        self._forwards.reset()

    def reset_log(self) -> None:
        """Reset the counts for the next log line."""
        for counts in (self.expert_load, self.num_routed, self.logged_before):
            counts.zero_()

    def _choose(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None, batch_size: int) -> Routes:
        """Choose the experts of tokens [T, H]; ``padding_mask`` is [T] bool, True for padding, or None."""
        raise NotImplementedError

    def _choose_among(
        self,
        logits: torch.Tensor,
        ids: torch.Tensor,
        padding_mask: torch.Tensor | None,
        batch_size: int,
        explored: Explored | None = None,
    ) -> Routes:
        """Select each token's best K candidates as Megatron does, by logits [T, N] with expert ids [T, N].

        Explored candidates are the last columns. Only the balancing losses see them.
        """
        num_best = logits.shape[1] - (0 if explored is None else explored.number)
        best = self.apply_z_loss(logits[:, :num_best], padding_mask=padding_mask)
        probs, columns = self._select(best, ids[:, :num_best])
        if self._needs_aux_scores():
            logits = best if explored is None else torch.cat((best, logits[:, num_best:]), dim=1)
            by_score = columns if self.expert_bias is None else None
            probs = self._attach_aux_losses(probs, logits, ids, padding_mask, batch_size, by_score, explored)
        return Routes(ids.gather(1, columns).int(), probs, columns=columns)

    def _select(self, logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, K] probs and columns of the selected candidates, as Megatron selects them."""
        expert_bias = None
        if self.expert_bias is not None:  # an empty slot must not be selected because of a bias
            expert_bias = self.expert_bias[ids.clamp(min=0)].masked_fill(ids < 0, float("-inf"))
        return topk_routing_with_score_function(
            logits, self.topk, expert_bias=expert_bias, dense_output=True, **self._score_settings()
        )

    def _score_settings(self) -> dict[str, Any]:
        return {
            "use_pre_softmax": self.config.moe_router_pre_softmax,
            "scaling_factor": self.config.moe_router_topk_scaling_factor,
            "score_function": self.score_function,
        }

    def _to_dense(self, routes: Routes) -> tuple[torch.Tensor, torch.Tensor]:
        """Convert routes to dense [T, E] probs and routing map, for the stock dispatchers only.

        If an expert takes several slots of a token, their probs are added. Megatron's all-to-all requires exactly K
        experts per token, so a token with fewer gets further experts with a prob of zero.
        """
        num_tokens, width = routes.topk_ids.shape[0], self.num_experts
        ids = routes.topk_ids.long()
        if not self.always_complete:
            ids = torch.where(ids < 0, width, ids)  # empty slots get an extra column, which is cut off below
            width += 1
        rows = torch.arange(num_tokens, device=ids.device).unsqueeze(1)
        probs = routes.probs.new_zeros(num_tokens, width).index_put((rows, ids), routes.probs, self.may_repeat)
        routing_map = torch.zeros(num_tokens, width, dtype=torch.bool, device=ids.device)
        routing_map[rows, ids] = True
        probs, routing_map = probs[:, : self.num_experts], routing_map[:, : self.num_experts]
        if self.may_repeat or not self.always_complete:
            routing_map = routing_map.scatter(1, routing_map.byte().topk(self.topk, dim=1).indices, True)
        return probs, routing_map

    @torch.no_grad()
    def _count(self, topk_ids: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """[E] int64: tokens of each expert, padding left out."""
        counted = topk_ids >= 0
        if padding_mask is not None:
            counted &= ~padding_mask.unsqueeze(1)
        ids = topk_ids.clamp(min=0).reshape(-1)
        return torch.zeros_like(self.expert_load).scatter_add_(0, ids.long(), counted.reshape(-1).long())

    def _linear(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """[T, V] scores of tokens against the rows of a weight, computed by Megatron's ``router_gating_linear``.

        An empty batch takes ``torch.nn.functional.linear``, because Megatron's function does not accept it.
        """
        dtype = dtype or self._router_dtype(hidden)
        if hidden.shape[0]:
            return router_gating_linear(hidden, weight, bias, dtype)
        return torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    def _router_dtype(self, hidden: torch.Tensor) -> torch.dtype:
        return router_dtype_of(self.config.moe_router_dtype, hidden.dtype)

    def _follow_device(self, hidden: torch.Tensor) -> None:
        # As in Router.gating: with use_cpu_initialization the router may still be on the host. All of it moves.
        if self.expert_load.device != hidden.device:
            self.to(hidden.device)


def find_routers[R: TopKRouter](
    modules: torch.nn.Module | Iterable[torch.nn.Module], router_class: type[R] = CompactRouter
) -> list[R]:
    """Find all routers of a class in a fixed order, each once.

    Args:
        modules: a module, or several, such as Megatron's model chunks.
        router_class: the class to find; ``TopKRouter`` also finds Megatron's own.
    """
    return find_modules(modules, router_class)


def invalid_probs_error(number: int, rank: int, layer: int | None) -> ValueError:
    """Make the error that every expert-parallel rank raises if one of them has probs that are NaN or infinite.

    Args:
        number: how many such probs there are.
        rank: the expert-parallel rank that has them.
        layer: the layer's number, as :func:`layer_of` gives it; None leaves it out.
    """
    where = "" if layer is None else f"layer {layer}: "
    return ValueError(
        f"{where}{number} of the routing probs of expert-parallel rank {rank} are NaN or infinite; the hidden states "
        "or the router's weights are not finite"
    )
