"""The gradient of a weight of which a microbatch uses some rows: into Megatron's ``main_grad`` where there is one.

A dense gradient of [M, H] per microbatch is as large as the weight itself, whatever few rows were used. Megatron's
data-parallel wrapper gives each parameter a ``main_grad`` that outlives the microbatch; the sums go straight there, as
those of its fused linear layers do, and touch only the rows that were used.

Legend: N pairs, M weight rows, H hidden.
"""

import torch
from torch.nn.functional import embedding_bag

_CHUNK_ELEMENTS = 2**21  # of the sums on their way into main_grad: 8 MiB in fp32


def main_grad_of(weight: torch.Tensor) -> torch.Tensor | None:
    """[M, H] view of the buffer that gathers the gradient of ``weight`` over microbatches; None where there is none."""
    main_grad = getattr(weight, "main_grad", None)
    return None if main_grad is None else main_grad.view(-1, weight.shape[-1])


def added_to_main_grad(weight: torch.Tensor) -> torch.Tensor:
    """What a backward returns for a weight whose gradient is in ``main_grad`` already.

    Autograd needs a tensor of the right shape for Megatron's hooks to run; they do not read it, and it is never
    written, so that on a CPU it takes no memory.
    """
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


def weight_gradient(weight, source, ids, rows, values):
    """Sum ``values[n] * source[rows[n]]`` into row ``ids[n]`` of the gradient of ``weight``.

    Does not wait for the device. On a GPU the sums are made by atomic additions, unless torch's deterministic
    algorithms are on.

    Args:
        weight: [..., H] parameter of M rows.
        source: [R, H], any float dtype.
        ids: [N] int64, ascending.
        rows: [N] int64, rows of source.
        values: [N], any float dtype.
    Returns:
        the gradient in the dtype and shape of ``weight``; where it went into ``main_grad``, a tensor to be ignored.

    Example: two pairs (id 3, row 0, value 2) and (id 3, row 1, value 1) make row 3 equal 2 * source[0] + source[1].
    """
    num_rows, hidden_size = weight.numel() // weight.shape[-1], weight.shape[-1]
    main_grad = main_grad_of(weight)
    wide = torch.promote_types(source.dtype, torch.float32)
    source, values = source.to(wide), values.to(wide)
    if main_grad is None:
        first = torch.searchsorted(ids, torch.arange(num_rows, device=ids.device))
        sums = embedding_bag(rows, source, first, per_sample_weights=values, mode="sum")
        return sums.to(weight.dtype).view_as(weight)
    chunk = max(1, _CHUNK_ELEMENTS // hidden_size)
    if source.is_cuda:
        for part in _parts(ids.numel(), chunk):
            products = source[rows[part]].mul_(values[part].unsqueeze(1))
            main_grad.index_add_(0, ids[part], products.to(main_grad.dtype))
    else:  # to know how many rows were used costs nothing here
        used, counts = torch.unique_consecutive(ids, return_counts=True)
        ends = counts.cumsum(0)
        first = ends - counts
        for part in _parts(used.numel(), chunk):
            pairs = slice(int(first[part.start]), int(ends[part.stop - 1]))
            sums = embedding_bag(
                rows[pairs], source, first[part] - pairs.start, per_sample_weights=values[pairs], mode="sum"
            )
            main_grad.index_add_(0, used[part], sums.to(main_grad.dtype))
    return added_to_main_grad(weight)


def _parts(length, chunk):
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]
