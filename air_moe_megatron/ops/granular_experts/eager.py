"""Granular experts with torch operations: each weight row is one pair product."""

from collections.abc import Callable

import torch

from air_moe_megatron.ops.pair_products import Pairs, pair_dots, pair_sums


def granular_experts(
    hidden: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    probs: torch.Tensor,
    pairs: Pairs,
    activate: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.granular_experts.granular_experts`."""
    num_pairs, num_inputs, ffn_hidden_size = probs.shape[0], weight1.shape[1], weight2.shape[1]
    inputs = pair_dots(hidden, weight1, pairs.split(num_inputs)).view(num_pairs, num_inputs)
    values = activate(inputs) * probs.unsqueeze(1)  # [N, F], fp32 or wider
    return pair_sums(values.reshape(-1), weight2, pairs.split(ffn_hidden_size))
