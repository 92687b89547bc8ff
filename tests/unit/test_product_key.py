"""ProductKeyRouter: the best of all products, found without scoring them; queries normalized as PEER's."""

import pytest
import torch

from air_moe_megatron.config import resolve_product_keys
from air_moe_megatron.sync import discard_statistics, update_codebooks
from tests.builders import HIDDEN, make_config, make_router

pytestmark = pytest.mark.usefixtures("megatron_cpu")

SETTINGS = {
    "one-head": dict(moe_product_key_heads=1),
    "two-heads": dict(moe_product_key_heads=2),
    "on-tokens": dict(moe_product_key_heads=1, moe_product_key_on_tokens=True),
    "on-tokens-two-heads": dict(moe_product_key_heads=2, moe_product_key_on_tokens=True),
    "no-square": dict(moe_product_key_heads=1, num_moe_experts=96, moe_router_topk=12),
    "more-per-head-than-keys": dict(moe_product_key_heads=1, num_moe_experts=6, moe_router_topk=6),
    "on-tokens-layernorm": dict(moe_product_key_on_tokens=True, moe_product_key_query_norm="layernorm"),
    "omnimoe": dict(moe_product_key_heads=1, moe_product_key_on_tokens=True, moe_router_pre_softmax=True),
    "pre-softmax": dict(moe_product_key_heads=2, moe_router_pre_softmax=True),
    "scaled": dict(moe_product_key_heads=2, moe_router_topk_scaling_factor=3.0),
    "pre-softmax-scaled": dict(moe_router_pre_softmax=True, moe_router_topk_scaling_factor=3.0),
    "sigmoid": dict(moe_product_key_heads=2, moe_router_score_function="sigmoid"),
    "layernorm": dict(moe_product_key_query_norm="layernorm"),
    "no-norm": dict(moe_product_key_query_norm="none"),
}


def naive_batch_norm(values):
    return (values - values.mean(dim=0)) / (values.var(dim=0, unbiased=False) + 1e-5).sqrt()


def naive_queries(router, hidden):
    """[T, R, 2, D] in words: projection, normalization, halves."""
    sizes, on_tokens = router.sizes, router.config.moe_product_key_on_tokens
    queries = hidden if on_tokens else hidden @ router.query_weight.t()
    if sizes.query_norm == "batchnorm":
        normal = queries if on_tokens else naive_batch_norm(queries)
    elif sizes.query_norm == "layernorm":
        parts = queries.view(len(hidden), -1, sizes.key_dim)
        centered = parts - parts.mean(dim=2, keepdim=True)
        normal = (centered / (parts.var(dim=2, unbiased=False, keepdim=True) + 1e-5).sqrt()).view_as(queries)
    else:
        normal = queries
    if sizes.query_norm != "none" and not router.normalizes_scores:
        normal = normal * router.norm_weight + router.norm_bias
    if on_tokens:
        return normal[:, None, None].expand(-1, sizes.num_heads, 2, -1)
    return normal.view(len(hidden), sizes.num_heads, 2, sizes.key_dim)


def naive_routes(router, hidden):
    """Every one of the E products scored, then the best k of each head, then the softmax over those."""
    config, topk = router.config, router.sizes.topk_per_head
    queries = naive_queries(router, hidden)
    all_ids, all_probs = [], []
    for head in range(router.sizes.num_heads):
        own = head if config.moe_product_key_on_tokens else 0  # PEER's heads share their keys
        first = queries[:, head, 0] @ router.keys1[own].t()
        second = queries[:, head, 1] @ router.keys2[own].t()
        if router.normalizes_scores:
            first, second = naive_batch_norm(first), naive_batch_norm(second)
        scores = (first[:, :, None] + second[:, None, :]).flatten(1)  # [T, E]
        assert scores.shape[1] == config.num_moe_experts
        best, ids = scores.topk(topk, dim=1)
        if config.moe_router_score_function == "sigmoid":
            probs = best.sigmoid() / best.sigmoid().sum(dim=1, keepdim=True)
        elif config.moe_router_pre_softmax:  # over all E
            probs = scores.softmax(dim=1).gather(1, ids)
        else:
            probs = best.softmax(dim=1)
        all_ids.append(ids)
        all_probs.append(probs * (config.moe_router_topk_scaling_factor or 1.0))
    return torch.cat(all_ids, dim=1), torch.cat(all_probs, dim=1)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_search_is_exact_within_the_products(megatron_cpu, settings):
    router = make_router(megatron_cpu, moe_router_type="product_key", **settings)
    hidden = torch.randn(50, HIDDEN, requires_grad=True)
    routes = router.route(hidden)
    ids, probs = naive_routes(router, hidden)
    assert routes.topk_ids.tolist() == ids.tolist()
    torch.testing.assert_close(routes.probs, probs)
    weights = torch.randn(probs.shape)
    leaves = [hidden, *router.parameters()]
    found = torch.autograd.grad((routes.probs * weights).sum(), leaves)
    for actual, wanted in zip(found, torch.autograd.grad((probs * weights).sum(), leaves), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-5)


