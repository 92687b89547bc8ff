"""Boundary cases of every router: large finite tokens, sizes around powers of two, ties, repeated experts."""

import types

import pytest
import torch
import torch.utils.checkpoint

from air_moe_megatron.learned.running_norm import RunningNorm
from air_moe_megatron.sync import update_codebooks
from tests.builders import HIDDEN, make_config, make_layer, make_router, naive_layer, tell_ids
from tests.unit import test_hierarchical, test_product_key

pytestmark = pytest.mark.usefixtures("megatron_cpu")

LISTS = dict(moe_air_num_clusters=8, moe_air_shortlist_size=12)

# Name -> fields of a router; every type, and whatever scores tokens in a way of its own.
ROUTES = {
    "exact": dict(moe_router_type="topk"),
    "air": dict(moe_router_type="air", **LISTS),
    "air-two-probes": dict(moe_router_type="air", moe_air_num_probes=2, **LISTS),
    "air-pre-softmax": dict(moe_router_type="air", moe_router_pre_softmax=True, **LISTS),
    "air-experts": dict(moe_router_type="air", moe_air_codebook_source="experts", moe_air_num_probes=2),
    "product-keys": dict(moe_router_type="product_key"),
    "product-keys-one-head": dict(moe_router_type="product_key", moe_product_key_heads=1),
    "product-keys-pre-softmax": dict(moe_router_type="product_key", moe_router_pre_softmax=True),
    "product-keys-layernorm": dict(moe_router_type="product_key", moe_product_key_query_norm="layernorm"),
    "product-keys-no-norm": dict(
        moe_router_type="product_key", moe_product_key_query_norm="none", moe_router_pre_softmax=True
    ),
    "product-keys-on-tokens": dict(moe_router_type="product_key", moe_product_key_on_tokens=True),
    "omnimoe": dict(
        moe_router_type="product_key", moe_product_key_heads=1, moe_product_key_on_tokens=True,
        moe_router_pre_softmax=True,
    ),
    "hierarchical": dict(moe_router_type="hierarchical"),
    "hierarchical-pre-softmax": dict(moe_router_type="hierarchical", moe_router_pre_softmax=True),
    "hash": dict(moe_router_type="hash"),
    "vq": dict(moe_router_type="vq"),
}  # fmt: skip
SCORING = {name: fields for name, fields in ROUTES.items() if name != "hash"}  # hash looks at no token


# Large finite tokens.


def in_fp64(router):
    """The parameters of a router in fp64, with what naive references read beside them."""
    names = ("config", "sizes", "topk", "normalizes_scores", "codebook", "index", "bias", "group_bias")
    beside = {name: getattr(router, name) for name in names if hasattr(router, name)}
    parameters = {name: parameter.detach().double() for name, parameter in router.named_parameters()}
    return types.SimpleNamespace(**{**beside, **{name: p.requires_grad_() for name, p in parameters.items()}})


def probs_of(scores, logits, config):
    """Of the best scores, among all."""
    if config.moe_router_pre_softmax:
        return (scores - logits.logsumexp(dim=1, keepdim=True)).exp()
    return scores.softmax(dim=1)


