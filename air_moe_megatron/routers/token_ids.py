"""How token ids reach what routes or counts by them: from the model's embedding, a microbatch at a time.

Routers see hidden states, not token ids. So the embedding must be on the same rank, and forward and backward of a
microbatch must run in turn. Legend: T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from torch.utils.hooks import RemovableHandle

from air_moe_megatron.routers.base import CompactRouter


def ids_in_order(token_ids: torch.Tensor, router: CompactRouter) -> torch.Tensor:
    """[T] token ids of this rank in the order of a router's hidden states, from ids [batch, sequence]."""
    ids = token_ids.t()  # [sequence, batch]
    if router.config.sequence_parallel:
        ids = ids.chunk(router.tp_group.size(), dim=0)[router.tp_group.rank()]
    return ids.reshape(-1)


def embedding_of(chunk: torch.nn.Module) -> torch.nn.Module | None:
    """The embedding of a model chunk, which sees the token ids; None if it has none."""
    return next((module for name, module in chunk.named_modules() if name.split(".")[-1] == "embedding"), None)


def embedders_of_shifted_ids(chunk: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of multi-token prediction of a model chunk, which call its embedding with shifted ids."""
    return [module for module in chunk.modules() if isinstance(module, MultiTokenPredictionLayer)]


def tell_token_ids(
    embedding: torch.nn.Module, receivers: Sequence[Any], others: Sequence[torch.nn.Module] = ()
) -> RemovableHandle:
    """Have an embedding set the ``token_ids`` of receivers to those of each microbatch, until the handle is removed.

    Args:
        embedding: of a model chunk.
        receivers: objects with that attribute.
        others: modules whose forwards call the embedding with ids that are not those of the decoder's layers. A layer
            that is recomputed after them still has its own.
    """
    running = []

    def enter(*_: object) -> None:
        running.append(True)

    def leave(*_: object) -> None:
        running.pop()

    for other in others:
        other.register_forward_pre_hook(enter)
        other.register_forward_hook(leave, always_call=True)

    def tell(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if running:
            return
        token_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        for receiver in receivers:
            receiver.token_ids = token_ids

    return embedding.register_forward_pre_hook(tell, with_kwargs=True)
