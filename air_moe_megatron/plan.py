"""Predict a run before it is launched: ``python -m air_moe_megatron.plan --experts 1048576 --hidden 4096 ...``.

It prints memory per rank, router FLOPs, and bytes and time of each collective, for a replicated router and for one
whose centers and lists are sharded over the expert-parallel ranks (docs/sharded-routing.md). It needs no device and
makes no process group. It assumes equally loaded experts. Attention, embeddings and everything else outside of MoE
layers are not included.

Legend: T tokens per rank and microbatch, D expert-parallel ranks, W ranks, R rows that are sent for a rank's tokens (a
token travels once to each rank that holds any of its experts); others as in ``ops/__init__.py``.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from air_moe_megatron.config import AIRMoEConfig, resolve_sizes
from air_moe_megatron.learned.codebook import Codebook
from air_moe_megatron.learned.index import ShortlistIndex
from air_moe_megatron.routers import AIRRouter
from air_moe_megatron.routers.base import INPUT_NORMS
from air_moe_megatron.routers.flops import Rebuilds
from air_moe_megatron.training.memory import parameter_bytes

_GIB = 2**30
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PAIR_ID = 4  # bytes of an expert id that is sent


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


def words_of_sizes(config: AIRMoEConfig) -> str:
    """The sizes of a router, for the header."""
    sizes, parts = resolve_sizes(config), config.moe_air_list_parts
    words = [f"{sizes.num_clusters} codewords", f"lists of {sizes.shortlist_size}"]
    words[1] += f" in {parts} parts" if parts > 1 else ""
    words += [f"{sizes.num_probes} probes", f"{sizes.num_candidates} candidates"]
    words += [f"{sizes.num_explored} explored"] if sizes.num_explored else []
    return ", ".join(words)


def _training_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Megatron's arguments that :func:`parameter_bytes` reads."""
    return argparse.Namespace(
        params_dtype=_DTYPES[args.dtype],
        accumulate_allreduce_grads_in_fp32=not args.bf16_gradients,
        optimizer="adam",
        use_precision_aware_optimizer=False,
        use_distributed_optimizer=args.distributed_optimizer,
        skip_train=False,
    )


def learned_bytes(args: argparse.Namespace, config: AIRMoEConfig, shards: int) -> tuple[dict[str, int], int]:
    """Bytes per rank of the state that one layer learns without gradients, and of its statistics.

    The state is counted by purpose. Every rank holds codebook and input norm, their statistics, and two counters for
    each of all experts. The statistics are all-reduced.
    """
    sizes, norm = resolve_sizes(config), INPUT_NORMS[args.input_norm]
    with torch.device("meta"):
        learners = [Codebook(sizes.num_clusters, args.hidden, config.moe_air_codebook_ema)]
        learners += [] if norm is None else [norm(args.hidden)]
        index = ShortlistIndex(
            args.experts // shards,
            sizes.num_clusters,
            sizes.shortlist_size // shards,
            source=config.moe_air_codebook_source,
            refresh_interval=config.moe_air_refresh_interval,
        )
    statistics = sum(learner.statistics.nbytes for learner in learners)
    buffers = sum(buffer.nbytes for learner in learners for buffer in learner.buffers())
    lists = sum(buffer.nbytes for buffer in index.buffers()) + 2 * torch.int64.itemsize * args.experts
    return {"codebooks and input norms": buffers + statistics, "lists": lists}, statistics


