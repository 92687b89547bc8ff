"""Kernels or torch: who decides, and that the layer is the same either way."""

import functools
import logging

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from air_moe_megatron import update_codebooks
from air_moe_megatron.learned.module_state import HostCopy
from air_moe_megatron.ops import backend
from air_moe_megatron.ops.backend import VARIABLE, use_kernels
from tests.unit.test_layer import EVERY_LOSS, HIDDEN, Recorder, make_layer

SMALL = torch.zeros(2, 2)


@pytest.fixture
def forced(monkeypatch):
    return lambda name: monkeypatch.setenv(VARIABLE, name)


def test_tensors_on_a_cpu_take_torch_and_say_so_once(caplog, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend._say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        assert not use_kernels("coarse", SMALL, num_probes=1)
        assert not use_kernels("coarse", SMALL, num_probes=1)
    assert caplog.messages == ["coarse uses torch operations: the tensors are not on a CUDA GPU"]


def test_an_interpreter_alone_does_not_slow_down_a_cpu_run(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not use_kernels("ranking", SMALL)


def test_both_ways_can_be_forced(forced):
    forced("torch")
    assert not use_kernels("ranking", SMALL)
    forced("triton")
    assert use_kernels("ranking", SMALL)


def test_what_kernels_cannot_do_is_not_forced_in_silence(forced, monkeypatch):
    forced("triton")
    with pytest.raises(ValueError, match="coarse: num_probes \\(9\\) exceeds 8"):
        use_kernels("coarse", SMALL, num_probes=9)
    with pytest.raises(ValueError, match="ranking: its kernels take no torch.float64"):
        use_kernels("ranking", SMALL.double())
    with pytest.raises(ValueError, match="fine_scores: its kernels take no torch.float64"):
        use_kernels("fine_scores", SMALL, dtype=torch.float64)
    monkeypatch.setattr(backend, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match="Triton is not installed"):
        use_kernels("ranking", SMALL)


def test_a_gpu_with_little_shared_memory_takes_torch(forced, monkeypatch):
    """As of an L40S, where the largest launches would run out of resources."""
    reason = functools.partial(backend._reason_against, "coarse", torch.device("cuda:0"), [torch.float32])
    monkeypatch.setattr(backend, "_shared_memory", lambda device: 101_376)
    assert "101376 bytes of shared memory" in reason({"num_probes": 1})
    monkeypatch.setattr(backend, "_shared_memory", lambda device: 166_912)
    assert reason({"num_probes": 1}) is None


def test_an_unknown_choice_is_refused(forced):
    forced("cuda")
    with pytest.raises(ValueError, match="AIR_MOE_BACKEND \\('cuda'\\) must be 'auto', 'torch' or 'triton'"):
        use_kernels("ranking", SMALL)


LAYERS = {
    "softmax": {},
    "gated": dict(moe_ffn_hidden_size=3, gated_linear_unit=True, activation_func=torch.nn.functional.silu),
    "activation-without-kernel": dict(moe_ffn_hidden_size=2, activation_func=torch.nn.functional.mish),
    "every-loss": EVERY_LOSS,
    "two-probes": dict(moe_air_num_probes=2),
    "sigmoid-bias": dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True),
    "lists-of-experts": dict(moe_air_codebook_source="experts", moe_air_num_probes=2),
}


def two_steps(groups, fields):
    """Outputs and all gradients of two training steps with padding, a codebook update and a rebuild between."""
    layer = make_layer(groups, **fields).train()
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        hidden = torch.randn(15, 2, HIDDEN, generator=generator).requires_grad_()
        padding = torch.zeros(2, 15, dtype=torch.bool)
        padding[1, 10:] = True
        out, _ = layer(hidden, padding_mask=padding)
        found += [out, *torch.autograd.grad(out.square().sum(), [hidden, *layer.parameters()])]
        update_codebooks(layer)
    return [*found, layer.router.codebook.codewords], layer.router.index.shortlist


@pytest.mark.parametrize("fields", LAYERS.values(), ids=LAYERS)
def test_a_layer_of_kernels_equals_one_of_torch_operations(megatron_cpu, forced, fields):
    results = []
    for name in ("torch", "triton"):
        forced(name)
        results.append(two_steps(megatron_cpu, fields))
    (expected, expected_lists), (found, lists) = results
    assert torch.equal(lists, expected_lists)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [LAYERS[name] for name in ("softmax", "every-loss", "sigmoid-bias")], ids=str)
def test_a_router_of_kernels_does_not_wait_for_the_device(megatron_cpu, forced, monkeypatch, fields):
    """Not even for the padding mask; what the interpreter itself reads is left out of the count."""
    forced("triton")
    monkeypatch.setattr(HostCopy, "is_on_cpu", lambda _: False)  # as on a device
    router = make_layer(megatron_cpu, **fields).train().router
    hidden, padding = torch.randn(20, 1, HIDDEN), torch.zeros(20, 1, dtype=torch.bool)
    padding[15:] = True
    router.route(hidden, padding)  # builds the lists
    lists, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor.shape) or tolist(tensor))
    recorder = Recorder()
    run = InterpretedFunction.run

    def run_unseen(self, *args, **kwargs):
        with torch.utils._python_dispatch._disable_current_modes():
            return run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run_unseen)
    with recorder:
        router.route(hidden.requires_grad_(), padding).probs.sum().backward()
    assert recorder.waits == [] and lists == []
