"""What our modules keep when a model is cast, evaluated, frozen, or a step is attempted anew."""

import copy

import pytest
import torch

from air_moe_megatron.routers import ROUTERS
from air_moe_megatron.sync import discard_statistics, update_codebooks
from tests.builders import HIDDEN, make_layer, make_router
from tests.states import (
    ALL_TYPES,
    BIAS,
    BOTH_PATHS,
    EVERYTHING,
    NORM,
    assert_same_state,
    fields_of,
    give_ids,
    microbatches,
    state_of,
)

pytestmark = pytest.mark.usefixtures("megatron_cpu")


# Casts.


@pytest.mark.parametrize("router_type", ("topk", "air"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_counts_are_exact_in_a_model_of_low_precision(megatron_cpu, router_type, dtype):
    """bf16 counts stall at 256, and 256 + 3 rounds to 260."""
    fields = dict(moe_router_type=router_type, **BIAS, moe_router_load_balancing_type="global_aux_loss",
                  moe_aux_loss_coeff=0.1)  # fmt: skip
    router = make_router(megatron_cpu, **fields).to(dtype)
    token = torch.ones(3, 1, HIDDEN, dtype=dtype)
    for _ in range(300):
        router.route(token)
    assert sorted(router.local_tokens_per_expert.tolist())[-4:] == [900.0] * 4
    assert router.global_tokens_per_expert.sum() == 300 * 3 * 4 and router.ga_steps == 300
    assert router.expert_bias.dtype == router.local_tokens_per_expert.dtype == torch.float32


def test_the_expert_bias_is_not_rounded_by_a_cast(megatron_cpu):
    router = make_router(megatron_cpu, moe_router_type="air", **BIAS)
    router.expert_bias.fill_(0.1234567)
    assert torch.equal(router.bfloat16().expert_bias, torch.full((64,), 0.1234567))


@ALL_TYPES
def test_a_router_is_the_same_under_any_default_dtype(megatron_cpu, name):
    routers, routes, batches = [], [], microbatches(4)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            router = make_router(megatron_cpu, **fields_of(name), params_dtype=torch.float32)
            give_ids(router)
            for hidden in batches[:3]:
                router.route(hidden)
                update_codebooks(router)
            routes.append(router.eval().route(batches[3]))
        finally:
            torch.set_default_dtype(torch.float32)
        routers.append(state_of(router))
    for other in (1, 2):
        assert_same_state(routers[other], routers[0])
        assert torch.equal(routes[other].topk_ids, routes[0].topk_ids)
        assert torch.equal(routes[other].probs, routes[0].probs)


@pytest.mark.parametrize("name", ("air", "hash"))
def test_experts_are_the_same_under_any_default_dtype(megatron_cpu, name):
    weights = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            weights.append(make_layer(megatron_cpu, **fields_of(name)).experts.weight1.float())
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*weights)


@ALL_TYPES
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
def test_a_router_scores_in_its_own_dtype_under_autocast(megatron_cpu, name, dtype):
    found = []
    for enabled in (False, True):
        router = make_router(megatron_cpu, **fields_of(name))
        give_ids(router)
        for hidden in microbatches(3):  # the lists are rebuilt, too
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                routes = router.route(hidden.requires_grad_())
            if routes.probs.requires_grad:
                routes.probs.square().sum().backward()
            update_codebooks(router)
        grads = {name: parameter.grad for name, parameter in router.named_parameters()}
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=enabled):
            routes = router.eval().route(hidden)
        found.append(state_of(router) | grads | {"ids": routes.topk_ids, "probs": routes.probs})
    assert_same_state(found[1], found[0])


@ALL_TYPES
@BOTH_PATHS
def test_a_layer_takes_the_tokens_of_other_layers_under_autocast(megatron_cpu, name, dispatch):
    """These are bf16. The backward may run under autocast, too."""
    hidden, found = microbatches(1)[0].bfloat16(), []
    for dtype in (torch.bfloat16, torch.float32):
        layer = make_layer(megatron_cpu, **fields_of(name), moe_dispatch=dispatch)
        give_ids(layer)
        tokens = hidden.detach().to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = layer(tokens)[0]
            output.float().square().sum().backward()
        found.append([output, tokens.grad, *(parameter.grad for parameter in layer.parameters())])
    for actual, expected in zip(*found, strict=True):
        assert (actual.float() - expected).norm() < 0.02 * expected.norm()


# Steps.


@ALL_TYPES
def test_an_attempt_that_is_discarded_leaves_no_trace(megatron_cpu, name):
    layer = make_layer(megatron_cpu, **fields_of(name))
    give_ids(layer)
    layer(microbatches(1)[0])
    update_codebooks(layer)
    layer(microbatches(1)[0])  # rebuilds the lists, as a repeated attempt would
    discard_statistics(layer)
    before = state_of(layer)
    for hidden in microbatches(2, seed=1):
        layer(hidden)[0].sum().backward()
    discard_statistics(layer)
    assert_same_state(state_of(layer), before)
    assert before["router.expert_load"].sum() == 20 * 4


