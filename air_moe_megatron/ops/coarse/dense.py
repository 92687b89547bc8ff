"""The coarse stage with torch operations: the similarities [T, C] in memory, sums by `index_add_`."""

import torch


def dense_assign(hidden, codewords, num_probes, allowed):
    """As :func:`air_moe_megatron.ops.coarse.assign`."""
    similarity = hidden.float() @ codewords.t()
    if allowed is not None:
        similarity = similarity.masked_fill(~allowed, float("-inf"))
    if num_probes == 1:
        return similarity.argmax(dim=1, keepdim=True)
    return similarity.topk(num_probes, dim=1).indices


def dense_token_statistics(hidden, codewords, assignments, keep, ordered):
    """As :func:`air_moe_megatron.ops.coarse.token_statistics`. Waits for the device where tokens are left out."""
    if keep is not None:
        hidden, assignments = hidden[keep], assignments[keep]
    hidden = hidden.float()
    lengths = hidden.norm(dim=1, keepdim=True)
    unit = hidden / lengths.clamp_min(torch.finfo(torch.float32).tiny)
    scalars = torch.cat((torch.ones_like(lengths), lengths), dim=1)

    def sum_per_codeword(rows):
        if ordered:
            counts = torch.bincount(assignments, minlength=codewords.shape[0])
            rows = rows.index_select(0, assignments.argsort(stable=True))
            return torch.segment_reduce(rows, "sum", lengths=counts, initial=0)
        return rows.new_zeros(codewords.shape[0], rows.shape[1]).index_add_(0, assignments, rows)

    sums, (counts, summed_lengths) = sum_per_codeword(unit), sum_per_codeword(scalars).split(1, dim=1)
    cosines = (sums * codewords).sum(dim=1, keepdim=True)  # of a sum of vectors: the sum of their cosines
    return torch.cat((sums, counts, cosines, summed_lengths), dim=1)
