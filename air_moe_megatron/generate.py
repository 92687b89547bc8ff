"""Continue texts: ``python -m air_moe_megatron.generate --load CHECKPOINT --prompt TEXT [TEXT ...] [--cpu]``.

The model's flags come from the checkpoint. See docs/inference.md.
"""

from air_moe_megatron.command.start import run_quietly


def main() -> None:
    """Choose the device, then hand over to ``inference.generation.run``.

    Raises:
        SystemExit: if a check refuses to start; one line says why.
    """
    screen = run_quietly()
    from air_moe_megatron.inference import generation

    generation.run(screen)


if __name__ == "__main__":
    main()