def test_an_update_begins_the_counts_of_the_next_global_batch(megatron_cpu):
    """In Megatron's loop the end of the gradients does; a loop of one's own has only the update."""
    router = make_router(megatron_cpu, **fields_of("air"))
    for _ in range(2):
        router.route(microbatches(1)[0])
        assert router.ga_steps == 1 and router.global_tokens_per_expert.sum() == 20 * 4
        update_codebooks(router)
    assert router.ga_steps == 0 and not router.global_tokens_per_expert.any()


@ALL_TYPES
def test_updates_without_tokens_change_nothing(megatron_cpu, name):
    """Of a teacher in evaluation mode within a model that trains, for one."""
    router = make_router(megatron_cpu, **fields_of(name))
    give_ids(router)
    for hidden in microbatches(3):
        router.route(hidden)
        update_codebooks(router)
    before = state_of(router.eval())
    routes = router.route(microbatches(1, seed=4)[0])
    for _ in range(200):
        router.route(microbatches(1, seed=3)[0])
        update_codebooks(router)
    assert_same_state(state_of(router), before)
    again = router.route(microbatches(1, seed=4)[0])
    assert torch.equal(again.topk_ids, routes.topk_ids) and torch.equal(again.probs, routes.probs)


@ALL_TYPES
@BOTH_PATHS
@pytest.mark.parametrize("with_gradients", (False, True), ids=("no-grad", "grad"))
def test_evaluation_changes_no_state(megatron_cpu, name, dispatch, with_gradients):
    """Also where an update has made a rebuild of the lists due, which the next training forward makes."""
    trained, evaluated = (make_layer(megatron_cpu, **fields_of(name), moe_dispatch=dispatch) for _ in range(2))
    for layer in (trained, evaluated):
        give_ids(layer)
        layer(microbatches(1)[0])[0].sum().backward()
        update_codebooks(layer)
        with torch.no_grad():
            for parameter in layer.router.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    before = state_of(evaluated.eval())
    with torch.set_grad_enabled(with_gradients):
        evaluated(microbatches(1, seed=2)[0])
    assert_same_state(state_of(evaluated), before)
    for layer in (trained, evaluated.train()):
        layer(microbatches(1, seed=3)[0])
        update_codebooks(layer)
    assert_same_state(state_of(evaluated), state_of(trained))


class Times(torch.nn.Module):
    def forward(self, weight):
        return 2.0 * weight


def with_data(router, weight):
    router.weight.data.copy_(weight)


def with_parametrization(router, weight):
    if not torch.nn.utils.parametrize.is_parametrized(router):
        torch.nn.utils.parametrize.register_parametrization(router, "weight", Times())
    with torch.no_grad():
        router.parametrizations.weight.original.copy_(0.5 * weight)


def with_other_buffers(router, weight):
    """The lists of such a call are in buffers that are gone after it."""
    with torch.no_grad():
        router.weight.copy_(weight)
    buffers = {name: buffer.clone() for name, buffer in router.named_buffers()}
    torch.func.functional_call(router, buffers, (microbatches(1)[0],))


def with_an_expert_bias(router, weight):
    if router.expert_bias is not None:
        router.expert_bias.copy_(weight[:, 0].sigmoid())


WAYS = (with_data, with_parametrization, with_other_buffers, with_an_expert_bias)


@pytest.mark.parametrize("name", ("air", "air-experts"))
@pytest.mark.parametrize("give", WAYS, ids=lambda function: function.__name__)
def test_an_untrained_router_routes_by_the_weights_that_it_has(megatron_cpu, name, give):
    """However these came to it; no version counter of torch and no address tells all of them."""
    router = make_router(megatron_cpu, **fields_of(name)).eval()
    for seed in range(4):
        router.route(microbatches(1)[0])
        weight = torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(seed))
        give(router, weight)
        expected = make_router(megatron_cpu, **fields_of(name)).eval()
        with torch.no_grad():
            expected.weight.copy_(router.weight)
            if expected.expert_bias is not None:
                expected.expert_bias.copy_(router.expert_bias)
        routes = [one.route(microbatches(1)[0]) for one in (router, expected)]
        assert torch.equal(routes[0].topk_ids, routes[1].topk_ids)
        assert torch.equal(routes[0].probs, routes[1].probs)


