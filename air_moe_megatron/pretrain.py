"""Pretrain a GPT model with Megatron-Core: ``torchrun ... -m air_moe_megatron.pretrain <Megatron flags> [ours]``.

It replaces Megatron-LM's ``pretrain_gpt.py`` (and, with ``--hybrid-layer-pattern``, ``pretrain_hybrid.py``) without a
checkout of Megatron-LM. Every Megatron flag keeps its meaning. The few flags that need code from outside the
``megatron-core`` wheel are refused by name. With ``--moe-router-type topk``, the default, it trains as Megatron does.

Importing this module loads only the standard library, because worker processes, such as those that write checkpoints,
import it again.
"""

import logging
import os
import sys
import time
import warnings
from typing import TextIO


def main() -> None:
    """Choose the device, then hand over to ``training.training.train``.

    Raises:
        SystemExit: if there is neither a GPU nor ``--cpu``, or a check refuses to start.
    """
    from air_moe_megatron.training import console

    program_start = time.time()
    screen = None
    log_file = console.log_file_of(sys.argv[1:])
    if log_file:
        with console.refusals():
            screen = console.write_log_file(log_file)
    choose_device()
    from air_moe_megatron.training.training import train

    train(program_start, screen)


def run_quietly() -> TextIO:
    """Begin a command that prints only results: Megatron's output goes to ``--log-file``, or nowhere.

    Returns:
        the screen, as a stream: what standard output was before the call.
    Raises:
        SystemExit: as :func:`choose_device`.
    """
    from air_moe_megatron.training import console

    screen, log_file = sys.stdout, console.log_file_of(sys.argv[1:])
    if not {"-h", "--help"} & set(sys.argv):
        with console.refusals():
            screen = console.write_log_file(log_file or os.devnull)
    if not log_file:
        logging.getLogger(__package__).setLevel(logging.WARNING)
    choose_device()
    from air_moe_megatron import cpu

    cpu.set_rendezvous_defaults()
    return screen


def choose_device() -> None:
    """Turn on CPU mode if the command line has ``--cpu``, and add the flags that a CPU run needs to ``sys.argv``.

    Call it before Megatron is imported, because Megatron binds names of ``torch.cuda`` at import.

    Raises:
        SystemExit: if there is neither a GPU nor ``--cpu``, or both, or if the commands do not run on this Megatron.
    """
    from air_moe_megatron.training import console

    if os.environ.get("RANK", "0") != "0":
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)

    if "--cpu" in sys.argv:
        # Use large pages if the system grants them on request: each gathered expert is on another page.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    from air_moe_megatron import cpu

    if "--cpu" in sys.argv:
        if torch.cuda.is_available() and not cpu.is_enabled():
            console.refuse(console.CPU_ON_A_GPU)
        cpu.enable()
        cpu.set_rendezvous_defaults()
        sys.argv = cpu.with_required_flags(sys.argv)
    elif not torch.cuda.is_available() and not {"-h", "--help"} & set(sys.argv):
        console.refuse(console.NO_GPU)
    from air_moe_megatron.compat import require_entry_megatron, use_compiled_helpers

    try:
        require_entry_megatron()
    except ImportError as error:
        console.refuse(str(error))
    use_compiled_helpers()


if __name__ == "__main__":
    main()
