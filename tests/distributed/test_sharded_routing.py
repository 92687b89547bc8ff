"""Sharded routing over gloo ranks: against the replicated router on the same ranks, and on one rank with all tokens."""

import os
from functools import partial

import pytest
import torch
from megatron.core.package_info import __version__ as megatron_core_version
from packaging.version import Version
from torch.utils.checkpoint import checkpoint

from tests.processes import rank_of, run_ranks

PARTS, STEPS, TOKENS = 4, 3, 6
SIZES = dict(
    moe_router_type="air", num_moe_experts=64, moe_air_num_clusters=40, moe_air_shortlist_size=16,
    moe_air_num_probes=2, moe_air_list_parts=PARTS, moe_ffn_hidden_size=2, moe_air_refresh_interval=3,
)  # fmt: skip
SHARDED = dict(moe_air_shard_experts=True)
ALL_LOSSES = dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.3, moe_z_loss_coeff=0.1)
BIASED = dict(moe_router_enable_expert_bias=True)
SCENARIOS = {
    "topk-only": {},
    "losses": ALL_LOSSES,
    "input-norm": dict(moe_router_input_norm="running", **ALL_LOSSES),
    "softmax-of-candidates": dict(moe_router_pre_softmax=True, moe_router_topk=1),
    "expert-bias": dict(moe_router_score_function="sigmoid", **BIASED),
    "expert-bias-with-losses": dict(moe_router_score_function="sqrtsoftplus", **BIASED, **ALL_LOSSES),
    "sequence-losses": dict(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.3),
    "global-losses": dict(moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.3),
    "explored": dict(moe_air_num_candidates=4, moe_air_num_explored=8, **ALL_LOSSES),
    "padding": ALL_LOSSES,
    "no-tokens-on-odd-ranks": {},
    "full-lists": dict(moe_air_shortlist_size=64, moe_air_num_probes=1, moe_air_num_clusters=8),
    "bf16": dict(bf16=True, params_dtype=torch.bfloat16, **ALL_LOSSES),
    "recomputed": ALL_LOSSES,
    "recomputed-in-hooks": ALL_LOSSES,
    "kernels": {},
}
if Version(megatron_core_version) < Version("0.18"):  # it has no score function sqrtsoftplus
    del SCENARIOS["expert-bias-with-losses"]
OF_ONE_RANK = (
    *("topk-only", "losses", "input-norm", "expert-bias", "explored", "padding", "no-tokens-on-odd-ranks"),
    "full-lists",
)
"""Whose microbatches do not depend on one another, so that one rank can run those of all ranks one after another."""
SAMPLED = ("topk-only", "input-norm", "expert-bias", "padding", "no-tokens-on-odd-ranks")
LAYOUTS = [
    pytest.param((1, 1), id="EP1"),
    pytest.param((2, 2), marks=pytest.mark.world_size(2), id="EP2"),
    pytest.param((4, 2), marks=[pytest.mark.world_size(4), pytest.mark.long], id="EP2-DP2"),
    pytest.param((4, 4), marks=[pytest.mark.world_size(4), pytest.mark.long], id="EP4"),
]
CLOSE = dict(rtol=1e-4, atol=2e-5)


def batch_of(name, rank, step):
    """[S, B, H] tokens of one rank, their padding mask [B, S] or None, and the gradient of their outputs."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    length = 0 if name.startswith("no-tokens") and rank % 2 else 4 + 3 * rank
    hidden = torch.randn(length, 2, 16, generator=generator)
    grad = torch.randn(length, 2, 16, generator=generator)
    mask = None
    if name == "padding":
        mask = torch.rand(2, length, generator=generator) < 0.4
        hidden[mask.t()] = float("nan")
    if name == "bf16":
        hidden, grad = hidden.bfloat16(), grad.bfloat16()
    return hidden, mask, grad


def layer_of(groups, name, **fields):
    from tests.builders import make_layer

    layer = make_layer(groups, **{**SIZES, **SCENARIOS[name], **fields})
    if layer.router.expert_bias is not None:
        generator = torch.Generator().manual_seed(9)
        layer.router.expert_bias.copy_(0.3 * torch.randn(64, generator=generator))
    return layer


def forward(layer, name, hidden, mask):
    run = partial(layer, padding_mask=mask)
    if name.startswith("recomputed"):
        return checkpoint(lambda tokens: run(tokens)[0], hidden, use_reentrant=name == "recomputed")
    return run(hidden)[0]


def step_on(layer, name, batches):
    """A step's microbatches: outputs and gradients of the tokens."""
    found = []
    for hidden, mask, grad in batches:
        hidden = hidden.requires_grad_()
        out = forward(layer, name, hidden, mask)
        out.backward(grad)
        hidden_grad = hidden.grad if mask is None else hidden.grad.masked_fill(mask.t().unsqueeze(2), 0.0)
        found.append((out.detach().clone(), hidden_grad))
    return found


