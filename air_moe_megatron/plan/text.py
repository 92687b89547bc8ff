"""The prediction as text: both layouts in tables, and what would fit if they do not."""

import argparse
import itertools
import math

from air_moe_megatron.config import AIRMoEConfig, resolve_sizes
from air_moe_megatron.plan.prediction import Plan, predict, seconds

_GIB, _MIB = 2**30, 2**20
_SHOWN = 4  # remedies


def words_of_sizes(config: AIRMoEConfig) -> str:
    """The sizes of a router, for the header."""
    sizes, parts = resolve_sizes(config), config.moe_air_list_parts
    words = [f"{sizes.num_clusters} codewords", f"lists of {sizes.shortlist_size}"]
    words[1] += f" in {parts} parts" if parts > 1 else ""
    words += [f"{sizes.num_probes} probes", f"{sizes.num_candidates} candidates"]
    words += [f"{sizes.num_explored} explored"] if sizes.num_explored else []
    return ", ".join(words)


def remedies(args: argparse.Namespace) -> list[str]:
    """Up to four changed layouts that fit into the memory, one per line.

    All expert-parallel sizes that divide the experts and the ranks are tried. Layouts with the fewest changes come
    first, then those whose expert-parallel size is nearest to the given one by ratio. Of two equally near sizes the
    smaller one comes first, because it sends tokens to fewer ranks.
    """
    common = math.gcd(args.experts, args.nodes * args.gpus_per_node)
    layouts = [
        argparse.Namespace(**{**vars(args), "ep": ep, "distributed_optimizer": distributed})
        for ep in range(1, common + 1)
        for distributed in sorted({args.distributed_optimizer, True})
        if common % ep == 0
    ]
    layouts.sort(key=lambda one: (len(_changes(args, one)), max(one.ep, args.ep) / min(one.ep, args.ep)))
    found = []
    for layout, is_sharded in itertools.product(layouts, (False, True)):
        try:
            plan = predict(layout, is_sharded)
        except ValueError:  # the lists do not divide into so many parts
            continue
        if _fits(args, plan):
            found.append(f"{', '.join([*_changes(args, layout), plan.name])}: {plan.total / _GIB:.1f} GiB")
        if len(found) == _SHOWN:
            break
    return found


def _changes(args: argparse.Namespace, layout: argparse.Namespace) -> list[str]:
    """The flags of a layout that are not as given."""
    changes = [f"--ep {layout.ep}"] if layout.ep != args.ep else []
    return changes + (["--distributed-optimizer"] if layout.distributed_optimizer != args.distributed_optimizer else [])


def _fits(args: argparse.Namespace, plan: Plan) -> bool:
    return plan.total <= args.memory_gib * _GIB


def report(args: argparse.Namespace) -> tuple[str, bool]:
    """The prediction as text, and whether any of the layouts fits into the memory.

    Raises:
        ValueError: as :func:`config_of`, for the replicated layout. The text says why a sharded one is invalid.
    """
    plans, refusal = [predict(args, is_sharded=False)], None
    try:
        plans.append(predict(args, is_sharded=True))
    except ValueError as error:
        refusal = error
    sizes = [words_of_sizes(plan.config) for plan in plans]
    num_ranks = args.nodes * args.gpus_per_node
    unit, num_bytes = ("GiB", _GIB) if max(plan.total for plan in plans) >= _GIB else ("MiB", _MIB)
    lines = [
        f"{args.layers} {'layer' if args.layers == 1 else 'layers'} of {args.experts} experts, K = {args.topk}, "
        f"H = {args.hidden}, on {num_ranks} {'rank' if num_ranks == 1 else 'ranks'}, EP {args.ep}",
        f"AIR: {sizes[0]}",
    ]
    lines += [f"AIR, sharded: {sizes[-1]}"] if sizes[-1] != sizes[0] else []

    def row(name: str, values: list[float], form: str) -> str:
        return f"  {name:50}" + "".join(format(value, f"12{form}") for value in values)

    headings = "".join(f"{plan.name:>12}" for plan in plans)
    lines += ["", f"{unit + ' per rank':52}{headings}"]
    lines += [row(name, [plan.memory[name] / num_bytes for plan in plans], ".3f") for name in plans[0].memory]
    lines.append(row("all", [plan.total / num_bytes for plan in plans], ".3f"))
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
    for plan in plans:
        lines.append(f"{plan.name}: {'fits' if _fits(args, plan) else 'does not fit'} into {args.memory_gib:g} GiB")
    if refusal is not None:
        lines.append(f"sharded: not possible: {refusal}")
    fitting = [plan for plan in plans if _fits(args, plan)]
    if len(fitting) < len(plans):
        found = remedies(args)
        lines.append("what would fit:" if found else "nothing of --ep, --distributed-optimizer and sharding fits: use")
        lines += [f"  {line}" for line in found] or ["  fewer or smaller experts, or more nodes"]
    return "\n".join(lines) + "\n", bool(fitting)
