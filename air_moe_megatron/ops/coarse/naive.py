"""Ground truth of the coarse stage: all similarities in memory, a stable sort, sums by ``index_add_``."""

import torch


def naive_assign(hidden, codewords, num_probes, allowed=None):
    """As :func:`air_moe_megatron.ops.coarse.kernels.assign_tokens`, in the codewords' dtype, with [T, C] in memory."""
    similarity = hidden.to(codewords.dtype) @ codewords.t()
    if allowed is not None:
        similarity = similarity.masked_fill(~allowed, float("-inf"))
    return similarity.sort(dim=1, descending=True, stable=True).indices[:, :num_probes]


def naive_token_statistics(hidden, codewords, assignments, keep=None):
    """[C, H + 3]: sums of unit tokens, counts, sums of cosines and of lengths, in the codewords' dtype."""
    if keep is not None:
        hidden, assignments = hidden[keep], assignments[keep]
    hidden = hidden.to(codewords.dtype)
    lengths = hidden.norm(dim=1, keepdim=True)
    unit = hidden / lengths.clamp_min(torch.finfo(torch.float32).tiny)
    cosines = (unit * codewords[assignments]).sum(dim=1, keepdim=True)
    rows = torch.cat((unit, torch.ones_like(lengths), cosines, lengths), dim=1)
    return rows.new_zeros(codewords.shape[0], rows.shape[1]).index_add_(0, assignments, rows)


def naive_assign_with_statistics(hidden, codewords, num_probes, allowed=None, keep=None):
    """As :func:`air_moe_megatron.ops.coarse.kernels.assign_with_statistics`."""
    assignments = naive_assign(hidden, codewords, num_probes, allowed)
    return assignments, naive_token_statistics(hidden, codewords, assignments[:, 0], keep)