def naive_routes(router, hidden):
    """[T, K] ids and probs of fp64 tokens, from all scores."""
    config = router.config
    if config.moe_router_type == "product_key":
        return test_product_key.naive_routes(router, hidden)
    if config.moe_router_type == "hierarchical":
        ids, probs = test_hierarchical.naive_routes(router, hidden)
        return torch.tensor(ids), probs
    logits = hidden @ router.weight.t()
    if config.moe_router_type == "vq":
        half = router.topk // 2
        codes = (hidden @ router.codes.t() - 0.5 * router.codes.square().sum(dim=1)).topk(half, dim=1).indices
        scores, ids = logits.topk(half, dim=1)
        gate = (hidden @ router.branch_weight.t()).softmax(dim=1)
        probs = (gate[:, :1].expand(-1, half) / half, gate[:, 1:] * scores.softmax(dim=1))
        return torch.cat((codes, ids), dim=1), torch.cat(probs, dim=1)
    if config.moe_router_type == "air":
        lists = router.index.shortlist.long()
        nearest = (hidden.detach() @ router.codebook.codewords.double().t()).topk(router.sizes.num_probes, dim=1)
        listed = torch.zeros(len(hidden), config.num_moe_experts + 1, dtype=torch.bool)
        for token, codewords in enumerate(nearest.indices.tolist()):
            listed[token, lists[codewords].flatten()] = True  # -1, for no expert, is the last column
        logits = logits.masked_fill(~listed[:, :-1], float("-inf"))
        if config.moe_router_pre_softmax:  # over the best M
            least = logits.topk(router.sizes.num_candidates, dim=1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
    scores, ids = logits.topk(router.topk, dim=1)
    return ids, probs_of(scores, logits, config)


def head_scores(router, hidden):
    """[T, R, E] sums of batch-normalized scores of sub-keys on tokens."""
    first, second = (
        torch.stack([test_product_key.naive_batch_norm(hidden @ own.t()) for own in keys], dim=1)
        for keys in (router.keys1, router.keys2)
    )
    return (first.unsqueeze(3) + second.unsqueeze(2)).flatten(2)


def sorted_routes(ids, probs):
    """By expert, without slots whose prob is zero: which expert stands there says nothing."""
    rows = zip(ids.tolist(), probs.tolist(), strict=True)
    return [sorted((e, p) for e, p in zip(*row, strict=True) if p > 0) for row in rows]


@pytest.mark.parametrize("length", (1e20, 1e30, 1e36), ids=str)
@pytest.mark.parametrize("fields", SCORING.values(), ids=SCORING)
def test_a_large_finite_token_is_routed_as_in_fp64(megatron_cpu, fields, length):
    """And the tokens beside it, whatever normalizes them together; and all gradients are finite."""
    router = make_router(megatron_cpu, **fields)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(20, HIDDEN, generator=generator)
    hidden[3] *= length
    by_expert = torch.randn(router.num_experts, generator=generator)
    leaves = [hidden.requires_grad_(), *router.parameters()]
    routes = router.route(hidden)
    assert routes.probs.isfinite().all()
    loss = (routes.probs * by_expert[routes.topk_ids.long()]).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    assert all(grad.isfinite().all() for grad in grads)

    wide = in_fp64(router)
    wide_hidden = hidden.detach().double().requires_grad_()
    ids, probs = naive_routes(wide, wide_hidden)
    if getattr(router, "normalizes_scores", False):
        # Batch-normalized scores of the others are all 1 / sqrt(19) or its negative: ties, in fp64 too.
        found, expected = (p.detach().sort(dim=1).values.double() for p in (routes.probs, probs))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        scores = head_scores(wide, wide_hidden).detach()  # [T, R, E]
        found, expected = (
            scores.gather(2, chosen.long().view(20, router.sizes.num_heads, -1)).sort(dim=2).values
            for chosen in (routes.topk_ids, ids)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        return
    found, expected = sorted_routes(routes.topk_ids, routes.probs), sorted_routes(ids, probs)
    for actual, wanted in zip(found, expected, strict=True):
        assert [e for e, _ in actual] == [e for e, _ in wanted]
        assert [p for _, p in actual] == pytest.approx([p for _, p in wanted], rel=1e-4, abs=1e-6)
    if fields["moe_router_type"] == "vq":
        return  # its loss, of the order of the token's square, adds to the gradients
    wide_leaves = [wide_hidden, *(getattr(wide, name) for name, _ in router.named_parameters())]
    wide_loss = (probs * by_expert.double()[ids]).sum()
    wide_grads = torch.autograd.grad(wide_loss, wide_leaves, allow_unused=True, materialize_grads=True)
    for grad, wanted in zip(grads, wide_grads, strict=True):
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-4)


@pytest.mark.parametrize("length", (1e10, 1e20, 1e30), ids=str)
def test_a_running_norm_of_large_finite_tokens_is_that_of_fp64(length):
    norm, generator = RunningNorm(HIDDEN), torch.Generator().manual_seed(1)
    hidden = torch.randn(40, HIDDEN, generator=generator)
    hidden[7] *= length
    keep = torch.arange(40) < 30
    for part in (slice(0, 10), slice(10, 40)):
        norm.accumulate(hidden[part], ~keep[part])
    assert norm.statistics.isfinite().all()
    norm.apply_update(norm.statistics, True)
    wide = hidden[:30].double()
    mean, variance = wide.mean(dim=0), wide.var(dim=0, unbiased=False)
    torch.testing.assert_close(norm.mean.double(), mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.variance, variance, rtol=1e-5, atol=0)
    expected = (hidden.double() - mean) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(norm(hidden).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("router_type", ("topk", "air", "hierarchical", "vq", "product_key"))
def test_an_update_with_a_large_finite_token_is_applied(megatron_cpu, router_type):
    """The running norm, for product keys that of the queries: learned in training, used in evaluation."""
    norm = {} if router_type == "product_key" else dict(moe_router_input_norm="running")
    router = make_router(megatron_cpu, moe_router_type=router_type, **norm)
    hidden = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(1))
    hidden[3] *= 1e30
    router.route(hidden)
    learned = router.query_norm if router_type == "product_key" else router.input_norm
    assert update_codebooks(router) == 0  # none was dropped
    assert learned.num_updates == 1 and learned.mean.isfinite().all() and learned.variance.isfinite().all()
    router.eval()
    routes = router.route(hidden)
    assert routes.probs.isfinite().all() and (routes.probs.sum(dim=1) > 0.5).all()
    features = hidden @ router.query_weight.t() if router_type == "product_key" else hidden
    normal = learned(features)
    assert normal.isfinite().all() and (normal.abs() <= 20**0.5 + 1e-3).all()


@pytest.mark.parametrize("length", (1e18, 1e19, 1e30), ids=str)
def test_the_vq_loss_of_a_large_finite_token(megatron_cpu, length):
    """Right while fp32 holds it, infinite in the log beyond; its gradients are right and finite either way."""
    from air_moe_megatron.compat import destroy_moe_metrics_tracker, get_moe_metrics_tracker

    destroy_moe_metrics_tracker()
    router = make_router(megatron_cpu, moe_router_type="vq", moe_vq_loss_coeff=0.7, moe_vq_commitment=0.3)
    hidden = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(1))
    hidden[3] *= length
    routes = router.route(hidden.requires_grad_())
    grads = torch.autograd.grad(0.0 * routes.probs.sum(), [hidden, router.codes])
    wide, wide_hidden = in_fp64(router), hidden.detach().double().requires_grad_()
    codes = wide.codes[routes.topk_ids[:, : router.topk // 2].long()]
    codebook = (codes - wide_hidden.detach().unsqueeze(1)).square().mean()
    commitment = (codes.detach() - wide_hidden.unsqueeze(1)).square().mean()
    logged = get_moe_metrics_tracker().metrics["vq_loss"].values[0]
    torch.testing.assert_close(logged, (codebook + 0.3 * commitment).detach().float())
    expected = torch.autograd.grad(0.7 * (codebook + 0.3 * commitment), [wide_hidden, wide.codes])
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted.float(), rtol=1e-4, atol=1e-6)


# Numbers of experts around powers of two.

SIZES = (255, 256, 257, 32_767, 32_768, 65_537)
PRIMES = (257, 65_537)
FULL = {
    "exact": dict(moe_router_type="topk"),
    "air-one-list": dict(moe_router_type="air", moe_air_num_clusters=1),
    "air-full-lists": dict(moe_router_type="air", moe_air_num_clusters=3, moe_air_num_probes=2),
    "air-experts": dict(moe_router_type="air", moe_air_codebook_source="experts", moe_air_num_clusters=3,
                        moe_air_num_probes=3),
}  # fmt: skip


@pytest.mark.parametrize("num_experts", SIZES)
@pytest.mark.parametrize("fields", FULL.values(), ids=FULL)
def test_full_lists_of_any_size_equal_megatrons_router(megatron_cpu, num_experts, fields):
    from megatron.core.transformer.moe.router import TopKRouter

    if fields.get("moe_air_codebook_source") != "experts" and fields["moe_router_type"] == "air":
        fields = fields | dict(moe_air_shortlist_size=num_experts)
    router = make_router(megatron_cpu, num_moe_experts=num_experts, **fields)
    config = make_config(num_moe_experts=num_experts, moe_router_type="topk")
    megatrons = TopKRouter(config, megatron_cpu)
    megatrons.set_layer_number(1)
    with torch.no_grad():
        megatrons.weight.copy_(router.weight)
    hidden = torch.randn(9, 1, HIDDEN, generator=torch.Generator().manual_seed(2))
    probs, routing_map = megatrons(hidden)
    routes = router.route(hidden)
    for token in range(9):
        wanted = routing_map[token].nonzero().flatten()
        assert routes.topk_ids[token].sort().values.tolist() == wanted.tolist()
        order = routes.topk_ids[token].argsort()
        torch.testing.assert_close(routes.probs[token][order], probs[token][wanted])


@pytest.mark.parametrize("num_experts", SIZES)
@pytest.mark.parametrize("name", ("air", "air-experts", "product-keys", "product-keys-on-tokens", "hierarchical", "vq"))
def test_routes_at_any_number_of_experts_equal_naive_ones(megatron_cpu, num_experts, name):
    fields = {key: value for key, value in ROUTES[name].items() if key not in LISTS}  # automatic sizes
    if fields["moe_router_type"] == "product_key" and num_experts in PRIMES:
        message = rf"num_moe_experts \({num_experts}\) must be a product of two numbers above 1, the sub-keys"
        with pytest.raises(ValueError, match=message):
            make_router(megatron_cpu, num_moe_experts=num_experts, **fields)
        return
    router = make_router(megatron_cpu, num_moe_experts=num_experts, **fields)
    hidden = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(2))
    routes = router.route(hidden)
    ids, probs = naive_routes(in_fp64(router), hidden.double())
    assert routes.topk_ids.min() >= 0 and routes.topk_ids.max() < num_experts
    found, expected = sorted_routes(routes.topk_ids, routes.probs), sorted_routes(ids, probs)
    for actual, wanted in zip(found, expected, strict=True):
        assert [e for e, _ in actual] == [e for e, _ in wanted]
        assert [p for _, p in actual] == pytest.approx([p for _, p in wanted], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("num_experts", SIZES)
def test_hash_tables_of_any_number_of_experts(megatron_cpu, num_experts):
    vocabulary = num_experts // 2 + 1
    router = make_router(
        megatron_cpu, moe_router_type="hash", num_moe_experts=num_experts, moe_hash_vocab_size=vocabulary
    )
    tell_ids(router, torch.arange(vocabulary).view(1, vocabulary))
    ids = router.route(torch.randn(vocabulary, 1, HIDDEN)).topk_ids.long()
    assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()  # K distinct experts
    counts = torch.bincount(ids.flatten(), minlength=num_experts)
    assert len(counts) == num_experts and counts.max() - counts.min() <= 1


@pytest.mark.parametrize("num_experts", SIZES)
@pytest.mark.parametrize("name", ("exact", "air", "product-keys", "hierarchical", "hash", "vq"))
def test_layers_of_any_number_of_experts(megatron_cpu, num_experts, name):
    """Both paths reach the last expert, and give what the routes say."""
    if name == "product-keys" and num_experts in PRIMES:
        num_experts -= 1  # refused as it is
    fields = {key: value for key, value in ROUTES[name].items() if key not in LISTS}
    hidden = torch.randn(5, 1, HIDDEN, generator=torch.Generator().manual_seed(2))
    token_ids = torch.arange(5).view(1, 5)
    for dispatch in (dict(moe_dispatch="compact"), dict(moe_dispatch="stock", moe_token_dispatcher_type="allgather")):
        layer = make_layer(megatron_cpu, num_moe_experts=num_experts, **fields, **dispatch)
        layer.eval()
        tell_ids(layer.router, token_ids)
        if name == "exact":  # the last expert is the best of every token
            with torch.no_grad():
                layer.router.weight[-1] = 100.0 * torch.linalg.pinv(hidden[:, 0]).sum(dim=1)
        with torch.no_grad():
            routes = layer.router.route(hidden)
            out, _ = layer(hidden)
        if name == "exact":
            assert (routes.topk_ids == num_experts - 1).any(dim=1).all()
        torch.testing.assert_close(out[:, 0], naive_layer(layer, hidden[:, 0], routes).detach(), rtol=1e-4, atol=1e-5)


# Ties.

LOSSES = dict(
    moe_router_load_balancing_type=["aux_loss", "seq_aux_loss"], moe_aux_loss_coeff=[0.01, 0.01], moe_z_loss_coeff=1e-3
)
TIES = ROUTES | {
    "exact-losses": ROUTES["exact"] | LOSSES,
    "exact-bias": dict(
        moe_router_type="topk", moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True
    ),
    "air-aux-loss": ROUTES["air"] | dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01),
    "air-losses": ROUTES["air"] | LOSSES,
    "air-two-probes-losses": ROUTES["air-two-probes"] | LOSSES,
    "air-candidates": ROUTES["air-two-probes"] | LOSSES | dict(moe_air_num_candidates=8),
    "air-candidates-one-probe": ROUTES["air"] | LOSSES | dict(moe_air_num_candidates=8),
    "air-bias": ROUTES["air"] | dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
    "product-keys-losses": ROUTES["product-keys"] | LOSSES,
    "hierarchical-losses": ROUTES["hierarchical"] | LOSSES,
}  # fmt: skip


