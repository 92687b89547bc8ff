"""Save a checkpoint with another router: ``python -m air_moe_megatron.convert --load CHECKPOINT --save OTHER [--cpu]``.

It converts between ``topk`` and ``air``, and between forms of AIR's lists. See docs/inference.md.
"""

from air_moe_megatron.command.start import run_quietly


def main() -> None:
    """Choose the device, then hand over to ``inference.conversion.run``.

    Raises:
        SystemExit: if a check refuses to start; one line says why.
    """
    screen = run_quietly()
    from air_moe_megatron.inference import conversion

    conversion.run(screen)


if __name__ == "__main__":
    main()
