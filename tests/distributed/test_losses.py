"""Balancing losses over gloo ranks: with a list of every expert AIRRouter's gradients are those of TopKRouter."""

import pytest
import torch

from tests.processes import run_ranks

LOSSES = {
    "aux": dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.3),
    "seq-aux": dict(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.3),
    "global-aux": dict(moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.3),
    "z-loss": dict(moe_router_load_balancing_type="none", moe_z_loss_coeff=0.1),
}
LAYOUTS = {"DP2": {}, "CP2": dict(context_parallel_size=2)}
CASES = [(name, per_token) for name in LOSSES for per_token in (False, True)]
SHAPE = (5, 3)  # sequence and batch of a rank


def run(rank, groups, name, per_token):
    """Gradients and logged losses of both routers, for probs without a gradient of their own."""
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker

    from tests.unit.test_router_equals_topk import HIDDEN, make_routers

    results = []
    for router in make_routers(groups, calculate_per_token_loss=per_token, **LOSSES[name]):
        destroy_moe_metrics_tracker()
        hidden = torch.randn(*SHAPE, HIDDEN, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        probs, _ = router(hidden)
        (0.0 * probs).sum().backward()
        logged = {key: entry.values for key, entry in get_moe_metrics_tracker().metrics.items()}
        results.append({"input": hidden.grad, "weight": router.weight.grad, **logged})
    return results


def worker(rank, world_size, directory):
    from air_moe_megatron import cpu

    cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.set_num_threads(1)
    store = f"file://{directory}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    results = {}
    for layout, sizes in LAYOUTS.items():
        parallel_state.initialize_model_parallel(**sizes)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        for name, per_token in CASES:
            results[layout, name, per_token] = run(rank, groups, name, per_token)
        parallel_state.destroy_model_parallel()
    torch.save(results, f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.world_size(2), id="two-ranks")])
def ranks(request, tmp_path_factory):
    return run_ranks(worker, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "per_token"), CASES)
def test_losses_weigh_as_megatrons(ranks, layout, name, per_token):
    for results in ranks:
        topk, air = results[layout, name, per_token]
        assert topk["weight"].abs().max() > 1e-6 and topk.keys() == air.keys() and len(topk) == 3
        for key, wanted in topk.items():
            torch.testing.assert_close(
                air[key], wanted, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
            )
