"""State that is learned without gradients: codebook, shortlists and input norms. Imports torch and ops, not Megatron.

``learner.py`` has the base class of codebook and norms. ``module_state.py`` protects their statistics from casts and
wrappers. ``recomputation.py`` decides which forward of a token counts.
"""
