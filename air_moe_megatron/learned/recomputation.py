"""Count each token once where activations are recomputed.

Activation checkpointing runs the forward of a layer twice for the same tokens. Statistics must count one of the two:

- Reentrant checkpointing (Megatron's, and ``torch.utils.checkpoint`` with ``use_reentrant=True``) runs the first
  forward without gradients and repeats it with gradients inside the backward. The second one counts.
- Non-reentrant checkpointing runs both with gradients. The first one counts.

So the two forwards run different operations. Selective checkpointing stores results of operations in the first forward
and returns them, in order, in the second. An operation that runs in only one of the two must be hidden from it, see
:func:`hidden_from_checkpoints`.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode


def is_in_backward() -> bool:
    """Whether autograd is executing a backward on this thread."""
    return torch._C._current_graph_task_id() != -1


def keeps_graph() -> bool:
    """Whether the backward that is executing keeps its graph, so that a second backward may repeat its forwards."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def may_be_repeated() -> bool:
    """Whether the forward that is running may be repeated in a backward.

    True in every checkpoint, and also for other forwards without gradients or under other saved-tensor hooks.
    """
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def hidden_from_checkpoints() -> AbstractContextManager:
    """A context in which selective checkpointing stores and replaces no results; no effect without checkpointing."""
    selective = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
    return _pop_mode_temporarily() if isinstance(_get_current_dispatch_mode(), selective) else nullcontext()


class ForwardCounter:
    """Decides which training forwards of one module count, and which only repeat another.

    A forward inside a backward counts if an earlier forward without gradients is still to be repeated. Only the number
    of such forwards is kept, so the order of microbatches does not matter.
    """

    def __init__(self) -> None:
        self._num_waiting = 0

    def counts(self) -> bool:
        """Whether the training forward that begins now counts; call it once per forward."""
        has_gradients = torch.is_grad_enabled()
        if not is_in_backward():
            self._num_waiting += not has_gradients
            return has_gradients
        # The first pass of a checkpoint within a checkpoint has no gradients and is repeated later in this backward.
        if not has_gradients or _is_repeated_by_torch() or self._num_waiting == 0:
            return False
        # A checkpoint whose graph is kept may have several backwards; only its first one counts.
        node, backward = torch._C._current_autograd_node(), torch._C._current_graph_task_id()
        if node is not None and node.metadata.setdefault(self, backward) != backward:
            return False
        self._num_waiting -= 1
        return True

    def reset(self) -> None:
        """Forget forwards that are still to be repeated; call it when an attempt at a step begins, and when it ends."""
        self._num_waiting = 0


def _is_repeated_by_torch() -> bool:
    """Whether a non-reentrant checkpoint of torch is repeating a forward. Other saved-tensor hooks can hide this.

    The answer matters only after a training forward without gradients that nothing repeats.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_recomputation_hook")
