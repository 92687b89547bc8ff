"""Starts the ranks of training runs from one process that has imported Megatron already.

Importing torch and Megatron takes each rank longer than most tests train. This process imports them once, in CPU mode,
and forks a process per rank for each run it is asked for: a JSON object per line in, one out. Ranks end as those of
torchrun do: when one fails, the others are stopped.
"""

import functools
import gc
import importlib
import inspect
import json
import os
import signal
import sys
import time

_GRACE = 60.0  # seconds that the others get to end by themselves when a rank has failed; quiet, they need under one


def start(rank: int, request: dict) -> int:
    """Fork a rank; returns its process id, and in the rank itself does not return: it ends as any program does."""
    process = os.fork()
    if process:
        return process
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["ranks"], "LOCAL_WORLD_SIZE": request["ranks"]}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": request["port"]}
    os.environ.update({name: str(value) for name, value in {**world, **rendezvous}.items()})
    sys.argv = [request["module"], *request["flags"], *request["flags_of_rank"].get(str(rank), [])]
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from air_moe_megatron.command import console

    console._PATIENCE = 1.0  # no launcher stops this rank when rank 0 has ended
    # The first save would spawn the process of this queue, which imports torch anew.
    filesystem_async.get_write_results_queue("fork")
    importlib.import_module(request["module"]).main()
    sys.exit(0)


def wait(processes: list[int], timeout: float) -> int:
    """Wait for all ranks; returns the first exit code that is not 0, if any."""
    failure, deadline = 0, time.monotonic() + timeout
    running = set(processes)
    while running:
        for process in list(running):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                running.discard(process)
                code = os.waitstatus_to_exitcode(status)
                if code and not failure:
                    failure, deadline = code, min(deadline, time.monotonic() + _GRACE)
        if time.monotonic() > deadline:
            failure = failure or -signal.SIGALRM
            for process in running:
                os.kill(process, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.02)
    return failure


def main() -> None:
    """Import what every rank needs, then serve until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Megatron prints while it is imported is no reply

    from air_moe_megatron import cpu

    cpu.enable()
    from megatron.training.arguments import parse_args

    import air_moe_megatron.inference.conversion
    import air_moe_megatron.inference.evaluation
    import air_moe_megatron.inference.generation
    import air_moe_megatron.training.run
    import air_moe_megatron.tune.command  # noqa: F401

    inspect.getsource = functools.cache(inspect.getsource)  # Megatron reads the sources of its configs for each parser
    sys.argv = sys.argv[:1]
    parse_args(ignore_unknown_args=True)
    gc.collect()
    gc.freeze()  # ranks neither search nor free what is there before them

    for line in sys.stdin:
        request = json.loads(line)
        processes = [start(rank, request) for rank in range(request["ranks"])]
        returncode = wait(processes, request["timeout"])
        replies.write(json.dumps({"returncode": returncode}) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
