"""Routers with all that their type can accumulate, and their state: what the tests of module state share."""

import pytest
import torch

from air_moe_megatron.routers import find_routers
from tests.builders import HIDDEN, VOCABULARY, tell_ids

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
