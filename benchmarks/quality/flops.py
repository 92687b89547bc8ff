"""Floating-point operations per token of a study's model, in training: what its results are plotted against."""

from dataclasses import fields

from benchmarks import roofline
from benchmarks.quality.router_flops import expert_flops, router_flops


def flops_per_token(flags: dict, vocabulary: int) -> dict[str, float]:
    """Operations per token, forward and backward, of all layers.

    Args:
        flags: of a run, without dashes in front.
        vocabulary: token ids of the output layer.
    Returns:
        "router" (scores and rebuilds), "rebuilds" (of the lists, as often as this run makes them; in "router" too),
        "router_with_dispatch" (with the constant of Krajewski et al.), "experts",
        "other" (attention and output layer), "total" (without dispatch) and "total_with_dispatch".
    """
    config = config_of(flags)
    tokens = flags["global-batch-size"] * flags["seq-length"]
    router, layers = router_flops(config, tokens, flags["train-iters"]), config.num_layers
    sizes = (config.hidden_size, layers, flags["seq-length"], vocabulary)
    given = {
        "router": layers * router.total,
        "rebuilds": layers * router.refresh,
        "router_with_dispatch": layers * router.with_dispatch,
        "experts": layers * expert_flops(config),
        "other": sum(work.flops for work in roofline.transformer(1, *sizes).values()),
    }
    rest = given["experts"] + given["other"]
    return given | {"total": given["router"] + rest, "total_with_dispatch": given["router_with_dispatch"] + rest}


def config_of(flags: dict):
    """The transformer config of a run's flags, as far as they are fields of it."""
    from air_moe_megatron import AIRMoEConfig

    renamed = {"num-experts": "num_moe_experts"}
    known = {field.name for field in fields(AIRMoEConfig)}
    values = {renamed.get(flag, flag.replace("-", "_")): value for flag, value in flags.items()}
    given = {name: value for name, value in values.items() if name in known}
    if flags.get("moe-router-type") == "hash":
        given.setdefault("moe_hash_vocab_size", 1)  # costs nothing whatever it is
    return AIRMoEConfig(**{"add_bias_linear": not flags.get("disable-bias-linear", False), **given})
