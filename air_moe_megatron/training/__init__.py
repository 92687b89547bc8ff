"""A run, from its command line to Megatron's loop; ``training.py`` calls the rest in order."""
