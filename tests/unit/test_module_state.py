"""What our modules keep when a model is cast, recomputed, evaluated, frozen, copied, pickled, or built elsewhere."""

import copy
from functools import partial

import pytest
import torch

from air_moe_megatron.learned.module_state import HostCopy
from air_moe_megatron.routers import ROUTERS, find_routers
from air_moe_megatron.sync import discard_statistics, update_codebooks
from tests.builders import HIDDEN, VOCABULARY, make_layer, make_router, pickled, tell_ids

pytestmark = pytest.mark.usefixtures("megatron_cpu")

LOSSES = dict(moe_router_load_balancing_type=["aux_loss", "global_aux_loss"], moe_aux_loss_coeff=[0.1, 0.1])
BIAS = dict(moe_router_enable_expert_bias=True, moe_router_score_function="sigmoid")
NORM = dict(moe_router_input_norm="running")
# Per router type: all that a router of that type can accumulate.
EVERYTHING = {
    "topk": {**LOSSES, **BIAS, **NORM},
    "air": {**LOSSES, **BIAS, **NORM},
    "air-experts": {**LOSSES, **NORM, "moe_air_codebook_source": "experts", "moe_air_num_probes": 4},
    "product_key": LOSSES,
    "hierarchical": {**LOSSES, **NORM},
    "hash": {},
    "vq": NORM,
}
ALL_TYPES = pytest.mark.parametrize("name", EVERYTHING)
BOTH_PATHS = pytest.mark.parametrize("dispatch", ("stock", "compact"))


def fields_of(name):
    return dict(moe_router_type=name.split("-")[0], **EVERYTHING[name])


def microbatches(count, size=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 2, HIDDEN, generator=generator) for _ in range(count)]


def give_ids(module, size=10):
    for router in find_routers(module):
        tell_ids(router, torch.arange(2 * size).view(2, size) % VOCABULARY)


def state_of(module):
    """Everything that forwards and updates may change."""
    state = {name: value.clone() for name, value in module.state_dict(keep_vars=True).items() if "_extra" not in name}
    for name, part in module.named_modules():
        for accumulator in vars(part).get("_accumulators", ()):
            state[f"{name}.{accumulator}"] = getattr(part, accumulator).clone()
    return {name: value.detach() for name, value in state.items()}


def assert_same_state(actual, expected, exact=True):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if exact:
            assert torch.equal(actual[name], value), name
        else:
            torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


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


# Recomputation.


def reentrant(layer, hidden):
    return torch.utils.checkpoint.checkpoint(lambda x: layer(x)[0], hidden, use_reentrant=True)


def non_reentrant(layer, hidden):
    return torch.utils.checkpoint.checkpoint(lambda x: layer(x)[0], hidden, use_reentrant=False)


def selective(layer, hidden):
    """Stores results of operations that coarse stage, lists and statistics use too."""
    aten = torch.ops.aten
    stored = [aten.mm.default, aten.topk.default, aten.sort.stable, aten.index.Tensor, aten.sum.dim_IntList]
    contexts = partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, stored)
    return torch.utils.checkpoint.checkpoint(lambda x: layer(x)[0], hidden, use_reentrant=False, context_fn=contexts)


def megatrons(layer, hidden):
    from megatron.core.tensor_parallel import checkpoint

    return checkpoint(lambda x: layer(x)[0], False, hidden)


def nested(inner, outer):
    return lambda layer, hidden: outer(lambda x: (inner(layer, x),), hidden)


CHECKPOINTS = {
    "reentrant": reentrant,
    "non-reentrant": non_reentrant,
    "selective": selective,
    "megatron": megatrons,
    "reentrant-in-reentrant": nested(reentrant, reentrant),
    "non-reentrant-in-reentrant": nested(non_reentrant, reentrant),
    "reentrant-in-non-reentrant": nested(reentrant, non_reentrant),
    "non-reentrant-in-non-reentrant": nested(non_reentrant, non_reentrant),
}


def train_step(layer, run, order):
    """Forwards of three microbatches, then their backwards in another order; the gradients and what was counted."""
    outputs = []
    for hidden in microbatches(3):
        hidden = hidden.requires_grad_()
        outputs.append((hidden, run(layer, hidden)))
    for index in order:
        outputs[index][1].square().sum().backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return state_of(layer) | grads | {f"input {i}": hidden.grad for i, (hidden, _) in enumerate(outputs)}