def recompute(how, layer, hidden):
    if how == "megatron":
        from megatron.core import tensor_parallel

        return tensor_parallel.checkpoint(lambda x: layer(x)[0], False, hidden)
    return torch.utils.checkpoint.checkpoint(lambda x: layer(x)[0], hidden, use_reentrant=True)


@pytest.mark.parametrize("how", ("megatron", "torch"))
@pytest.mark.parametrize("tokens", ("equal", "zero"))
@pytest.mark.parametrize("fields", TIES.values(), ids=TIES)
def test_ties_fall_alike_in_a_recomputed_forward(megatron_cpu, fields, tokens, how):
    """Equal tokens get equal routes; zero tokens tie all experts. Both passes see the same ones, and K distinct."""
    dispatches = (dict(moe_dispatch="compact"), dict(moe_dispatch="stock", moe_token_dispatcher_type="alltoall"))
    for dispatch in dispatches:
        layer = make_layer(megatron_cpu, **fields, **dispatch).train()
        router, seen = layer.router, []
        original = router._route
        router._route = lambda *args, seen=seen, original=original: seen.append(original(*args)) or seen[-1]
        tell_ids(router, torch.full((1, 24), 3))
        token = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(4)) * (tokens == "equal")
        hidden = token.expand(24, 1, HIDDEN).clone().requires_grad_()
        recompute(how, layer, hidden).square().sum().backward()
        first, second = seen
        assert not first.probs.requires_grad
        # By expert within each head or branch: Megatron sorts the K by score only where gradients are on.
        parts = {"product_key": getattr(getattr(router, "sizes", None), "num_heads", 1), "vq": 2}
        topk = router.topk // parts.get(fields["moe_router_type"], 1)
        (ids, order), (ids_again, order_again) = (routes.topk_ids.view(-1, topk).sort(dim=1) for routes in seen)
        assert torch.equal(ids, ids_again)
        assert (ids >= 0).all() and (ids.diff(dim=1) > 0).all()
        probs, probs_again = first.probs.view(-1, topk).gather(1, order), second.probs.view(-1, topk)
        torch.testing.assert_close(probs, probs_again.gather(1, order_again))
        assert hidden.grad.isfinite().all()


