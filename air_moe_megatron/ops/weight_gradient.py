"""The gradient of a weight of which a microbatch uses only some rows, added to Megatron's ``main_grad`` if it exists.

A dense gradient [V, H] per microbatch is as large as the weight, however few rows were used. Megatron's data-parallel
wrapper gives each parameter a ``main_grad`` that outlives the microbatch. As in Megatron's fused linear layers, the
sums are added there directly. They touch only the rows that were used.

Megatron then ignores what autograd has accumulated for the weight. So :class:`_MainGradHook` finds out whether other
terms of the loss have contributed to it. Where other code needs the whole gradient, it is dense (:func:`main_grad_of`).
"""

import warnings
import weakref
from collections.abc import Callable

import torch
from torch.nn.functional import embedding_bag

from air_moe_megatron.ops.dtypes import at_least_fp32

_CHUNK_ELEMENTS = 2**26  # elements of the products that are added to main_grad at a time on a GPU: 256 MiB in fp32


class _MainGradHook:
    """Hook of a weight's gradient that tells Megatron whether all of the gradient has been added to ``main_grad``.

    It sees the sum over all terms of the loss. A backward that has added its part to ``main_grad`` contributes
    :attr:`zeros` instead, so the sum is the contribution of the other terms. Without other terms the sum is ``zeros``
    itself. Megatron does not read it then, and gets a tensor that is never written: on a CPU it takes no memory.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weakref.ref(weight)
        self.zeros = weight.new_zeros(()).expand_as(weight)

    def __call__(self, grad: torch.Tensor) -> torch.Tensor:
        weight = self._weight()
        weight.grad_added_to_main_grad = grad.data_ptr() == self.zeros.data_ptr()
        return torch.empty_like(weight) if weight.grad_added_to_main_grad else grad


def main_grad_of(weight: torch.Tensor) -> torch.Tensor | None:
    """[V, H] view of ``weight.main_grad``, which accumulates the gradient over microbatches; call it in a backward.

    Returns:
        None if there is none, or if its gradient must not be added to it in parts: because ``torch.autograd.grad``
        computes it, or because hooks of other code must see all of it.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None or not weight.requires_grad or _has_other_hooks(weight) or not _is_accumulated(weight):
        return None
    return main_grad.view(-1, weight.shape[-1])


def _has_other_hooks(weight: torch.Tensor) -> bool:
    hooks = (weight._backward_hooks or {}).values()
    return bool(weight._post_accumulate_grad_hooks) or any(not isinstance(hook, _MainGradHook) for hook in hooks)


def _is_accumulated(weight: torch.Tensor) -> bool:
    """Whether the running backward accumulates the gradient of a leaf, instead of returning it."""
    try:
        return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(weight).node)
    except RuntimeError:  # raised for a leaf in torch.autograd.grad
        return False


def added_to_main_grad(weight: torch.Tensor) -> torch.Tensor:
    """What a backward returns for a weight whose gradient it has added to ``main_grad``: zeros without memory."""
    hooks = (weight._backward_hooks or {}).values()
    hook = next((hook for hook in hooks if isinstance(hook, _MainGradHook)), None)
    if hook is None:
        hook = _MainGradHook(weight)
        weight.register_hook(hook)
    if (hook.zeros.device, hook.zeros.dtype) != (weight.device, weight.dtype):  # the module was moved or cast
        hook.zeros = weight.new_zeros(()).expand_as(weight)
    return hook.zeros


def add_weight_gradient(weight: torch.Tensor, add: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """Call ``add`` on ``main_grad`` [V, H] if it exists, otherwise on zeros; return what the backward must return."""
    main_grad = main_grad_of(weight)
    if main_grad is None:
        grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        add(grad_weight.view(-1, weight.shape[-1]))
        return grad_weight
    add(main_grad)
    return added_to_main_grad(weight)


def weight_gradient(
    weight: torch.Tensor, source: torch.Tensor, first: torch.Tensor, rows: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Sum ``values[n] * source[rows[n]]`` over the pairs n of each row of ``weight``.

    Sums are added directly to an fp32 ``main_grad``: on a CPU by a sparse-times-dense product, and on a GPU by atomic
    additions, unless torch's deterministic algorithms are on. For a narrower ``main_grad`` a dense tensor of sums is
    made first, and rounded once. Does not wait for the device.

    Args:
        weight: [..., H] parameter of V rows.
        source: [R, H], any float dtype.
        first: [V + 1] int64, the first pair of each row of weight; the last entry is N.
        rows: [N] int64, rows of source; the pairs are sorted by row of weight.
        values: [N], any float dtype.
    Returns:
        the gradient in the dtype and shape of ``weight``; if it was added to ``main_grad``, a tensor to be ignored.

    Example: first [0, 0, 2], rows [0, 1] and values [2, 1] make row 0 zero, and row 1 2 * source[0] + source[1].
    """
    main_grad = main_grad_of(weight)
    wide = at_least_fp32(source.dtype)
    source, values = source.to(wide), values.to(wide)
    if main_grad is None or main_grad.dtype != wide:
        sums = embedding_bag(rows, source, first[:-1], per_sample_weights=values, mode="sum")
        if main_grad is None:
            return sums.to(weight.dtype).view_as(weight)
        main_grad.add_(sums)
    elif source.is_cuda:
        ids = torch.searchsorted(first, torch.arange(rows.numel(), device=rows.device), right=True) - 1
        for part in _parts(rows.numel(), max(1, _CHUNK_ELEMENTS // source.shape[1])):
            main_grad.index_add_(0, ids[part], source[rows[part]].mul_(values[part].unsqueeze(1)))
    elif rows.numel():
        torch.addmm(main_grad, sparse_rows(first, rows, values, source.shape[0]), source, out=main_grad)
    return added_to_main_grad(weight)


def sparse_rows(first: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, num_columns: int) -> torch.Tensor:
    """The CSR matrix [V, num_columns] with ``values`` in ``columns``; ``first`` [V + 1] has the start of each row."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")  # torch announces CSR as beta, once per process
        shape = (first.numel() - 1, num_columns)
        return torch.sparse_csr_tensor(first, columns, values, shape, check_invariants=False)


def _parts(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]
