"""Pretrain a GPT model with Megatron-Core: ``torchrun ... -m air_moe_megatron.pretrain <Megatron flags> [ours]``.

It replaces Megatron-LM's ``pretrain_gpt.py`` (and, with ``--hybrid-layer-pattern``, ``pretrain_hybrid.py``) without a
checkout of Megatron-LM. Every Megatron flag keeps its meaning. The few flags that need code from outside the
``megatron-core`` wheel are refused by name. Without our flags it trains as Megatron does.

Importing this module loads only the standard library, because worker processes, such as those that write checkpoints,
import it again.
"""

import sys
import time

from air_moe_megatron.command import console, start


def main() -> None:
    """Choose the device, then hand over to ``training.run.train``.

    Raises:
        SystemExit: if there is neither a GPU nor ``--cpu``, or a check refuses to start.
    """
    program_start = time.time()
    screen = None
    log_file = console.log_file_of(sys.argv[1:])
    if log_file:
        with console.refusals():
            screen = console.write_log_file(log_file)
    start.choose_device()
    from air_moe_megatron.training.run import train

    train(program_start, screen)


if __name__ == "__main__":
    main()
