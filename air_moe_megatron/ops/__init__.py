"""Tensor operations of the router, one folder each. They import torch (and Triton) only.

``__init__.py`` is the documented front door: it validates, then calls the Triton kernels or torch (``backend.py``).
``naive.py`` specifies the operation and is what tests compare with; ``eager.py`` is the torch version, ``kernels.py``
the Triton one. ``torch.compile`` breaks its graph at each front door: operations read group sizes and the environment
on the host, and write gradients into ``main_grad``.

Legend of all files, to which some add letters of their own:

- T tokens, H hidden, E experts, C clusters (codewords), L shortlist, P probes, K top-k
- R rows of tokens, N pairs of a row and an expert (or a weight row), M weight rows, F rows of an expert
- D expert-parallel ranks
"""
