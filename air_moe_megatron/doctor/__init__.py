"""What would stop a command line, and whether a version of Megatron has what we use; see docs/tools.md.

``command.py`` runs the checks of a start, ``machine.py`` says what is installed, ``mismatches.py`` compares our use of
Megatron with its sources, which ``source_tree.py`` reads.
"""
