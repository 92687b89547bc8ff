"""Compact dispatch and granular experts over gloo ranks: against K copies of each token on a plain all-to-all, and
against Megatron's own all-to-all dispatcher with its SequentialMLP experts of the same weights."""

import os
import types

import pytest
import torch

from tests.processes import rank_of, ranks_fixture

HIDDEN, FFN = 12, 3
WORLD_SIZES = (1, 2, 4)
CLOSE = 2e-6  # relative to the largest entry: sums in another order, over up to 512 experts of a token
SCENARIOS = {
    # name: (experts, top-k, tokens of rank r, which experts)
    "unequal-tokens": (16, 3, lambda rank: 5 + 9 * rank, "any"),
    "top-1": (8, 1, lambda rank: 20, "any"),
    "top-512": (600, 512, lambda rank: 3 + rank, "any"),
    "every-expert": (12, 12, lambda rank: 4, "any"),
    "all-to-the-last-rank": (16, 4, lambda rank: 6, "last"),
    "all-at-home": (16, 4, lambda rank: 6 + rank, "own"),
    "no-tokens-on-odd-ranks": (16, 4, lambda rank: 0 if rank % 2 else 7, "any"),
    "no-tokens-at-all": (16, 4, lambda rank: 0, "any"),
    "fewer-candidates": (16, 5, lambda rank: 9 + rank, "holes"),
    "tokens-without-experts": (16, 5, lambda rank: 9 + rank, "none for some"),
}
INTERPRETED = ("unequal-tokens", "all-to-the-last-rank", "no-tokens-at-all", "tokens-without-experts")  # with kernels
FULL = [name for name, (*_, which) in SCENARIOS.items() if which not in ("holes", "none for some")]


def routes_of(name, rank, world_size):
    """Hidden states, expert ids and probs of one rank, and the gradient that its outputs will get."""
    num_experts, topk, tokens, which = SCENARIOS[name]
    generator = torch.Generator().manual_seed(rank)
    num_tokens, local = tokens(rank), num_experts // world_size
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(dim=1)
    if which in ("last", "own"):
        home = world_size - 1 if which == "last" else rank
        ids = ids % local + home * local
        ids = torch.stack([row.unique()[torch.randperm(local, generator=generator)] for row in ids]).view(-1, local)
    ids = ids[:, :topk]
    if which == "holes":
        ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -1)
    if which == "none for some":
        ids[::3] = -1
    probs = torch.rand(num_tokens, ids.shape[1], generator=generator).masked_fill(ids < 0, 0.0)
    hidden = torch.randn(num_tokens, 1, HIDDEN, generator=generator)
    grad = torch.randn(num_tokens, 1, HIDDEN, generator=generator)
    return hidden, ids, probs, grad


class OneRank:
    """A process group of one rank, as far as the experts ask."""

    rank = staticmethod(lambda: 0)
    size = staticmethod(lambda: 1)


class PlainAllToAll(torch.autograd.Function):
    """The reference's own communication: rows by uneven splits, and back."""

    @staticmethod
    def forward(ctx, rows, sent, received):
        ctx.splits = (sent, received)
        out = rows.new_empty(sum(received), *rows.shape[1:])
        torch.distributed.all_to_all_single(out, rows.contiguous(), received, sent)
        return out

    @staticmethod
    def backward(ctx, grad):
        sent, received = ctx.splits
        return PlainAllToAll.apply(grad, received, sent), None, None


def expert_of(weight1, weight2, ids, rows):
    """Each row through its own expert: gated, as Megatron's MLP."""
    gate, linear = torch.einsum("nfh,nh->nf", weight1[ids], rows).chunk(2, dim=1)
    return torch.einsum("nf,nfh->nh", torch.nn.functional.silu(gate) * linear, weight2[ids])