def whole(tensor, group, dim=0):
    """The shards of all ranks together."""
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def train(layer, name, ranks, groups, is_sharded):
    """Steps of plain gradient descent; what each gives, and what the model then is."""
    from air_moe_megatron.sync import discard_statistics, update_codebooks

    results, router = [], layer.router
    for step in range(1 if name == "kernels" else STEPS):  # interpreted ones are slow
        discard_statistics(layer)
        for parameter in layer.parameters():
            parameter.grad = None
        found = step_on(layer, name, [batch_of(name, rank, step) for rank in ranks])
        centers, loads = router.weight.grad, router.expert_load.clone()
        gradients = [layer.experts.weight1.grad, layer.experts.weight2.grad]
        if groups is not None:
            for gradient in [*gradients, *([centers] if is_sharded else [])]:
                torch.distributed.all_reduce(gradient, group=groups.expt_dp)
            gradients = [whole(gradient, groups.ep) for gradient in gradients]
            if is_sharded:
                centers = whole(centers, groups.ep)
            else:
                torch.distributed.all_reduce(centers, group=groups.tp_dp_cp)
            torch.distributed.all_reduce(loads, group=groups.tp_dp_cp)
        results.append({"found": found, "gradients": [centers.clone(), *gradients], "loads": loads})
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.05 * parameter.grad
        update_codebooks(layer, None if groups is None else groups.tp_dp_cp)
    state = {name: value.clone() for name, value in router.codebook.state_dict().items()}
    state["num_rebuilds"] = router.index.progress[0].clone()
    return results, state


def bitwise(groups, alone, rank):
    """Codebooks and lists of steps whose tokens and centers are the same numbers on any number of ranks."""
    from air_moe_megatron.sync import update_codebooks
    from tests.builders import make_layer

    def tokens_of(rank, step):
        """Unit vectors of four halves, times powers of two: their sums are exact."""
        generator = torch.Generator().manual_seed(100 * step + rank)
        where = torch.rand(24, 16, generator=generator).argsort(dim=1)[:, :4]
        signs = torch.randint(2, (24, 4), generator=generator) - 0.5
        lengths = 2.0 ** torch.randint(3, (24, 1), generator=generator)
        return lengths * torch.zeros(24, 16).scatter_(1, where, signs)

    def states(layer, ranks, group):
        router, found = layer.router, []
        for step in range(30):
            for number in ranks:
                layer(tokens_of(number, step).unsqueeze(1))
            update_codebooks(layer, group)
            noise = 0.2 * torch.randn(64, 16, generator=torch.Generator().manual_seed(step))
            with torch.no_grad():
                router.weight += noise[router.first_expert :][: router.weight.shape[0]]
            index = {name: value.clone() for name, value in router.index.state_dict().items()}
            if group is not None:
                index |= {name: whole(index[name], groups.ep, dim) for name, dim in AXES.items()}
            found.append({"codewords": router.codebook.codewords.clone(), **index})
        return found

    group = groups.tp_dp_cp
    sharded = states(make_layer(groups, **SIZES, **SHARDED, **EP(groups)), [rank], group)
    if rank:
        return {"sharded": sharded}
    expected = states(make_layer(alone, **SIZES), range(group.size()), None)
    return {"sharded": sharded, "one rank": expected}


AXES = {"shortlist": 1, "pool": 1, "staged_keys": 0}


def EP(groups):
    return dict(expert_model_parallel_size=groups.ep.size())


def refusals(groups):
    """What each rank says when the last one has tokens that are not finite, or of another size."""
    last = groups.ep.rank() == groups.ep.size() - 1
    layer = layer_of(groups, "topk-only", **SHARDED, **EP(groups))
    messages = {}
    hidden = torch.ones(3, 1, 16)
    if last:
        hidden[1, 0, 2] = float("nan")
    with pytest.raises(ValueError) as error:
        layer(hidden)
    messages["nan"] = str(error.value)
    layer(torch.ones(3, 1, 16))
    return messages


