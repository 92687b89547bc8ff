"""Tensor operations of the router, one folder each: naive.py is the ground truth. They import torch only.

``torch.compile`` breaks its graph at each: they read group sizes and the environment on the host, and write gradients
into ``main_grad``.
"""
