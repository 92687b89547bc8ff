"""A training run, from its command line to Megatron's loop. ``training.py`` calls the other modules in order."""