@pytest.mark.parametrize("name", ("air", "air-experts"))
def test_training_begins_anew_after_an_evaluation_of_a_new_model(megatron_cpu, name):
    fresh, evaluated = (make_router(megatron_cpu, **fields_of(name)) for _ in range(2))
    first, second = (evaluated.eval().route(microbatches(1)[0]) for _ in range(2))
    assert torch.equal(first.topk_ids, second.topk_ids) and int(evaluated.index.built_at) == -1
    with torch.no_grad():
        for router in (fresh, evaluated.train()):
            router.weight += torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(1))
    for router in (fresh, evaluated):
        router.route(microbatches(1)[0])
    assert_same_state(state_of(evaluated), state_of(fresh))


@ALL_TYPES
def test_a_router_may_be_built_in_inference_mode(megatron_cpu, name):
    """Its parameters then have no version by which torch tells that they were written."""
    expected = make_router(megatron_cpu, **fields_of(name)).eval()
    with torch.inference_mode():
        router = make_router(megatron_cpu, **fields_of(name)).eval()
        for _ in range(2):
            routes = []
            for one in (router, expected):
                give_ids(one)
                routes.append(one.route(microbatches(1)[0]))
            assert torch.equal(routes[0].topk_ids, routes[1].topk_ids)
            assert torch.equal(routes[0].probs, routes[1].probs)


@ALL_TYPES
def test_a_frozen_router_learns_nothing(megatron_cpu, name):
    """Tokens that it routes still show in the logs."""
    router = make_router(megatron_cpu, **fields_of(name))
    give_ids(router)
    for _ in range(2):
        router.route(microbatches(1)[0])
        update_codebooks(router)
    router.requires_grad_(False)
    before = state_of(router)
    router.route(microbatches(1, seed=1)[0].requires_grad_())
    update_codebooks(router)
    after = state_of(router)
    logs = ("expert_load", "num_routed", "logged_before", "global_tokens_per_expert", "ga_steps")
    for state in (before, after):
        for key in logs:
            state.pop(f".{key}", None)
    assert_same_state(after, before)


@pytest.mark.parametrize("name", ("air", "air-experts"))
def test_a_frozen_router_that_follows_another_routes_as_in_evaluation(megatron_cpu, name):
    """As a teacher whose weights are moving averages. It has no lists that training made."""
    teacher = make_router(megatron_cpu, **fields_of(name)).requires_grad_(False)
    for seed in range(3):
        with torch.no_grad():
            teacher.weight.copy_(torch.randn(teacher.weight.shape, generator=torch.Generator().manual_seed(seed)))
        found, expected = (
            one.route(microbatches(1)[0]).topk_ids.sort(dim=1).values
            for one in (teacher, copy.deepcopy(teacher).eval())
        )
        update_codebooks(teacher)
        assert torch.equal(found, expected) and int(teacher.index.built_at) == -1


@pytest.mark.parametrize("ends_steps", (False, True))
def test_a_loop_that_never_ends_a_step_is_warned_once(megatron_cpu, monkeypatch, caplog, ends_steps):
    """Its codewords would stay random without a word."""
    monkeypatch.setattr("air_moe_megatron.routers.base._MANY_FORWARDS", 5)
    router = make_router(megatron_cpu, **fields_of("air"))
    for hidden in microbatches(12):
        router.route(hidden)
        if ends_steps:
            update_codebooks(router)
    words = "5 training forwards since the last step"
    assert [words in record.getMessage() for record in caplog.records] == ([] if ends_steps else [True])


@ALL_TYPES
def test_counts_of_a_model_from_the_meta_device_begin_at_zero(megatron_cpu, name):
    """``to_empty`` gives memory with any content, and no checkpoint holds the counts."""
    router = make_router(megatron_cpu, **fields_of(name))
    found = copy.deepcopy(router).to("meta").to_empty(device="cpu")
    accumulators = [(part, key) for part in found.modules() for key in vars(part).get("_accumulators", ())]
    assert accumulators and all(bool((getattr(part, key) == 0).all()) for part, key in accumulators)
    found.load_state_dict(router.state_dict())
    assert_same_state(state_of(found), state_of(router))


@pytest.mark.parametrize("router_type", ("topk", "air", "product_key"))
def test_rounded_statistics_are_refused(megatron_cpu, router_type):
    """As by the ``buffer_dtype`` of FSDP's MixedPrecision, or ``load_state_dict(assign=True)`` of a state in bf16."""
    norm = {} if router_type == "product_key" else NORM
    router = make_router(megatron_cpu, moe_router_type=router_type, **norm)
    learner = router.learners()[0]
    learner.mean = learner.mean.bfloat16()
    router.route(microbatches(1)[0])
    with pytest.raises(ValueError, match=f"{learner.title}: mean is torch.bfloat16, and what is learned must be fp32"):
        update_codebooks(router)


def test_every_router_type_is_tested_here():
    assert {name.split("-")[0] for name in EVERYTHING} == set(ROUTERS)
