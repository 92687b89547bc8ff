"""AIR routers with short lists and a codebook that has learned from a few batches."""

import torch

from air_moe_megatron.sync import update_codebooks
from tests import builders

HIDDEN, EXPERTS, TOPK = 16, 40, 4
CLOSE = dict(rtol=1e-5, atol=1e-6)  # fp32 sums of 16 terms in another order

SOURCES = ("tokens", "experts")
SCORES = {
    "softmax": {},
    "pre-softmax": dict(moe_router_pre_softmax=True),
    "scaled-sigmoid": dict(moe_router_score_function="sigmoid", moe_router_topk_scaling_factor=2.5),
    "sigmoid-expert-bias": dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
}


def make_router(pg_collection, seed=0, learned=2, **settings):
    """A router whose codebook has learned from a few batches, with random parameters and expert bias."""
    base = dict(
        hidden_size=HIDDEN, num_moe_experts=EXPERTS, moe_router_topk=TOPK, moe_router_type="air",
        moe_air_num_clusters=8, moe_air_shortlist_size=9, moe_air_refresh_interval=1, **builders.STOCK,
    )  # fmt: skip
    router = builders.make_router(pg_collection, **{**base, **settings})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        if router.bias is not None:
            router.bias.copy_(torch.randn(router.num_experts, generator=generator))
        if router.expert_bias is not None:
            router.expert_bias.copy_(2.0 * torch.randn(router.num_experts, generator=generator))
            router.expert_bias[0] = 5.0  # id 0 is what a careless clamp makes of -1
    for step in range(learned):
        router.route(make_hidden(100, seed=step))
        update_codebooks(router)
    router.expert_load.zero_()
    if router.local_tokens_per_expert is not None:
        router.local_tokens_per_expert.zero_()
    return router


def make_hidden(num_tokens, seed=10):
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))
