"""Gradients under Megatron's data-parallel wrapper are those of torch, whatever else contributes to a weight."""

import pytest
import torch

from tests.builders import HIDDEN, make_layer

pytestmark = pytest.mark.usefixtures("megatron_cpu")

LAYERS = {
    "air": dict(moe_router_type="air"),
    "air-losses": dict(moe_router_type="air", moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1),
    "hierarchical": dict(moe_router_type="hierarchical"),
    "topk": dict(moe_router_type="topk"),
}
EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)


def penalty(layer):
    return sum(parameter.square().sum() for parameter in layer.parameters())


def in_one_backward(layer, loss):
    (loss + penalty(layer)).backward()


def in_two_backwards(layer, loss):
    loss.backward()
    penalty(layer).backward()


def of_penalty_first(layer, loss):
    penalty(layer).backward()
    loss.backward()


def of_constant_slope(layer, loss):
    """The gradient of a sum is a single number without memory, as is the stand-in for what is in ``main_grad``."""
    (loss + sum(parameter.sum() for parameter in layer.parameters())).backward()


def through_hooks(layer, loss):
    for parameter in layer.parameters():
        parameter.register_hook(lambda grad: 3.0 * grad)
    loss.backward()


def alone(layer, loss):
    loss.backward()


def gradients(groups, name, backward, wrapped, steps=2):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    layer = make_layer(groups, **LAYERS[name])
    model = layer
    if wrapped:
        model = DistributedDataParallel(layer.config, DistributedDataParallelConfig(), layer)
        model.zero_grad_buffer()
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):  # microbatches
        hidden = torch.randn(6, 2, HIDDEN, generator=generator)
        backward(layer, model(hidden)[0].square().sum())
    return {name: one.main_grad if wrapped else one.grad for name, one in layer.named_parameters()}


@EVERY_LAYER
@pytest.mark.parametrize(
    "backward",
    (alone, in_one_backward, in_two_backwards, of_penalty_first, of_constant_slope, through_hooks),
    ids=lambda function: function.__name__,
)
def test_what_else_contributes_to_a_weight_is_added(megatron_cpu, name, backward):
    steps = 1 if backward is through_hooks else 2
    plain, wrapped = (gradients(megatron_cpu, name, backward, one, steps) for one in (False, True))
    for key, expected in plain.items():
        torch.testing.assert_close(wrapped[key], expected, rtol=1e-5, atol=1e-6)


@EVERY_LAYER
def test_a_gradient_that_is_asked_for_is_returned_and_not_accumulated(megatron_cpu, name):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    found = []
    for wrapped in (False, True):
        layer = make_layer(megatron_cpu, **LAYERS[name])
        if wrapped:
            DistributedDataParallel(layer.config, DistributedDataParallelConfig(), layer).zero_grad_buffer()
        hidden = torch.randn(6, 2, HIDDEN, generator=torch.Generator().manual_seed(1))
        found.append(torch.autograd.grad(layer(hidden)[0].square().sum(), list(layer.parameters())))
    assert not any(parameter.main_grad.any() for parameter in layer.parameters())
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_forward_that_is_used_twice_counts_twice(megatron_cpu):
    def twice(layer, loss):
        hidden = torch.randn(6, 2, HIDDEN, generator=torch.Generator().manual_seed(7))
        (loss + layer(hidden)[0].sum()).backward()

    plain, wrapped = (gradients(megatron_cpu, "air", twice, one) for one in (False, True))
    for key, expected in plain.items():
        torch.testing.assert_close(wrapped[key], expected, rtol=1e-5, atol=1e-6)
