"""CPU mode: what it changes, that it changes back, and that random numbers behave as Megatron needs them to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from air_moe_megatron import cpu
from air_moe_megatron.compat import SUPPORTED_MEGATRON, version_range
from tests.processes import run

REPOSITORY = Path(__file__).resolve().parents[2]


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    return run([sys.executable, *arguments], env=environment)


def snapshot() -> dict[str, dict[str, object]]:
    """Every attribute of every object that holds an adapted name, by the holder's dotted name."""
    holders = {adaptation.name.rpartition(".")[0] for adaptation in cpu.ADAPTATIONS}
    found = {}
    for holder in holders:
        owner, key = cpu._resolve(f"{holder}.any")
        assert key == "any"
        if holder == "torch._dynamo.config":  # keeps its values away from its __dict__
            found[holder] = {"disable": owner.disable}
        elif holder.endswith("initialize_megatron"):  # a function: __defaults__ is a slot
            found[holder] = {"__defaults__": owner.__defaults__}
        else:
            found[holder] = dict(owner) if holder == "os.environ" else dict(vars(owner))
    return found


def changes(before: dict, after: dict) -> set[str]:
    changed = set()
    for holder in before:
        for key in before[holder].keys() | after[holder].keys():
            old, new = before[holder].get(key, cpu._MISSING), after[holder].get(key, cpu._MISSING)
            if old is not new and not (isinstance(old, str) and old == new):  # os.environ makes new strings
                changed.add(f"{holder}.{key}")
    return changed


