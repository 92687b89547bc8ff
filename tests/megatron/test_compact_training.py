"""The compact path in the real training loop: one model in many layouts, recomputation, precisions, kinds of model.

One run on two expert-parallel ranks is what the others are compared with. All see the same microbatches, and nothing is
dropped out, so the same losses and gradient norms are due: a gradient that is lost, doubled, averaged over the wrong
ranks or missing in the norm shows there, as do weights, codebooks and Adam states that do not reshard.
"""

import re

import pytest
import torch

from tests.megatron.conftest import (
    AIR,
    EP2,
    GLOBAL_BATCH,
    PRINTED_LOSS,
    SEQUENCE,
    TP2,
    VOCABULARY,
    assert_same_norms,
    read_checkpoint,
    refused,
    save_flags,
    trainer_of,
)

pytestmark = pytest.mark.slow

HIDDEN, EXPERTS, FFN, LAYERS = 32, 16, 8, 4
STEPS, SAVED = 8, 4
TOKENS = GLOBAL_BATCH * SEQUENCE  # per global batch
FIRST_DECAY = 1 / 3  # window_decay of the first update
COMPACT = [
    *(*AIR, "--moe-granular-experts", "--moe-dispatch", "compact", "--num-layers", LAYERS),
    *("--attention-dropout", "0", "--hidden-dropout", "0"),
    # Large enough for experts and router to have their part in the gradient norm.
    *("--init-method-std", "0.1"),
]
PP2 = ["--pipeline-model-parallel-size", "2"]
FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
MOE_RECOMPUTE = "--recompute-granularity selective --recompute-modules moe".split()
RESUMED = {
    # name: (ranks, flags)
    "EP1-moe-recompute": (1, MOE_RECOMPUTE),
    "EP4": (4, ["--expert-model-parallel-size", "4"]),
    "TP2-SP-EP2": (2, [*TP2, *EP2]),
    "PP2": (2, PP2),
    "PP2-VPP2": (2, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]),
}

COMPARED = 3  # steps of the runs that start anew
FIRST = range(1, COMPARED + 1)
TRAFFIC = re.compile(r"dispatched bytes per token: (\d+) \((\d+) to other ranks\)")
ADAM_MEAN, ADAM_SQUARE = "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."

CLOSE = 1e-5  # relative to the largest entry of a tensor, after some steps; 5e-7 is usual
BF16 = 1e-2  # relative: weights and activations are rounded to 2^-9, one after the other


