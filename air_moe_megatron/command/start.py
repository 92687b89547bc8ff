"""The start of a command: the device, and where output goes. Both are chosen before Megatron is imported.

Importing this module loads only the standard library.
"""

import logging
import os
import sys
import warnings
from typing import TextIO

from air_moe_megatron.command import console


def run_quietly() -> TextIO:
    """Begin a command that prints only results: Megatron's output goes to ``--log-file``, or nowhere.

    Returns:
        the screen, as a stream: what standard output was before the call.
    Raises:
        SystemExit: as :func:`choose_device`.
    """
    screen, log_file = sys.stdout, console.log_file_of(sys.argv[1:])
    if not {"-h", "--help"} & set(sys.argv):
        with console.refusals():
            screen = console.write_log_file(log_file or os.devnull)
    if not log_file:
        logging.getLogger("air_moe_megatron").setLevel(logging.WARNING)
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
    if os.environ.get("RANK", "0") != "0":
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)

    if "--cpu" in sys.argv:
        # Use huge pages if the system grants them on request: each gathered expert is on another page.
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
    from air_moe_megatron.compat import require_entry_megatron

    try:
        require_entry_megatron()
    except ImportError as error:
        console.refuse(str(error))
    use_compiled_helpers()


def use_compiled_helpers() -> None:
    """Make Megatron compile its data-set helpers only if they are missing, as CPU mode does.

    The replacement keeps Megatron's own function as ``__wrapped__``.
    """
    from megatron.core.datasets import utils

    from air_moe_megatron.cpu.adaptations import unless_compiled

    if not hasattr(utils.compile_helpers, "__wrapped__"):
        utils.compile_helpers = unless_compiled(utils.compile_helpers)