@pytest.fixture
def no_cuda(monkeypatch):
    """The same on a machine that has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def cpu_mode():
    random_state = torch.get_rng_state()
    with cpu.enable(force=True) as mode:
        yield mode
    torch.set_rng_state(random_state)


def test_import_has_no_side_effect():
    code = (
        "import sys, os, torch; before = dict(vars(torch)), dict(vars(torch.cuda)), dict(os.environ);"
        "import air_moe_megatron.cpu as cpu;"
        "assert before == (dict(vars(torch)), dict(vars(torch.cuda)), dict(os.environ));"
        "assert not cpu.is_enabled();"
        "assert not [name for name in sys.modules if name.startswith('megatron')]"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_torch_compile_can_tell_the_adapted_functions_apart(cpu_mode):
    """It holds a handler for each of these; newer versions of torch refuse to be given one function twice."""
    names = ("cuda.current_device", "cuda.current_stream", "cuda.is_available", "cuda.set_device", "cuda.synchronize")
    names += ("cuda.get_device_properties", "accelerator.current_accelerator", "accelerator.synchronize")
    functions = [cpu._resolve(f"torch.{name}") for name in names]
    functions = [getattr(owner, key) for owner, key in functions]
    assert len(set(functions)) == len(names)


def test_table_is_exact_and_reversible(no_cuda):
    snapshot()  # imports what is not there yet
    before = snapshot()
    mode = cpu.enable()
    try:
        during = snapshot()
        assert mode.names == tuple(adaptation.name for adaptation in cpu.ADAPTATIONS)
        assert len(set(mode.names)) == len(mode.names)
        assert changes(before, during) == set(mode.names)
    finally:
        cpu.disable()
    assert changes(before, snapshot()) == set()


def test_enable_twice_is_once(no_cuda):
    before = snapshot()
    try:
        with cpu.enable():
            during = snapshot()
            with cpu.enable():
                assert changes(during, snapshot()) == set()
            assert cpu.is_enabled(), "the inner handle did not begin CPU mode and must not end it"
        assert not cpu.is_enabled()
        cpu.disable()  # harmless
    finally:
        cpu.disable()
    assert changes(before, snapshot()) == set()


def test_refused_where_cuda_is_available_unless_forced(monkeypatch):
    before = snapshot()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA is available"):
        cpu.enable()
    assert not cpu.is_enabled()
    with cpu.enable(force=True):
        assert cpu.is_enabled()
    monkeypatch.undo()
    assert changes(before, snapshot()) == set()


@pytest.mark.parametrize(
    "name",
    ["megatron.core.no_module.name", "megatron.core.jit.no_name", "torch.cuda.no_name", "torch.Tensor.no_name"],
)
def test_missing_name_is_named_and_rolled_back(monkeypatch, no_cuda, name):
    before = snapshot()
    table = (*cpu.ADAPTATIONS, cpu.Adaptation(name, lambda original: None, "test"))
    with monkeypatch.context() as patch, pytest.raises(cpu.MissingNameError, match=name) as raised:
        patch.setattr(cpu, "ADAPTATIONS", table)
        cpu.enable()
    megatron = f"megatron-core {version_range(SUPPORTED_MEGATRON)}"
    assert f"supports {megatron if name.startswith('megatron') else 'torch >= 2.11'}" in str(raised.value)
    assert not cpu.is_enabled()
    assert changes(before, snapshot()) == set()


def test_cuda_means_cpu(cpu_mode):
    device = torch.cuda.current_device()
    for tensor in (
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0], device=torch.device("cuda", device)),
        torch.empty(2, device=device, pin_memory=True),
        torch.zeros_like(torch.ones(2), device="cuda:0"),
        torch.ones(2).new_zeros(3, device=device),
        torch.ones(2).to(device),
        torch.ones(2).to(device="cuda", dtype=torch.float64),
        torch.nn.Linear(2, 2).cuda().to("cuda").weight,
        torch.ones(2).cuda(non_blocking=True).pin_memory(),
        torch.cuda.FloatTensor([1.0]),
    ):
        assert tensor.device.type == "cpu"
    assert torch.zeros(1, device="meta").device.type == "meta"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type("torch.cuda.HalfTensor").dtype == torch.float16
    assert torch.zeros(1).type(torch.int32).dtype == torch.int32
    assert not torch.zeros(1).is_cuda


def test_a_context_of_a_device_holds():
    """torch knows the functions of such a context from its first use. If that came in CPU mode, it changed nothing."""
    code = (
        "from air_moe_megatron import cpu\ncpu.enable()\nimport torch\n"
        "with torch.device('meta'):\n    tensors = torch.zeros(3), torch.randn(2), torch.nn.Linear(2, 2).weight\n"
        "assert all(tensor.is_meta for tensor in tensors), tensors"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_streams_and_events(cpu_mode):
    side, start, end = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    assert torch.cuda.current_stream() is torch.cuda.current_stream() != side
    start.record()
    with torch.cuda.stream(side):
        side.wait_stream(torch.cuda.current_stream())
        torch.ones(1).record_stream(side)
        side.record_event().wait()
    end.record()
    torch.cuda.synchronize()
    assert start.elapsed_time(end) > 0


def test_data_loader_leaves_the_random_state_alone(cpu_mode):
    before = torch.cuda.get_rng_state()
    assert [int(x) for x in torch.utils.data.DataLoader(range(3))] == [0, 1, 2]
    assert torch.equal(torch.cuda.get_rng_state(), before)


def make_tracker():
    from megatron.core.tensor_parallel import random

    tracker = random.CudaRNGStatesTracker()
    tracker.add("model-parallel-rng", 1234)
    return tracker


def test_rng_tracker_forks(cpu_mode, caplog):
    torch.cuda.manual_seed(7)
    expected_outside = torch.rand(6)

    draws = []
    for _ in range(2):
        tracker = make_tracker()
        torch.cuda.manual_seed(7)
        outside = [torch.rand(3)]
        with tracker.fork():
            first = torch.rand(4)
        outside.append(torch.rand(3))
        with tracker.fork():
            second = torch.rand(4)
        assert torch.equal(torch.cat(outside), expected_outside), "a fork must not move the outer generator"
        draws.append(torch.cat([first, second]))

    assert torch.equal(draws[0], draws[1])
    torch.manual_seed(1234)
    assert torch.equal(draws[0], torch.rand(8)), "a second fork continues where the first ended"
    assert not caplog.records


def test_recompute_replays_dropout(cpu_mode, monkeypatch):
    from megatron.core.tensor_parallel import random

    x = torch.randn(16, 8, requires_grad=True)

    def block(hidden):
        hidden = torch.nn.functional.dropout(hidden, 0.5)
        with random.get_cuda_rng_tracker().fork():
            hidden = torch.nn.functional.dropout(hidden, 0.5)
        return torch.nn.functional.dropout(hidden * hidden, 0.5)

    results = []
    for checkpointed in (False, True):
        monkeypatch.setattr(random, "_CUDA_RNG_STATE_TRACKER", make_tracker())
        monkeypatch.setattr(random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True)
        torch.cuda.manual_seed(3)
        output = random.checkpoint(block, False, x) if checkpointed else block(x)
        after_forward = torch.rand(2)
        (gradient,) = torch.autograd.grad(output.sum(), x) if not checkpointed else (None,)
        if checkpointed:
            output.sum().backward()
            gradient = x.grad
        results.append([output.detach(), after_forward, gradient, torch.rand(2)])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)
    assert 0 < (results[0][0] == 0).float().mean() < 1


def test_norm_with_sequence_parallelism(cpu_mode):
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_dtype=torch.float32,
    )
    norm = WrappedTorchNorm(config=config, hidden_size=8)
    assert isinstance(norm, torch.nn.LayerNorm)
    assert config.sequence_parallel and all(parameter.sequence_parallel for parameter in norm.parameters())


def test_all_to_all_takes_tensor_splits_and_isend_keeps_its_data(cpu_mode, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        output = torch.empty(3)
        splits = torch.tensor([3])
        torch.distributed.all_to_all_single(output, torch.arange(3.0), splits, splits.numpy())
        assert output.tolist() == [0, 1, 2]
        assert torch.distributed.isend is torch.distributed.distributed_c10d.isend
    finally:
        torch.distributed.destroy_process_group()


def test_with_required_flags():
    assert cpu.with_required_flags([]) == list(cpu.REQUIRED_FLAGS)
    given = ["--num-workers=3", "--distributed-backend", "nccl", "--seed", "1", "--no-rope-fusion"]
    flags = cpu.with_required_flags(given)
    assert flags[: len(given)] == given
    assert flags.count("--distributed-backend") == flags.count("--no-rope-fusion") == 1
    assert "--num-workers" not in flags and "0" not in flags and "gloo" not in flags
    assert flags[flags.index("--transformer-impl") + 1] == "local"
    assert cpu.with_required_flags(flags) == flags


def test_runs_a_script(tmp_path):
    (tmp_path / "neighbor.py").write_text("NAME = 'beside the script'\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, os, torch, neighbor\n"
        "from air_moe_megatron import cpu\n"
        "assert __name__ == '__main__' and cpu.is_enabled()\n"
        "cpu.enable()\n"
        "assert torch.zeros(2, device='cuda').device.type == 'cpu' and os.environ['TORCHDYNAMO_DISABLE'] == '1'\n"
        "print(sys.argv, neighbor.NAME)\n"
        "sys.exit(3)\n"
    )
    result = run_python("-m", "air_moe_megatron.cpu", str(script), "--flag", "value", "--help")
    assert result.returncode == 3, result.stderr
    assert result.stdout.splitlines()[-1] == f"{[str(script), '--flag', 'value', '--help']} beside the script"


def test_missing_script_is_one_line(tmp_path):
    result = run_python("-m", "air_moe_megatron.cpu", str(tmp_path / "absent.py"), "--flag")
    assert result.returncode != 0
    assert result.stderr.splitlines() == [f"python -m air_moe_megatron.cpu: no such script: {tmp_path / 'absent.py'}"]


@pytest.mark.parametrize(
    ("end", "code", "groups_left"),
    [("pass", 0, False), ("sys.exit(3)", 3, False), ("raise KeyError('step')", 1, True)],
    ids=["end", "early-exit", "failure"],
)
def test_a_script_that_ends_leaves_no_process_group(end, code, groups_left, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import atexit, sys, torch\n"
        "torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)\n"
        "atexit.register(lambda: print('groups left:', torch.distributed.is_initialized()))\n"
        f"{end}\n"
    )
    result = run_python("-m", "air_moe_megatron.cpu", str(script))
    assert result.returncode == code, result.stderr
    assert result.stdout.splitlines()[-1] == f"groups left: {groups_left}"


def test_a_lone_process_lets_the_system_choose_its_port(monkeypatch):
    """A port that is chosen before the store listens may be another process's by then."""
    monkeypatch.setenv("MASTER_ADDR", "")
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setenv("MASTER_PORT", "1")
    cpu.set_rendezvous_defaults()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("localhost", "0")
    store, rank, world_size = next(torch.distributed.rendezvous("env://", rank=0, world_size=1))
    assert (rank, world_size) == (0, 1) and store.port > 0
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.setenv("MASTER_PORT", "2")
    cpu.set_rendezvous_defaults()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("elsewhere", "2")
