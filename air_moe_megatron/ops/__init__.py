"""Tensor operations of the router, one folder each: naive.py is the ground truth. They import torch only."""
