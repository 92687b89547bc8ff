"""The prediction as text: both layouts in tables, and what would fit if they do not."""

import argparse

from air_moe_megatron.config import AIRMoEConfig, resolve_sizes
from air_moe_megatron.plan.prediction import config_of, predict, seconds

_GIB = 2**30


def words_of_sizes(config: AIRMoEConfig) -> str:
    """The sizes of a router, for the header."""
    sizes, parts = resolve_sizes(config), config.moe_air_list_parts
    words = [f"{sizes.num_clusters} codewords", f"lists of {sizes.shortlist_size}"]
    words[1] += f" in {parts} parts" if parts > 1 else ""
    words += [f"{sizes.num_probes} probes", f"{sizes.num_candidates} candidates"]
    words += [f"{sizes.num_explored} explored"] if sizes.num_explored else []
    return ", ".join(words)


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
