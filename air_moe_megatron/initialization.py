"""Which of Megatron's methods of initialization may draw a weight a part at a time."""

import functools
from collections.abc import Callable

import torch


def is_normal(init_method: Callable[[torch.Tensor], object]) -> bool:
    """Whether a method is one of Megatron's that draw each number alike, whatever the tensor's shape."""
    return isinstance(init_method, functools.partial) and init_method.func is torch.nn.init.normal_
