"""A training run: its data, what is checked of them, and Megatron's loop. ``run.py`` calls all in order."""
