"""Ground truth of the granular experts: gather both projections of every pair's expert."""

from collections.abc import Callable

import torch


def naive_granular_experts(
    hidden: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    probs: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
    gated: bool,
) -> torch.Tensor:
    """[R, H]: row r sums ``probs[n] * W2_e.T act(W1_e x_r)`` over its pairs n, with e = ids[n], by plain autograd.

    Args:
        hidden: [R, H].
        weight1: [E, F, H]; if ``gated``, [E, 2F, H] with the gates first.
        weight2: [E, F, H].
        probs, rows, ids: [N], of each pair.
        activation: elementwise function.
        gated: whether the experts are gated linear units.
    """
    inputs = torch.einsum("nh,nfh->nf", hidden[rows], weight1[ids])
    if gated:
        gate, linear = inputs.chunk(2, dim=1)
        values = activation(gate) * linear
    else:
        values = activation(inputs)
    outputs = torch.einsum("nf,nfh->nh", values * probs.unsqueeze(1), weight2[ids])
    return outputs.new_zeros(hidden.shape).index_add(0, rows, outputs)
