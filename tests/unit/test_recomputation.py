"""Forwards that are recomputed in the backward count once, by whichever checkpoint of torch or Megatron."""

from functools import partial

import pytest
import torch

from air_moe_megatron.sync import update_codebooks
from tests.builders import HIDDEN, make_layer
from tests.states import ALL_TYPES, BOTH_PATHS, assert_same_state, fields_of, give_ids, microbatches, state_of

pytestmark = pytest.mark.usefixtures("megatron_cpu")


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
