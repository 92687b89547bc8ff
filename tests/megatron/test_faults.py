"""Bad days of a training run: killed and hung ranks, a full disk, ten thousand steps of loads that move.

docs/results/faults.md has the figures, which each test appends to the file that FAULTS names.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.megatron.conftest import AIR, ENVIRONMENT, EP2, MODEL, OURS, ROOT, free_port, read_checkpoint
from tests.processes import HANG_SECONDS

pytestmark = pytest.mark.long

KILLS, STEPS, INTERVAL = 10, 60, 5
TIMEOUT = ["--distributed-timeout-minutes", 1]
END_SECONDS = 150
"""How long the others may take to end with that timeout when a rank is killed or hangs, on a busy machine.

Most notice a closed connection at once. A rank that is killed while it saves may leave a process that writes for it and
holds its connections open: the others then wait for the timeout.
"""
COMPACT = ["--moe-granular-experts", "--moe-dispatch", "compact", "--moe-air-refresh-interval", "3"]


def note(**figures) -> None:
    """Keep what was measured, where FAULTS names a file."""
    if os.environ.get("FAULTS"):
        with Path(os.environ["FAULTS"]).open("a") as file:
            file.write(json.dumps(figures) + "\n")


class Ranks:
    """The ranks of a run without a launcher that would end them: as on two hosts."""

    def __init__(self, folder: Path, *flags, ranks: int = 2) -> None:
        port = free_port()
        self.logs = [folder / f"{rank}.log" for rank in range(ranks)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {**ENVIRONMENT, **{name: str(value) for name, value in world.items()}}
            command = [sys.executable, *OURS, *map(str, (*MODEL, *flags))]
            with log.open("w") as file:
                settings = {"cwd": ROOT, "env": environment, "stdout": file, "stderr": subprocess.STDOUT}
                self.processes.append(subprocess.Popen(command, start_new_session=True, **settings))

    @property
    def output(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    @property
    def step(self) -> int:
        """The last step that was printed."""
        return max(map(int, re.findall(r"iteration +(\d+)/", self.output)), default=0)

    def until(self, happened) -> bool:
        """Wait until ``happened()``; False if the ranks end before."""
        deadline = time.monotonic() + HANG_SECONDS
        while not happened():
            assert time.monotonic() < deadline, self.output[-3000:]
            if all(process.poll() is not None for process in self.processes):
                return False
            time.sleep(0.001)
        return True

    def seconds_to_end(self, seconds: float) -> float:
        """Wait until all ranks have ended; fails if that takes longer."""
        start = time.monotonic()
        for process in self.processes:
            process.wait(timeout=max(0.0, start + seconds - time.monotonic()))
        return time.monotonic() - start

    def end(self) -> None:
        """Kill the ranks and the processes that they started, as a launcher does."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def start(tmp_path, data_prefix):
    """A function that starts ranks, which are gone after the test."""
    started = []

    def run(*flags, ranks=2):
        data = ["--data-path", data_prefix, "--split", "8,1,1", "--data-cache-path", tmp_path / "cache"]
        started.append(Ranks(tmp_path, *AIR, *COMPACT, *EP2, *data, *flags, ranks=ranks))
        return started[-1]

    yield run
    for ranks in started:
        ranks.end()


def saved_step(folder: Path) -> int:
    tracker = folder / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.is_file() else 0


