"""Runs of the real training loop on CPU with gloo: our entry forked from a process that has imported Megatron already
(forkserver.py), other entries by torchrun, as users start them."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from tests.datasets import write_indexed
from tests.processes import HANG_SECONDS
from tests.processes import run as run_command

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 64
SEQUENCE = 16
GLOBAL_BATCH = 8

MODEL = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2", "--ffn-hidden-size", "64"),
    *("--seq-length", SEQUENCE, "--max-position-embeddings", SEQUENCE, "--position-embedding-type", "rope"),
    *("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    *("--attention-dropout", "0.1", "--hidden-dropout", "0.1"),
    *("--num-experts", "16", "--moe-ffn-hidden-size", "8", "--moe-router-topk", "2", "--moe-router-dtype", "fp32"),
    *("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "0.01"),
    *("--moe-token-dispatcher-type", "alltoall"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", VOCABULARY, "--make-vocab-size-divisible-by", "1"),
    *("--micro-batch-size", "2", "--global-batch-size", GLOBAL_BATCH, "--lr", "1e-2", "--lr-decay-style", "constant"),
    *("--log-interval", "1", "--eval-interval", "1000", "--eval-iters", "1", "--seed", "7"),
]
AIR = ["--moe-router-type", "air", "--moe-air-num-clusters", "4", "--moe-air-shortlist-size", "8"]
EP2 = ["--expert-model-parallel-size", "2"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-tensor-parallel-size", "1"]
OURS = ("-m", "air_moe_megatron.pretrain", "--cpu")
# Layouts sum in another order, which may turn the last printed digit: three decimals of norms, six of losses.
PRINTED_NORM, PRINTED_LOSS = 1.1e-3, 1.1e-6
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

_ITERATION = re.compile(r"iteration +(\d+)/ .*?lm loss: ([0-9.E+-]+) .*?grad norm: ([0-9.naif]+)")


@dataclass(frozen=True)
class Run:
    """What a finished run printed."""

    output: str
    returncode: int

    @property
    def steps(self) -> dict[int, tuple[str, str]]:
        """Iteration -> (loss, gradient norm), as printed."""
        return {int(number): (loss, norm) for number, loss, norm in _ITERATION.findall(self.output)}

    @property
    def health(self) -> dict[int, dict[str, float]]:
        """Iteration -> what the health line says: label -> first number, as printed."""
        lines = re.findall(r"routing health at iteration +(\d+) \|(.*)\|", self.output)
        return {
            int(iteration): {label: float(number) for label, number in re.findall(r" ([^|:]+): ([0-9.]+)", items)}
            for iteration, items in lines
        }

    @property
    def validation_loss(self) -> float:
        """That of the evaluation at the end of the run."""
        return float(re.search(r"on validation set \| lm loss value: ([0-9.E+-]+)", self.output)[1])

    @property
    def norms(self) -> dict[int, str]:
        return {number: norm for number, (_, norm) in self.steps.items()}


@pytest.fixture(scope="session")
def data_prefix(tmp_path_factory) -> str:
    """A small indexed data set with structure to learn: documents that count modulo the vocabulary."""
    generator, documents = numpy.random.default_rng(0), []
    for _ in range(200):
        start, step = generator.integers(0, VOCABULARY, size=2)
        documents.append([*((start + step * numpy.arange(60)) % (VOCABULARY - 1)), VOCABULARY - 1])
    return write_indexed(tmp_path_factory.mktemp("data") / "count", documents)


@pytest.fixture(scope="session")
def successors(tmp_path_factory) -> list:
    """The flags of a data set that is learned in a few steps: every token is followed by the next number."""
    folder = tmp_path_factory.mktemp("successors")
    starts = numpy.random.default_rng(0).integers(0, VOCABULARY, size=200)
    prefix = write_indexed(folder / "count", [(start + numpy.arange(61)) % VOCABULARY for start in starts])
    return ["--data-path", prefix, "--split", "8,1,1", "--data-cache-path", folder]


@pytest.fixture(scope="session")
def validation(tmp_path_factory) -> list:
    """The flags of validation data that the evaluations of ``MODEL`` read once, whole: one document."""
    document = numpy.random.default_rng(1).integers(0, VOCABULARY, size=GLOBAL_BATCH * SEQUENCE + 1)
    prefix = write_indexed(tmp_path_factory.mktemp("validation") / "one", [document])
    return ["--valid-data-path", prefix, "--test-data-path", prefix]


@pytest.fixture(scope="session")
def forkserver(tmp_path_factory):
    """A function that runs one of our commands: flags, ranks, more flags by rank, its module -> Run."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.megatron.forkserver"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    folder = tmp_path_factory.mktemp("logs")

    def run(flags, ranks, flags_of_rank, module="air_moe_megatron.pretrain"):
        log = folder / f"{len(list(folder.iterdir()))}.log"
        log.touch()
        request = {"flags": flags, "ranks": ranks, "port": free_port(), "log": str(log), "timeout": HANG_SECONDS}
        request |= {"flags_of_rank": flags_of_rank, "module": module}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        reply = process.stdout.readline()
        assert reply, "the process that starts the ranks has ended"
        return Run(log.read_text(errors="replace"), json.loads(reply)["returncode"])

    yield run
    process.stdin.close()
    process.wait(timeout=HANG_SECONDS)