# Repeated experts.

REPEATING = {
    "two-heads": dict(moe_router_type="product_key", moe_product_key_heads=2),
    "two-heads-losses": dict(moe_router_type="product_key", moe_product_key_heads=2, **LOSSES),
    "four-heads": dict(moe_router_type="product_key", moe_product_key_heads=4, moe_router_topk=8),
    "two-heads-on-tokens": dict(
        moe_router_type="product_key", moe_product_key_heads=2, moe_product_key_on_tokens=True
    ),
    "vq": dict(moe_router_type="vq"),
}  # fmt: skip


def repeat_experts(router):
    """Make heads, or both branches, find the same experts."""
    with torch.no_grad():
        if router.config.moe_router_type == "vq":
            router.codes.copy_(torch.nn.functional.normalize(router.weight, dim=1))
            router.weight.copy_(router.codes)
        elif router.on_tokens:
            for keys in (router.keys1, router.keys2):
                keys[1] = keys[0]
        else:
            heads = router.query_weight.view(router.sizes.num_heads, -1, HIDDEN)
            heads[1:] = heads[:1]


@pytest.mark.parametrize("dispatcher", ("alltoall", "allgather"))
@pytest.mark.parametrize("fields", REPEATING.values(), ids=REPEATING)
def test_repeated_experts_count_as_often_on_both_paths(megatron_cpu, fields, dispatcher):
    hidden = torch.randn(15, 2, HIDDEN, generator=torch.Generator().manual_seed(5))
    found = []
    for dispatch in (dict(), dict(moe_dispatch="stock", moe_token_dispatcher_type=dispatcher)):
        layer = make_layer(megatron_cpu, **fields, **dispatch)
        repeat_experts(layer.router)
        tokens = hidden.clone().requires_grad_()
        out, _ = layer(tokens)
        names = [name for name, _ in layer.named_parameters()]
        grads = torch.autograd.grad(out.square().sum(), [tokens, *layer.parameters()])
        found.append(dict(zip(["out", "hidden", *names], [out, *grads], strict=True)))
    layer = make_layer(megatron_cpu, **fields)
    repeat_experts(layer.router)
    routes = layer.router.route(hidden)
    assert (routes.topk_ids.sort(dim=1).values.diff(dim=1) == 0).any(dim=1).all()  # every token has one
    expected = naive_layer(layer, hidden.view(30, HIDDEN), routes).view_as(hidden)
    torch.testing.assert_close(found[0]["out"], expected, rtol=1e-4, atol=1e-5)
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-4, atol=1e-4)