def test_two_heads_may_find_one_expert_and_both_count(megatron_cpu):
    router = make_router(megatron_cpu, moe_router_type="product_key", moe_product_key_heads=2, moe_dispatch="stock")
    with torch.no_grad():  # the heads alike: every expert is found twice
        half = router.query_weight.shape[0] // 2
        router.query_weight[half:] = router.query_weight[:half]
    hidden = torch.randn(9, HIDDEN)
    routes = router.route(hidden)
    assert torch.equal(routes.topk_ids[:, :2], routes.topk_ids[:, 2:])
    probs, routing_map = router(hidden.unsqueeze(1))
    torch.testing.assert_close(probs.gather(1, routes.topk_ids[:, :2].long()), 2 * routes.probs[:, :2])
    torch.testing.assert_close(probs.sum(dim=1), torch.full((9,), 2.0))
    assert (routing_map.sum(dim=1) == 4).all()  # as many as Megatron's dispatchers count on


def test_probs_of_omnimoe_are_products_of_two_softmaxes(megatron_cpu):
    """The authors' words: log_softmax of each half's batch-normalized scores, summed, the best K, and their exp."""
    router = make_router(
        megatron_cpu, moe_router_type="product_key", moe_product_key_heads=1, moe_product_key_on_tokens=True,
        moe_router_pre_softmax=True,
    )  # fmt: skip
    hidden = torch.randn(50, HIDDEN)
    halves = [
        torch.nn.BatchNorm1d(keys.shape[1], affine=False)(hidden @ keys[0].t()).log_softmax(dim=1)
        for keys in (router.keys1, router.keys2)
    ]
    scores, ids = (halves[0][:, :, None] + halves[1][:, None, :]).flatten(1).topk(router.topk, dim=1)
    routes = router.route(hidden)
    assert routes.topk_ids.tolist() == ids.tolist()
    torch.testing.assert_close(routes.probs, scores.exp())
    assert {name for name, _ in router.named_parameters()} == {"keys1", "keys2"}


def batch(step, num_tokens=20):
    return torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(step)) + 5.0


def test_batch_norm_is_torchs(megatron_cpu):
    router = make_router(megatron_cpu, moe_router_type="product_key")
    reference = torch.nn.BatchNorm1d(router.query_weight.shape[0], momentum=None)  # the plain average, as of the young
    for step in range(3):
        hidden = batch(step)
        with torch.no_grad():  # the first pass of a recomputation changes nothing
            router.route(hidden)
        router.route(hidden)
        queries = hidden @ router.query_weight.t()
        torch.testing.assert_close(router._normalize(queries, None), reference(queries), rtol=1e-4, atol=1e-4)
        assert update_codebooks(router) == 0
        torch.testing.assert_close(router.query_norm.mean, reference.running_mean, rtol=1e-4, atol=1e-4)
        # torch divides by one token less
        variance = router.query_norm.variance.float() * 20 / 19
        torch.testing.assert_close(variance, reference.running_var, rtol=1e-2, atol=1e-2)
    router.eval()
    before = router.query_norm.mean.clone()
    expected = (queries - before) * (router.query_norm.variance.float() + 1e-5).rsqrt()
    torch.testing.assert_close(router._normalize(queries, None), expected, rtol=1e-4, atol=1e-4)
    router.route(hidden)
    assert torch.equal(router.query_norm.mean, before) and not router.query_norm.statistics.any()


def test_a_step_that_is_attempted_again_or_not_finite_leaves_no_trace(megatron_cpu, caplog):
    router, once = (make_router(megatron_cpu, moe_router_type="product_key") for _ in range(2))
    router.route(batch(7))
    discard_statistics(router)
    for module in (router, once):
        module.route(batch(0))
        update_codebooks(module)
    infinite = batch(1)
    infinite[3, 2] = torch.inf
    router.route(infinite)
    assert update_codebooks(router) == 1 and "running norm stays" in caplog.text
    for (name, found), (_, expected) in zip(router.named_buffers(), once.named_buffers(), strict=True):
        if "query_norm" in name:
            assert torch.equal(found, expected), name
    assert router.route(batch(2)).probs.isfinite().all()


