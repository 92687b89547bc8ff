"""Our entry as a launch script with a mistake would start it: rank 1 gets another top-k than the others.

Each rank says what it was refused with, and waits for the others to have said it, so that none is killed before.
"""

import os
import sys

if __name__ == "__main__":
    import torch

    from air_moe_megatron import pretrain

    rank = os.environ["RANK"]
    if rank == "1":
        sys.argv += ["--moe-router-topk", "3"]
    try:
        pretrain.main()
    except ValueError as error:
        sys.stdout.write(f"rank {rank} is refused: {error}\n")
        sys.stdout.flush()
        torch.distributed.barrier()
        raise