def predict(args: argparse.Namespace, is_sharded: bool) -> Plan:
    """Predict memory, FLOPs and communication of one layout, replicated or sharded.

    Raises:
        ValueError: as :func:`config_of`.
    """
    config, dtype = config_of(args, is_sharded), _DTYPES[args.dtype]
    sizes, ranks, world = resolve_sizes(config), args.ep, args.nodes * args.gpus_per_node
    theirs = _training_arguments(args)
    shards = ranks if is_sharded else 1
    number = dtype.itemsize
    router = args.layers * args.experts * args.hidden // shards
    projections = 3 if args.swiglu else 2
    experts = args.layers * args.experts // ranks * projections * args.ffn * args.hidden
    of_router = parameter_bytes(theirs, world // ranks if is_sharded else world)
    of_experts = parameter_bytes(theirs, world // ranks)
    memory = {
        f"{what} of {who}": float(count * per[what])
        for who, count, per in (("experts", experts, of_experts), ("routers", router, of_router))
        for what in ("weights", "gradients", "optimizer state")
    }
    learned, statistics = learned_bytes(args, config, shards)
    memory |= {name: float(args.layers * size) for name, size in learned.items()}
    distinct = rows_per_token(args.experts, args.topk, ranks)
    sent = ranks if is_sharded else distinct
    rows, pairs = args.tokens * sent, args.tokens * args.topk
    # Each layer keeps for the backward: the received rows, the pairs' activations, and for each candidate its score,
    # its id and, with the kernels, its position in the lists.
    kept = (
        rows * args.hidden * number
        + args.tokens * (sizes.num_candidates + sizes.num_explored) * 12
        + pairs * args.ffn * number * projections
    )
    memory["activations of the routed path"] = float(kept * (1 if args.recompute else args.layers))
    memory["dispatch buffers"] = float(2 * rows * args.hidden * number + 2 * pairs * (_PAIR_ID + 4))
    steps, away = args.microbatches, (ranks - 1) / ranks
    row_bytes = steps * rows * away * args.hidden * number
    forwards = 2 if args.recompute else 1  # a recomputed forward sends everything again
    rows_sent = (2 * forwards + 2) * row_bytes
    pair_bytes = steps * pairs * away * (4 if is_sharded else 4 + _PAIR_ID)
    collectives = [
        Collective("rows to the experts and back, forward and backward", rows_sent, ranks, outward=row_bytes),
        # With sharding no ids are sent: owners know the ids of their candidates.
        Collective(
            "pairs of expert and prob, and the gradients of the probs",
            forwards * pair_bytes + steps * pairs * away * 4,
            ranks,
            outward=pair_bytes,
        ),
        Collective(
            _reduced("experts", theirs),
            experts / args.layers * _bytes_of_reduction(theirs, of_experts, world // ranks),
            world // ranks,
            stride=ranks,
        ),
        Collective("statistics of codebook and input norm", _ring(world) * statistics, world),
    ]
    group = world // ranks if is_sharded else world
    share = router / args.layers * _bytes_of_reduction(theirs, of_router, group)
    collectives.append(Collective(_reduced("centers", theirs), share, group, stride=shards))
    if is_sharded:
        width = min(sizes.num_candidates, sizes.num_probes * sizes.shortlist_size // ranks)
        width += sizes.num_explored // ranks
        outward = steps * args.tokens * (ranks - 1) * (width * (4 + _PAIR_ID + 1) + 4 * sizes.num_probes)
        gradients = steps * args.tokens * away * 4 * (sizes.num_candidates + sizes.num_explored)
        name = "scores of the candidates, codewords, marks and gradients"
        collectives.append(Collective(name, forwards * outward + gradients, ranks, outward=outward))
    tokens = world * args.tokens * args.microbatches
    flops = AIRRouter.flops(config, Rebuilds(tokens, on_gpu=True))
    rebuild = flops.refresh * tokens * args.refresh_interval
    collectives = [one for one in collectives if one.group > 1]
    return Plan(is_sharded, memory, flops.total, rebuild / shards, rebuild / world, collectives)


def _ring(ranks: int) -> float:
    """Bytes that a rank sends in a ring all-reduce, per byte of the reduced tensor."""
    return 2 * (ranks - 1) / ranks


def _reduced(what: str, theirs: argparse.Namespace) -> str:
    """Name of the collectives after a backward, as :func:`_bytes_of_reduction` counts them."""
    return f"gradients{' and updated weights' if theirs.use_distributed_optimizer else ''} of the {what}"


def _bytes_of_reduction(theirs: argparse.Namespace, per: dict[str, float], ranks: int) -> float:
    """Bytes per parameter that a rank sends to sum up gradients over replicas.

    They are all-reduced. A distributed optimizer scatters the sums instead, and gathers the updated weights.

    Args:
        theirs: Megatron's arguments.
        per: bytes of a parameter, as :func:`parameter_bytes` gives them.
        ranks: number of replicas.
    """
    if theirs.use_distributed_optimizer:
        return _ring(ranks) / 2 * (per["gradients"] + per["weights"])
    return _ring(ranks) * per["gradients"]


def seconds(args: argparse.Namespace, collective: Collective) -> float:
    """Seconds of a collective at the given bandwidths, if groups fill nodes and each rank has its own network link."""
    on_node = min(collective.group, max(1, args.gpus_per_node // collective.stride))
    across = (collective.group - on_node) / (collective.group - 1)
    return max(
        collective.num_bytes * across / (args.network_gbytes * 1e9),
        collective.num_bytes * (1 - across) / (args.node_gbytes * 1e9),
    )


def remedies(args: argparse.Namespace) -> list[str]:
    """Changed layouts that fit into the memory, one per line; those with the fewest changes first."""
    world, found = args.nodes * args.gpus_per_node, []
    expert_parallel = args.ep
    while expert_parallel <= world:
        for distributed in sorted({args.distributed_optimizer, True}):
            for is_sharded in (False, True):
                changed = argparse.Namespace(
                    **{**vars(args), "ep": expert_parallel, "distributed_optimizer": distributed}
                )
                if args.experts % expert_parallel or world % expert_parallel:
                    continue
                try:
                    plan = predict(changed, is_sharded)
                except ValueError:  # the lists do not divide into so many parts
                    continue
                if plan.total <= args.memory_gib * _GIB:
                    words = [f"--ep {expert_parallel}"] if expert_parallel != args.ep else []
                    words += ["--distributed-optimizer"] if distributed != args.distributed_optimizer else []
                    words += [plan.name]
                    found.append(f"{', '.join(words)}: {plan.total / _GIB:.1f} GiB")
        expert_parallel *= 2
    return sorted(found, key=lambda line: line.count(","))[:4]


def report(args: argparse.Namespace) -> tuple[str, bool]:
    """The prediction as text, and whether any of the layouts fits into the memory.

    Raises:
        ValueError: as :func:`config_of`, for the replicated layout. The text says why a sharded one is invalid.
    """
    plans, sizes, refusal = [predict(args, False)], [words_of_sizes(config_of(args, False))], None
    try:
        plans.append(predict(args, True))
        sizes.append(words_of_sizes(config_of(args, True)))
    except ValueError as error:
        refusal = error
    lines = [
        f"{args.layers} {'layer' if args.layers == 1 else 'layers'} of {args.experts} experts, K = {args.topk}, "
        f"H = {args.hidden}, on {args.nodes * args.gpus_per_node} ranks, EP {args.ep}",
        f"AIR: {sizes[0]}",
    ]
    lines += [f"AIR, sharded: {sizes[-1]}"] if sizes[-1] != sizes[0] else []

    def row(name: str, values: list[float], form: str) -> str:
        return f"  {name:50}" + "".join(format(value, f"12{form}") for value in values)

    headings = "".join(f"{plan.name:>12}" for plan in plans)
    lines += ["", f"{'GiB per rank':52}{headings}"]
    lines += [row(name, [plan.memory[name] / _GIB for plan in plans], ".3f") for name in plans[0].memory]
    lines.append(row("all", [plan.total / _GIB for plan in plans], ".3f"))
    lines += ["", f"{'kFLOPs':52}{headings}"]
    lines.append(row("router, per token and layer", [plan.router_flops / 1e3 for plan in plans], ".1f"))
    rebuilds = [plan.first_rebuild_flops / 1e3 for plan in plans]
    lines.append(row("each of the first two rebuilds, per rank and layer", rebuilds, ".3g"))
    lines.append(row("each later rebuild", [plan.rebuild_flops / 1e3 for plan in plans], ".3g"))
    for plan in plans:
        lines += ["", f"{plan.name}: sent by a rank, per layer and step"]
        for one in plan.collectives:
            lines.append(
                f"  {one.name:62}{one.num_bytes / 1e6:12.1f} MB{seconds(args, one) * 1e3:10.2f} ms{one.group:6} ranks"
            )
        every = sum(seconds(args, one) for one in plan.collectives)
        lines.append(f"  {'all, one after another':62}{'':15}{every * 1e3:10.2f} ms")
    lines.append("")
    fits = [plan.total <= args.memory_gib * _GIB for plan in plans]
    for plan, is_small in zip(plans, fits, strict=True):
        lines.append(f"{plan.name}: {'fits' if is_small else 'does not fit'} into {args.memory_gib:g} GiB")
    if refusal is not None:
        lines.append(f"sharded: not possible: {refusal}")
    if not all(fits):
        found = remedies(args)
        lines.append("what would fit:" if found else "nothing of --ep, --distributed-optimizer and sharding fits: use")
        lines += [f"  {line}" for line in found] or ["  fewer or smaller experts, or more nodes"]
    return "\n".join(lines) + "\n", any(fits)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m air_moe_megatron.plan",
        description=__doc__.partition("\n")[0].replace("``", "`"),
        allow_abbrev=False,
    )
    for flag, default, text in (
        ("--experts", None, "experts of a layer"),
        ("--hidden", None, "hidden size"),
        ("--topk", None, "experts per token"),
        ("--ep", None, "expert-parallel size"),
        ("--nodes", 1, "nodes"),
        ("--gpus-per-node", 8, "ranks per node"),
        ("--layers", 1, "MoE layers per rank"),
        ("--ffn", 1, "hidden size of an expert"),
        ("--tokens", 8192, "tokens per rank and microbatch"),
        ("--microbatches", 1, "microbatches per step"),
        ("--clusters", 0, "codewords; 0 is automatic"),
        ("--shortlist", 0, "experts of a list; 0 is automatic"),
        ("--list-parts", 0, "parts of a list; 0 is --ep in the sharded layout, otherwise 1"),
        ("--probes", 0, "lists searched; 0 is automatic"),
        ("--candidates", 0, "candidates with gradients; 0 is automatic"),
        ("--explored", 0, "explored candidates of the balancing loss"),
        ("--refresh-interval", 20, "steps between rebuilds"),
    ):
        parser.add_argument(
            flag,
            type=int,
            default=default,
            required=default is None,
            help=text if default is None else f"{text}; default {default}",
        )
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="bf16", help="dtype of weights and activations; default bf16"
    )
    parser.add_argument(
        "--input-norm", choices=INPUT_NORMS, default="running", help="norm before scoring; default running"
    )
    parser.add_argument("--swiglu", action="store_true", help="experts with a gate")
    parser.add_argument("--bf16-gradients", action="store_true", help="gradients in the weights' dtype, not fp32")
    parser.add_argument("--distributed-optimizer", action="store_true", help="shard optimizer state over replicas")
    parser.add_argument("--recompute", action="store_true", help="keep activations of one layer; forwards send twice")
    parser.add_argument("--memory-gib", type=float, default=80.0, help="memory of a rank; default 80")
    parser.add_argument(
        "--node-gbytes", type=float, default=300.0, help="GB/s that a rank sends within a node; default 300"
    )
    parser.add_argument(
        "--network-gbytes", type=float, default=40.0, help="GB/s that a rank sends to other nodes; default 40"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the prediction.

    Raises:
        SystemExit: always; 2 for invalid values, 1 if neither layout fits, otherwise 0.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    world = args.nodes * args.gpus_per_node
    for name in (
        "experts",
        "hidden",
        "topk",
        "ep",
        "nodes",
        "gpus_per_node",
        "layers",
        "ffn",
        "tokens",
        "microbatches",
    ):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} ({getattr(args, name)}) must be at least 1")
    for name in ("memory_gib", "node_gbytes", "network_gbytes"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} ({getattr(args, name)}) must be positive")
    if args.topk > args.experts:
        parser.error(f"--topk ({args.topk}) must not exceed --experts ({args.experts})")
    for name, whole in (("--experts", args.experts), ("--nodes times --gpus-per-node", world)):
        if whole % args.ep:
            parser.error(f"{name} ({whole}) must be divisible by --ep ({args.ep})")
    try:
        text, fits = report(args)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(text)
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    main()
