"""First layers by hash: which layers they are, what routers layers get, and what cannot be."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint

from air_moe_megatron import AIRMoELayer
from air_moe_megatron.config import (
    AIRFields,
    hash_layer_config,
    hash_layer_numbers,
    is_plain_topk,
    num_hash_layers,
    raise_first,
    unused,
    validate,
)
from air_moe_megatron.layer.experts import GranularExperts
from air_moe_megatron.routers import ROUTERS, HashRouter, find_routers
from air_moe_megatron.routers.hashing import WaitingIds, hand_over_token_ids
from air_moe_megatron.specs import air_hybrid_stack_spec, require_routers, with_air_layers
from air_moe_megatron.sync import discard_statistics
from tests.builders import HIDDEN, STOCK, VOCABULARY, make_config, make_layer, make_router, pickled, tell_ids

pytestmark = pytest.mark.usefixtures("megatron_cpu")

MIXED = dict(moe_router_type="air", num_layers=4, moe_num_hash_layers=1)
FREQUENCIES = st.integers(1, 4) | st.lists(st.integers(0, 1), min_size=8, max_size=8).filter(any)


def naive_moe_layers(frequency, num_layers=8):
    """Numbers from 1, as Megatron's ``get_gpt_decoder_layer_specs`` reads the frequency."""
    if isinstance(frequency, int):
        return [layer + 1 for layer in range(num_layers) if layer % frequency == 0]
    return [layer + 1 for layer in range(num_layers) if frequency[layer] == 1]


@given(frequency=FREQUENCIES, number=st.integers(-1, 9))
def test_they_are_the_first_with_experts(frequency, number):
    fields = dict(num_layers=8, moe_layer_freq=frequency, moe_num_hash_layers=number)
    expected = naive_moe_layers(frequency)
    if not 0 <= number < len(expected):
        with pytest.raises(ValueError, match=rf"moe_num_hash_layers \({number}\) must be from 0 to below"):
            make_config(moe_router_type="air", **fields)
    else:
        assert hash_layer_numbers(make_config(moe_router_type="air", **fields)) == expected[:number]


@given(
    frequency=FREQUENCIES,
    number=st.integers(1, 7),
    stages=st.sampled_from([(1, None), (2, None), (4, None), (2, 2), (4, 2), (2, 4)]),
)
def test_they_are_beside_the_embedding(frequency, number, stages):
    numbers = naive_moe_layers(frequency)
    if number >= len(numbers):
        return
    num_stages, num_chunks = stages
    fields = dict(pipeline_model_parallel_size=num_stages, virtual_pipeline_model_parallel_size=num_chunks)
    if num_stages > 1:
        fields["pipeline_dtype"] = torch.float32
    given = dict(num_layers=8, moe_layer_freq=frequency, moe_num_hash_layers=number, **fields)
    beside = 8 // (num_stages * (num_chunks or 1))  # layers 1, 2, ... of the first chunk
    last = numbers[number - 1]
    if last <= beside:
        assert hash_layer_numbers(make_config(moe_router_type="air", **given))[-1] == last
    else:
        with pytest.raises(ValueError) as error:
            make_config(moe_router_type="air", **given)
        for words in (f"moe_num_hash_layers ({number}) makes layer {last} a hash layer", f"the {beside} layers of the"):
            assert words in str(error.value)


@pytest.mark.parametrize(
    "fields, fits",
    [
        (dict(num_layers_in_first_pipeline_stage=1, moe_num_hash_layers=1), True),
        (dict(num_layers_in_first_pipeline_stage=1, moe_num_hash_layers=2), False),
        (dict(pipeline_model_parallel_layout="Ettt|tL", moe_num_hash_layers=3), True),
        (dict(pipeline_model_parallel_layout="Et|tttL", moe_num_hash_layers=2), False),
    ],
    ids=("short-first-stage", "beyond-it", "layout", "beyond-the-layout"),
)
def test_uneven_stages_are_looked_at(fields, fits):
    fields = {**MIXED, **dict(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32), **fields}
    if fits:
        assert len(hash_layer_numbers(make_config(**fields))) == fields["moe_num_hash_layers"]
    else:
        with pytest.raises(ValueError, match="which must be among the 1 layers of the first pipeline stage"):
            make_config(**fields)


def make_moe_layer(groups, config, number, **more):
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    submodules = MoESubmodules(experts=GranularExperts, router=ROUTERS[config.moe_router_type])
    layer = AIRMoELayer(config, submodules, None, groups, **more)
    if number is not None:
        layer.set_layer_number(number)
    return layer


