"""What AIR routers with short lists learn, count and save."""

import pytest
import torch

from air_moe_megatron.layer import find_compact_layers
from air_moe_megatron.routers import AIRRouter, find_routers
from air_moe_megatron.sync import discard_statistics, update_codebooks
from tests.builders import make_layer
from tests.short_lists import CLOSE, HIDDEN, SCORES, SOURCES, TOPK, make_hidden, make_router
from tests.states import assert_same_state, microbatches, state_of

pytestmark = pytest.mark.usefixtures("megatron_cpu")


# Statistics.


def num_counted(router):
    return router.codebook.statistics[:, HIDDEN].sum().item()


def test_statistics_are_those_of_the_tokens_with_their_nearest_codeword(megatron_cpu):
    from air_moe_megatron.ops.coarse import token_statistics

    router = make_router(megatron_cpu, moe_air_num_probes=2)
    first, second = make_hidden(20), make_hidden(30, seed=11)
    nearest = [router.route(hidden).probed[:, 0] for hidden in (first, second)]
    both = token_statistics(torch.cat((first, second)), router.codebook.codewords, torch.cat(nearest))
    torch.testing.assert_close(router.codebook.statistics, both, **CLOSE)


@pytest.mark.parametrize("mode", ("evaluation", "no-grad", "evaluation-no-grad"))
@pytest.mark.parametrize("entry", ("route", "forward"))
def test_nothing_is_counted_outside_training(megatron_cpu, mode, entry):
    router = make_router(megatron_cpu)
    router.train("evaluation" not in mode)
    hidden = make_hidden(20).unsqueeze(1)
    with torch.set_grad_enabled("no-grad" not in mode):
        router.route(hidden) if entry == "route" else router(hidden)
    assert num_counted(router) == 0 and router.expert_load.sum() == 0
    router.train()
    router.route(hidden)
    assert num_counted(router) == 20 and router.expert_load.sum() == 20 * TOPK


@pytest.mark.parametrize("entry", ("route", "forward"))
def test_padding_counts_nowhere(megatron_cpu, entry):
    settings = SCORES["sigmoid-expert-bias"]
    padded, alone = make_router(megatron_cpu, **settings), make_router(megatron_cpu, **settings)
    hidden, mask = make_hidden(24).view(8, 3, HIDDEN), (torch.arange(24) % 5 == 0).view(8, 3)
    kept = hidden[~mask].unsqueeze(1)
    hidden = hidden.masked_fill(mask.unsqueeze(2), float("nan"))
    for router, *arguments in ((padded, hidden, mask), (alone, kept)):
        router.route(*arguments) if entry == "route" else router(*arguments)
    torch.testing.assert_close(padded.codebook.statistics, alone.codebook.statistics, **CLOSE)
    assert torch.equal(padded.expert_load, alone.expert_load)
    assert torch.equal(padded.local_tokens_per_expert, alone.local_tokens_per_expert)
    assert alone.local_tokens_per_expert.sum() == kept.shape[0] * TOPK


@pytest.mark.parametrize("shape", [(2, 20), (20,), (40, 1)])
def test_a_padding_mask_of_another_shape_is_refused(megatron_cpu, shape):
    """A mask [batch, sequence] has as many entries as one [sequence, batch], for other tokens."""
    router, hidden = make_router(megatron_cpu), torch.randn(20, 2, HIDDEN)
    for fitting in (torch.zeros(20, 2, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)):
        router.route(hidden, fitting)
    with pytest.raises(ValueError, match=r"padding_mask \[.*\] must be \[sequence, batch\] or \[tokens\]"):
        router.route(hidden, torch.zeros(shape, dtype=torch.bool))


def test_discarded_statistics_leave_no_trace(megatron_cpu):
    once, twice = make_router(megatron_cpu), make_router(megatron_cpu)
    twice.route(make_hidden(40, seed=77))
    discard_statistics(twice)
    for router in (once, twice):
        router.route(make_hidden(40))
        update_codebooks(router)
    assert torch.equal(twice.codebook.codewords, once.codebook.codewords)
    assert num_counted(twice) == 0


def test_a_nan_token_drops_the_update_and_says_so(megatron_cpu, caplog):
    router = make_router(megatron_cpu)
    before = router.codebook.codewords.clone(), router.codebook.ema.clone()
    hidden = make_hidden(40)
    hidden[3, 5] = float("nan")
    router.route(hidden)
    assert update_codebooks(router) == 1
    assert torch.equal(router.codebook.codewords, before[0]) and torch.equal(router.codebook.ema, before[1])
    assert "layer 1" in caplog.text and "NaN" in caplog.text
    router.route(make_hidden(40))
    assert update_codebooks(router) == 0
    assert router.codebook.codewords.isfinite().all()


def test_one_poisoned_layer_does_not_hold_up_the_others(megatron_cpu):
    layers = torch.nn.ModuleList([make_router(megatron_cpu), make_router(megatron_cpu)])
    before = [layer.codebook.codewords.clone() for layer in layers]
    layers[0].route(make_hidden(40) * float("nan"))
    layers[1].route(make_hidden(40))
    assert update_codebooks(layers) == 1
    assert torch.equal(layers[0].codebook.codewords, before[0])
    assert not torch.equal(layers[1].codebook.codewords, before[1])


