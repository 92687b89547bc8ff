"""What is learned without gradients: the codebook, the shortlists made with it, and the input norm. torch only.

``learner.py`` is the base of codebook and norm. ``module_state.py`` keeps their statistics from casts and wrappers, and
``recomputation.py`` says which forward of a token counts.
"""