@pytest.mark.parametrize("router_type", sorted(set(ROUTERS) - {"hash"}))
@pytest.mark.parametrize("path", ({}, dict(moe_dispatch="stock")), ids=("compact", "stock"))
def test_a_layer_routes_by_its_number(megatron_cpu, router_type, path):
    config = make_config(**{**MIXED, "moe_router_type": router_type, "num_layers": 3, "moe_num_hash_layers": 2, **path})
    kinds = [type(make_moe_layer(megatron_cpu, config, number).router) for number in (1, 2, 3)]
    assert kinds == [HashRouter, HashRouter, ROUTERS[router_type]]
    assert type(make_moe_layer(megatron_cpu, config, 1, is_mtp_layer=True).router) is ROUTERS[router_type]
    assert type(make_moe_layer(megatron_cpu, config, 1, hash_layers=[3]).router) is ROUTERS[router_type]
    # The experts, and which of them each token id has, are those of a model that hashes every layer.
    layer, alone = make_moe_layer(megatron_cpu, config, 2), make_router(megatron_cpu, moe_router_type="hash", **path)
    alone.set_layer_number(2)
    ids = torch.randint(VOCABULARY, (3, 5))
    for router in (layer.router, alone):
        tell_ids(router, ids)
    hidden = torch.randn(5, 3, HIDDEN)
    assert torch.equal(layer.router.route(hidden).topk_ids, alone.route(hidden).topk_ids)
    assert layer(hidden)[0].shape == hidden.shape


def test_a_layer_without_a_number_has_no_router_yet(megatron_cpu):
    layer = make_moe_layer(megatron_cpu, make_config(**MIXED), None)
    with pytest.raises(ValueError, match=r"layer_number \(None\) must be set"):
        layer(torch.randn(5, 3, HIDDEN))
    layer.set_layer_number(2)
    layer.set_layer_number(3)
    with pytest.raises(ValueError, match=r"layer_number \(1\) must stay that of other layers, as 3"):
        layer.set_layer_number(1)


SETTINGS_OF_OTHERS = dict(
    moe_router_input_norm="running", moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1,
    moe_z_loss_coeff=0.1, moe_input_jitter_eps=0.1, moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
)  # fmt: skip


def test_what_other_layers_do_with_scores_leaves_hash_layers_alone(megatron_cpu):
    config = make_config(**MIXED, **SETTINGS_OF_OTHERS)
    router, other = (make_moe_layer(megatron_cpu, config, number).router for number in (1, 2))
    assert other.input_norm is not None and other.expert_bias is not None
    assert router.input_norm is None and not hasattr(router, "expert_bias") and not list(router.parameters())
    assert router.learners() == []
    tell_ids(router, torch.randint(VOCABULARY, (3, 5)))
    assert torch.equal(router.route(torch.randn(5, 3, HIDDEN)).probs, torch.full((15, 4), 0.25))


def test_weights_sum_to_what_the_others_sum_to(megatron_cpu):
    fields = dict(moe_router_topk_scaling_factor=3.0, moe_product_key_heads=2, moe_router_topk=4)
    for router_type, total in (("air", 3.0), ("product_key", 6.0)):
        of_type = fields if router_type == "product_key" else dict(moe_router_topk_scaling_factor=3.0)
        config = make_config(**{**MIXED, "moe_router_type": router_type}, **of_type)
        for number in (1, 2):
            router = make_moe_layer(megatron_cpu, config, number).router
            tell_ids(router, torch.randint(VOCABULARY, (1, 7)))
            probs = router.route(torch.randn(7, 1, HIDDEN)).probs
            torch.testing.assert_close(probs.sum(dim=1), torch.full((7,), total))


