"""Pass the token ids of each microbatch from the model's embedding to modules that route or count by them.

Routers see hidden states, not token ids. So the embedding must be on the same rank. The ids that a module holds are
those of the microbatch whose forward ran last. Legend: T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from air_moe_megatron.routers.base import CompactRouter


def ids_in_order(token_ids: torch.Tensor, router: CompactRouter) -> torch.Tensor:
    """[T] token ids of this rank in the order of a router's hidden states, from ids [batch, sequence]."""
    ids = token_ids.t()  # [sequence, batch]
    if router.config.sequence_parallel:
        ids = ids.chunk(router.tp_group.size(), dim=0)[router.tp_group.rank()]
    return ids.reshape(-1)


def embedding_of(chunk: torch.nn.Module) -> torch.nn.Module | None:
    """The embedding of a model chunk, which sees the token ids; None if the chunk has no embedding."""
    return next((module for name, module in chunk.named_modules() if name.split(".")[-1] == "embedding"), None)


def tell_token_ids(embedding: torch.nn.Module, receivers: Sequence[Any]) -> RemovableHandle:
    """Make an embedding set ``receiver.token_ids`` in each forward, until the returned handle is removed."""
    return embedding.register_forward_pre_hook(_TellTokenIds(receivers), with_kwargs=True)


class _TellTokenIds:
    """Forward hook of an embedding. In a copy of the model it tells the receivers of the copy."""

    def __init__(self, receivers: Sequence[Any]) -> None:
        self._receivers = list(receivers)

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        token_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        for receiver in self._receivers:
            receiver.token_ids = token_ids
