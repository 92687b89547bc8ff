"""Which of Megatron's optimizers take which weights of a layer."""

import types

import pytest
import torch

from tests.builders import make_layer

SHARDED = dict(moe_router_type="air", moe_air_shard_experts=True)
MATRICES = {
    "topk": {"router.weight"},
    "air": {"router.weight"},
    "air-sharded": {"router.weight"},
    "product_key": {"router.query_weight"},
    "hierarchical": {"router.weight", "router.group_weight"},
    "hash": set(),
    "vq": {"router.weight", "router.codes", "router.branch_weight"},
}


@pytest.mark.parametrize("name", MATRICES)
def test_muon_takes_matrices_and_its_scalar_optimizer_the_experts(megatron_cpu, name):
    """Megatron's rule; docs/layouts.md says the same."""
    from megatron.core.optimizer.layer_wise_optimizer import is_managed_by_layer_wise_optimizer

    layer = make_layer(megatron_cpu, **(SHARDED if name == "air-sharded" else dict(moe_router_type=name)))
    taken = {name for name, weight in layer.named_parameters() if is_managed_by_layer_wise_optimizer(weight)}
    assert taken == MATRICES[name]


def test_muon_orthogonalizes_the_centers_of_each_rank_by_themselves(megatron_cpu):
    """Whatever its mode for tensor parallelism: shards of centers are no shards of a tensor-parallel weight."""
    from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon

    weight = make_layer(megatron_cpu, **SHARDED).router.weight
    process_groups = types.SimpleNamespace(
        tp="tensor parallel", expt_tp="of experts", gtp_remat=None, expt_gtp_remat=None
    )
    muon = TensorParallelMuon([weight], tp_mode="duplicated", pg_collection=process_groups)
    seen = []
    muon.scaled_orthogonalize_fn = lambda grad, group, dim: seen.append(group) or grad
    muon.orthogonalize(weight, torch.ones_like(weight))
    assert seen == ["of experts"]
