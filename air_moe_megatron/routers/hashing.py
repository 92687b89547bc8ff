"""HashRouter: the experts of a token are fixed by its token id.

Each layer has a random table of K distinct experts per token id (``hash_tables.py``). Nothing is learned, and all K
experts have the prob 1/K, times the scaling factor.

Source: Roller et al. 2021, "Hash Layers For Large Sparse Models", arXiv 2106.04426. Deviations: K experts per id
instead of one, and by default balance over ids instead of over their frequencies.

Cost per token: no FLOPs, only a look-up of one row of the table.

Routers see hidden states, not token ids. :func:`hand_over_token_ids` makes the model's embedding, which must be on the
same rank, pass them on. A forward may be recomputed after the forwards of later microbatches, as with pipeline stages.
So a router keeps the ids of microbatches until then (:class:`WaitingIds`). ``config/refusals.py`` refuses other cases.
"""

import argparse
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.learned.recomputation import hidden_from_checkpoints, is_in_backward, keeps_graph, may_be_repeated
from air_moe_megatron.routers.base import CompactRouter, Routes, find_routers
from air_moe_megatron.routers.flops import Rebuilds, RouterFlops
from air_moe_megatron.routers.hash_tables import balanced_table, frequency_table
from air_moe_megatron.routers.token_ids import embedding_of, ids_in_order, tell_token_ids

_MOST_WAITING = 1024
"""Most microbatches whose ids are kept; a limit for training loops that never end a step."""

_MOST_OF_EVALUATION = 32
"""Most microbatches of evaluation whose ids are kept. Hardly any goes back, and no call ends a step of evaluation."""


