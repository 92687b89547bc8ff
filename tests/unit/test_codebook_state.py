"""The codebook as a module: what must not poison it, its precision, and what checkpoints hold of it."""

import pytest
import torch

from air_moe_megatron.learned.codebook import Codebook, lloyd_step, window_decay
from tests.codebooks import CLOSE, assert_same_bits, clustered, learn, randn, state

# What must not poison it.


@pytest.mark.parametrize("poison", (float("nan"), float("inf"), float("-inf")), ids=str)
@pytest.mark.parametrize("position", ((0, 0), (17, 3)), ids=("first-element", "inner-element"))
def test_a_token_that_is_not_finite_drops_the_update(poison, position):
    codebook = Codebook(6, 8, 0.9)
    learn(codebook, clustered(60, 3, 8))
    before = state(codebook)
    hidden = clustered(60, 3, 8, seed=1)
    hidden[position] = poison
    learn(codebook, hidden, clustered(60, 3, 8, seed=2))
    after = state(codebook)
    assert torch.equal(after["codewords"], before["codewords"])
    assert torch.equal(after["ema"], before["ema"])
    assert after["num_dropped"].item() == codebook.health().num_dropped == 1
    learn(codebook, clustered(60, 3, 8, seed=3))
    assert state(codebook)["codewords"].isfinite().all()
    assert codebook.health().num_dropped == 1
    assert not torch.equal(codebook.codewords, before["codewords"])


@pytest.mark.parametrize("size", (0.0, 1e-30, 1e-42, 1e30, 1e38), ids=str)
def test_tokens_of_extreme_length_leave_it_finite(size):
    codebook = Codebook(6, 8, 0.9)
    learn(codebook, randn(40, 8).clamp(-3.0, 3.0) * size)
    assert codebook.health().num_dropped == 0
    assert codebook.codewords.isfinite().all() and codebook.ema.isfinite().all()
    torch.testing.assert_close(codebook.codewords.norm(dim=1), torch.ones(6))
    assert codebook.typical_projections().isfinite().all()


@pytest.mark.parametrize("length", (1e-45, 1e-37, 1e-25, 1e20, 3e38), ids=str)
def test_one_token_of_extreme_length_counts_as_any_other(length):
    """Around a narrow cluster, where it would turn the codeword most, and among short and long ones."""
    hidden = torch.nn.functional.normalize(torch.ones(200, 16) + 1e-3 * randn(200, 16), dim=1)
    hidden[77] = torch.eye(16)[3] * length
    hidden[100:] *= torch.logspace(-20, 30, 100).unsqueeze(1)
    expected = torch.nn.functional.normalize(hidden.double(), dim=1, eps=0.0).sum(dim=0)
    codebook = Codebook(1, 16, 0.9)
    learn(codebook, hidden)
    assert codebook.health().num_dropped == 0
    assert torch.nn.functional.cosine_similarity(codebook.codewords[0].double(), expected, dim=0) > 1 - 1e-6
    assert codebook.ema[0, 16] / (1 - window_decay(0.9, 0)) == pytest.approx(200)
    assert codebook.typical_projections().isfinite().all()


def test_tokens_of_zeros_do_not_count():
    codebook, without = Codebook(3, 8, 0.9), Codebook(3, 8, 0.9)
    hidden = clustered(60, 3, 8)
    learn(without, hidden)
    learn(codebook, torch.cat((hidden, torch.zeros(30, 8))))
    assert torch.equal(codebook.codewords, without.codewords)
    assert torch.equal(codebook.ema, without.ema)


def test_lloyd_steps_see_the_directions_of_expert_centers_of_every_length():
    weight = clustered(60, 3, 8)
    weight = torch.nn.functional.normalize(weight, dim=1)
    codewords = torch.nn.functional.normalize(randn(3, 8, seed=5), dim=1)
    expected, _ = lloyd_step(codewords, weight)
    found, statistics = lloyd_step(codewords, weight * torch.logspace(-36, 37, 60).unsqueeze(1))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert statistics.isfinite().all()


@pytest.mark.parametrize("batches", (0, 1), ids=("first", "later"))
def test_a_global_batch_without_tokens_changes_no_codeword(batches):
    codebook = Codebook(6, 8, 0.9)
    for step in range(batches):
        learn(codebook, clustered(60, 6, 8, seed=step))
    before = codebook.codewords.clone()
    learn(codebook, randn(0, 8))
    torch.testing.assert_close(codebook.codewords, before, **CLOSE)