@ALL_TYPES
@BOTH_PATHS
@pytest.mark.parametrize("checkpoint", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_recomputed_forward_counts_once(megatron_cpu, name, dispatch, checkpoint):
    found = []
    for run in (lambda layer, hidden: layer(hidden)[0], checkpoint):
        layer = make_layer(megatron_cpu, **fields_of(name), moe_dispatch=dispatch)
        give_ids(layer)
        found.append(train_step(layer, run, order=(0, 1, 2)))
        assert layer.router.expert_load.sum() == 3 * 20 * 4
        if dispatch == "compact":
            assert layer.token_dispatcher.traffic.row_bytes == 3 * 20 * 4 * HIDDEN
            assert layer.token_dispatcher.recomputed_traffic.row_bytes >= (run is checkpoint) * 3 * 20 * 4 * HIDDEN
    assert_same_state(found[1], found[0], exact=False)


@ALL_TYPES
@BOTH_PATHS
def test_a_selective_checkpoint_sees_the_same_operations_twice(megatron_cpu, name, dispatch):
    """It gives the results of the first forward to the operations of the second one in their order."""
    seen = {False: [], True: []}

    def policy(context, operation, *args, **kwargs):
        seen[context.is_recompute].append(str(operation))
        return torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, policy)
    layer = make_layer(megatron_cpu, **fields_of(name), moe_dispatch=dispatch)
    give_ids(layer)
    for hidden in microbatches(3):
        hidden.requires_grad_()
        with torch.utils.checkpoint.set_checkpoint_early_stop(False):
            out = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False, context_fn=contexts)[0]
            out.sum().backward()
        update_codebooks(layer)
    assert seen[True] == seen[False]


@pytest.mark.parametrize("checkpoint", ("reentrant", "non-reentrant", "megatron"))
def test_forwards_without_gradients_that_nothing_repeats_do_not_confuse_the_count(megatron_cpu, checkpoint):
    layer = make_layer(megatron_cpu, **fields_of("air"))
    with torch.no_grad():
        layer(microbatches(1)[0])
    train_step(layer, CHECKPOINTS[checkpoint], order=(2, 0, 1))
    assert layer.router.expert_load.sum() == 3 * 20 * 4
    assert layer.router.codebook.statistics[:, HIDDEN].sum() == 3 * 20


@pytest.mark.parametrize("checkpoint", ("reentrant", "non-reentrant", "megatron"))
def test_a_microbatch_with_two_backwards_counts_once(megatron_cpu, checkpoint):
    """As for two losses, while another microbatch is on its way."""
    found = []
    for run in (lambda layer, hidden: layer(hidden)[0], CHECKPOINTS[checkpoint]):
        layer = make_layer(megatron_cpu, **fields_of("air"))
        first, second = (run(layer, hidden.requires_grad_()) for hidden in microbatches(2))
        first.square().sum().backward(retain_graph=True)
        first.sum().backward()
        second.sum().backward()
        found.append(state_of(layer))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, msg=name)


def test_a_checkpoint_may_run_under_hooks_of_any_kind(megatron_cpu):
    """Hooks of saved tensors need no name, which tells those of torch's checkpoints from others."""
    layer, hidden = make_layer(megatron_cpu, **fields_of("air")), microbatches(1)[0].requires_grad_()
    keep = partial(lambda value: value)
    with torch.autograd.graph.saved_tensors_hooks(keep, keep):
        reentrant(layer, hidden).sum().backward()
    assert layer.router.num_routed == 20


def test_some_microbatches_may_be_recomputed_and_others_not(megatron_cpu):
    layer = make_layer(megatron_cpu, **fields_of("air"))
    runs = (megatrons, lambda layer, hidden: layer(hidden)[0], megatrons)
    outputs = [run(layer, hidden.requires_grad_()) for run, hidden in zip(runs, microbatches(3), strict=True)]
    for output in outputs:
        output.sum().backward()
    assert layer.router.expert_load.sum() == 3 * 20 * 4
    assert layer.router.codebook.statistics[:, HIDDEN].sum() == 3 * 20


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
    router.requires_grad_(False).route(microbatches(1)[0])  # rebuilds the lists that the last update made due
    update_codebooks(router)
    before = state_of(router)
    router.route(microbatches(1, seed=1)[0].requires_grad_())
    update_codebooks(router)
    after = state_of(router)
    logs = ("expert_load", "num_routed", "logged_before", "global_tokens_per_expert", "ga_steps")
    for state in (before, after):
        for key in logs:
            state.pop(f".{key}", None)
    assert_same_state(after, before)