class WaitingIds:
    """Token ids of microbatches whose forward may be recomputed, looked up by the hidden states of that forward.

    Microbatches may be recomputed in any order, and some never. The look-up takes the kept microbatch whose hidden
    states are the nearest. It runs on the device and does not wait for it.

    Microbatches of evaluation have their own slots, so that they push out none of training.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=_MOST_WAITING)  # ids and fingerprint
        self._of_evaluation: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=_MOST_OF_EVALUATION)
        self._num_found = 0

    def keep(self, token_ids: torch.Tensor, hidden: torch.Tensor, training: bool = True) -> None:
        """Keep the token ids [T] of a microbatch with hidden states [T, H]."""
        if not training:
            self._of_evaluation.append((token_ids, _fingerprint(hidden)))
            return
        if len(self._kept) == _MOST_WAITING:  # the oldest goes; it has been found if any has
            self._num_found = max(0, self._num_found - 1)
        self._kept.append((token_ids, _fingerprint(hidden)))

    def find(self, hidden: torch.Tensor, is_last_time: bool) -> torch.Tensor:
        """[T] ids of the microbatch whose forward had these hidden states.

        Args:
            hidden: [T, H].
            is_last_time: whether the microbatch is one of training and will not be looked up again.
        Raises:
            ValueError: if no microbatch of T tokens is kept.
        """
        fitting = [one for one in (*self._kept, *self._of_evaluation) if one[0].shape[0] == hidden.shape[0]]
        if not fitting:
            raise ValueError(
                f"{hidden.shape[0]} tokens are recomputed, and no forward of this step had so many: recompute a "
                "microbatch in the step of its forward"
            )
        ids = fitting[0][0]
        if len(fitting) > 1:
            own = _fingerprint(hidden)
            distances = torch.stack([(kept - own).abs().sum() for _, kept in fitting])
            ids = torch.stack([ids for ids, _ in fitting]).index_select(0, distances.argmin().unsqueeze(0)).squeeze(0)
        self._num_found += is_last_time
        if self._num_found == len(self._kept):
            self._forget_training()
        return ids

    def clear(self) -> None:
        """Forget all microbatches."""
        self._forget_training()
        self._of_evaluation.clear()

    def _forget_training(self) -> None:
        self._kept.clear()
        self._num_found = 0


@torch.no_grad()
def _fingerprint(hidden: torch.Tensor) -> torch.Tensor:
    """[T] fp32, a finite number for each token that identifies it in practice, even if recomputing rounds otherwise.

    It is a product with a fixed vector. The plain sum would be zero for every token after a layer norm.
    """
    direction = torch.arange(hidden.shape[1], dtype=torch.float32, device=hidden.device).cos()
    return (hidden.float() * direction).sum(dim=1).nan_to_num(nan=1e30).clamp(-1e30, 1e30)


class HashRouter(CompactRouter):
    """Route each token to the experts of its token id; has no parameters and does not wait for the device."""

    router_type = "hash"
    checkpoint_key = "table"
    vectors_per_expert = 0

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, is_mtp_layer: bool = False
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        # Megatron updates the expert biases of all modules that have the attribute, if the model has any.
        del self.expert_bias
        table = torch.zeros(config.moe_hash_vocab_size, config.moe_router_topk, dtype=torch.int32)
        self.register_buffer("table", table)
        # Saved, because a table made from another seed would otherwise load unnoticed.
        self.register_buffer("seed", torch.tensor([config.moe_hash_seed]))
        self._has_table = False
        # [batch, sequence] of the current microbatch: this context-parallel rank's sequences, not split over tp.
        self.token_ids: torch.Tensor | None = None
        self._waiting = WaitingIds()

    @staticmethod
    def checkpoint_fields(config: TransformerConfig | argparse.Namespace) -> dict[str, Any]:
        """See the base class."""
        names = ("moe_hash_vocab_size", "moe_hash_seed", "moe_hash_balance")
        return {name: getattr(config, name) for name in names}

    @staticmethod
    def flops(config: TransformerConfig, rebuilds: Rebuilds | None = None) -> RouterFlops:
        """See the base class: none."""
        return RouterFlops(0, 0)

    def set_layer_number(self, layer_number: int) -> None:
        """Set the layer's number and make its table, unless :meth:`balance` is to make it by frequency."""
        super().set_layer_number(layer_number)
        self._has_table = self.config.moe_hash_balance == "ids"
        if self._has_table:
            self.table.copy_(balanced_table(*self.table.shape, self.num_experts, self._table_seed()))

    def balance(self, counts: torch.Tensor) -> None:
        """Make the table anew, balanced by frequency.

        Args:
            counts: [moe_hash_vocab_size] number of tokens of each id, the same on all ranks.
        """
        self.table.copy_(frequency_table(counts, self.topk, self.num_experts, self._table_seed()))
        self._has_table = True

    def _table_seed(self) -> int:
        return self.config.moe_hash_seed * 65537 + self.layer_number

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Make Megatron's sharded state dict. As with the embedding, the padded vocabulary may differ in a checkpoint.

        Rows that a checkpoint lacks become zero; they are padding ids, which no token has.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state[prefix + "table"].allow_shape_mismatch = True
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        seed = state_dict.get(prefix + "seed")
        if seed is not None and int(seed) != self.config.moe_hash_seed:
            raise ValueError(
                f"moe_hash_seed ({self.config.moe_hash_seed}) must be that of the checkpoint, {int(seed)}: the experts "
                "of each token id come from it"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._has_table |= prefix + "table" in state_dict

    def _choose(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None, batch_size: int) -> Routes:
        topk_ids = self.table[self._ids_of(hidden)]
        weight = (self.config.moe_router_topk_scaling_factor or 1.0) / self.topk
        return Routes(topk_ids, hidden.new_full(topk_ids.shape, weight, dtype=self._router_dtype(hidden)))

    def _ids_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T] token ids in the order of the hidden states [T, H]; a recomputed forward looks them up."""
        num_tokens = hidden.shape[0]
        if self.layer_number is None:
            raise ValueError("layer_number (None) must be set before a hash router is used: it chooses the table")
        if not self._has_table:
            raise ValueError(
                f"layer {self.layer_number}: moe_hash_balance 'frequency' needs the counts of the token ids; call "
                "balance_hash_tables(counts, model) after the model is built, as the entry point does, or load a "
                "checkpoint"
            )
        if self.token_ids is None:
            raise ValueError(
                f"layer {self.layer_number}: the router has been given no token ids; call hand_over_token_ids(model) "
                "after the model is built, as the entry point does"
            )
        with hidden_from_checkpoints():
            if is_in_backward():
                # A checkpoint within a checkpoint is repeated once more, later in the backward.
                is_last_time = self.training and not (may_be_repeated() or keeps_graph())
                return self._waiting.find(hidden, is_last_time)
            ids = ids_in_order(self.token_ids, self)
            if ids.numel() != num_tokens:
                raise ValueError(
                    f"layer {self.layer_number}: {num_tokens} tokens, but {ids.numel()} token ids (of "
                    f"{tuple(self.token_ids.shape)} [batch, sequence]) came from the embedding"
                )
            if may_be_repeated():
                self._waiting.keep(ids, hidden, self.training)
            return ids

    def discard(self) -> None:
        """See the base class; also forgets token ids, because earlier forwards will not be recomputed any more."""
        super().discard()
        self._waiting.clear()

    def end_step(self) -> None:
        """See the base class; also forgets token ids, because earlier forwards will not be recomputed any more."""
        super().end_step()
        self._waiting.clear()


def hand_over_token_ids(model: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Make a model's embedding pass the token ids of each microbatch to the hash routers.

    Returns:
        the model, as Megatron requires of a hook after the model is built.
    Raises:
        ValueError: if a chunk has hash routers and no embedding.
    """
    for chunk in model:
        routers = find_routers(chunk, HashRouter)
        if not routers:
            continue
        embedding = embedding_of(chunk)
        if embedding is None:
            raise ValueError(
                f"hash routers (layers {', '.join(str(router.layer_number) for router in routers)}) need the model's "
                f"embedding on the same rank; {type(chunk).__name__} has none"
            )
        tell_token_ids(embedding, routers)
    return model


def balance_hash_tables(counts: Sequence[float], model: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Balance the tables of a model's hash routers by frequency.

    Args:
        counts: number of tokens of each id, the same on all ranks; further ids have none.
        model: Megatron's list of model chunks.
    Returns:
        the model, as Megatron requires of a hook after the model is built.
    Raises:
        ValueError: if there are more counts than a table has ids.
    """
    for router in find_routers(model, HashRouter):
        num_ids = router.table.shape[0]
        if len(counts) > num_ids:
            raise ValueError(f"counts ({len(counts)}) must not exceed the token ids, moe_hash_vocab_size ({num_ids})")
        padded = torch.zeros(num_ids, dtype=torch.float64)
        padded[: len(counts)] = torch.as_tensor(counts, dtype=torch.float64)
        router.balance(padded)
    return model