def interrupted(groups, rank):
    """A step after a forward that failed between scores and selection, the step alone, and what the failure left."""
    from air_moe_megatron.sync import discard_statistics

    class Failure(Exception):
        pass

    def fail(*args, **kwargs):
        raise Failure

    steps, left = [], set()
    for is_interrupted in (True, False):
        layer = layer_of(groups, "losses", **SHARDED, **EP(groups))
        router, batches = layer.router, [batch_of("losses", rank, step) for step in range(2)]
        router(batches[0][0])
        if is_interrupted:
            before = dict(vars(router))
            router.apply_z_loss = fail
            with pytest.raises(Failure):
                router(batches[1][0].requires_grad_())
            del router.apply_z_loss
            left = {name for name, value in vars(router).items() if value is not before.get(name)}
        discard_statistics(layer)
        found = step_on(layer, "losses", batches)
        steps.append([*(value for pair in found for value in pair), *(one.grad for one in layer.parameters())])
    return {"interrupted": steps[0], "alone": steps[1], "left": left}


def in_flight(groups, rank):
    """Outputs and gradients of two microbatches: backwards after both forwards, as in a pipeline, and in turn."""
    results = []
    for name in ("losses", "recomputed", "recomputed-in-hooks"):
        for order in ("in turn", "first in, first out", "last in, first out"):
            layer = layer_of(groups, name, **SHARDED, **EP(groups))
            batches = [batch_of(name, rank, step) for step in range(2)]
            for hidden, _, _ in batches:
                hidden.requires_grad_()
            if order == "in turn":
                outs = [out for out, _ in step_on(layer, name, batches)]
            else:
                outs = [forward(layer, name, hidden, None) for hidden, _, _ in batches]
                pairs = list(zip(outs, batches, strict=True))
                for out, (_, _, grad) in pairs if order.startswith("first") else reversed(pairs):
                    out.backward(grad)
            grads = [hidden.grad for hidden, _, _ in batches] + [one.grad for one in layer.parameters()]
            results.append([*(out.detach() for out in outs), *grads])
    return results


def bytes_of(run, group):
    """What a function returns, and the bytes that this rank hands to each of its collectives."""
    sent = []
    names = ("all_to_all_single", "all_gather_into_tensor", "all_reduce")
    originals = {name: getattr(torch.distributed, name) for name in names}

    def watched(name):
        def call(*args, **kwargs):
            values = args[0] if name == "all_reduce" else args[1]
            times = group.size() if name == "all_gather_into_tensor" else 1  # one copy for each rank
            sent.append(times * values.numel() * values.element_size())
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(torch.distributed, name, watched(name))
    try:
        result = run()
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)
    return result, sent


