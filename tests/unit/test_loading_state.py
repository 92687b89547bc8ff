"""What our modules keep when they are copied, pickled, written by other code, or loaded."""

import copy

import pytest
import torch

from air_moe_megatron.learned.module_state import HostCopy
from air_moe_megatron.sync import discard_statistics, update_codebooks
from tests.builders import HIDDEN, make_layer, make_router, pickled
from tests.states import (
    ALL_TYPES,
    BOTH_PATHS,
    EVERYTHING,
    assert_same_state,
    fields_of,
    give_ids,
    microbatches,
    state_of,
)

pytestmark = pytest.mark.usefixtures("megatron_cpu")


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


def accumulators(module):
    names = {name for name, _ in module.named_buffers()} | {name for name, _ in module.named_parameters()}
    return {name: value for name, value in state_of(module).items() if name not in names}


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
    monkeypatch.setattr(HostCopy, "is_on_cpu", lambda _: on_host)
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
    monkeypatch.setattr(HostCopy, "is_on_cpu", lambda _: False)
    routers, lists, tolist = [trained(megatron_cpu, "air") for _ in range(3)], [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor.shape) or tolist(tensor))
    discard_statistics(routers)
    assert len(lists) == 1
    assert all(router.index.is_built and router.codebook.updates_on_host == 3 for router in routers)
    assert len(lists) == 1


def test_a_write_that_forwards_have_missed_is_refused(megatron_cpu, monkeypatch):
    monkeypatch.setattr(HostCopy, "is_on_cpu", lambda _: False)
    router = trained(megatron_cpu, "air")
    discard_statistics(router)
    router.codebook.num_updates.data.fill_(40)
    router(microbatches(1)[0])
    with pytest.raises(ValueError, match=r"layer 1: .* call discard_statistics\(model\) after a broadcast"):
        update_codebooks(router)


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


def test_lists_of_another_codebook_are_left_out(megatron_cpu):
    """Whoever drops the codebook from a state, to learn it anew, must not keep lists as old as the state."""
    state = {
        key: value for key, value in trained(megatron_cpu, "air", 60).state_dict().items() if "codebook" not in key
    }
    with pytest.raises(RuntimeError, match="Missing key.*codebook.codewords"):
        make_router(megatron_cpu, **fields_of("air")).load_state_dict(state)
    router = make_router(megatron_cpu, **fields_of("air"))
    router.load_state_dict(state, strict=False)
    for seed in range(3):
        discard_statistics(router)
        router.route(microbatches(1, seed=seed)[0])
        update_codebooks(router)
        assert 0 <= int(router.index.built_at) <= router.codebook.updates_on_host == seed + 1


@pytest.mark.parametrize("training", (False, True))
def test_lists_that_are_newer_than_the_codebook_are_made_anew(megatron_cpu, training):
    """As after a state without weights that brings an earlier codebook, or a write to its buffers."""
    router, early = (trained(megatron_cpu, "air", steps) for steps in (60, 20))
    router.codebook.load_state_dict(early.codebook.state_dict())
    expected = copy.deepcopy(router)
    expected.index.start_anew()
    routes = [one.train(training).route(microbatches(1)[0]) for one in (router, expected)]
    assert torch.equal(routes[0].topk_ids, routes[1].topk_ids)
    assert torch.equal(router.index.shortlist, expected.index.shortlist)
