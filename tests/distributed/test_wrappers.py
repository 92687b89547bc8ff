"""Routers within torch's own wrappers: N ranks learn what one rank learns from all their tokens."""

import pytest
import torch

from tests.processes import rank_of, ranks_fixture

HIDDEN, STEPS, MICROBATCHES, RATE = 16, 3, 2, 0.5
NORM = dict(moe_router_input_norm="running")
TYPES = {
    "topk": NORM,
    "air": {**NORM, "moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"},
    "air-experts": {**NORM, "moe_air_codebook_source": "experts", "moe_air_num_probes": 4},
    "product_key": {},
    "hierarchical": NORM,
    "vq": {**NORM, "moe_vq_loss_coeff": 1e-9},  # its loss is a mean over the tokens of a rank
}
WRAPPERS = ("ddp", "fsdp", "flat-fsdp")
# Sums over ranks and microbatches in another order, carried through three steps with a large rate.
CLOSE = dict(rtol=1e-3, atol=1e-4)


class Routed(torch.nn.Module):
    """A model that is one router: its output is the probs."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, hidden):
        return self.router(hidden)[0]


def tokens_of(rank, step, microbatch):
    generator = torch.Generator().manual_seed(100 * step + 10 * microbatch + rank)
    return torch.randn(12 + 9 * rank, 1, HIDDEN, generator=generator)


def train(model, router, shares, group, scale):
    """Plain gradient steps on the sum over all tokens; ``shares`` are the ranks whose tokens this one takes."""
    from air_moe_megatron.sync import discard_statistics, update_codebooks

    counts = []
    for step in range(STEPS):
        discard_statistics(model)
        model.zero_grad()
        for microbatch in range(MICROBATCHES):
            hidden = torch.cat([tokens_of(rank, step, microbatch) for rank in shares])
            (scale * model(hidden).square().sum()).backward()
        if router.local_tokens_per_expert is not None:
            counts.append(router.local_tokens_per_expert.clone())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
        update_codebooks(model, group)
    return counts


def full(tensor):
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(groups, name, wrapper):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    from tests.builders import make_router

    fields = dict(moe_router_type=name.split("-")[0], **TYPES[name])
    world_size = groups.tp_dp_cp.size()
    router = make_router(groups, **fields)
    model = Routed(router)
    if wrapper == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif wrapper == "flat-fsdp":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    else:
        fully_shard(router, mesh=init_device_mesh("cpu", (world_size,)))
    scale = world_size  # both wrappers take the mean of gradients over ranks
    counts = train(model, router, (groups.tp_dp_cp.rank(),), groups.tp_dp_cp, scale)
    whole = model if wrapper == "flat-fsdp" else router  # only the wrapper gathers its parameters
    state = {key.removeprefix("router."): full(value).clone() for key, value in whole.state_dict().items()}
    return state | {f"counts {step}": count for step, count in enumerate(counts)}


def reference(groups, name, world_size):
    from tests.builders import make_router

    router = make_router(groups, moe_router_type=name.split("-")[0], **TYPES[name])
    for attribute, value in list(vars(router).items()):
        if isinstance(value, torch.distributed.ProcessGroup):
            setattr(router, attribute, None)
    counts = train(Routed(router), router, range(world_size), None, 1.0)
    return dict(router.state_dict()) | {f"counts {step}": count for step, count in enumerate(counts)}


def worker(rank, world_size, directory):
    with rank_of(rank, world_size, directory) as groups:
        results = {(name, wrapper): run(groups, name, wrapper) for name in TYPES for wrapper in WRAPPERS}
        if rank == 0:
            results |= {(name, "one rank"): reference(groups, name, world_size) for name in TYPES}
        torch.save(results, f"{directory}/{rank}.pt")


ranks = ranks_fixture(worker, 2)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_routers_learn_what_one_rank_learns_from_all_tokens(ranks, wrapper, name):
    """torch's DDP overwrites buffers with those of rank 0 in every forward, and so twice in a step here."""
    expected = ranks[0][name, "one rank"]
    for key, wanted in expected.items():
        found = [results[name, wrapper][key] for results in ranks]
        if key.startswith("counts"):  # each rank has those of its own tokens
            assert torch.equal(sum(found), wanted), key
            continue
        assert torch.equal(*found), key
        torch.testing.assert_close(found[0], wanted, **CLOSE, msg=lambda m, key=key: f"{key}: {m}")