def make_gpt(groups, mtp=False, **fields):
    """A GPT model of Megatron's local layers, with tokens and its loss."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec

    torch.manual_seed(1)
    config = make_config(
        moe_hash_vocab_size=VOCABULARY, hidden_dropout=0.0, attention_dropout=0.0, masked_softmax_fusion=False,
        bias_dropout_fusion=False, gradient_accumulation_fusion=False, **fields,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    ours = with_air_layers(spec, config)
    mtp_spec = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False) if mtp else None
    model = GPTModel(
        config, ours, VOCABULARY, 8, pg_collection=groups, position_embedding_type="rope",
        mtp_block_spec=with_air_layers(mtp_spec, config),
    )  # fmt: skip
    hand_over_token_ids(require_routers([model.train()]))
    return model


def loss_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(VOCABULARY, (2, 9), generator=generator)
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)  # True: not attended to
    positions = torch.arange(8).expand(2, 8)
    return model(text[:, :-1], positions, mask, labels=text[:, 1:], loss_mask=torch.ones(2, 8)).mean()


def test_megatrons_own_experts_and_top_k_behind_a_hash_layer(megatron_cpu):
    """The other layers' routes are Megatron's: exact top-k on the stock path."""
    from megatron.core.transformer.moe.router import TopKRouter

    fields = {**STOCK, "moe_router_type": "topk", "num_layers": 2, "moe_num_hash_layers": 1, "moe_ffn_hidden_size": 4}
    model = make_gpt(megatron_cpu, num_moe_experts=8, **fields)
    assert [type(router) for router in find_routers(model)] == [HashRouter, ROUTERS["topk"]]
    loss_of(model).backward()
    router = model.decoder.layers[1].mlp.router
    plain = TopKRouter(make_config(**{**STOCK, "moe_router_type": "topk", "num_moe_experts": 8}), megatron_cpu)
    plain.load_state_dict(router.state_dict(), strict=False)
    hidden = torch.randn(5, 3, HIDDEN)
    for found, expected in zip(router(hidden), plain(hidden), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("router_type", ("air", "topk"))
def test_layers_are_recomputed_with_the_ids_of_their_tokens(megatron_cpu, router_type):
    """Multi-token prediction embeds shifted ids between a layer's forward and its repetition."""
    fields = {**MIXED, "moe_router_type": router_type, "num_layers": 2, "mtp_num_layers": 1}
    recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    found = []
    for repeated in ({}, recompute):
        model = make_gpt(megatron_cpu, mtp=True, **fields, **repeated)
        assert [type(router) for router in find_routers(model)] == [HashRouter, *[ROUTERS[router_type]] * 2]
        loss_of(model).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)


RECOMPUTED = {
    "layers": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    "moe": dict(recompute_granularity="selective", recompute_modules=["moe"]),
}


@pytest.mark.parametrize("router_type", ("air", "hash"))
@pytest.mark.parametrize("recompute", RECOMPUTED.values(), ids=RECOMPUTED)
def test_a_layer_is_recomputed_after_later_microbatches(megatron_cpu, router_type, recompute):
    """As with pipeline stages: the second microbatch goes forward before the first one goes back."""
    fields = dict(moe_router_type=router_type, num_layers=3, moe_num_hash_layers=2 * (router_type != "hash"))
    found = []
    for repeated in ({}, recompute):
        model = make_gpt(megatron_cpu, **fields, **repeated)
        for _ in range(2):  # nothing is left of the step before
            discard_statistics(model)
            losses = [loss_of(model, seed) for seed in (0, 1, 2)]
            model.eval()
            loss_of(model, 3)
            for loss in losses:
                model.train()
                loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recompute", RECOMPUTED.values(), ids=RECOMPUTED)
def test_microbatches_are_recomputed_in_any_order_and_some_never(megatron_cpu, recompute):
    """A loop of one's own may leave out the backward of a microbatch, and go back in another order."""
    fields = dict(moe_router_type="air", num_layers=3, moe_num_hash_layers=2)
    found = []
    for repeated in ({}, recompute):
        model = make_gpt(megatron_cpu, **fields, **repeated)
        discard_statistics(model)
        losses = [loss_of(model, seed) for seed in (0, 1, 2, 3)]
        for microbatch in (3, 1, 2):
            losses[microbatch].backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)


def test_ids_are_found_by_tokens_that_are_not_finite_too():
    waiting = WaitingIds()
    hidden = [torch.randn(6, 4) for _ in range(3)]
    hidden[0][2], hidden[1][3], hidden[2][0, 1] = torch.nan, torch.inf, -torch.inf
    ids = [torch.full((6,), number) for number in range(3)]
    for one in zip(ids, hidden, strict=True):
        waiting.keep(*one)
    for number in (1, 0, 0, 2):
        found = waiting.find(hidden[number] + 1e-6 * torch.randn(6, 4), is_last_time=False)
        assert torch.equal(found, ids[number])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
def test_ids_are_found_after_a_layer_norm_by_a_forward_that_rounds_otherwise(dtype):
    """The numbers of a token that a layer norm has centered sum to zero, up to rounding."""
    waiting, generator = WaitingIds(), torch.Generator().manual_seed(1)
    hidden = [torch.randn(32, 64, generator=generator) for _ in range(8)]
    hidden = [torch.nn.functional.layer_norm(tokens, tokens.shape[1:]) for tokens in hidden]
    for number, tokens in enumerate(hidden):
        waiting.keep(torch.full((32,), number), tokens.to(dtype))
    noise = 4 * torch.finfo(dtype).eps
    for number, tokens in enumerate(hidden):
        again = tokens + noise * torch.randn(tokens.shape, generator=generator)
        assert (waiting.find(again.to(dtype), is_last_time=False) == number).all()


