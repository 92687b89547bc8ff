"""Pretrain a GPT model with Megatron-Core: `torchrun ... -m air_moe_megatron.pretrain <Megatron flags> [ours]`.

It is what Megatron-LM's `pretrain_gpt.py` (and, with `--hybrid-layer-pattern`, `pretrain_hybrid.py`) is to a checkout
of Megatron-LM. Every Megatron flag keeps its meaning; the few that need code from outside the `megatron-core` wheel are
refused by name. With `--moe-router-type topk`, the default, it is Megatron.

Importing this module loads nothing else: worker processes, such as those that write checkpoints, import it again.
"""

import os
import sys
import time
import warnings


def main() -> None:
    """Choose the device, then hand over to `training.train`.

    Raises:
        SystemExit: where there is neither a GPU nor `--cpu`, or a check refuses the start.
    """
    from air_moe_megatron import console

    program_start = time.time()
    screen = None
    log_file = console.log_file_of(sys.argv[1:])
    if log_file:
        with console.refusals():
            screen = console.write_log_file(log_file)
    if os.environ.get("RANK", "0") != "0":
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)

    if "--cpu" in sys.argv:
        # Large pages, where the system grants them on request: gathered experts each lie on another page.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    from air_moe_megatron import cpu

    if "--cpu" in sys.argv:  # before Megatron is imported: it binds some of torch.cuda at import
        if torch.cuda.is_available() and not cpu.is_enabled():
            console.refuse(
                "--cpu is for machines without a CUDA GPU, and this one has one; leave it out, or hide the GPU with "
                "CUDA_VISIBLE_DEVICES="
            )
        cpu.enable()
        cpu.set_rendezvous_defaults()
        sys.argv = cpu.with_required_flags(sys.argv)
    elif not torch.cuda.is_available() and not {"-h", "--help"} & set(sys.argv):
        console.refuse("no CUDA GPU is visible; give --cpu to train on CPU with gloo")

    from air_moe_megatron.training import train

    train(program_start, screen)


if __name__ == "__main__":
    main()