# Copies.


def results(layer):
    give_ids(layer)
    layer.zero_grad()
    hidden = microbatches(1, seed=9)[0].requires_grad_()
    output = layer(hidden)[0]
    output.square().sum().backward()
    return [output, hidden.grad, *(parameter.grad for parameter in layer.parameters())]


@ALL_TYPES
@pytest.mark.parametrize("duplicate", (copy.deepcopy, pickled), ids=("deepcopy", "pickle"))
def test_a_copy_of_a_layer_works_as_the_layer(megatron_cpu, name, duplicate):
    """On the compact path; Megatron's own dispatchers hold process groups, which cannot be copied."""
    layer = make_layer(megatron_cpu, **fields_of(name))
    give_ids(layer)
    for parameter in layer.parameters():  # as Megatron's data-parallel wrapper
        parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros_like(parameter), False
    layer(microbatches(1)[0])[0].sum().backward()
    update_codebooks(layer)
    copied = duplicate(layer)
    assert layer.experts.weight1.allreduce is False
    for parameter, original in zip(copied.parameters(), layer.parameters(), strict=True):
        del original.main_grad, original.grad_added_to_main_grad
        assert vars(parameter) == vars(original)  # Megatron's marks
    assert copied.router.tp_dp_cp_group is layer.router.tp_dp_cp_group
    assert_same_state(state_of(copied), state_of(layer))
    for actual, expected in zip(results(copied), results(layer), strict=True):
        assert torch.equal(actual, expected)
    assert_same_state(state_of(copied), state_of(layer))
    assert not {parameter.data_ptr() for parameter in copied.parameters()} & {
        parameter.data_ptr() for parameter in layer.parameters()
    }


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_router_without_process_groups_is_one_rank_alone(megatron_cpu, name):
    """As a pickle is where Megatron's parallel state is not initialized."""
    router, alone = (make_router(megatron_cpu, **fields_of(name)) for _ in range(2))
    for attribute, value in list(vars(alone).items()):
        if isinstance(value, torch.distributed.ProcessGroup):
            setattr(alone, attribute, None)
    found = []
    for one in (router, alone):
        give_ids(one)
        hidden = microbatches(1)[0].requires_grad_()
        routes = one.route(hidden)
        parameters = list(one.parameters())
        found.append([routes.probs, *(torch.autograd.grad(routes.probs.sum(), parameters) if parameters else ())])
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual, expected)


def trained(groups, name, steps=3, **fields):
    router = make_router(groups, **fields_of(name), **fields)
    for step in range(steps):
        discard_statistics(router)
        give_ids(router)
        router(microbatches(1, seed=step)[0])
        update_codebooks(router)
    return router


def through_copy(own, others):
    own.copy_(others)


def through_data(own, others):
    """As a broadcast or an average of models writes: torch does not count the write."""
    version = own._version
    own.data.copy_(others)
    assert own._version == version


@pytest.mark.parametrize("on_host", (True, False), ids=("cpu", "device"))
@pytest.mark.parametrize("write", (through_copy, through_data), ids=lambda function: function.__name__)
@pytest.mark.parametrize("name", ("air", "air-experts", "product_key", "hierarchical"))
def test_buffers_that_another_has_written_are_read_again(megatron_cpu, monkeypatch, name, write, on_host):
    monkeypatch.setattr(HostCopy, "is_on_host", lambda _: on_host)
    source, copied = trained(megatron_cpu, name), make_router(megatron_cpu, **fields_of(name), seed=5)
    with torch.no_grad():
        for own, others in zip(
            (*copied.parameters(), *copied.buffers()), (*source.parameters(), *source.buffers()), strict=True
        ):
            write(own, others)
    assert_same_state({**state_of(copied), **accumulators(source)}, state_of(source))
    copied.eval()
    copied(microbatches(1, seed=9)[0])
    assert_same_state({**state_of(copied), **accumulators(source)}, state_of(source))
    copied.train()
    for router in (source, copied):
        discard_statistics(router)
        router(microbatches(1, seed=7)[0])
        update_codebooks(router)
    assert_same_state({**state_of(copied), **accumulators(source)}, state_of(source))


