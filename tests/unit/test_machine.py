"""What the doctor says of a machine: what is installed, and which backend an operation uses."""

import argparse

import pytest
import torch

from air_moe_megatron.config import AIRFields
from air_moe_megatron.doctor import machine
from tests.unit.test_layering import PACKAGE


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that puts a package on the path: name, files -> None."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name, *files):
        for file in ("__init__.py", *files):
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("raise AssertionError('the doctor imports no Apex')\n")

    return install


def test_apex_of_pypi_is_not_taken_for_nvidias(installed):
    assert machine.apex() == "missing"
    installed("apex", "models.py", "templates/base.pt")
    assert machine.apex().startswith("missing: the installed package `apex`") and "unrelated" in machine.apex()


def test_nvidias_apex_is_told_with_its_extensions(installed):
    installed("apex", "multi_tensor_apply/__init__.py", "optimizers/fused_adam.py")
    assert "without its CUDA extensions" in machine.apex()
    installed("amp_C")
    assert machine.apex() == "of unknown version"


def test_versions_name_what_is_there():
    found = machine.versions()
    assert found["torch"].startswith(torch.__version__) and found["megatron-core"].startswith("0.19")
    assert found["Triton"][0].isdigit()
    assert {"Triton", "Transformer Engine", "NVIDIA Apex", "NCCL"} <= set(found)


def test_every_operation_has_a_backend_and_a_reason(monkeypatch):
    assert set(machine.OPERATIONS) == {path.parent.name for path in (PACKAGE / "ops").glob("*/kernels.py")}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert set(machine.backends(None).values()) == {("torch", "the tensors are not on a CUDA GPU")}
    monkeypatch.setenv("AIR_MOE_BACKEND", "torch")
    assert set(machine.backends(None).values()) == {("torch", "AIR_MOE_BACKEND is 'torch'")}
    monkeypatch.setenv("AIR_MOE_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert set(machine.backends(None).values()) == {("Triton", "AIR_MOE_BACKEND is 'triton'")}


def test_sizes_beyond_the_kernels_limits_are_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fields = dict(num_experts=4096, moe_router_topk=4, expert_model_parallel_size=1, moe_ffn_hidden_size=1, cpu=True)
    values = {name: field.default for name, field in AIRFields.__dataclass_fields__.items()}
    args = argparse.Namespace(
        **values | fields | dict(moe_router_type="air", moe_air_num_probes=16, moe_granular_experts=True),
        moe_router_enable_expert_bias=False,
    )
    found = machine.backends(args)
    assert found["coarse"] == ("torch", "num_probes (16) exceeds 8")
    assert found["fine_scores"] == ("torch", "probes (16) exceeds 8")
    assert found["exchange"] == ("torch", "a single expert-parallel rank exchanges nothing")