@pytest.fixture(scope="module")
def train(pretrain, successors):
    """A function that trains the compact model: number of steps, flags -> Run."""
    return trainer_of(pretrain, *COMPACT, *successors, "--train-iters")


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The run that the others are compared with, and its checkpoints of the steps SAVED and STEPS."""
    directory = tmp_path_factory.mktemp("whole")
    return train(STEPS, *EP2, *save_flags(directory, SAVED)), directory


def assert_same_steps(run, expected):
    assert_same_norms(run, expected, FIRST)
    found = {step: float(run.steps[step][0]) for step in FIRST}
    assert found == pytest.approx({step: float(expected.steps[step][0]) for step in FIRST}, rel=PRINTED_LOSS)


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        tensor = tensor.double()
        assert (found[key] - tensor).abs().max() <= CLOSE * tensor.abs().max(), key


def make_config(**settings):
    from air_moe_megatron import AIRMoEConfig

    fields = dict(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, num_moe_experts=EXPERTS, moe_ffn_hidden_size=FFN,
        add_bias_linear=False, transformer_impl="local", moe_router_type="air", moe_granular_experts=True,
        moe_dispatch="compact",
    )  # fmt: skip
    return AIRMoEConfig(**{**fields, **settings})


def test_trains_and_reports_its_traffic(whole):
    run, _ = whole
    assert list(run.steps) == list(range(1, STEPS + 1))
    assert float(run.steps[STEPS][0]) < float(run.steps[1][0]) - 1.0
    traffic = TRAFFIC.findall(run.output)
    assert len(traffic) == STEPS
    row = 4 * HIDDEN
    for total, remote in ((int(total), int(remote)) for total, remote in traffic):
        assert row <= total <= 2 * row  # one row for each distinct rank of the two experts
        assert 0 < remote < total


def test_checkpoint_holds_all_experts(whole):
    tensors = read_checkpoint(whole[1], STEPS)
    shapes = {"weight1": (LAYERS, EXPERTS, 2 * FFN, HIDDEN), "weight2": (LAYERS, EXPERTS, FFN, HIDDEN)}
    for name, shape in shapes.items():
        key = f"decoder.layers.mlp.experts.{name}"
        assert all(tensors[part + key].shape == shape for part in ("", ADAM_MEAN, ADAM_SQUARE))
        assert all(of_a_rank.any() for of_a_rank in tensors[ADAM_MEAN + key].chunk(2, dim=1))


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.long if name == "PP2" else ()) for name in RESUMED]
)
def test_resumed_in_another_layout_it_goes_on_as_the_uninterrupted_run(train, whole, tmp_path, layout):
    ranks, flags = RESUMED[layout]
    load = ["--load", whole[1], "--ckpt-step", SAVED]
    run = train(STEPS, *flags, *load, *save_flags(tmp_path, STEPS), ranks=ranks)
    assert_same_norms(run, whole[0], range(SAVED + 1, STEPS + 1))
    assert_same_tensors(*(read_checkpoint(directory, STEPS) for directory in (tmp_path, whole[1])))


def test_one_rank_with_full_recompute_equals_two_ranks(train, whole):
    run = train(COMPARED, *FULL_RECOMPUTE, ranks=1)
    assert_same_steps(run, whole[0])


def test_hybrid_model_of_the_same_layers_equals_the_gpt_model(train, whole, tmp_path):
    """In fp32, neither the distributed optimizer nor the loss per token changes a number here: they come along."""
    pattern = ["--hybrid-layer-pattern", "*E" * LAYERS, "--spec", "tests.megatron.local_hybrid", "stack_spec"]
    flags = [*pattern, "--use-distributed-optimizer", "--no-save-optim", "--calculate-per-token-loss"]
    run = train(COMPARED, *EP2, *flags, *save_flags(tmp_path, COMPARED))
    assert_same_steps(run, whole[0])
    assert len(TRAFFIC.findall(run.output)) == COMPARED
    tensors = read_checkpoint(tmp_path, COMPARED)
    for layer in range(1, 2 * LAYERS, 2):
        assert tensors[f"decoder.layers.{layer}.mlp.router.codebook.num_updates"].item() == COMPARED
        assert tensors[f"decoder.layers.{layer}.mlp.experts.weight1"].shape == (EXPERTS, 2 * FFN, HIDDEN)


def test_overlapping_the_distributed_optimizer_changes_nothing(train, whole):
    """With a bucket per parameter, each is gathered by the hook of the very module that uses it."""
    overlap = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    run = train(COMPARED, *EP2, *overlap, "--ddp-bucket-size", "1")
    assert_same_steps(run, whole[0])


def test_bf16_with_distributed_optimizer_accumulation_and_loss_per_token(train, whole, tmp_path):
    flags = ["--bf16", "--use-distributed-optimizer", "--no-save-optim", "--calculate-per-token-loss"]
    run = train(COMPARED, *EP2, *flags, *save_flags(tmp_path, 1))
    losses, expected = ([float(steps[step][0]) for step in FIRST] for steps in (run.steps, whole[0].steps))
    assert losses == pytest.approx(expected, rel=BF16)
    # Adam's first updates take the signs of gradients, however small: later norms may differ by more.
    assert float(run.norms[1]) == pytest.approx(float(whole[0].norms[1]), rel=BF16)
    tensors = read_checkpoint(tmp_path, 1)
    assert tensors["decoder.layers.mlp.experts.weight1"].dtype == torch.bfloat16
    running = tensors["decoder.layers.mlp.router.codebook.ema"]
    assert running.dtype == torch.float32
    counts = running[..., HIDDEN].sum(dim=-1)
    torch.testing.assert_close(counts, torch.full_like(counts, (1 - FIRST_DECAY) * TOKENS))


def test_shared_experts_and_multi_token_prediction_learn(train, whole, tmp_path):
    flags = ["--moe-shared-expert-intermediate-size", "16", "--mtp-num-layers", "1"]
    run = train(COMPARED, *EP2, *flags, *save_flags(tmp_path, COMPARED))
    losses = [float(run.steps[step][0]) for step in FIRST]
    assert losses[-1] < losses[0] - 0.3
    assert len(TRAFFIC.findall(run.output)) == COMPARED
    tensors = read_checkpoint(tmp_path, COMPARED)
    for layer in ("decoder.layers.", "mtp.layers.0.transformer_layer."):
        assert tensors[f"{layer}mlp.router.codebook.num_updates"].eq(COMPARED).all()
        for name in ("experts.weight1", "experts.weight2"):
            assert tensors[f"{ADAM_MEAN}{layer}mlp.{name}"].any()
        for name in ("linear_fc1", "linear_fc2"):
            mean = tensors[f"{ADAM_MEAN}{layer}mlp.shared_experts.{name}.weight"]
            assert mean.any(dim=-1).all(), f"every row of {layer}mlp.shared_experts.{name} gets gradients"


def test_the_other_form_of_experts_is_refused(pretrain, train, whole, successors, tmp_path):
    own_experts = [*AIR, *successors, "--num-layers", LAYERS, "--train-iters", "1"]
    pretrain(*own_experts, *save_flags(tmp_path, 1), ranks=1, data=False)
    granular = train(2, "--load", tmp_path, ranks=1, succeeds=False)
    assert refused(granular, "holds Megatron's own experts, one module each: train without --moe-granular-experts")
    modules = pretrain(*own_experts, "--load", whole[1], ranks=1, data=False, succeeds=False)
    assert refused(modules, "holds granular experts: add --moe-granular-experts")


def test_multi_token_prediction_gets_the_compact_layer(megatron_cpu):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.training.models import GPTModelConfig, gpt

    from air_moe_megatron.layer import AIRMoELayer
    from air_moe_megatron.layer.experts import GranularExperts
    from air_moe_megatron.routers.air import AIRRouter
    from air_moe_megatron.specs import mtp_specs_with_air_layers

    model_config = GPTModelConfig(transformer=make_config(mtp_num_layers=1), vocab_size=VOCABULARY)
    with mtp_specs_with_air_layers():
        block = gpt.mtp_block_spec(model_config, get_gpt_layer_local_spec(num_experts=EXPERTS))
    (layer,) = block.layer_specs
    mlp = layer.submodules.mtp_model_layer.submodules.mlp
    assert mlp.func is AIRMoELayer
    assert mlp.keywords["submodules"].router is AIRRouter
    assert mlp.keywords["submodules"].experts is GranularExperts


def test_compact_dispatch_is_refused_in_a_layer_class_of_someone_else():
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from air_moe_megatron.specs import with_air_layers

    class OtherLayer(MoELayer):
        pass

    spec = ModuleSpec(module=OtherLayer, submodules=MoESubmodules(experts="experts"))
    message = r"moe_dispatch \('compact'\) is not supported by the layer class OtherLayer"
    with pytest.raises(ValueError, match=message):
        with_air_layers(spec, make_config())
    assert with_air_layers(spec, make_config(moe_dispatch="stock")).module is OtherLayer


def test_expert_weights_carry_the_marks_that_megatron_asks_for(megatron_cpu):
    """Without ``allreduce`` false the layouts above differ; the other mark alone changes no number in 0.19."""
    from air_moe_megatron.layer.experts import GranularExperts

    experts = GranularExperts(EXPERTS, make_config(use_cpu_initialization=True), pg_collection=megatron_cpu)
    for weight in (experts.weight1, experts.weight2):
        assert weight.allreduce is False
        assert weight.tensor_model_parallel is True