# Precision, gradients, checkpoints.


@pytest.mark.parametrize("cast", ("bfloat16", "half", "double", "float"))
def test_casting_the_model_keeps_every_bit(cast):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), Codebook(6, 8, 0.9))
    learn(model[1], clustered(60, 3, 8))
    model[1].accumulate(randn(6, 8 + 3))
    before = {name: value.clone() for name, value in model[1].named_buffers()}
    getattr(model, cast)()
    assert model[0].weight.dtype == getattr(torch, cast)
    assert_same_bits(dict(model[1].named_buffers()), before)


@pytest.mark.parametrize("arguments", (("cpu",), ("cpu", torch.bfloat16), (torch.float16,)), ids=str)
def test_moving_the_model_keeps_every_bit(arguments):
    codebook = Codebook(6, 8, 0.9)
    learn(codebook, clustered(60, 3, 8))
    before = state(codebook)
    codebook.to(*arguments)
    assert_same_bits(state(codebook), before)


def test_moving_to_another_device_with_a_cast_moves_the_fp32_buffers():
    codebook = Codebook(6, 8, 0.9).to(device="meta", dtype=torch.bfloat16)
    assert {buffer.device.type for buffer in codebook.buffers()} == {"meta"}
    assert codebook.codewords.dtype == codebook.ema.dtype == torch.float32


def test_nothing_requires_gradients_nor_keeps_a_graph():
    codebook = Codebook(6, 8, 0.9)
    hidden = clustered(60, 3, 8).requires_grad_()
    learn(codebook, hidden)
    assert list(codebook.parameters()) == []
    assert not any(buffer.requires_grad for buffer in codebook.buffers())


def test_state_survives_a_round_trip_and_training_continues_the_same():
    uninterrupted, resumed = Codebook(16, 8, 0.8), Codebook(16, 8, 0.8)
    for step in range(3):
        learn(uninterrupted, clustered(60, 3, 8, seed=step))
    resumed.load_state_dict(uninterrupted.state_dict())
    assert_same_bits(state(resumed), state(uninterrupted))
    assert resumed.updates_on_host == uninterrupted.updates_on_host == 3
    for step in range(3, 6):
        learn(uninterrupted, clustered(60, 3, 8, seed=step))
        learn(resumed, clustered(60, 3, 8, seed=step))
        assert_same_bits(state(resumed), state(uninterrupted))


def test_statistics_and_logs_are_not_saved():
    assert set(Codebook(6, 8, 0.9).state_dict()) == {"codewords", "ema", "num_updates", "num_dropped"}


def test_a_checkpoint_without_codebook_keeps_the_random_start():
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(3, 3), "codebook": Codebook(6, 8, 0.9)})
    start = state(model["codebook"])
    without = {name: value for name, value in model.state_dict().items() if not name.startswith("codebook")}
    result = model.load_state_dict(without, strict=True)
    assert result.missing_keys == [] and result.unexpected_keys == []
    assert_same_bits(state(model["codebook"]), start)
    learn(model["codebook"], clustered(60, 3, 8))
    assert model["codebook"].updates_on_host == 1


@pytest.mark.parametrize("missing", ("codewords", "ema", "num_updates"))
def test_a_checkpoint_with_half_a_codebook_is_an_error(missing):
    codebook = Codebook(6, 8, 0.9)
    incomplete = {name: value for name, value in codebook.state_dict().items() if name != missing}
    with pytest.raises(RuntimeError, match=missing):
        codebook.load_state_dict(incomplete)


@pytest.mark.parametrize("shape", ((7, 8), (6, 9)), ids=str)
@pytest.mark.parametrize("strict", (True, False), ids=("strict", "not-strict"))
def test_a_checkpoint_of_another_shape_is_refused(shape, strict):
    other = Codebook(*shape, 0.9).state_dict()
    with pytest.raises(ValueError) as error:
        Codebook(6, 8, 0.9).load_state_dict(other, strict=strict)
    message = str(error.value)
    assert "moe_air_num_clusters" in message and "hidden_size" in message
    assert str(shape) in message and "(6, 8)" in message