def test_ids_are_found_in_steps_of_very_many_microbatches():
    """As with pipeline stages: three microbatches are on their way."""
    waiting, most, ahead = WaitingIds(), 1300, 3
    hidden = torch.randn(most, 4, 8, generator=torch.Generator().manual_seed(1))
    for number in range(most + ahead):
        if number < most:
            waiting.keep(torch.arange(4) + 10 * number, hidden[number])
        if number >= ahead:
            found = waiting.find(hidden[number - ahead], is_last_time=True)
            assert torch.equal(found, torch.arange(4) + 10 * (number - ahead))


@pytest.mark.parametrize("mode", ("train", "eval", "train-then-eval"))
@pytest.mark.parametrize("use_reentrant", (True, False), ids=("reentrant", "non-reentrant"))
def test_a_layer_in_a_checkpoint_of_ones_own_finds_its_ids(megatron_cpu, use_reentrant, mode):
    """Two microbatches go forward before one backward, as for a loss over pairs of sequences."""
    found = []
    for repeated in (False, True):
        layer = make_layer(megatron_cpu, moe_router_type="hash").train(mode != "eval")
        generator = torch.Generator().manual_seed(1)
        hidden = [torch.randn(8, 1, HIDDEN, generator=generator).requires_grad_() for _ in range(2)]
        loss = 0.0
        for number, tokens in enumerate(hidden):
            layer.router.token_ids = torch.arange(8).view(1, 8) + 8 * number
            out = checkpoint(layer, tokens, use_reentrant=use_reentrant) if repeated else layer(tokens)
            loss = loss + out[0].square().sum()
        layer.train(mode == "train")
        loss.backward()
        found.append([one.grad for one in (*hidden, *layer.parameters())])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_microbatch_with_two_backwards_leaves_the_others_their_ids(megatron_cpu):
    """A loop of one's own may go back once for each of two losses; a third microbatch goes forward in between."""
    found = []
    for repeated in (False, True):
        layer = make_layer(megatron_cpu, moe_router_type="hash")
        generator = torch.Generator().manual_seed(1)
        hidden = [torch.randn(8, 1, HIDDEN, generator=generator).requires_grad_() for _ in range(3)]

        def forward(number, layer=layer, hidden=hidden, repeated=repeated):
            layer.router.token_ids = torch.arange(8).view(1, 8) + 8 * number
            out = checkpoint(layer, hidden[number], use_reentrant=True) if repeated else layer(hidden[number])
            return out[0]

        first, second = forward(0), forward(1)
        first.square().sum().backward(retain_graph=True)
        first.sum().backward()
        third = forward(2)
        for out in (second, third):
            out.square().sum().backward()
        found.append([one.grad for one in (*hidden, *layer.parameters())])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("duplicate", (copy.deepcopy, pickled), ids=("deepcopy", "pickle"))
def test_a_copy_of_a_model_routes_by_its_own_ids(megatron_cpu, duplicate):
    model = torch.nn.ModuleDict({
        "embedding": torch.nn.Embedding(VOCABULARY, HIDDEN), "moe": make_layer(megatron_cpu, moe_router_type="hash"),
    }).eval()  # fmt: skip
    hand_over_token_ids([model])

    def run(of, ids):
        return of["moe"](of["embedding"](ids).transpose(0, 1))[0]

    first, second = torch.arange(16).view(2, 8) % VOCABULARY, torch.arange(16, 32).view(2, 8) % VOCABULARY
    run(model, first)
    copied = duplicate(model)
    expected = run(model, second)
    run(model, first)
    assert torch.equal(run(copied, second), expected)


def test_microbatches_of_other_shapes_and_as_many_tokens_are_told_apart(megatron_cpu):
    fields = dict(moe_router_type="hash", recompute_granularity="full", recompute_method="uniform")
    layer = make_layer(megatron_cpu, **fields, recompute_num_layers=1)
    ids = [torch.arange(12).view(3, 4), torch.arange(12, 24).view(2, 6)]
    routes = []
    layer.router.register_forward_hook(lambda module, args, output: routes.append(output[1]))
    losses = []
    for one in ids:
        layer.router.token_ids = one
        hidden = torch.randn(*one.t().shape, HIDDEN, requires_grad=True)
        losses.append(checkpoint(lambda tokens: layer(tokens)[0], hidden, use_reentrant=True).sum())
    for loss in losses:
        loss.backward()
    assert torch.equal(routes[2], routes[0]) and torch.equal(routes[3], routes[1])


