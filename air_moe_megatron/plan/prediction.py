"""The formulas: memory per rank, router FLOPs, and bytes and time of each collective.

They describe a replicated router, or one whose centers and lists are sharded over the expert-parallel ranks
(docs/sharded-routing.md). They need no device and make no process group. Experts are assumed to be equally loaded.
Attention, embeddings and everything else outside of MoE layers are not included.

Legend: T tokens per rank and microbatch, D expert-parallel ranks, R rows that are sent for a rank's tokens (a token
travels once to each rank that holds any of its experts); others as in ``ops/__init__.py``.
"""

import argparse
import math
from dataclasses import dataclass

import torch

from air_moe_megatron.command.memory import parameter_bytes, parameters_of_expert
from air_moe_megatron.config import AIRMoEConfig, AIRSizes, resolve_sizes
from air_moe_megatron.learned.rebuild_schedule import POOL
from air_moe_megatron.ops.ranking import kernel_bytes
from air_moe_megatron.routers import AIRRouter
from air_moe_megatron.routers.flops import Rebuilds, rebuild_flops
from air_moe_megatron.routers.learned_bytes import learned_bytes

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Bytes of one number, as it is sent and kept.
_ID = 4  # of an expert, or of a codeword
_PROB = 4
_SCORE = 4
_POSITION = 4  # of a candidate in the lists
_MARK = 1  # whether an offered candidate was kept and selected


@dataclass(frozen=True)
class Collective:
    """The traffic of one collective: what one rank sends per MoE layer and step."""

    name: str
    num_bytes: float
    """Bytes that leave the rank."""
    group: int
    """Number of ranks that take part."""
    stride: int = 1
    """Distance between ranks of the group. Ranks that hold the same experts are D ranks apart."""
    outward: float = 0.0
    """The part of ``num_bytes`` that forwards send to the experts, which the health line counts."""


@dataclass(frozen=True)
class Plan:
    """The prediction for one layout."""

    is_sharded: bool
    config: AIRMoEConfig
    memory: dict[str, float]  # purpose -> bytes per rank, over all layers
    router_flops: float  # per token and layer: forward, backward, rebuilds and input norm
    first_rebuild_flops: float  # per rank and layer: each of the first two rebuilds, which ranks make alone
    rebuild_flops: float  # per rank and layer: each later rebuild, which the ranks share
    collectives: list[Collective]

    @property
    def name(self) -> str:
        """The layout in a word."""
        return "sharded" if self.is_sharded else "replicated"

    @property
    def total(self) -> float:
        """Bytes per rank."""
        return sum(self.memory.values())


def rows_per_token(num_experts: int, topk: int, ranks: int) -> float:
    """Expected number of ranks that hold any of a token's K experts, if every choice of experts is equally likely.

    Example: 4 experts on 2 ranks and K = 2: 2 of the 6 choices are on one rank and 4 on two, so 5/3.
    """
    others = num_experts - num_experts // ranks
    missed = math.prod((others - i) / (num_experts - i) for i in range(min(topk, num_experts)))
    return ranks * (1.0 - max(missed, 0.0))


def config_of(args: argparse.Namespace, is_sharded: bool) -> AIRMoEConfig:
    """The config of the planned layers, replicated or sharded.

    Raises:
        ValueError: naming the field, value and rule, as the start of such a run would.
    """
    return AIRMoEConfig(
        moe_router_dtype="fp32",  # no formula depends on it; without it Megatron warns
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=1,
        num_moe_experts=args.experts,
        expert_model_parallel_size=args.ep,
        moe_ffn_hidden_size=args.ffn,
        gated_linear_unit=args.swiglu,
        moe_router_topk=args.topk,
        moe_router_pre_softmax=args.topk == 1,  # no formula depends on it; without it Megatron refuses a single expert
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        add_bias_linear=False,
        moe_router_type="air",
        moe_granular_experts=True,
        moe_dispatch="compact",
        moe_router_input_norm=args.input_norm,
        moe_air_num_clusters=args.clusters,
        moe_air_shortlist_size=args.shortlist,
        moe_air_list_parts=args.list_parts or (args.ep if is_sharded else 1),
        moe_air_shard_experts=is_sharded,
        moe_air_num_probes=args.probes,
        moe_air_num_candidates=args.candidates,
        moe_air_num_explored=args.explored,
        moe_air_refresh_interval=args.refresh_interval,
    )


@dataclass(frozen=True)
class _Weights:
    """The weights of one kind that a rank holds in each layer: of its experts, or its centers."""

    count: int
    num_replicas: int
    """Ranks that hold the same weights."""
    bytes_each: dict[str, float]
    """Purpose -> bytes per weight, as :func:`parameter_bytes` gives them."""


