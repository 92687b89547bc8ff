"""AIRRouter with short lists: against a reference that loops over the tokens, and what must never happen."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.short_lists import CLOSE, EXPERTS, HIDDEN, SCORES, SOURCES, TOPK, make_hidden, make_router

pytestmark = pytest.mark.usefixtures("megatron_cpu")


def reference(router, hidden):
    """Routes of each token, one by one: the union of the probed lists, then Megatron's score function in words.

    Returns a list of (expert ids best first, their probs).
    """
    config, codebook, lists = router.config, router.codebook, router.index.shortlist.tolist()
    allowed = [c for c, row in enumerate(lists) if row[0] >= 0]
    routes = []
    for token in hidden:
        cosine = {c: (token @ codebook.codewords[c]).item() for c in allowed}
        probes = sorted(allowed, key=cosine.__getitem__, reverse=True)[: router.sizes.num_probes]
        candidates = sorted({e for c in probes for e in lists[c] if e >= 0})
        logits = [(token @ router.weight[e]).item() for e in candidates]
        if router.bias is not None:
            logits = [z + router.bias[e].item() for z, e in zip(logits, candidates, strict=True)]
        if config.moe_router_pre_softmax:  # over the best M
            kept = sorted(range(len(logits)), key=logits.__getitem__)[-router.sizes.num_candidates :]
            candidates, logits = [candidates[i] for i in kept], [logits[i] for i in kept]
        if config.moe_router_score_function == "sigmoid":
            scores = [1.0 / (1.0 + math.exp(-z)) for z in logits]
        elif config.moe_router_pre_softmax:
            total = sum(math.exp(z) for z in logits)
            scores = [math.exp(z) / total for z in logits]
        else:
            scores = logits
        rank = list(scores)
        if router.expert_bias is not None:
            rank = [s + router.expert_bias[e].item() for s, e in zip(scores, candidates, strict=True)]
        best = sorted(range(len(candidates)), key=rank.__getitem__, reverse=True)[: config.moe_router_topk]
        probs = [scores[i] for i in best]
        if config.moe_router_score_function == "sigmoid":
            probs = [p / sum(probs) for p in probs]
        elif not config.moe_router_pre_softmax:
            probs = [math.exp(p) / sum(math.exp(q) for q in probs) for p in probs]
        factor = config.moe_router_topk_scaling_factor or 1.0
        routes.append(([candidates[i] for i in best], [factor * p for p in probs]))
    return routes


def assert_equals_reference(router, hidden):
    """Route, compare with the reference, and return the number of slots that stayed empty."""
    routes = router.route(hidden)
    expected = reference(router, hidden)
    assert routes.topk_ids.dtype == torch.int32
    assert routes.topk_ids.shape == routes.probs.shape == (hidden.shape[0], router.topk)
    empty = 0
    for ids, probs, (wanted_ids, wanted_probs) in zip(
        routes.topk_ids.tolist(), routes.probs.tolist(), expected, strict=True
    ):
        missing = router.topk - len(wanted_ids)
        found = sorted(zip(ids, probs, strict=True))  # in no order
        wanted = sorted([*zip(wanted_ids, wanted_probs, strict=True), *[(-1, 0.0)] * missing])
        assert [expert for expert, _ in found] == [expert for expert, _ in wanted]
        assert [prob for _, prob in found] == pytest.approx([prob for _, prob in wanted], rel=1e-4, abs=1e-6)
        empty += missing
    return empty


@pytest.mark.parametrize("num_probes", (1, 2, 3, 4), ids=lambda n: f"{n}-probes")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_route_equals_a_loop_over_tokens(megatron_cpu, scores, source, num_probes):
    router = make_router(megatron_cpu, moe_air_codebook_source=source, moe_air_num_probes=num_probes, **scores)
    empty = assert_equals_reference(router, make_hidden(60))
    if source == "tokens":
        assert empty == 0


@pytest.mark.parametrize("source", SOURCES)
def test_route_equals_a_loop_over_tokens_with_a_linear_bias(megatron_cpu, source):
    router = make_router(megatron_cpu, moe_air_codebook_source=source, moe_air_num_probes=2, add_bias_linear=True)
    assert_equals_reference(router, make_hidden(60))


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_slots_stay_empty_where_candidates_run_out(megatron_cpu, scores):
    """More experts per token than many an inverted list holds: id -1 and prob 0, never another expert."""
    router = make_router(
        megatron_cpu,
        moe_air_codebook_source="experts",
        moe_air_num_clusters=6,
        moe_air_shortlist_size=9,
        moe_router_topk=6,
        **scores,
    )
    hidden = make_hidden(60)
    assert assert_equals_reference(router, hidden) > 0
    probs, routing_map = router(hidden.unsqueeze(1))
    expected = reference(router, hidden)
    assert (routing_map.sum(dim=1) == 6).all()  # Megatron's all-to-all counts on K experts
    for row, chosen, (ids, _) in zip(probs, routing_map, expected, strict=True):
        assert set(row.nonzero().flatten().tolist()) <= set(ids) <= set(chosen.nonzero().flatten().tolist())


def test_an_expert_in_two_probed_lists_is_one_candidate(megatron_cpu):
    router = make_router(megatron_cpu, moe_air_num_probes=2, moe_router_pre_softmax=True, moe_air_refresh_interval=1000)
    router.route(make_hidden(1))
    router.index.shortlist[:] = torch.arange(9)  # every list the same: 18 slots, 9 experts
    assert_equals_reference(router, make_hidden(30))
    routes = router.route(make_hidden(30))
    assert all(len(set(ids)) == TOPK for ids in routes.topk_ids.tolist())
    # The softmax runs over 9 candidates, not 18: all of its mass is at hand where K = 9.
    everyone = make_router(
        megatron_cpu, moe_air_num_probes=2, moe_router_pre_softmax=True, moe_router_topk=9,
        moe_air_shortlist_size=10, learned=0,
    )  # fmt: skip
    everyone.route(make_hidden(1))
    everyone.index.shortlist[:] = torch.tensor([*range(9), -1])
    torch.testing.assert_close(everyone.route(make_hidden(30)).probs.sum(dim=1), torch.ones(30))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("num_probes", (1, 3), ids=lambda n: f"{n}-probes")
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_dense_forward_agrees_with_route(megatron_cpu, scores, source, num_probes):
    router = make_router(megatron_cpu, moe_air_codebook_source=source, moe_air_num_probes=num_probes, **scores)
    hidden = make_hidden(42)
    routes = router.route(hidden)
    probs, routing_map = router(hidden.view(14, 3, HIDDEN))
    expected_probs, expected_map = torch.zeros(42, EXPERTS), torch.zeros(42, EXPERTS, dtype=torch.bool)
    for token, (ids, values) in enumerate(zip(routes.topk_ids.tolist(), routes.probs.tolist(), strict=True)):
        for expert, value in zip(ids, values, strict=True):
            if expert >= 0:
                expected_probs[token, expert], expected_map[token, expert] = value, True
    torch.testing.assert_close(probs, expected_probs, rtol=0, atol=0)
    # Where candidates ran out, others are named with a prob of zero: Megatron's all-to-all counts on K experts.
    assert routing_map.dtype == torch.bool and (routing_map.sum(dim=1) == router.topk).all()
    assert (routing_map | ~expected_map).all()


@pytest.mark.parametrize("shape", ((5, 3), (15,)), ids=("S-B-H", "T-H"))
def test_route_takes_sequences_and_tokens(megatron_cpu, shape):
    router = make_router(megatron_cpu)
    hidden = make_hidden(15)
    mask = torch.arange(15) % 4 == 0
    routes = router.route(hidden.view(*shape, HIDDEN), mask.view(shape))
    assert torch.equal(routes.topk_ids, router.route(hidden, mask).topk_ids)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("num_probes", (1, 2), ids=lambda n: f"{n}-probes")
@pytest.mark.parametrize("num_tokens", (0, 1))
def test_no_token_and_one_token(megatron_cpu, source, num_probes, num_tokens):
    router = make_router(megatron_cpu, moe_air_codebook_source=source, moe_air_num_probes=num_probes)
    hidden = make_hidden(num_tokens).requires_grad_()
    routes = router.route(hidden)
    assert routes.topk_ids.shape == routes.probs.shape == (num_tokens, TOPK)
    routes.probs.square().sum().backward()
    assert hidden.grad.shape == hidden.shape and router.weight.grad.isfinite().all()


def test_a_repeated_candidate_never_displaces_an_expert_whose_score_underflows(megatron_cpu):
    """All probability goes to expert 39; the other scores are zero, as are those of the repeated candidates."""
    router = make_router(
        megatron_cpu, learned=0, moe_air_num_probes=2, moe_router_pre_softmax=True, moe_air_refresh_interval=1000
    )
    hidden = make_hidden(1)
    router.route(hidden)
    router.index.shortlist[:] = torch.arange(31, 40)
    with torch.no_grad():
        router.weight[39] = hidden[0] * 1000
    probs, routing_map = router(hidden.unsqueeze(1))
    assert probs[0, 39] == 1 and probs.sum() == 1 and routing_map[0, 39]
    assert set(router.route(hidden).topk_ids[0].tolist()) <= {-1, *range(31, 40)}


# Gradients.


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("num_probes", (1, 3), ids=lambda n: f"{n}-probes")
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_gradients_are_those_of_the_chosen_scores(megatron_cpu, scores, source, num_probes):
    """As autograd through the dense logits of the same candidates, all other logits at minus infinity."""
    router = make_router(megatron_cpu, moe_air_codebook_source=source, moe_air_num_probes=num_probes, **scores)
    hidden = make_hidden(30).requires_grad_()
    routes = router.route(hidden)
    present = routes.topk_ids >= 0
    grad_probs = torch.randn(routes.probs.shape, generator=torch.Generator().manual_seed(1))
    actual = torch.autograd.grad(routes.probs, (hidden, router.weight), grad_probs)

    lists = router.index.shortlist[routes.probed].long()  # [T, P, L]
    candidate = torch.zeros(30, EXPERTS + 1, dtype=torch.bool)
    candidate[torch.arange(30).unsqueeze(1), torch.where(lists < 0, EXPERTS, lists).flatten(1)] = True
    logits = (hidden @ router.weight.t()).masked_fill(~candidate[:, :EXPERTS], float("-inf"))
    if router.config.moe_router_pre_softmax:  # over the best M
        least = logits.detach().topk(min(router.sizes.num_candidates, EXPERTS), dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    ids = routes.topk_ids.clamp(min=0).long()
    if router.score_function == "sigmoid":
        chosen = torch.where(present, logits.sigmoid().gather(1, ids), 0.0)
        probs = chosen / chosen.sum(dim=1, keepdim=True)
    elif router.config.moe_router_pre_softmax:
        probs = logits.softmax(dim=1).gather(1, ids)
    else:
        probs = logits.gather(1, ids).masked_fill(~present, float("-inf")).softmax(dim=1)
    probs = torch.where(present, probs, 0.0) * (router.config.moe_router_topk_scaling_factor or 1.0)
    torch.testing.assert_close(routes.probs, probs, **CLOSE)
    expected = torch.autograd.grad(probs, (hidden, router.weight), grad_probs)
    for name, a, b in zip(("hidden", "weight"), actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("source", SOURCES)
def test_no_gradient_reaches_the_codebook_and_only_listed_experts_learn(megatron_cpu, source):
    router = make_router(
        megatron_cpu,
        moe_air_codebook_source=source,
        moe_air_num_probes=2,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.1,
        moe_z_loss_coeff=0.1,
    )
    hidden = make_hidden(3).requires_grad_()
    routes = router.route(hidden)
    routes.probs.square().sum().backward()
    assert not any(buffer.requires_grad for buffer in router.buffers())
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    listed = torch.zeros(EXPERTS + 1, dtype=torch.bool)
    listed[router.index.shortlist[routes.probed].long()] = True  # -1 marks the last, which is cut off
    assert router.weight.grad[~listed[:EXPERTS]].count_nonzero() == 0
    assert (router.weight.grad[listed[:EXPERTS]].abs().sum(dim=1) > 0).all()
    assert (hidden.grad.abs().sum(dim=1) > 0).all()


# Auxiliary losses over the shortlist.


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("num_probes", (1, 3), ids=lambda n: f"{n}-probes")
@pytest.mark.parametrize("padding", (False, True), ids=("all-tokens", "padding-mask"))
def test_losses_are_megatrons_with_unscored_experts_at_zero(megatron_cpu, padding, num_probes, source):
    """The dense losses of TopKRouter on logits of minus infinity outside the shortlist."""
    from megatron.core.transformer.moe.router import TopKRouter

    from air_moe_megatron.compat import destroy_moe_metrics_tracker, get_moe_metrics_tracker

    settings = dict(
        moe_air_codebook_source=source,
        moe_air_num_probes=num_probes,
        moe_air_shortlist_size=12,
        moe_air_num_candidates=12 * num_probes,
        moe_router_topk=2,
        moe_router_load_balancing_type=["aux_loss", "seq_aux_loss", "global_aux_loss"],
        moe_aux_loss_coeff=[0.3, 0.2, 0.1],
        moe_z_loss_coeff=0.05,
        moe_router_pre_softmax=True,
    )
    router = make_router(megatron_cpu, learned=1, **settings)
    router.reset_global_aux_loss_tracker()
    hidden = make_hidden(21).view(7, 3, HIDDEN).requires_grad_()
    mask = (torch.arange(21) % 5 == 2).view(7, 3) if padding else None
    if padding:
        mask[5:] = False  # one token of each sequence is left out
    destroy_moe_metrics_tracker()
    routes = router.route(hidden, mask)
    kept = torch.ones(21, dtype=torch.bool) if mask is None else ~mask.flatten()
    assert torch.equal((routes.topk_ids >= 0).all(dim=1), kept) and torch.equal((routes.topk_ids < 0).any(dim=1), ~kept)
    actual = {name: entry.values.clone() for name, entry in get_moe_metrics_tracker().metrics.items()}
    actual_grad = torch.autograd.grad(routes.probs.square().sum(), (hidden, router.weight))

    dense = TopKRouter(router.config, megatron_cpu)
    dense.set_layer_number(1)
    lists = router.index.shortlist[routes.probed].long()
    candidate = torch.zeros(21, EXPERTS + 1, dtype=torch.bool)
    candidate[torch.arange(21).unsqueeze(1), torch.where(lists < 0, EXPERTS, lists).flatten(1)] = True
    logits = hidden @ router.weight.t()
    logits = logits.masked_fill(~candidate[:, :EXPERTS].view(7, 3, EXPERTS), float("-inf"))
    destroy_moe_metrics_tracker()
    probs, routing_map = dense.routing(logits, mask)
    expected = {name: entry.values.clone() for name, entry in get_moe_metrics_tracker().metrics.items()}
    expected_grad = torch.autograd.grad(probs[kept].square().sum(), (hidden, router.weight))
    assert actual.keys() == expected.keys() and len(expected) == 4
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
    assert not routes.probs[~kept].any()
    torch.testing.assert_close(probs[kept].gather(1, routes.topk_ids[kept].long()), routes.probs[kept], **CLOSE)
    for a, b in zip(actual_grad, expected_grad, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Load tests.


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("num_probes", (1, 2, 4), ids=lambda n: f"{n}-probes")
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_force_load_balancing_spreads_the_tokens_evenly(megatron_cpu, scores, source, num_probes):
    router = make_router(
        megatron_cpu,
        moe_air_codebook_source=source,
        moe_air_num_probes=num_probes,
        moe_air_shortlist_size=10,  # 8 lists of 10: two slots for every expert
        moe_router_force_load_balancing=True,
        **scores,
    )
    if router.expert_bias is not None:
        router.expert_bias.zero_()
    routes = router.route(make_hidden(2000))
    assert (routes.topk_ids >= 0).all()
    assert all(len(set(ids)) == TOPK for ids in routes.topk_ids.tolist())
    assert (routes.probs > 0).all()
    loads = torch.bincount(routes.topk_ids.flatten(), minlength=EXPERTS).double()
    mean = 2000 * TOPK / EXPERTS
    assert loads.sum() == 2000 * TOPK
    assert loads.min() > mean / 1.5 and loads.max() < mean * 1.5  # more than four standard deviations


# Memory.


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation returns, in numbers of four bytes."""

    def __init__(self):
        super().__init__()
        self.numel, self.name = 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            # A view that expands a tensor repeats elements that exist once.
            if torch.is_tensor(output) and output.untyped_storage().nbytes() // 4 > self.numel:
                self.numel = output.untyped_storage().nbytes() // 4
                self.name = str(function)
        return outputs


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("num_probes", (1, 2), ids=lambda n: f"{n}-probes")
def test_route_makes_nothing_of_the_size_of_tokens_times_experts(megatron_cpu, source, num_probes):
    num_tokens, num_experts = 512, 4096
    router = make_router(
        megatron_cpu,
        learned=1,
        num_moe_experts=num_experts,
        moe_air_codebook_source=source,
        moe_air_num_probes=num_probes,
        moe_air_num_clusters=64,
        moe_air_shortlist_size=128,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type=["aux_loss", "seq_aux_loss", "global_aux_loss"],
        moe_aux_loss_coeff=[0.3, 0.2, 0.1],
        moe_z_loss_coeff=0.05,
    )
    hidden = make_hidden(num_tokens).view(256, 2, HIDDEN).requires_grad_()
    with Largest() as largest:
        routes = router.route(hidden, torch.arange(num_tokens).view(256, 2) < 100)
        routes.probs.square().sum().backward()
    assert 0 < largest.numel <= num_tokens * num_experts // 4, largest.name
    with Largest() as dense:  # the measure itself: the dense adapter does make it
        router(hidden)
    assert dense.numel >= num_tokens * num_experts