def traffic(layer, rank, group):
    """Bytes that this rank hands to the collectives of one forward and backward, and what the dispatcher counts."""
    layer.token_dispatcher.traffic = type(layer.token_dispatcher.traffic)()
    hidden = torch.randn(TOKENS, 1, 16, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    out, in_forward = bytes_of(lambda: layer(hidden)[0], group)
    _, in_backward = bytes_of(lambda: out.backward(torch.ones_like(out)), group)
    received = layer.router.route(hidden.detach()).selected.received
    counted = vars(layer.token_dispatcher.traffic)
    return {"forward": in_forward, "backward": in_backward, "counted": counted, "pairs": sum(received)}


def sampled(groups, rank):
    """Recall, bounds and certificates of samples, of the sharded and the replicated router on the same ranks."""
    from air_moe_megatron.diagnostics.recall import measure

    found = {}
    for name in SAMPLED:
        hidden, mask, _ = batch_of(name, rank, 0)
        for form, fields in (("sharded", SHARDED), ("replicated", {})):
            layer = layer_of(groups, name, **fields, **EP(groups))
            with torch.no_grad():
                layer.router.weight *= 0.3  # so that some tokens are certified
            layer(hidden.clone(), padding_mask=mask)
            figures = measure(layer.router)
            found[name, form] = None if figures is None else figures._asdict()
    router = layer_of(groups, "topk-only", **SHARDED, **EP(groups)).router
    router(torch.randn(TOKENS, 1, 16, generator=torch.Generator().manual_seed(rank)))
    _, found["bytes"] = bytes_of(lambda: measure(router), groups.ep)
    return found


def results_of(groups, ep_size, rank, world_size):
    """All scenarios on one rank; starting the processes takes longer than running them."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    own = [torch.distributed.new_group([other]) for other in range(world_size)][rank]
    alone = ProcessGroupCollection(**{name: own for name in vars(groups)})
    results = {}
    for name in SCENARIOS:
        sharded = layer_of(groups, name, **SHARDED, **EP(groups))
        replicated = layer_of(groups, name, **EP(groups))
        initial = whole(sharded.router.weight.detach(), groups.ep), replicated.router.weight.detach().clone()
        results[name] = {"initial": initial, "replicated": train(replicated, name, [rank], groups, False)}
        if name == "kernels":
            os.environ["AIR_MOE_BACKEND"] = "triton"
        results[name]["sharded"] = train(sharded, name, [rank], groups, True)
        os.environ.pop("AIR_MOE_BACKEND", None)
        if name in OF_ONE_RANK and rank == 0:
            results[name]["one rank"] = train(layer_of(alone, name), name, range(world_size), None, False)
    xavier = [
        layer_of(groups, "losses", init_method=torch.nn.init.xavier_uniform_, **fields, **EP(groups)).router.weight
        for fields in (SHARDED, {})
    ]
    results["xavier"] = whole(xavier[0].detach(), groups.ep), xavier[1].detach().clone()
    results["bitwise"] = bitwise(groups, alone, rank)
    results["refusals"] = refusals(groups)
    results["interrupted"] = interrupted(groups, rank)
    results["in flight"] = in_flight(groups, rank)
    results["sampled"] = sampled(groups, rank)
    layer = layer_of(groups, "losses", **SHARDED, **EP(groups))
    results["traffic"] = traffic(layer, rank, groups.ep)
    index = layer.router.index
    held = {"weight": layer.router.weight, "lists": index.shortlist, "keys": index.staged_keys}
    results["ep_size"] = ep_size
    results["held"] = {name: value.untyped_storage().nbytes() // value.element_size() for name, value in held.items()}
    return results


def worker(ep_size, rank, world_size, directory):
    with rank_of(rank, world_size, directory, expert_model_parallel_size=ep_size) as groups:
        torch.save(results_of(groups, ep_size, rank, world_size), f"{directory}/{rank}.pt")


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request, tmp_path_factory):
    """What every rank found, in the order of the ranks."""
    num_ranks, ep_size = request.param
    return run_ranks(partial(worker, ep_size), num_ranks, tmp_path_factory.mktemp("ranks"))


def assert_alike(found, expected, name):
    if name == "bf16":
        error = (found.float() - expected.float()).square().mean().sqrt()
        assert error <= 0.02 * expected.float().square().mean().sqrt() + 1e-6
    else:
        torch.testing.assert_close(found, expected, **CLOSE)


def test_a_method_that_looks_at_the_shape_makes_the_centers_of_a_replicated_router(ranks):
    for results in ranks:
        assert torch.equal(*results["xavier"])


@pytest.mark.parametrize("name", SCENARIOS)
def test_outputs_losses_and_gradients_equal_those_of_the_replicated_router(ranks, name):
    for results in (results[name] for results in ranks):
        assert torch.equal(*results["initial"])
        (found, state), (expected, wanted_state) = results["sharded"], results["replicated"]
        for got, wanted in zip(found, expected, strict=True):
            assert torch.equal(got["loads"], wanted["loads"])
            for pair, wanted_pair in zip(got["found"], wanted["found"], strict=True):
                for value, wanted_value in zip(pair, wanted_pair, strict=True):
                    assert_alike(value, wanted_value, name)
            for gradient, wanted_gradient in zip(got["gradients"], wanted["gradients"], strict=True):
                assert wanted_gradient.abs().sum() > 0
                assert_alike(gradient, wanted_gradient, name)
        for key, value in wanted_state.items():
            torch.testing.assert_close(state[key], value, **CLOSE)


@pytest.mark.parametrize("name", OF_ONE_RANK)
def test_the_model_does_not_depend_on_the_number_of_ranks(ranks, name):
    expected, wanted_state = ranks[0][name]["one rank"]
    for rank, results in enumerate(ranks):
        found, state = results[name]["sharded"]
        for got, wanted in zip(found, expected, strict=True):
            assert torch.equal(got["loads"], wanted["loads"])
            for value, wanted_value in zip(got["found"][0], wanted["found"][rank], strict=True):
                assert_alike(value, wanted_value, name)
            for gradient, wanted_gradient in zip(got["gradients"], wanted["gradients"], strict=True):
                assert_alike(gradient, wanted_gradient, name)
        for key, value in wanted_state.items():
            torch.testing.assert_close(state[key], value, **CLOSE)


def test_codebooks_and_lists_are_bitwise_those_of_one_rank(ranks):
    expected = ranks[0]["bitwise"]["one rank"]
    assert int(expected[-1]["progress"][0]) > 5
    for results in ranks:
        for step, (found, wanted) in enumerate(zip(results["bitwise"]["sharded"], expected, strict=True)):
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                assert torch.equal(found[name], value), (step, name)


def test_codebooks_are_bitwise_equal_on_all_ranks(ranks):
    for name in SCENARIOS:
        states = [results[name]["sharded"][1] for results in ranks]
        for key, value in states[0].items():
            assert all(torch.equal(state[key], value) for state in states), (name, key)


def test_what_is_wrong_on_one_rank_is_an_error_on_every_rank(ranks):
    for found in (results["refusals"] for results in ranks):
        last = ranks[0]["ep_size"] - 1
        assert f"of the routing probs of expert-parallel rank {last} are NaN or infinite" in found["nan"]


def test_a_forward_that_fails_leaves_nothing_for_the_next_one(ranks):
    for found in (results["interrupted"] for results in ranks):
        assert found["left"] <= {"_is_counted", "_learns"}
        for value, wanted in zip(found["interrupted"], found["alone"], strict=True):
            assert torch.equal(value, wanted)


def test_forwards_before_their_backwards_are_those_of_microbatches_in_turn(ranks):
    """Recomputed or not: the rows and pairs of a forward are its own. Gradients are summed in other orders."""
    for found in (results["in flight"] for results in ranks):
        for values in found[1:]:
            for value, wanted in zip(values, found[0], strict=True):
                torch.testing.assert_close(value, wanted, **CLOSE)


def test_bytes_of_every_collective_are_those_of_the_formula(ranks):
    """Of T tokens on each of D ranks, H = 16, K = 4, P = 2, M = 16, L = 16, in fp32."""
    num_ranks = ranks[0]["ep_size"]
    rows = num_ranks * TOKENS * 16 * 4
    width = min(16, 2 * 16 // num_ranks)  # candidates that an owner returns
    codewords, numbers, marks = num_ranks * TOKENS * 2 * 4, num_ranks * TOKENS * width * 4, num_ranks * TOKENS * width
    probs, kept, sizes, invalid = TOKENS * 4 * 4, TOKENS * 16 * 4, num_ranks * 7 * 8, num_ranks * 8
    for found in (results["traffic"] for results in ranks):
        pairs = 4 * found["pairs"]  # of the probs' gradients, on their way home
        if num_ranks > 1:
            assert found["forward"] == [sizes, rows, codewords, numbers, numbers, marks, invalid, probs, rows]
            assert found["backward"] == [rows, pairs, kept, rows]
        else:
            assert found["forward"] == found["backward"] == []
        counted, away = found["counted"], num_ranks - 1
        assert counted["row_bytes"] == rows and counted["remote_row_bytes"] == rows // num_ranks * away
        assert counted["pair_bytes"] == codewords + 2 * numbers + marks + probs
        remote = (codewords + 2 * numbers + marks) // num_ranks * away
        assert remote <= counted["remote_pair_bytes"] <= remote + probs


@pytest.mark.parametrize("name", SAMPLED)
def test_recall_bounds_and_certificates_are_those_of_the_replicated_router(ranks, name):
    for rank, results in enumerate(ranks):
        found, expected = (results["sampled"][name, form] for form in ("sharded", "replicated"))
        if name.startswith("no-tokens") and rank % 2:
            assert found is expected is None
            continue
        mass = expected["mass_recall"]
        assert len(mass) > 0 and 0 < mass.min() < mass.max() < 1
        for key, wanted in expected.items():
            torch.testing.assert_close(found[key], wanted, rtol=1e-5, atol=1e-6)


def test_bytes_of_a_sample_are_those_of_the_formula(ranks):
    """Of T tokens on each of D ranks, H = 16, K = 4, P = 2, in fp32."""
    num_ranks = ranks[0]["ep_size"]
    num_rows = num_ranks * TOKENS
    found = [num_rows * size for size in (16 * 4, 2 * 4, 2 * 4 * 8, 8)]
    for sent in (results["sampled"]["bytes"] for results in ranks):
        expected = [num_ranks * 8, *found, 16 * 4, 3 * 4, num_rows * (5 + 2 + 2 * 4) * 8]
        assert sent == (expected if num_ranks > 1 else [])


def test_a_rank_holds_its_share_of_what_belongs_to_experts(ranks):
    num_ranks = ranks[0]["ep_size"]
    for held in (results["held"] for results in ranks):
        assert held == {"weight": 64 // num_ranks * 16, "lists": 40 * 16 // num_ranks, "keys": 64 // num_ranks}