def test_killed_ten_times_it_ends_with_the_parameters_of_an_undisturbed_run(start, pretrain, tmp_path):
    """A rank is killed at a random step, or while a checkpoint is written, in turn; then all start again."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--train-iters", STEPS, "--save-interval", INTERVAL]
    pretrain(*AIR, *COMPACT, *EP2, *flags, "--save", whole)
    generator, kills = random.Random(0), []
    killed.mkdir()
    while len(kills) < KILLS:
        saved = saved_step(killed)
        run = start(*flags, *TIMEOUT, "--save", killed, *(["--load", killed] if saved else []))
        during_save = len(kills) % 2 == 1
        # So late that at least every other run gets further, so early that ten kills find steps to disturb.
        target = saved + generator.randint(1, INTERVAL + 4)
        hit = run.until(
            # a step after which a checkpoint is due is printed, and the checkpoint is not complete
            (lambda run=run: run.step % INTERVAL == 0 and run.step > saved_step(killed))
            if during_save
            else (lambda target=target, run=run: run.step >= target)
        )
        assert hit, run.output[-3000:]
        victim = generator.randrange(2)
        run.processes[victim].kill()
        seconds = run.seconds_to_end(END_SECONDS)
        run.end()
        assert all(process.returncode for process in run.processes)
        kills.append({"step": run.step, "during_save": during_save, "rank": victim, "seconds": round(seconds, 1)})
    pretrain(*AIR, *COMPACT, *EP2, *flags, "--save", killed, "--load", killed)
    expected, found = (read_checkpoint(folder, STEPS) for folder in (whole, killed))
    assert expected.keys() == found.keys() and any("codebook" in key for key in expected)
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    note(test="killed", kills=kills)


def test_when_a_rank_hangs_the_others_end_after_the_timeout(start):
    run = start("--train-iters", 10**6, *TIMEOUT)
    assert run.until(lambda: run.step >= 3)
    run.processes[1].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    run.processes[0].wait(timeout=END_SECONDS)
    note(test="hung", seconds=round(time.monotonic() - begin, 1))
    assert run.processes[0].returncode and "imed out" in run.logs[0].read_text(), run.output[-3000:]


def test_a_full_disk_ends_the_run_and_the_checkpoint_before_loads(start, pretrain, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    pretrain(*AIR, *COMPACT, *EP2, "--train-iters", 1, "--save", tmp_path / "measured", "--save-interval", 1)
    size = sum(path.stat().st_size for path in (tmp_path / "measured").rglob("*") if path.is_file())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size * 5 // 2}", "none", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        run = start("--train-iters", 12, "--save", folder, "--save-interval", 2)
        run.seconds_to_end(HANG_SECONDS)
        assert all(process.returncode for process in run.processes)
        assert "No space left on device" in run.output
        last = saved_step(folder)
        assert last in (2, 4)
        flags = ["--train-iters", 12, "--load", folder, "--save", tmp_path / "larger", "--save-interval", 12]
        resumed = pretrain(*AIR, *COMPACT, *EP2, *flags)
        assert min(resumed.steps) == last + 1
    finally:
        subprocess.run(["umount", folder], check=True)


def test_checkpoints_written_in_the_background_hold_codebook_and_lists(pretrain, tmp_path):
    flags = [*AIR, *COMPACT, *EP2, "--train-iters", 6, "--save-interval", 3]
    pretrain(*flags, "--save", tmp_path / "plain")
    pretrain(*flags, "--save", tmp_path / "background", "--async-save")
    expected, found = (read_checkpoint(tmp_path / name, 6) for name in ("plain", "background"))
    assert {key.rpartition(".")[2] for key in expected} >= {"codewords", "ema", "shortlist"}
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_an_overflow_in_fp16_skips_the_step_and_changes_no_codebook(pretrain, tmp_path):
    """The first loss scale is far too large: steps are skipped until it fits."""
    flags = ["--fp16", "--initial-loss-scale", 2**32, "--min-loss-scale", 1, "--hysteresis", 1]
    run = pretrain(*AIR, *COMPACT, *EP2, *flags, "--train-iters", 40, "--save", tmp_path, "--save-interval", 40)
    lines = re.findall(r"number of skipped iterations: +(\d+)", run.output)
    skipped = sum(map(int, lines[1:]))  # the second line counts the first step too
    assert 0 < skipped < 40
    updates = read_checkpoint(tmp_path, 40)["decoder.layers.mlp.router.codebook.num_updates"]
    assert updates.eq(40 - skipped).all()


def test_ten_thousand_steps_of_skewed_and_drifting_tokens(megatron_cpu):
    """Tokens come from 64 directions of power-law frequency, which turn and change places all the time."""
    import psutil

    from air_moe_megatron.sync import update_codebooks
    from tests.builders import make_layer

    hidden, experts, tokens, steps = 32, 256, 128, 10_000
    layer = make_layer(
        megatron_cpu, hidden_size=hidden, num_moe_experts=experts, moe_router_type="air", moe_air_num_clusters=32,
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01, moe_router_input_norm="running",
    )  # fmt: skip
    router, optimizer = layer.router, torch.optim.AdamW(layer.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    sources = torch.randn(64, hidden, generator=generator)
    weights = 1.0 / torch.arange(1, 65)
    last_used, memory = torch.zeros(32), []
    for step in range(steps):
        sources += 0.01 * torch.randn(64, hidden, generator=generator)
        if step % 500 == 499:
            sources = sources[torch.randperm(64, generator=generator)]
        drawn = sources[torch.multinomial(weights, tokens, True, generator=generator)]
        out, _ = layer((drawn + 0.1 * torch.randn(tokens, hidden, generator=generator)).unsqueeze(1))
        out.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        last_used[router.codebook.statistics[:, hidden] > 0] = step
        update_codebooks([layer])
        if step % 1000 == 999:
            memory.append(psutil.Process().memory_info().rss / 2**20)
    assert all(value.isfinite().all() for value in layer.state_dict().values() if torch.is_tensor(value))
    note(test="drift", idle=int((steps - 1 - last_used).max()), memory=[round(value) for value in memory])
    assert (steps - last_used).max() < 500, "a codeword stayed idle"
    assert memory[-1] < memory[1] + 20, memory
