"""Tensor operations of the router, one folder each. They import torch (and Triton) only.

``__init__.py`` is the documented front door: it validates, then calls the Triton kernels or torch (``backend.py``).
``naive.py`` specifies the operation and is what tests compare with; ``eager.py`` is the torch version, ``kernels.py``
the Triton one. ``torch.compile`` breaks its graph at each front door: operations read group sizes and the environment
on the host, and write gradients into ``main_grad``.

Legend of the whole package; a file names letters of its own where it has some:

- T tokens, H hidden, E experts (in the tensors of experts those of one rank), K top-k, D expert-parallel ranks
- C clusters (codewords), L shortlist, P probes, M candidates whose scores reach probabilities and losses
- R rows of tokens, N pairs of a row and an expert, V rows of a weight, F rows of an expert
- S summands of a codeword, B blocks of work
"""
