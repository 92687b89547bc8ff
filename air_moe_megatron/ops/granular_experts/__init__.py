"""Granular experts: very many tiny MLPs in one tensor per projection."""

from collections.abc import Callable

import torch

from air_moe_megatron.ops.backend import use_kernels
from air_moe_megatron.ops.granular_experts import eager
from air_moe_megatron.ops.pair_products import Pairs

__all__ = ["KERNEL_ACTIVATIONS", "granular_experts"]

KERNEL_ACTIVATIONS = ("gelu", "silu", "relu", "squared_relu")
"""Activations that the kernels have; "gelu" is the exact one."""


@torch.compiler.disable
def granular_experts(
    hidden: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    probs: torch.Tensor,
    pairs: Pairs,
    activate: Callable[[torch.Tensor], torch.Tensor],
    kernel_activation: str | None,
) -> torch.Tensor:
    """Apply each row's experts: ``y_r = sum over the pairs n of row r of p_n * W2_e.T act(W1_e x_r)``.

    Differentiable in hidden, both weights and probs. The weights' gradients are added to ``main_grad`` if it exists
    (``ops/weight_gradient.py``), and touch only experts that have pairs. Does not wait for the device.

    Args:
        hidden: [R, H], any float dtype.
        weight1: [E, F, H], or [E, 2F, H] for a gated linear unit, the gates first; any float dtype.
        weight2: [E, F, H], any float dtype.
        probs: [N].
        pairs: N pairs of rows and experts.
        activate: maps inputs [N, F] or [N, 2F] to values [N, F].
        kernel_activation: name of ``activate`` in ``KERNEL_ACTIVATIONS``; None if the kernels do not have it.
    Returns:
        [R, H] in the dtype of weight2; zero for a row without pairs. The kernels sum in fp32 or wider.
    Raises:
        ValueError: if shapes or the activation do not fit.

    Example: hidden [[1, 2]], weight1 [[[1, 1]]], weight2 [[[0, 1]]], relu, the pair (0, 0) with probability 0.5 gives
    [[0, 1.5]].
    """
    num_experts, ffn_hidden_size, hidden_size = weight2.shape
    if weight1.shape not in ((num_experts, parts * ffn_hidden_size, hidden_size) for parts in (1, 2)):
        raise ValueError(
            f"weight1 {tuple(weight1.shape)} must be [E, F, H] or [E, 2F, H] with weight2 {tuple(weight2.shape)} "
            "[E, F, H]"
        )
    if hidden.shape != (pairs.num_rows, hidden_size) or pairs.num_ids != num_experts or probs.shape != pairs.ids.shape:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and probs {tuple(probs.shape)} must be [R, H] and [N] with "
            f"R = {pairs.num_rows}, H = {hidden_size}, N = {pairs.ids.numel()}, and E = {pairs.num_ids}"
        )
    if kernel_activation is not None and kernel_activation not in KERNEL_ACTIVATIONS:
        raise ValueError(
            f"kernel_activation ({kernel_activation!r}) must be one of {', '.join(KERNEL_ACTIVATIONS)}, or None"
        )
    tensors = (hidden, weight1, weight2, probs)
    if kernel_activation is not None and use_kernels("granular_experts", *tensors, ffn_hidden_size=ffn_hidden_size):
        from air_moe_megatron.ops.granular_experts import kernels

        deterministic = torch.are_deterministic_algorithms_enabled()
        return kernels.granular_experts(hidden, weight1, weight2, probs, pairs, kernel_activation, deterministic)
    return eager.granular_experts(hidden, weight1, weight2, probs, pairs, activate)
