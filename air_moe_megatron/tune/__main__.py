"""Choose AIR's sizes for a checkpoint: ``python -m air_moe_megatron.tune --load CHECKPOINT --data-path PATH [--cpu]``.

The model's flags come from the checkpoint. See docs/tools.md.
"""

from air_moe_megatron.command.start import run_quietly


def main() -> None:
    """Choose the device, then hand over to ``tune.command.run``.

    Raises:
        SystemExit: if a check refuses the start; one line says why.
    """
    screen = run_quietly()
    from air_moe_megatron.tune import command

    command.run(screen)


if __name__ == "__main__":
    main()
