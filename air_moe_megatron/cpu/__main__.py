"""``python -m air_moe_megatron.cpu SCRIPT ARGS...``: a Megatron script in CPU mode."""

import argparse
import os
import runpy
import sys

from air_moe_megatron.cpu import REQUIRED_FLAGS, enable, set_rendezvous_defaults
from air_moe_megatron.process_groups import process_groups_released


def main() -> None:
    """Run a Megatron script in CPU mode, as ``python SCRIPT ARGS...`` would run it. No flag is added."""
    parser = argparse.ArgumentParser(
        prog="python -m air_moe_megatron.cpu",
        description="Run a Megatron script on CPU with gloo.",
        epilog=f"Flags that such a run needs: {' '.join(REQUIRED_FLAGS)}",
    )
    parser.add_argument("script", help="for example pretrain_gpt.py of a Megatron-LM checkout")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="the script's arguments")
    arguments = parser.parse_args()
    if not os.path.isfile(arguments.script):
        sys.exit(f"{parser.prog}: no such script: {arguments.script}")
    sys.argv = [arguments.script, *arguments.args]
    # Before enable(): a checkout's own megatron directory must take precedence over the installed one, as usual.
    sys.path[0] = os.path.dirname(os.path.abspath(arguments.script))
    enable()
    set_rendezvous_defaults()
    with process_groups_released():
        runpy.run_path(arguments.script, run_name="__main__")


if __name__ == "__main__":
    main()
