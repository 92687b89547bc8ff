"""Product keys over gloo ranks: repeated experts on the compact path, and batch-normalized queries, as one rank."""

import os

import pytest
import torch

from tests.processes import rank_of, ranks_fixture, run_ranks

TOKENS = 23  # of all ranks
SPLITS = {1: (0, 23), 2: (0, 8, 23), 3: (0, 8, 8, 23)}  # unequal; the second rank of three has none
FIELDS = {
    "batchnorm": dict(moe_product_key_heads=4, moe_router_topk=8),
    "on-tokens": dict(moe_product_key_heads=4, moe_router_topk=8, moe_product_key_on_tokens=True),
}


def run(name, rank, world_size, groups):
    """Output, ids and gradients of one rank's part of the tokens."""
    from air_moe_megatron.sync import update_codebooks
    from tests.builders import HIDDEN, make_layer

    fields = dict(num_moe_experts=36, moe_router_type="product_key", expert_model_parallel_size=world_size)
    layer = make_layer(groups, **fields, **FIELDS[name])
    with torch.no_grad():  # two heads alike: experts are found twice
        if layer.router.on_tokens:
            for keys in (layer.router.keys1, layer.router.keys2):
                keys[1] = keys[0]
        else:
            width = 2 * layer.router.sizes.key_dim
            layer.router.query_weight[width : 2 * width] = layer.router.query_weight[:width]
    generator = torch.Generator().manual_seed(3)
    first, last = SPLITS[world_size][rank : rank + 2]
    hidden = torch.randn(TOKENS, 1, HIDDEN, generator=generator)[first:last].clone().requires_grad_()
    grad = torch.randn(TOKENS, 1, HIDDEN, generator=generator)[first:last]
    out, _ = layer(hidden)
    parameters = dict(layer.named_parameters())
    grads = torch.autograd.grad(out, [hidden, *parameters.values()], grad)
    update_codebooks(layer, groups.tp_dp_cp)
    return {
        "ids": layer.router.route(hidden.detach()).topk_ids,
        "output": out.detach(),
        "input": grads[0],
        "gradients": dict(zip(parameters, grads[1:], strict=True)),
        "statistics": {key: value for key, value in layer.router.state_dict().items() if "query_norm" in key},
    }


def worker(rank, world_size, directory):
    with rank_of(rank, world_size, directory, expert_model_parallel_size=world_size) as groups:
        results = {(name, "torch"): run(name, rank, world_size, groups) for name in FIELDS}
        os.environ["AIR_MOE_BACKEND"] = "triton"
        results |= {(name, "triton"): run(name, rank, world_size, groups) for name in FIELDS}
        torch.save(results, f"{directory}/{rank}.pt")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    return run_ranks(worker, 1, tmp_path_factory.mktemp("one"))[0]


ranks = ranks_fixture(worker, 2, 3, name="EP{}")


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("name", FIELDS)
def test_ranks_equal_one_rank_on_all_tokens(one_rank, ranks, name, backend):
    found, expected = [results[name, backend] for results in ranks], one_rank[name, "torch"]
    close = dict(rtol=1e-4, atol=1e-5)
    repeated = [len(set(row)) < len(row) for row in expected["ids"].tolist()]
    assert all(repeated)
    for key in ("ids", "output", "input"):
        torch.testing.assert_close(torch.cat([part[key] for part in found]), expected[key], **close)
    for key, wanted in expected["gradients"].items():
        parts = [part["gradients"][key] for part in found]
        whole = torch.cat(parts) if key.startswith("experts.") else sum(parts)
        torch.testing.assert_close(whole, wanted, **close, msg=lambda text, key=key: f"{key}: {text}")
    for part in found:
        for key, wanted in expected["statistics"].items():
            torch.testing.assert_close(part["statistics"][key], wanted, **close)


@pytest.mark.parametrize("name", FIELDS)
def test_kernels_take_repeated_experts(one_rank, name):
    for key in ("ids", "output", "input"):
        torch.testing.assert_close(one_rank[name, "triton"][key], one_rank[name, "torch"][key], rtol=1e-4, atol=1e-5)
    for key, wanted in one_rank[name, "torch"]["gradients"].items():
        torch.testing.assert_close(one_rank[name, "triton"]["gradients"][key], wanted, rtol=1e-4, atol=1e-5)
