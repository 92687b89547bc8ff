"""Shared fixtures: Megatron on one CPU process, set up for a module of tests and taken down again without a trace;
the device on which a kernel is tested."""

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Derandomized: the same examples on every machine and in every run, so that a failure is never a matter of luck.
settings.register_profile(
    "repository", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("repository")


def pytest_configure(config):
    """Interpret Triton kernels on the CPU, except in a run with `-m gpu`: Triton decides when a kernel is defined."""
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    """Tests that take much of a GPU's memory run one after another under pytest-xdist too.

    Those of tensors beyond 2^31 elements take half of it each, the others at large shapes up to 10 GiB.
    """
    for item in items:
        if "beyond_2_31" in item.name:
            item.add_marker(pytest.mark.xdist_group("beyond_2_31"))
        elif item.name.startswith("test_large"):
            item.add_marker(pytest.mark.xdist_group(f"large shapes of {item.path.name}"))


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request) -> str:
    """Device of a kernel's tensors: "cpu" where it is interpreted, "cuda" in a run with `-m gpu`."""
    return "cpu" if request.param == "interpreted" else request.getfixturevalue("cuda")


@pytest.fixture
def cuda() -> Iterator[str]:
    """Device of a test that needs a GPU. Its memory is given back: several processes may share the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    yield "cuda"
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def megatron_cpu():
    """Megatron's process groups of a world of one rank, in CPU mode; yields the ProcessGroupCollection."""
    with cpu_world() as groups:
        yield groups


@contextlib.contextmanager
def cpu_world():
    """What ``megatron_cpu`` yields, for a program that is no test.

    Leaves nothing behind: groups, Megatron's global metrics and random states, and CPU mode itself are undone, so that
    tests which need CPU mode off can run in the same process.
    """
    from air_moe_megatron import cpu

    random_state = torch.get_rng_state()
    cpu.enable()
    try:
        yield from _world_of_one()
    finally:
        cpu.disable()
        torch.set_rng_state(random_state)


def _world_of_one():
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from air_moe_megatron.compat import destroy_moe_metrics_tracker

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        MoEAuxLossAutoScaler.main_loss_backward_scale = None
        destroy_moe_metrics_tracker()
        get_cuda_rng_tracker().reset()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