def test_lists_of_experts_follow_the_centers_after_an_update_only(megatron_cpu):
    router = make_router(megatron_cpu, moe_air_codebook_source="experts")
    router.route(make_hidden(5))
    before = router.index.shortlist.clone()
    with torch.no_grad():
        router.weight.copy_(router.weight.flip(0))
    router.route(make_hidden(5))
    assert torch.equal(router.index.shortlist, before)
    update_codebooks(router)
    router.route(make_hidden(5))
    assert not torch.equal(router.index.shortlist, before)


# Life with Megatron.


def test_casting_to_bf16_keeps_the_codebook_in_fp32(megatron_cpu):
    router = make_router(megatron_cpu)
    before = {name: value.clone() for name, value in router.codebook.named_buffers()}
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    for name, value in router.codebook.named_buffers():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])


def test_state_of_a_topk_router_loads_and_back(megatron_cpu):
    from megatron.core.transformer.moe.router import TopKRouter

    air = make_router(megatron_cpu, learned=0, **SCORES["sigmoid-expert-bias"])
    topk = TopKRouter(air.config, megatron_cpu)
    topk.expert_bias.fill_(0.25)
    assert air.load_state_dict(topk.state_dict()).missing_keys == []
    assert torch.equal(air.weight, topk.weight) and torch.equal(air.expert_bias, topk.expert_bias)
    air.route(make_hidden(40))
    assert update_codebooks(air) == 0
    result = topk.load_state_dict(air.state_dict(), strict=False)
    assert result.missing_keys == []
    assert all(name.startswith(("codebook.", "index.")) for name in result.unexpected_keys)


@pytest.mark.parametrize("source", SOURCES)
def test_a_resumed_router_continues_bit_for_bit(megatron_cpu, source):
    settings = dict(moe_air_codebook_source=source, moe_air_refresh_interval=3)
    run = make_router(megatron_cpu, learned=4, **settings)
    resumed = make_router(megatron_cpu, learned=0, seed=5, **settings)
    resumed.load_state_dict(run.state_dict())
    for step in range(5):
        hidden = make_hidden(50, seed=100 + step)
        for router in (run, resumed):
            router.route(hidden).probs.square().sum().backward()
            with torch.no_grad():
                router.weight -= 0.1 * router.weight.grad
            router.weight.grad = None
            update_codebooks(router)
        for name, value in run.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), (step, name)


def test_routers_are_found_in_a_fixed_order(megatron_cpu):
    first, second, third = (make_router(megatron_cpu, learned=0) for _ in range(3))
    chunks = [torch.nn.ModuleList([first, torch.nn.Linear(2, 2)]), torch.nn.ModuleList([second, third])]
    assert find_routers(chunks, AIRRouter) == [first, second, third]
    assert find_routers(chunks[1], AIRRouter) == [second, third]
    assert find_routers(torch.nn.Linear(2, 2), AIRRouter) == []
    assert find_routers([chunks[1], chunks[0], third], AIRRouter) == [second, third, first]  # each once


def test_a_router_that_two_modules_share_learns_once(megatron_cpu):
    """As of actor and critic with one trunk, or of two models with tied layers."""
    found = []
    for give in (lambda layer: [layer], lambda layer: [torch.nn.Sequential(layer), layer, layer.router]):
        layer = make_layer(megatron_cpu, moe_router_type="air", moe_router_input_norm="running")
        for hidden in microbatches(3):
            discard_statistics(give(layer))
            layer(hidden)
            update_codebooks(give(layer))
        found.append(layer)
    assert_same_state(state_of(found[1]), state_of(found[0]))
    assert find_compact_layers([layer, torch.nn.Sequential(layer)]) == [layer]


def test_an_expert_that_its_bias_favors_gets_into_the_lists(megatron_cpu):
    router = make_router(
        megatron_cpu,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_air_refresh_interval=1,
    )
    router.route(make_hidden(1))
    update_codebooks(router)
    lists_of = torch.bincount(router.index.shortlist.long().flatten(), minlength=router.num_experts)
    rare = int(lists_of.argmin())
    assert 1 <= lists_of[rare] < router.sizes.num_clusters  # in some list, as every expert, but not in all
    router.expert_bias[rare] = 10.0
    for _ in range(router.index.schedule.num_turns):  # until every codeword has been tried with it
        router.route(make_hidden(1))
        update_codebooks(router)
    routes = router.route(make_hidden(1))
    assert (routes.topk_ids == rare).any(dim=1).all()


def test_a_compiled_model_leaves_the_router_as_it_is(megatron_cpu, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")  # CPU mode sets it
    router = make_router(megatron_cpu)
    hidden = make_hidden(12)
    expected = router.route(hidden)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    with torch._dynamo.config.patch(disable=False):
        compiled = torch.compile(lambda hidden: router.route(2.0 * hidden).probs + 1.0, backend=backend)
        found = compiled(hidden / 2.0)
    assert torch.equal(found, expected.probs + 1.0)
    assert len(graphs) == 2  # before the router and after it