def test_a_microbatch_of_another_step_is_not_recomputed(megatron_cpu):
    fields = dict(moe_router_type="air", num_layers=3, moe_num_hash_layers=2, **RECOMPUTED["layers"])
    model = make_gpt(megatron_cpu, **fields)
    loss = loss_of(model)
    discard_statistics(model)
    with pytest.raises(ValueError, match="recompute a microbatch in the step of its forward"):
        loss.backward()


def test_sizes_are_chosen_for_the_layers_that_score(megatron_cpu):
    from air_moe_megatron.tune.capture import collectors_of

    model = make_gpt(megatron_cpu, moe_router_type="air", num_layers=3, moe_num_hash_layers=1)
    collectors = collectors_of([model.eval()])
    for collector in collectors.values():
        collector.is_kept = torch.ones(16, dtype=torch.bool)
    loss_of(model)
    for collector in collectors.values():
        collector.remove()
    assert {name: collector.router for name, collector in collectors.items()} == {
        "2": model.decoder.layers[1].mlp.router, "3": model.decoder.layers[2].mlp.router,
    }  # fmt: skip
    assert all(sum(part.shape[0] for part in collector.kept["fit"]) == 16 for collector in collectors.values())


def test_hybrid_models_name_their_layers_with_experts():
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    config = make_config(**MIXED)
    with pytest.raises(ValueError, match=r"moe_num_hash_layers \(1\) needs moe_layers in a hybrid model"):
        air_hybrid_stack_spec(config, hybrid_stack_spec)


@dataclasses.dataclass
class MegatronsOwn(TransformerConfig):
    moe_num_hash_layers: int = 0


def test_a_flag_of_megatron_itself_is_left_to_it(monkeypatch):
    import argparse

    from air_moe_megatron.command.arguments import add_air_arguments

    own = MegatronsOwn.__dataclass_fields__["moe_num_hash_layers"]
    monkeypatch.setitem(TransformerConfig.__dataclass_fields__, "moe_num_hash_layers", own)
    parser = add_air_arguments(argparse.ArgumentParser())
    assert "--moe-num-hash-layers" not in parser._option_string_actions
    values = AIRFields(moe_num_hash_layers=2)
    assert num_hash_layers(values) == 0 and is_plain_topk(values)
    raise_first(unused(values))
    with pytest.raises(ValueError, match=r"moe_num_hash_layers \(1\) is Megatron's own here"):
        make_config(**MIXED)


REFUSED = {
    "forced": (dict(moe_router_force_load_balancing=True), "moe_router_force_load_balancing (True)"),
    "vocabulary": (dict(moe_hash_vocab_size=0), "moe_hash_vocab_size (0)"),
    "seed": (dict(moe_hash_seed=-1), "moe_hash_seed (-1)"),
}


@pytest.mark.parametrize("settings, words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(ValueError) as error:
        make_config(**{**MIXED, **settings})
    assert words in str(error.value)


def test_overlapped_communication_is_refused():
    config = make_config(**{**MIXED, "moe_dispatch": "stock"})
    config.overlap_moe_expert_parallel_comm = True  # Megatron's own checks need expert parallelism
    with pytest.raises(ValueError, match="mixes the token ids of two microbatches"):
        validate(config)


def test_first_layers_of_a_hash_everywhere_have_no_effect():
    with pytest.raises(ValueError, match=r"--moe-num-hash-layers \(1\) has no effect with --moe-router-type hash"):
        raise_first(unused(AIRFields(moe_router_type="hash", moe_num_hash_layers=1)))
    raise_first(unused(AIRFields(moe_router_type="air", moe_num_hash_layers=1, moe_hash_seed=3)))
    with pytest.raises(ValueError, match=r"--moe-hash-seed \(3\) has no effect"):
        raise_first(unused(AIRFields(moe_router_type="air", moe_hash_seed=3)))


def test_a_layer_class_that_is_not_ours_is_refused():
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    class OwnLayer(MoELayer):
        pass

    spec = ModuleSpec(module=OwnLayer, submodules=MoESubmodules(experts=GranularExperts))
    with pytest.raises(ValueError, match=r"moe_num_hash_layers \(1\) is not supported by the layer class OwnLayer"):
        with_air_layers(spec, make_config(**{**MIXED, "moe_dispatch": "stock"}))


def test_the_config_of_a_hash_layer_is_a_copy():
    config = make_config(**MIXED, moe_router_input_norm="running")
    assert hash_layer_config(config).moe_router_type == "hash"
    assert (config.moe_router_type, config.moe_router_input_norm) == ("air", "running")
