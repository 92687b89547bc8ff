"""Write the logits of a checkpoint's model on fixed tokens to a file, for tests that compare models."""

from pathlib import Path

import torch

from air_moe_megatron import cpu


def main() -> None:
    """The folder ``--out`` gets the file NAME.pt, of the checkpoint's folder NAME: [2, sequence, vocabulary] logits."""
    import sys

    sys.argv = cpu.with_required_flags(sys.argv)
    from air_moe_megatron.inference import restore
    from air_moe_megatron.process_groups import process_groups_released
    from tests.megatron.conftest import SEQUENCE, VOCABULARY

    command = restore.read_command_line(lambda parser: parser.add_argument("--out"))
    args = restore.complete_arguments(command)
    tokens = (torch.arange(2 * SEQUENCE).view(2, -1) * 7) % VOCABULARY
    with process_groups_released():
        model = restore.build_and_load(args, command.ranks)
        with torch.no_grad():
            logits = model[0](tokens, torch.arange(SEQUENCE).expand(2, -1), None)
        torch.save(logits, Path(args.out) / f"{Path(args.load).name}.pt")