@pytest.fixture(scope="session")
def pretrain(data_prefix, forkserver, tmp_path_factory):
    """A function that trains: flags -> Run. Give ``entry`` to start something else than our entry; ``flags_of_rank``
    are added to those of single ranks of ours."""
    cache = tmp_path_factory.mktemp("cache")

    def run(*flags, ranks=2, entry=OURS, env=None, succeeds=True, data=True, flags_of_rank=None):
        data_flags = ["--data-path", data_prefix, "--split", "8,1,1", "--data-cache-path", cache]
        flags = [str(flag) for flag in (*MODEL, *(data_flags if data else []), *flags)]
        if entry == OURS and env is None:
            result = forkserver(["--cpu", *flags], ranks, flags_of_rank or {})
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            environment = {**ENVIRONMENT, **(env or {})}
            ended = run_command([*command, *entry, *flags], cwd=ROOT, env=environment, stderr=subprocess.STDOUT)
            result = Run(ended.stdout, ended.returncode)
        if succeeds:
            assert result.returncode == 0, result.output[-6000:]
        return result

    return run


@pytest.fixture(scope="session")
def use(forkserver):
    """A function that runs what uses a checkpoint: "evaluate" or "generate", flags -> Run."""

    def run(command, *flags, ranks=1, succeeds=True):
        result = forkserver(["--cpu", *map(str, flags)], ranks, {}, f"air_moe_megatron.{command}")
        assert not succeeds or result.returncode == 0, result.output[-6000:]
        return result

    return run


def trainer_of(pretrain, *model_flags):
    """A function that trains a model whose flags name its data: more flags -> Run.

    If the last of ``model_flags`` needs a value, as --train-iters does, the value is the first of the others.
    """
    return lambda *flags, **settings: pretrain(*model_flags, *flags, data=False, **settings)


def save_flags(directory: Path, interval: int) -> list:
    return ["--save", directory, "--save-interval", interval]


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refused(run: Run, message: str) -> bool:
    """Whether the run ended with the message before Megatron set anything up."""
    return run.returncode != 0 and message in run.output and "time to initialize megatron" not in run.output


def assert_same_norms(run: Run, expected: Run, steps: Iterable[int]) -> None:
    """The gradient norms of these steps are the same, but for their last printed digit."""
    found, wanted = ({step: float(one.norms[step]) for step in steps} for one in (run, expected))
    assert found == pytest.approx(wanted, abs=PRINTED_NORM)


def read_diagnostics(directory: Path, kind: str | None = None) -> list[dict]:
    """The lines of a run's diagnostics, all or those of one kind."""
    lines = [json.loads(line) for line in (directory / "air_diagnostics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def untimed(line: dict) -> dict:
    """A line of diagnostics without what depends on the clock."""
    kept = {
        name: value for name, value in line.items() if "time" not in name and not name.endswith(("seconds", "share"))
    }
    layers = [untimed(layer) for layer in line.get("layers", [])]
    return kept | {"layers": layers} if layers else kept


def read_checkpoint(directory: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of a ``torch_dist`` checkpoint, whole, without any process group."""
    state = {}
    reader = FileSystemReader(str(directory / f"iter_{iteration:07d}"))
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {key: value for key, value in _flatten(state) if isinstance(value, torch.Tensor)}


def _flatten(state, prefix=""):
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
