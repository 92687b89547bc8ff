"""What all commands share: how one starts, its flags and their checks, the ranks' agreement, checkpoints to load."""
