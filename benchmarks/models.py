"""Builders of the measured routers and layers, ours and the baselines', for given sizes.

Legend: T tokens, H hidden, E experts, C clusters, L shortlist, K top-k, F rows of an expert.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from types import SimpleNamespace

import torch

from benchmarks import roofline
from benchmarks.arguments import not_negative, positive
from benchmarks.measure import accumulate_gradient, clock, give_main_grad
from benchmarks.peer import PEERLayer, ProductKeyRouter

ROUTE = "AIRRouter.route"
_GROUPS = 4  # groups that hierarchical routing searches for a token: the better setting of the study
_HEADS = 8  # as in PEER's paper; K is divided among them
_FLAGS = {
    "experts": "number of experts E",
    "hidden": "hidden size H",
    "tokens": "tokens T",
    "topk": "experts per token K",
    "ffn": "rows of an expert F",
    "clusters": "codewords C; 0 is automatic",
    "shortlist": "shortlist size L; 0 is automatic",
    "probes": "probes P; 0 is automatic",
}
_AUTOMATIC = ("clusters", "shortlist", "probes")  # may be 0


@dataclass(frozen=True)
class Sizes:
    """Sizes and dtypes of a router or a layer."""

    experts: int
    hidden: int
    tokens: int
    topk: int
    ffn: int = 1
    clusters: int = 0
    shortlist: int = 0
    probes: int = 0
    candidates: int = 0
    dtype: torch.dtype = torch.float32  # of tokens and weights
    routing_dtype: torch.dtype = torch.float32  # of scores and probs

    @classmethod
    def of(cls, args, **changes) -> "Sizes":
        """Take the sizes from parsed arguments, as far as they have them."""
        given = {field.name: getattr(args, field.name) for field in fields(cls) if hasattr(args, field.name)}
        return cls(**{**given, **changes})

    def columns(self) -> dict:
        """The sizes as columns of a row."""
        named = {name: getattr(self, name) for name in ("experts", "hidden", "tokens", "topk")}
        return named | {name: str(getattr(self, name)).removeprefix("torch.") for name in ("dtype", "routing_dtype")}


def add_sizes(parser, **defaults: int) -> None:
    """Add a flag for each of the sizes named, with its default."""
    for name, default in defaults.items():
        number = not_negative if name in _AUTOMATIC else positive
        parser.add_argument(f"--{name}", type=number, default=default, help=_FLAGS[name])


def check_square(num_experts: int) -> None:
    """Raise ValueError if product keys cannot have this number of experts."""
    if math.isqrt(num_experts) ** 2 != num_experts:
        raise ValueError(f"--experts ({num_experts}) must be a square, for product keys")


def make_config(sizes: Sizes, router: str, compact: bool = False, **more):
    """Make Megatron's config with our fields, for a router alone, a layer or a model. All benchmarks use this function.

    All routers have the settings of ``--air-moe``: the auxiliary loss, fp32 scores, and probabilities that sum to half
    of the top-k. AIR and hierarchical routing also have its input norm, which Megatron's own router lacks.

    Args:
        router: "air", "hierarchical", or "topk" for Megatron's own.
        compact: whether to use the compact path; otherwise Megatron's all-to-all dispatcher is used.
        more: further fields that a benchmark sets.
    """
    from air_moe_megatron import AIRMoEConfig
    from air_moe_megatron.command.arguments import RECOMMENDED, recommended_scale

    sizes_of_router = {
        "air": {
            "moe_air_num_clusters": sizes.clusters,
            "moe_air_shortlist_size": sizes.shortlist,
            "moe_air_num_probes": sizes.probes,
            "moe_air_num_candidates": sizes.candidates,
        },
        "hierarchical": {"moe_hierarchical_topk_groups": _GROUPS},
    }
    given = {
        **RECOMMENDED,
        "num_layers": 1,
        "hidden_size": sizes.hidden,
        "num_attention_heads": 4,
        "num_moe_experts": sizes.experts,
        "moe_ffn_hidden_size": sizes.ffn,
        "moe_router_topk": sizes.topk,
        "moe_router_topk_scaling_factor": recommended_scale(sizes.topk),
        "moe_router_dtype": "fp32" if sizes.routing_dtype == torch.float32 else None,
        "moe_token_dispatcher_type": "allgather" if compact else "alltoall",
        "add_bias_linear": False,
        "params_dtype": sizes.dtype,
        "bf16": sizes.dtype == torch.bfloat16,
        "moe_router_type": router,
        "moe_dispatch": "compact" if compact else "stock",
        "moe_granular_experts": compact,
        **sizes_of_router.get(router, {}),
    }
    if router == "topk":
        given["moe_router_input_norm"] = "none"
    return AIRMoEConfig(**{**given, **more})


def make_router(kind: str, sizes: Sizes, pg_collection, device, **fields):
    """A router on the device, with main_grad buffers: "air", "topk" or "product_key"; ``fields`` of the config."""
    if kind == "product_key":
        torch.manual_seed(0)
        return _ready(ProductKeyRouter(*_product_keys(sizes)).to(sizes.dtype), device)
    from megatron.core.transformer.moe.router import TopKRouter

    from air_moe_megatron import AIRRouter

    router = (AIRRouter if kind == "air" else TopKRouter)(make_config(sizes, kind, **fields), pg_collection)
    router.set_layer_number(1)
    return _ready(router, device)


def make_layer(kind: str, sizes: Sizes, pg_collection, device):
    """A layer on the device, with main_grad buffers.

    "AIRMoELayer" and "HierarchicalMoELayer" use the compact path; the second searches four groups per token.
    "PEERLayer" is that of ``peer.py``. "MoELayer" is Megatron's with its ``TopKRouter`` and all-to-all dispatcher, but
    with our granular experts: Megatron's own would be tens of thousands of modules, one per expert.
    """
    if kind == "PEERLayer":
        torch.manual_seed(0)
        return _ready(PEERLayer(*_product_keys(sizes)).to(sizes.dtype), device)
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.router import TopKRouter

    from air_moe_megatron import AIRMoELayer
    from air_moe_megatron.layer.experts import GranularExperts
    from air_moe_megatron.routers import ROUTERS

    if kind == "MoELayer":
        layer_class, router, router_class = MoELayer, "topk", TopKRouter
    else:
        layer_class, router = AIRMoELayer, "air" if kind == "AIRMoELayer" else "hierarchical"
        router_class = ROUTERS[router]
    config = make_config(sizes, router, compact=layer_class is AIRMoELayer)
    layer = layer_class(config, MoESubmodules(experts=GranularExperts, router=router_class), 1, pg_collection)
    layer.set_layer_number(1)
    return _ready(layer, device)


def _product_keys(sizes):
    """Sizes of product keys, with the smallest usual keys, so that the baseline's router does not slow it down."""
    heads = num_heads(sizes.topk)
    return sizes.hidden, sizes.experts, heads, sizes.topk // heads, max(1, sizes.hidden // 8)


