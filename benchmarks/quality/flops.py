"""Floating-point operations per token of a study's model in training, against which its results are plotted.

The formula of a router is in its class.
"""

from dataclasses import fields

from air_moe_megatron.config import hash_layer_numbers
from air_moe_megatron.routers import ROUTERS
from air_moe_megatron.routers.flops import Rebuilds, RouterFlops
from benchmarks import roofline

DISPATCH_CONSTANT = 14
"""Operations per scored row and hidden unit that Krajewski et al. 2024 (arXiv 2402.07871) charge an exact router with
its dispatch, forward and backward, in place of the 6 of the scores alone."""


def flops_per_token(flags: dict, vocabulary: int, on_gpu: bool = False) -> dict[str, float]:
    """Operations per token, forward and backward, of all layers.

    Args:
        flags: flags of a run, without leading dashes.
        vocabulary: number of token ids of the output layer.
        on_gpu: whether the run is on a GPU, which rebuilds lists in another way.
    Returns:
        "router" (scores, norm and rebuilds; none for first layers by hash), "rebuilds" (those of the lists, as often as
        this run makes them; included in "router"), "router_with_dispatch" (with the constant of Krajewski et al.),
        "experts", "other" (attention and output layer), "total" (without dispatch) and "total_with_dispatch".
    """
    config = config_of(flags)
    tokens = flags["global-batch-size"] * flags["seq-length"]
    router = ROUTERS[config.moe_router_type].flops(config, Rebuilds(tokens, flags["train-iters"], on_gpu))
    layers = config.num_layers
    scored = layers - len(hash_layer_numbers(config))  # a hash of token ids costs nothing
    sizes = (config.hidden_size, layers, flags["seq-length"], vocabulary)
    given = {
        "router": scored * router.total,
        "rebuilds": scored * router.refresh,
        "router_with_dispatch": scored * with_dispatch(router),
        "experts": layers * expert_flops(config),
        "other": sum(work.flops for work in roofline.transformer(1, *sizes).values()),
    }
    rest = given["experts"] + given["other"]
    return given | {"total": given["router"] + rest, "total_with_dispatch": given["router_with_dispatch"] + rest}


def with_dispatch(router: RouterFlops) -> float:
    """Refresh and norm, and 14 operations for each 2 of the forward (Krajewski et al.), which cover both directions
    and the dispatch. Dispatch is charged by the scored rows, so the hash router is charged nothing."""
    return DISPATCH_CONSTANT / 2 * router.forward + router.refresh + router.norm


def expert_flops(config) -> int:
    """Operations per token of the K experts of a layer, forward and backward: ``6 * K * H * F`` per projection."""
    projections = 3 if config.gated_linear_unit else 2
    return 6 * config.moe_router_topk * config.hidden_size * config.moe_ffn_hidden_size * projections


def config_of(flags: dict):
    """The transformer config of a run, made from those flags that are fields of it."""
    from air_moe_megatron import AIRMoEConfig

    renamed = {"num-experts": "num_moe_experts"}
    known = {field.name for field in fields(AIRMoEConfig)}
    values = {renamed.get(flag, flag.replace("-", "_")): value for flag, value in flags.items()}
    given = {name: value for name, value in values.items() if name in known}
    if flags.get("moe-router-type") == "hash" or flags.get("moe-num-hash-layers"):
        given.setdefault("moe_hash_vocab_size", 1)  # its value does not change the cost
    return AIRMoEConfig(**{"add_bias_linear": not flags.get("disable-bias-linear", False), **given})
