"""Measure a model on data: ``python -m air_moe_megatron.evaluate --load CHECKPOINT --data-path PATH... [--cpu]``.

The model's flags come from the checkpoint. See docs/inference.md.
"""

from air_moe_megatron.command.start import run_quietly


def main() -> None:
    """Choose the device, then hand over to ``inference.evaluation.run``.

    Raises:
        SystemExit: if a check refuses to start; one line says why.
    """
    screen = run_quietly()
    from air_moe_megatron.inference import evaluation

    evaluation.run(screen)


if __name__ == "__main__":
    main()