def num_heads(topk: int) -> int:
    """Number of heads of the product keys; a single one if K is not divisible by the usual number."""
    return _HEADS if topk % _HEADS == 0 else 1


def _ready(module, device):
    module = module.to(device)
    give_main_grad(module)
    return module


def inputs(sizes: Sizes, device, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Random tensors of the shapes, the same on every device. The first has the model's dtype, the others, gradients
    of probs, have the routing's."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [sizes.dtype, *[sizes.routing_dtype] * (len(shapes) - 1)]
    return [
        torch.randn(shape, generator=generator).to(device, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def warm_up_codebook(router, hidden: torch.Tensor):
    """Warm up the norm and codebook of an AIR router with a few updates on the tokens, and build its lists.

    Returns:
        the small router of :func:`learn_codebook`.
    """
    learner = learn_codebook(router, [hidden] * 3)
    with torch.no_grad():
        router.route(hidden)
    return learner


def learn_codebook(router, batches: Sequence[torch.Tensor]):
    """Train the norm and codebook of an AIR router with one update for each of the batches of tokens.

    Norm and codebook do not depend on the experts. So a router with as few experts as possible learns them, and the
    large router builds its lists only once, in its next forward. The count of updates is set beyond the early phase of
    frequent rebuilds, so that the lists then stay for most of a refresh interval.

    Returns:
        the small router.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    from air_moe_megatron.sync import update_codebooks

    config, sizes = copy.copy(router.config), router.sizes
    config.num_moe_experts = max(sizes.num_clusters, 2 * sizes.topk)
    config.moe_air_num_clusters, config.moe_air_shortlist_size = sizes.num_clusters, 2 * sizes.topk
    config.moe_air_num_candidates = 0
    learner = type(router)(config, ProcessGroupCollection.use_mpu_process_groups()).to(batches[0].device)
    learner.set_layer_number(1)
    for batch in batches:
        learner.route(batch)
        update_codebooks(learner)
    if router.input_norm is not None:
        router.input_norm.load_state_dict(learner.input_norm.state_dict())
    learned = learner.codebook.state_dict()
    router.codebook.load_state_dict({**learned, "num_updates": torch.full((1,), router.index.refresh_interval**2 + 1)})
    return learner


def usage(router, hidden: torch.Tensor) -> tuple[int, int]:
    """Numbers of codewords that have tokens and of experts that are selected."""
    with torch.no_grad():
        routes = router.route(hidden)
    num_live = 0 if routes.probed is None else routes.probed.unique().numel()
    return num_live, routes.topk_ids.unique().numel()


def air_work(router, hidden: torch.Tensor, sizes: Sizes) -> dict[str, roofline.Work]:
    """The least work of ``route`` for these tokens."""
    num_live, num_used = usage(router, hidden)
    routing = roofline.air_route(
        sizes.tokens,
        sizes.hidden,
        sizes.topk,
        router.sizes,
        num_live,
        num_used,
        sizes.dtype.itemsize,
        sizes.routing_dtype.itemsize,
    )
    return roofline.together(routing, roofline.whitening(sizes.tokens * router.flops(router.config).norm))


def air_columns(router) -> dict[str, int]:
    """The sizes of an AIR router as columns of a row."""
    sizes = router.sizes
    return {
        "clusters": sizes.num_clusters,
        "shortlist": sizes.shortlist_size,
        "probes": sizes.num_probes,
        "candidates": sizes.num_candidates,
    }


def topk_work(sizes: Sizes) -> dict[str, roofline.Work]:
    """The least work of ``TopKRouter.forward``."""
    return roofline.topk_route(
        sizes.tokens, sizes.hidden, sizes.experts, sizes.dtype.itemsize, sizes.routing_dtype.itemsize
    )


def hierarchical_work(router, sizes: Sizes) -> dict[str, roofline.Work]:
    """The least work of hierarchical routing: like AIR's, with groups in place of codewords and lists."""
    groups = router.sizes
    scored = groups.topk_groups * groups.group_size
    as_air = SimpleNamespace(
        num_clusters=groups.num_groups,
        shortlist_size=groups.group_size,
        num_probes=groups.topk_groups,
        num_candidates=scored,
    )
    numbers = (sizes.tokens, sizes.hidden, sizes.topk, as_air, groups.num_groups, sizes.experts)
    return roofline.air_route(*numbers, sizes.dtype.itemsize, sizes.routing_dtype.itemsize)


def product_key_work(router: ProductKeyRouter, sizes: Sizes) -> dict[str, roofline.Work]:
    """The least work of the product-key router."""
    keys = (router.num_heads, router.num_keys, router.key_size)
    return roofline.product_key_route(sizes.tokens, sizes.hidden, sizes.topk, *keys, sizes.dtype.itemsize)


def expert_work(sizes: Sizes, num_used: int) -> dict[str, roofline.Work]:
    """The least work of the experts."""
    numbers = (sizes.tokens, sizes.hidden, sizes.topk, sizes.ffn, sizes.ffn, num_used)
    return roofline.experts(*numbers, sizes.dtype.itemsize)


def rebuild_work(router, sizes: Sizes, in_full: bool = False) -> dict[str, roofline.Work]:
    """The least work of a rebuild of the router's lists, over all experts and codewords or over those that it tries."""
    from air_moe_megatron.learned.rebuild_schedule import rebuild_products

    lists = (router.sizes.num_clusters, router.sizes.shortlist_size)
    num_products = None if in_full else rebuild_products(sizes.experts, *lists, router.weight.is_cuda)
    return roofline.rebuild(sizes.experts, sizes.hidden, *lists, sizes.dtype.itemsize, num_products)


def step(forward, module, hidden: torch.Tensor, grad: torch.Tensor) -> dict[str, float]:
    """Seconds of ``forward(hidden)`` and of its backward, which accumulates the gradients of the module's weights."""
    hidden = hidden.detach().requires_grad_()
    start = clock(hidden.device)
    out = forward(hidden)
    middle = clock(hidden.device)
    out.backward(grad)
    accumulate_gradient(module)
    end = clock(hidden.device)
    return {"forward": middle - start, "backward": end - middle, "total": end - start}


def layer_inputs(sizes: Sizes, device):
    """Hidden states and a gradient for the output, both [T, 1, H]."""
    hidden, grad = inputs(sizes, device, *[(sizes.tokens, 1, sizes.hidden)] * 2)
    return hidden, grad.to(sizes.dtype)


def layer_step(layer, hidden, grad) -> dict[str, float]:
    """Seconds of a layer's forward and backward."""

    def forward(hidden):
        out = layer(hidden)
        return out[0] if isinstance(out, tuple) else out

    return step(forward, layer, hidden, grad)


@dataclass(frozen=True)
class PreparedStep:
    """A router or a layer with its inputs.

    Attributes:
        module: the router or layer.
        air: the AIR router in it, with a warm codebook; None if there is none.
        hidden: [T, 1, H].
        run: makes a forward and a backward, and returns their seconds.
    """

    module: torch.nn.Module
    air: torch.nn.Module | None
    hidden: torch.Tensor
    run: Callable[[], dict[str, float]]


def prepare_step(kind: str, sizes: Sizes, pg_collection, device) -> PreparedStep:
    """A step of ``AIRRouter.route``, which is ``kind`` ROUTE, or of a layer of :func:`make_layer`."""
    if kind == ROUTE:
        module = air = make_router("air", sizes, pg_collection, device)
        hidden, grad = inputs(sizes, device, (sizes.tokens, 1, sizes.hidden), (sizes.tokens, sizes.topk))
        run = partial(step, lambda tokens: air.route(tokens).probs, air, hidden, grad)
    else:
        module = make_layer(kind, sizes, pg_collection, device)
        air = module.router if kind == "AIRMoELayer" else None
        hidden, grad = layer_inputs(sizes, device)
        run = partial(layer_step, module, hidden, grad)
    if air is not None:
        warm_up_codebook(air, hidden)
    return PreparedStep(module, air, hidden, run)


def rebuild_run(router, in_full: bool = False):
    """A function that makes a complete rebuild of a router's lists, and returns its seconds.

    It works on copies of codebook and lists, so that the router keeps its own.

    Args:
        in_full: whether each rebuild is like the first one, which tries all experts at all codewords.
    """
    codebook, index = copy.deepcopy(router.codebook), copy.deepcopy(router.index)
    index.refresh_interval = 2**62  # every update makes a rebuild due, as in a young codebook

    def run():
        codebook.count_update()
        if in_full:
            index.load_state_dict({**index.state_dict(), "built_at": torch.full_like(index.built_at, -1)})
        start = clock(router.weight.device)
        index.refresh(codebook, router.centers)
        index.commit()
        if int(index.built_at) != codebook.updates_on_host:
            raise AssertionError("the lists were not rebuilt")
        return {"total": clock(router.weight.device) - start}

    run.index = index
    return run
