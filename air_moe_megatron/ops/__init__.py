"""Tensor operations of the router, one folder each. They import torch (and Triton) only.

``__init__.py`` is the public interface: it validates, then calls the Triton kernels or torch (``backend.py``).
``naive.py`` is the reference that tests compare with. ``eager.py`` is the torch version, and ``kernels.py`` the Triton
version. ``torch.compile`` breaks its graph at each public function, because operations read group sizes and the
environment on the host, and write gradients into ``main_grad``.

Legend of the whole package; a file's own legend adds to it or overrides it:

- T tokens, H hidden, E experts (in the tensors of experts those of one rank), K top-k, D expert-parallel ranks
- C clusters (codewords), L shortlist, P probes, M candidates whose scores reach probabilities and losses
- R rows of tokens, N pairs of a row and an expert, V rows of a weight, F hidden units of an expert (rows of each
  projection)
- S summands of a codeword, B blocks of work
"""
