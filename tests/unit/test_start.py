"""The start of a command: Megatron's data-set helpers."""

import importlib.util

import pytest

from air_moe_megatron.command import start


@pytest.mark.parametrize("is_compiled", (True, False))
def test_megatron_compiles_only_the_helpers_that_are_missing(monkeypatch, is_compiled):
    from megatron.core.datasets import utils

    calls = []
    monkeypatch.setattr(utils, "compile_helpers", lambda: calls.append("make"))
    start.use_compiled_helpers()
    start.use_compiled_helpers()  # a command within a command
    find_spec = importlib.util.find_spec
    name = "megatron.core.datasets.helpers_cpp"
    monkeypatch.setattr("importlib.util.find_spec", lambda of: is_compiled or None if of == name else find_spec(of))
    utils.compile_helpers()
    assert calls == ([] if is_compiled else ["make"])


def test_a_run_on_a_gpu_takes_the_helpers_of_the_wheel(monkeypatch):
    from megatron.core.datasets import utils

    monkeypatch.setattr(utils, "compile_helpers", lambda: pytest.fail("make was called: the wheel has no Makefile"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("sys.argv", ["pretrain"])
    start.choose_device()
    utils.compile_helpers()