def test_a_step_begins_with_one_wait_for_the_device(megatron_cpu, monkeypatch):
    monkeypatch.setattr(HostCopy, "is_on_host", lambda _: False)
    routers, lists, tolist = [trained(megatron_cpu, "air") for _ in range(3)], [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor.shape) or tolist(tensor))
    discard_statistics(routers)
    assert len(lists) == 1
    assert all(router.index.is_built and router.codebook.updates_on_host == 3 for router in routers)
    assert len(lists) == 1


def test_a_write_that_forwards_have_missed_is_refused(megatron_cpu, monkeypatch):
    monkeypatch.setattr(HostCopy, "is_on_host", lambda _: False)
    router = trained(megatron_cpu, "air")
    discard_statistics(router)
    router.codebook.num_updates.data.fill_(40)
    router(microbatches(1)[0])
    with pytest.raises(ValueError, match=r"layer 1: .* call discard_statistics\(model\) after a broadcast"):
        update_codebooks(router)


def accumulators(module):
    names = {name for name, _ in module.named_buffers()} | {name for name, _ in module.named_parameters()}
    return {name: value for name, value in state_of(module).items() if name not in names}


@pytest.mark.parametrize("name", ("air", "air-experts", "product_key", "hierarchical"))
def test_a_checkpoint_forgets_what_was_accumulated_before(megatron_cpu, name):
    state = {key: value for key, value in trained(megatron_cpu, name).state_dict().items() if "_extra" not in key}
    found = []
    for has_run in (True, False):
        router = make_router(megatron_cpu, **fields_of(name), seed=5)
        if has_run:
            router(microbatches(1, seed=8)[0] + 3.0)
        router.load_state_dict(state, strict=False)
        router(microbatches(1, seed=9)[0])
        update_codebooks(router)
        found.append({key: value for key, value in state_of(router).items() if key in state})
    assert_same_state(*found)


@ALL_TYPES
@BOTH_PATHS
def test_a_state_of_other_parts_of_the_model_leaves_the_router_as_it_is(megatron_cpu, name, dispatch):
    """As of an adapter, or of frozen layers, with ``strict=False``."""
    layer = make_layer(megatron_cpu, **fields_of(name), moe_dispatch=dispatch)
    for hidden in microbatches(3):
        give_ids(layer)
        layer(hidden)
        update_codebooks(layer)
    before = state_of(layer)
    layer.load_state_dict({"experts.weight1": layer.experts.weight1.detach().clone()}, strict=False)
    assert_same_state(state_of(layer), before)


@pytest.mark.parametrize("steps", (0, 4))
def test_a_codebook_that_is_lost_in_loading_is_warned_of(megatron_cpu, caplog, steps):
    """The state of the parameters alone, such as averages, looks like that of plain top-k routing."""
    router = trained(megatron_cpu, "air", steps)
    with caplog.at_level("INFO"):
        router.load_state_dict(dict(router.named_parameters()), strict=False)
    (record,) = caplog.records
    assert record.getMessage() == f"codebook: none in what is loaded; it is learned anew, and {steps} updates are lost"
    assert record.levelname == ("WARNING" if steps else "INFO")
    assert not router.index.is_built and router.codebook.updates_on_host == 0


def test_a_checkpoint_without_a_codebook_starts_a_used_router_anew(megatron_cpu):
    fields = dict(moe_router_type="air", moe_air_num_clusters=8, moe_air_shortlist_size=12)
    weight = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(3))
    found = []
    for steps in (4, 0):
        router = make_router(megatron_cpu, **fields)
        for step in range(steps):
            discard_statistics(router)
            router(microbatches(1, seed=step)[0])
            update_codebooks(router)
        router.load_state_dict({"weight": weight})
        for step in (10, 11):
            discard_statistics(router)
            router(microbatches(1, seed=step)[0])
            update_codebooks(router)
        found.append(state_of(router))
    for counts in ("expert_load", "num_routed", "logged_before"):
        for state in found:
            del state[f".{counts}"]
    assert_same_state(*found)


def test_every_router_type_is_tested_here():
    assert {name.split("-")[0] for name in EVERYTHING} == set(ROUTERS)
