"""ExactRouter is Megatron's TopKRouter: experts, probs, gradients, losses, counts."""

import pytest

from air_moe_megatron.routers.exact import ExactRouter
from tests.unit.test_router_equals_topk import LOSSES, SCORES, assert_equal, make_config, make_inputs, run

pytestmark = pytest.mark.usefixtures("megatron_cpu")

OTHERS = {
    "plain": {},
    "bias": dict(add_bias_linear=True),
    "groups": dict(moe_router_num_groups=4, moe_router_group_topk=2),
    "forced-balance": dict(moe_router_force_load_balancing=True),
    "forced-bias": dict(moe_router_force_biased=0.5),
    "jitter-z-loss": dict(moe_input_jitter_eps=0.1, moe_z_loss_coeff=0.05),
    "fp64": dict(moe_router_dtype="fp64"),
    "per-token-loss": dict(calculate_per_token_loss=True, moe_z_loss_coeff=0.05),
}


def compare(pg_collection, padding=False, **settings):
    from megatron.core.transformer.moe.router import TopKRouter

    routers = [router(make_config("topk", **settings), pg_collection) for router in (TopKRouter, ExactRouter)]
    routers[1].load_state_dict(routers[0].state_dict())
    for router in routers:
        router.set_layer_number(2)
    inputs = make_inputs((7, 3), num_microbatches=2, padding=padding)
    expected, found = (run(router, *inputs) for router in routers)
    assert_equal(found, expected)
    assert len(found.losses) == len(expected.losses)


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES)
def test_scores_and_losses(megatron_cpu, scores, losses):
    compare(megatron_cpu, **{**scores, **losses})


@pytest.mark.parametrize("losses", ("no-loss", "aux-seq-global"))
@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_other_options(megatron_cpu, settings, losses):
    compare(megatron_cpu, **settings, **LOSSES[losses])


@pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES)
def test_padding(megatron_cpu, losses):
    compare(megatron_cpu, padding=True, moe_z_loss_coeff=0.05, **losses)