@dataclass(frozen=True)
class _Layout:
    """One layout: what its memory and its communication are computed from."""

    args: argparse.Namespace
    config: AIRMoEConfig
    sizes: AIRSizes
    is_sharded: bool

    @classmethod
    def of(cls, args: argparse.Namespace, is_sharded: bool) -> "_Layout":
        """The layout of a command line, replicated or sharded.

        Raises:
            ValueError: as :func:`config_of`.
        """
        config = config_of(args, is_sharded)
        return cls(args, config, resolve_sizes(config), is_sharded)

    @property
    def num_ranks(self) -> int:
        """All ranks, which is the number of ranks with tokens of their own."""
        return self.args.nodes * self.args.gpus_per_node

    @property
    def num_router_shards(self) -> int:
        """Ranks that divide a router's centers and lists among them."""
        return self.args.ep if self.is_sharded else 1

    @property
    def num_projections(self) -> int:
        """Weight matrices of an expert."""
        return 3 if self.args.swiglu else 2

    @property
    def experts(self) -> _Weights:
        """The weights of a rank's experts."""
        per_expert = parameters_of_expert(self.args.hidden, self.args.ffn, self.args.swiglu)
        return self._weights(self.args.experts // self.args.ep * per_expert, self.args.ep)

    @property
    def centers(self) -> _Weights:
        """The centers that a rank holds."""
        shards = self.num_router_shards
        return self._weights(self.args.experts // shards * self.args.hidden, shards)

    def _weights(self, count: int, num_shards: int) -> _Weights:
        num_replicas = self.num_ranks // num_shards
        return _Weights(count, num_replicas, parameter_bytes(_training_arguments(self.args), num_replicas))

    @property
    def num_rows(self) -> float:
        """R, the rows that are sent for a rank's tokens of a microbatch."""
        copies = self.args.ep
        if not self.is_sharded:
            copies = rows_per_token(self.args.experts, self.args.topk, self.args.ep)
        return self.args.tokens * copies

    @property
    def num_pairs(self) -> int:
        """Pairs of a token and one of its experts, of a microbatch."""
        return self.args.tokens * self.args.topk

    @property
    def bytes_per_hidden_number(self) -> int:
        """Bytes of one of the H numbers of a row, and of one activation of an expert."""
        return DTYPES[self.args.dtype].itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of the hidden state of one token."""
        return self.args.hidden * self.bytes_per_hidden_number


def _training_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Megatron's arguments that :func:`parameter_bytes` reads."""
    return argparse.Namespace(
        params_dtype=DTYPES[args.dtype],
        accumulate_allreduce_grads_in_fp32=not args.bf16_gradients,
        optimizer="adam",
        use_precision_aware_optimizer=False,
        use_distributed_optimizer=args.distributed_optimizer,
        skip_train=False,
    )


def predict(args: argparse.Namespace, is_sharded: bool) -> Plan:
    """Predict memory, FLOPs and communication of one layout, replicated or sharded.

    Raises:
        ValueError: as :func:`config_of`.
    """
    layout = _Layout.of(args, is_sharded)
    learned, statistics = learned_bytes(layout.config, layout.num_router_shards)
    collectives = [*_dispatch(layout), *_reductions(layout, statistics)]
    if is_sharded:
        collectives.append(_offers(layout))
    tokens_per_batch = layout.num_ranks * args.tokens * args.microbatches
    rebuild = rebuild_flops(layout.config, on_gpu=True)
    return Plan(
        is_sharded,
        layout.config,
        memory=_weight_memory(layout)
        | {purpose: float(args.layers * size) for purpose, size in learned.items()}
        | _token_memory(layout)
        | {"first rebuild of a layer's lists": _rebuild_memory(layout)},
        router_flops=AIRRouter.flops(layout.config, Rebuilds(tokens_per_batch, on_gpu=True)).total,
        first_rebuild_flops=rebuild.first / layout.num_router_shards,
        rebuild_flops=rebuild.later / layout.num_ranks,
        collectives=[one for one in collectives if one.group > 1],
    )


def _weight_memory(layout: _Layout) -> dict[str, float]:
    """Bytes of all layers' weights, their gradients and their optimizer state, by purpose."""
    return {
        f"{purpose} of {owner}": float(layout.args.layers * weights.count * weights.bytes_each[purpose])
        for owner, weights in (("experts", layout.experts), ("routers", layout.centers))
        for purpose in ("weights", "gradients", "optimizer state")
    }


def _token_memory(layout: _Layout) -> dict[str, float]:
    """Bytes of what a rank keeps of its tokens, by purpose.

    Each layer keeps for the backward the received rows and the pairs' activations, and for each candidate its score,
    its id and, with the kernels, its position in the lists.
    """
    args, sizes = layout.args, layout.sizes
    num_candidates = args.tokens * (sizes.num_candidates + sizes.num_explored)
    num_activations = layout.num_pairs * args.ffn * layout.num_projections
    kept = (
        layout.num_rows * layout.row_bytes
        + num_candidates * (_SCORE + _ID + _POSITION)
        + num_activations * layout.bytes_per_hidden_number
    )
    return {
        "activations of the routed path": float(kept * (1 if args.recompute else args.layers)),
        "dispatch buffers": float(2 * layout.num_rows * layout.row_bytes + 2 * layout.num_pairs * (_ID + _PROB)),
    }


def _rebuild_memory(layout: _Layout) -> float:
    """Bytes of the kernels' keys while one layer makes its first lists, in the part that takes the most.

    The parts of lists are made one after another, each from its own experts.
    """
    sizes, num_parts = layout.sizes, layout.config.moe_air_list_parts
    num_experts = sizes.num_experts // num_parts
    pool_size = min(POOL * sizes.shortlist_size // num_parts, num_experts)
    return float(kernel_bytes(sizes.num_clusters, num_experts, pool_size))


def _dispatch(layout: _Layout) -> list[Collective]:
    """The dispatch of tokens to the experts, and the way back."""
    args, num_forwards = layout.args, _num_forwards(layout)
    num_rows_sent = args.microbatches * layout.num_rows * _share_of_others(args.ep)
    num_pairs_sent = args.microbatches * layout.num_pairs * _share_of_others(args.ep)
    row_bytes = num_rows_sent * layout.row_bytes
    # With sharding no ids are sent: owners know the ids of their candidates.
    pair_bytes = num_pairs_sent * (_PROB if layout.is_sharded else _PROB + _ID)
    return [
        Collective(
            "rows to the experts and back, forward and backward",
            (2 * num_forwards + 2) * row_bytes,
            args.ep,
            outward=row_bytes,
        ),
        Collective(
            "pairs of expert and prob, and the gradients of the probs",
            num_forwards * pair_bytes + num_pairs_sent * _PROB,
            args.ep,
            outward=pair_bytes,
        ),
    ]


def _reductions(layout: _Layout, statistics: int) -> list[Collective]:
    """The sums over replicas at the end of a step: of gradients, and of ``statistics`` bytes of statistics."""
    args, experts, centers = layout.args, layout.experts, layout.centers
    what = "gradients and updated weights" if args.distributed_optimizer else "gradients"
    return [
        Collective(
            f"{what} of the experts",
            _reduced_bytes(experts, args.distributed_optimizer),
            experts.num_replicas,
            stride=args.ep,
        ),
        Collective(
            "statistics of codebook and input norm", _bytes_of_ring(layout.num_ranks) * statistics, layout.num_ranks
        ),
        Collective(
            f"{what} of the centers",
            _reduced_bytes(centers, args.distributed_optimizer),
            centers.num_replicas,
            stride=layout.num_router_shards,
        ),
    ]


def _offers(layout: _Layout) -> Collective:
    """What sharded routing sends beside rows and pairs: the steps 1, 3 and 4 in ``routers/sharded/``."""
    args, sizes = layout.args, layout.sizes
    num_searched = sizes.num_probes * sizes.shortlist_size // args.ep  # slots of a token at one owner
    num_offers = min(sizes.num_candidates, num_searched) + sizes.num_explored // args.ep
    num_tokens = args.microbatches * args.tokens
    outward = num_tokens * (args.ep - 1) * (num_offers * (_SCORE + _ID + _MARK) + _ID * sizes.num_probes)
    num_candidates = num_tokens * (sizes.num_candidates + sizes.num_explored)
    gradients = num_candidates * _SCORE * _share_of_others(args.ep)
    name = "scores of the candidates, codewords, marks and gradients"
    return Collective(name, _num_forwards(layout) * outward + gradients, args.ep, outward=outward)


def _num_forwards(layout: _Layout) -> int:
    """Forwards of a microbatch: a recomputed one sends everything again."""
    return 2 if layout.args.recompute else 1


def _share_of_others(num_ranks: int) -> float:
    """The part of evenly spread data that belongs to other ranks."""
    return (num_ranks - 1) / num_ranks


def _bytes_of_ring(num_ranks: int) -> float:
    """Bytes that a rank sends in a ring all-reduce, per byte of the reduced tensor."""
    return 2 * _share_of_others(num_ranks)


def _reduced_bytes(weights: _Weights, is_distributed: bool) -> float:
    """Bytes that a rank sends to sum up gradients over replicas.

    They are all-reduced. A distributed optimizer scatters the sums instead, and gathers the updated weights.
    """
    each = weights.bytes_each
    if is_distributed:
        return weights.count * _share_of_others(weights.num_replicas) * (each["gradients"] + each["weights"])
    return weights.count * _bytes_of_ring(weights.num_replicas) * each["gradients"]


def seconds(args: argparse.Namespace, collective: Collective) -> float:
    """Seconds of a collective at the given bandwidths, if groups fill nodes and each rank has its own network link."""
    on_node = min(collective.group, max(1, args.gpus_per_node // collective.stride))
    across = (collective.group - on_node) / (collective.group - 1)
    return max(
        collective.num_bytes * across / (args.network_gbytes * 1e9),
        collective.num_bytes * (1 - across) / (args.node_gbytes * 1e9),
    )
