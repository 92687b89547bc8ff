"""Repeat one training step in deterministic mode: `python -m benchmarks.determinism --out FILE.json`.

The model is the small GPT of `train.py`. Weights, codebooks, lists and tokens are the same each time. What Megatron's
`--deterministic-mode` sets is set. So loss, gradients and statistics of the codebooks must come out bit for bit equal.
"""

import argparse
import hashlib
import json
import logging
import os
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in run.py, before anything imports torch

import torch

from benchmarks.arguments import positive
from benchmarks.measure import world
from benchmarks.models import Sizes, add_sizes, warm_up_codebook
from benchmarks.train import AIR, Trainer, make_batch

logger = logging.getLogger("benchmarks.determinism")


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """A hash of the bits of all tensors, in their order."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy())
    return state.hexdigest()


def hash_step(trainer: Trainer, batch: dict[str, torch.Tensor]) -> str:
    """Hash loss, gradients and codebook statistics of one forward and backward. The model does not change."""
    from air_moe_megatron.sync import discard_statistics

    trainer.model.zero_grad_buffer()
    discard_statistics(trainer.model)
    loss = trainer.model(batch["tokens"], batch["positions"], batch["mask"], labels=batch["labels"]).float().mean()
    loss.backward()
    trainer.model.finish_grad_sync()
    gradients = [parameter.main_grad for parameter in trainer.model.parameters()]
    statistics = [learner.statistics for router in trainer.routers for learner in router.learners()]
    if not all(tensor.any() for tensor in (*gradients, *statistics)):
        raise AssertionError("a gradient or a codebook's statistics are zero: the step has not run as it should")
    return digest([loss.reshape(1), *gradients, *statistics])


def run(args: Namespace) -> list[str]:
    """The hash of each repeat."""
    from megatron.training.determinism import apply_determinism_to_args

    apply_determinism_to_args(Namespace(cross_entropy_loss_fusion=False, tp_comm_overlap=False))
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    sizes = Sizes.of(args, dtype=dtype, routing_dtype=torch.float32)
    with world() as (device, pg_collection):
        trainer = Trainer.of_router(AIR, sizes, 2, args.sequence, pg_collection, device, deterministic_mode=True)
        batch = make_batch(sizes, args.sequence, device)
        for layer, hidden in trainer.layers_and_inputs(batch):
            warm_up_codebook(layer.router, hidden)
        hashes = []
        for number in range(1, args.repeats + 1):
            hashes.append(hash_step(trainer, batch))
            logger.info("repeat %d of %d: %s", number, args.repeats, hashes[-1][:12])
        return hashes


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, repeat the step and write the hashes."""
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, experts=16_384, hidden=512, tokens=8192, topk=32, ffn=2)
    parser.add_argument("--sequence", type=positive, default=512, help="tokens of a sequence")
    parser.add_argument("--repeats", type=positive, default=40, help="how often the step is made")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write the list of hashes to")
    args = parser.parse_args(argv)
    hashes = run(args)
    args.out.write_text(json.dumps(hashes) + "\n")


if __name__ == "__main__":
    main()