@pytest.mark.parametrize("dispatch", ("stock", "compact"))
@pytest.mark.parametrize("settings", ("one-head", "two-heads", "on-tokens", "on-tokens-layernorm", "no-norm"))
def test_gradients_with_padding_are_those_of_the_tokens_alone(megatron_cpu, settings, dispatch):
    hidden, padding = torch.randn(12, 1, HIDDEN), torch.arange(12).unsqueeze(1) >= 8
    found = []
    for tokens, mask in ((hidden[:8], None), (hidden, padding)):
        router = make_router(
            megatron_cpu, moe_router_type="product_key", moe_dispatch=dispatch, **SETTINGS[settings]
        )  # fmt: skip
        probs = router(tokens, mask)[0][:8]
        (probs * torch.arange(probs.numel()).view_as(probs).cos()).sum().backward()
        found.append([parameter.grad for parameter in router.parameters()])
    for actual, expected in zip(found[1], found[0], strict=True):
        assert expected.any()
        torch.testing.assert_close(actual, expected)


def test_padding_may_hold_anything(megatron_cpu):
    found = []
    for filling in (0.0, torch.nan):
        router, hidden = make_router(megatron_cpu, moe_router_type="product_key"), batch(0).unsqueeze(1)
        hidden[12:] = filling
        found.append(router.route(hidden, torch.arange(20).view(20, 1) >= 12).probs[:12])
        update_codebooks(router)
        assert router.query_norm.mean.isfinite().all() and router.query_norm.mean.any()
    assert torch.equal(*found)


# E, K, H, fields -> keys, heads, per head, size of a sub-key, norm
SIZES = {
    "65536": ((65536, 64, 512, {}), ((256, 256), 8, 8, 128, "batchnorm")),
    "no-square": ((8192, 48, 64, {}), ((64, 128), 8, 6, 32, "batchnorm")),
    "few": ((16, 2, 32, {}), ((4, 4), 1, 2, 16, "batchnorm")),
    "odd": ((64, 7, 32, {}), ((8, 8), 1, 7, 16, "batchnorm")),
    "two-of-each": ((64, 6, 32, {}), ((8, 8), 3, 2, 16, "batchnorm")),
    "on-tokens": (
        (64, 4, 32, dict(moe_product_key_on_tokens=True, moe_product_key_heads=1)), ((8, 8), 1, 4, 32, "batchnorm"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("given, expected", SIZES.values(), ids=SIZES)
def test_automatic_sizes(given, expected):
    num_experts, topk, hidden_size, fields = given
    config = make_config(
        moe_router_type="product_key", num_moe_experts=num_experts, moe_router_topk=topk, hidden_size=hidden_size,
        **fields,
    )  # fmt: skip
    sizes = resolve_product_keys(config)
    found = (sizes.num_keys, sizes.num_heads, sizes.topk_per_head, sizes.key_dim, sizes.query_norm)
    assert found == expected


def test_balancing_loss_sees_every_head_as_a_routing(megatron_cpu):
    """Against Megatron's formula on dense per-head scores, where every product is a candidate."""
    from air_moe_megatron.compat import destroy_moe_metrics_tracker, get_moe_metrics_tracker

    destroy_moe_metrics_tracker()
    router = make_router(
        megatron_cpu, moe_router_type="product_key", num_moe_experts=9, moe_router_topk=6, moe_product_key_heads=2,
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.5,
    )  # fmt: skip
    hidden = torch.randn(30, HIDDEN)
    router.route(hidden)
    logged = get_moe_metrics_tracker().metrics["load_balancing_loss"].values[0]
    queries = naive_queries(router, hidden)
    counts, scores = torch.zeros(9), torch.zeros(9)
    for head in range(2):
        parts = [queries[:, head, i] @ keys[0].t() for i, keys in enumerate((router.keys1, router.keys2))]
        logits = (parts[0][:, :, None] + parts[1][:, None, :]).flatten(1)
        scores += logits.softmax(dim=1).sum(dim=0) / 2
        counts += torch.zeros_like(logits).scatter(1, logits.topk(3, dim=1).indices, 1.0).sum(dim=0)
    torch.testing.assert_close(logged, 9 * (counts / (30 * 6) * scores / 30).sum().detach())