def plain(hidden, ids, probs, weight1, weight2, world_size):
    """K copies of each token travel, one per expert; every copy comes back as an output."""
    local = weight1.shape[0]
    tokens, slots = torch.nonzero(ids >= 0, as_tuple=True)
    experts = ids[tokens, slots]
    order = (experts // local).argsort(stable=True)
    tokens, slots, experts = tokens[order], slots[order], experts[order]
    sent = torch.bincount(experts // local, minlength=world_size)
    received = torch.empty_like(sent)
    torch.distributed.all_to_all_single(received, sent)
    sent, received = sent.tolist(), received.tolist()
    rows = PlainAllToAll.apply(hidden.view(-1, HIDDEN)[tokens], sent, received)
    local_ids = PlainAllToAll.apply(experts, sent, received) % local
    outputs = PlainAllToAll.apply(expert_of(weight1, weight2, local_ids, rows), received, sent)
    weighted = outputs * probs[tokens, slots].unsqueeze(1)
    return torch.zeros_like(hidden.view(-1, HIDDEN)).index_add(0, tokens, weighted).view_as(hidden), sum(sent)


def config_for(name, world_size, **fields):
    from air_moe_megatron import AIRMoEConfig

    num_experts, topk, *_ = SCENARIOS[name]
    return AIRMoEConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, num_moe_experts=num_experts, moe_router_topk=topk,
        moe_ffn_hidden_size=FFN, ffn_hidden_size=FFN, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, expert_model_parallel_size=world_size, use_cpu_initialization=True,
        init_method_std=0.5, moe_router_pre_softmax=topk == 1, **fields,
    )  # fmt: skip


def run(steps, hidden, probs, weights, grad):
    """Output and gradients of ``steps(hidden, probs)``."""
    hidden, probs = hidden.clone().requires_grad_(), probs.clone().requires_grad_()
    out = steps(hidden, probs)
    grads = torch.autograd.grad(out, [hidden, probs, *weights], grad, allow_unused=True)
    return [out.detach(), *(torch.zeros(0) if g is None else g for g in grads)]


def compact_steps(dispatcher, experts, ids):
    def steps(hidden, probs):
        rows, sent_probs = dispatcher.dispatch_preprocess(hidden, ids.int(), probs)
        rows, received_probs = dispatcher.token_dispatch(rows, sent_probs)
        rows, pairs, received_probs = dispatcher.dispatch_postprocess(rows, received_probs)
        out, bias = experts(rows, pairs, received_probs)
        assert bias is None
        out = dispatcher.token_combine(dispatcher.combine_preprocess(out))
        return dispatcher.combine_postprocess(out)

    return steps


def stock_layer(name, config, experts, groups, world_size):
    """Megatron's all-to-all dispatcher with SequentialMLP, or with the granular experts, of the same weights."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    local = config.num_moe_experts // world_size
    first = torch.distributed.get_rank() * local
    dispatcher = MoEAlltoAllTokenDispatcher(local, list(range(first, first + local)), config, groups)
    spec = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    sequential = spec.keywords["submodules"].experts(local, config, pg_collection=groups)
    with torch.no_grad():
        for number, expert in enumerate(sequential.local_experts):
            expert.linear_fc1.weight.copy_(experts.weight1[number])
            expert.linear_fc2.weight.copy_(experts.weight2[number].t())
    return dispatcher, sequential


def dense(ids, probs, num_experts):
    rows = torch.arange(ids.shape[0]).unsqueeze(1)
    maps = torch.zeros(ids.shape[0], num_experts).index_put((rows, ids), probs)
    return maps, torch.zeros(ids.shape[0], num_experts, dtype=torch.bool).index_put_((rows, ids), torch.tensor(True))


def stock_steps(dispatcher, experts, ids, num_experts):
    def steps(hidden, probs):
        dense_probs, routing_map = dense(ids, probs, num_experts)
        rows, kept = dispatcher.dispatch_preprocess(hidden, routing_map, dense_probs)
        rows, kept = dispatcher.token_dispatch(rows, kept)
        rows, tokens_per_expert, kept = dispatcher.dispatch_postprocess(rows, kept)
        out, _ = experts(rows, tokens_per_expert, kept)
        return dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(out)))

    return steps


def scenario(name, rank, world_size, groups):
    from air_moe_megatron.layer.dispatcher import CompactTokenDispatcher
    from air_moe_megatron.layer.experts import GranularExperts

    config = config_for(name, world_size)
    local = config.num_moe_experts // world_size
    torch.manual_seed(5)
    experts = GranularExperts(local, config, pg_collection=groups)
    hidden, ids, probs, grad = routes_of(name, rank, world_size)
    weights = [experts.weight1, experts.weight2]
    dispatcher = CompactTokenDispatcher(local, config, groups)
    torch.manual_seed(5)
    alone = types.SimpleNamespace(ep=OneRank, expt_dp=OneRank)
    one_rank = GranularExperts(config.num_moe_experts, config, pg_collection=alone)
    result = {
        "initial": [weight.detach() for weight in weights],
        "initial of one rank": [one_rank.weight1.detach(), one_rank.weight2.detach()],
    }
    result["compact"] = run(compact_steps(dispatcher, experts, ids), hidden, probs, weights, grad)
    result["traffic"] = vars(dispatcher.traffic)
    if name in INTERPRETED:
        os.environ["AIR_MOE_BACKEND"] = "triton"
        again = CompactTokenDispatcher(local, config, groups)
        result["kernels"] = run(compact_steps(again, experts, ids), hidden, probs, weights, grad)
        result["traffic of kernels"] = vars(again.traffic)
        del os.environ["AIR_MOE_BACKEND"]
    copies = []

    def plain_steps(hidden, probs):
        out, num_copies = plain(hidden, ids, probs, *weights, world_size)
        copies.append(num_copies)
        return out

    result["plain"] = run(plain_steps, hidden, probs, weights, grad)
    result["copies"], result["ids"] = copies[0], ids
    if name in FULL:
        stock_config = config_for(name, world_size, moe_token_dispatcher_type="alltoall")
        stock, sequential = stock_layer(name, stock_config, experts, groups, world_size)
        parameters = [p for e in sequential.local_experts for p in (e.linear_fc1.weight, e.linear_fc2.weight)]
        out = run(stock_steps(stock, sequential, ids, config.num_moe_experts), hidden, probs, parameters, grad)
        grads = [torch.zeros_like(p) if not g.numel() else g for g, p in zip(out[3:], parameters, strict=True)]
        first, second = torch.stack(grads[::2]), torch.stack(grads[1::2]).transpose(1, 2)
        result["stock"] = [*out[:3], first, second]
        again, _ = stock_layer(name, stock_config, experts, groups, world_size)
        result["stock-granular"] = run(
            stock_steps(again, experts, ids, config.num_moe_experts), hidden, probs, weights, grad
        )
    return result


def refusals(rank, groups, world_size):
    """What each rank says when the last one has something wrong."""
    from air_moe_megatron.layer.dispatcher import CompactTokenDispatcher
    from air_moe_megatron.layer.experts import GranularExperts

    config = config_for("unequal-tokens", world_size)
    local = config.num_moe_experts // world_size
    experts = GranularExperts(local, config, pg_collection=groups)
    hidden, ids, probs, _ = routes_of("unequal-tokens", rank, world_size)
    is_last = rank == world_size - 1

    def message(dispatcher, hidden, ids, probs):
        try:
            compact_steps(dispatcher, experts, ids)(hidden, probs)
        except ValueError as error:
            return str(error)
        return None

    def changed(values, index, value):
        values = values.clone()
        values[index] = value if is_last else values[index]
        return values

    ready = CompactTokenDispatcher(local, config, groups)
    found = {
        "too large": message(ready, hidden, changed(ids, (0, 0), 16), probs),
        "too small": message(ready, hidden, changed(ids, (2, 1), -2), probs),
        "nan": message(ready, hidden, ids, changed(probs, (1, 1), float("nan"))),
        "fine": message(ready, hidden, ids, probs),
        "width": message(ready, hidden, ids[:, :2] if is_last else ids, probs),
        "length": message(ready, hidden, ids[1:] if is_last else ids, probs[1:] if is_last else probs),
        "dimensions": message(ready, hidden, ids.flatten() if is_last else ids, probs),
        "fine again": message(ready, hidden, ids, probs),
    }
    narrower = hidden[..., :-4] if is_last else hidden
    found["hidden size"] = message(CompactTokenDispatcher(local, config, groups), narrower, ids, probs)
    fewer = slice(0, 2 if is_last else 3)
    found["topk"] = message(CompactTokenDispatcher(local, config, groups), hidden, ids[:, fewer], probs[:, fewer])
    return found


def worker(rank, world_size, directory):
    with rank_of(rank, world_size, directory, expert_model_parallel_size=world_size) as groups:
        results = {name: scenario(name, rank, world_size, groups) for name in SCENARIOS}
        results["refusals"] = refusals(rank, groups, world_size)
        torch.save(results, f"{directory}/{rank}.pt")


ranks = ranks_fixture(worker, *WORLD_SIZES, name="EP{}")


def assert_alike(found, expected):
    for name, got, wanted in zip(("output", "hidden", "probs", "weight1", "weight2"), found, expected, strict=True):
        assert got.shape == wanted.shape, name
        if wanted.numel():
            assert (got - wanted).abs().max() <= CLOSE * wanted.abs().max(), name


@pytest.mark.parametrize("name", SCENARIOS)
def test_output_and_all_gradients_equal_a_plain_all_to_all(ranks, name):
    for result in (results[name] for results in ranks):
        assert_alike(result["compact"], result["plain"])
        assert name == "no-tokens-at-all" or any(results[name]["compact"][3].any() for results in ranks)


@pytest.mark.parametrize("name", INTERPRETED)
def test_kernels_send_and_compute_the_same(ranks, name):
    for result in (results[name] for results in ranks):
        assert_alike(result["kernels"], result["plain"])
        assert result["traffic of kernels"] == result["traffic"]


@pytest.mark.parametrize("name", FULL)
def test_output_and_all_gradients_equal_megatrons_dispatcher_and_experts(ranks, name):
    for result in (results[name] for results in ranks):
        assert_alike(result["compact"], result["stock"])
        assert_alike(result["stock-granular"], result["stock"])


@pytest.mark.parametrize("name", SCENARIOS)
def test_bytes_are_those_of_the_formula(ranks, name):
    for rank, result in enumerate(results[name] for results in ranks):
        ids, traffic = result["ids"], result["traffic"]
        local = SCENARIOS[name][0] // len(ranks)
        distinct = [{int(e) // local for e in row if e >= 0} for row in ids]
        if len(ranks) > 1:
            assert traffic["row_bytes"] == 4 * HIDDEN * sum(map(len, distinct))
            assert traffic["remote_row_bytes"] == 4 * HIDDEN * sum(len(ranks - {rank}) for ranks in distinct)
        else:
            assert traffic["remote_row_bytes"] == traffic["remote_pair_bytes"] == 0
        assert traffic["pair_bytes"] == 8 * int((ids >= 0).sum())
        assert result["copies"] == int((ids >= 0).sum())


def test_many_experts_of_a_token_travel_once_per_rank(ranks):
    """K = 512 over D ranks: 512 / D times fewer rows than K copies."""
    for result in (results["top-512"] for results in ranks):
        copies = 4 * HIDDEN * result["copies"]
        assert copies / result["traffic"]["row_bytes"] == pytest.approx(512 / len(ranks))


@pytest.mark.parametrize("name", ("unequal-tokens", "top-512"))
def test_initialization_does_not_depend_on_the_number_of_ranks(ranks, name):
    for projection in (0, 1):
        weight = torch.cat([results[name]["initial"][projection] for results in ranks])
        assert torch.equal(weight, ranks[0][name]["initial of one rank"][projection])
        assert weight.std() == pytest.approx(0.5, rel=0.5)
        assert not torch.equal(weight[0], weight[1])


def test_what_is_wrong_on_one_rank_is_an_error_on_every_rank(ranks):
    last = len(ranks) - 1
    for found in (results["refusals"] for results in ranks):
        for kind in ("too large", "too small"):
            assert f"1 of the topk_ids of expert-parallel rank {last} are out of range" in found[kind]
            assert "between 0 and 15" in found[kind]
        assert f"1 of the routing probs of expert-parallel rank {last} are NaN" in found["nan"]
        assert found["fine"] is None and found["fine again"] is None
        for kind in ("width", "length", "dimensions"):
            assert f"topk_ids and probs of expert-parallel rank {last} must both be [T, K]" in found[kind]
            assert (": topk_ids (" in found[kind]) == (found is ranks[last]["refusals"])  # it knows its shapes
        if last:
            assert "hidden size differs between the expert-parallel ranks: [12" in found["hidden size"]
            assert "moe_router_topk differs between the expert-parallel ranks: [3" in found["topk"]
