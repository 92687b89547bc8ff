"""Granular experts: very many tiny MLPs in one tensor per projection."""

from collections.abc import Callable

import torch
from megatron.core.activations import squared_relu
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config import validate
from air_moe_megatron.expert_weights import mark_expert_weight, sharded_by_expert
from air_moe_megatron.initialization import is_normal
from air_moe_megatron.ops.granular_experts import granular_experts
from air_moe_megatron.ops.pair_products import Pairs, make_pairs
from air_moe_megatron.process_groups import HoldsProcessGroups

_EXPERTS_PER_SEED = 256  # so the first weights depend on this number
_KERNEL_ACTIVATIONS = {
    torch.nn.functional.gelu: "gelu",
    torch.nn.functional.silu: "silu",
    torch.nn.functional.relu: "relu",
    squared_relu: "squared_relu",
}


class GranularExperts(HoldsProcessGroups, MegatronModule):
    """The experts of one rank: ``y_t = sum over the experts e of t of p_te * W2_e.T act(W1_e x_t)``.

    Forward and backward cost O(N * F * H) for N pairs; no weight is copied per pair. ``weight1`` is [E, F, H], or
    [E, 2F, H] with a gated linear unit (the gates first, as in Megatron's MLP). ``weight2`` is [E, F, H], the transpose
    of Megatron's second projection. E is the number of local experts, and F is ``moe_ffn_hidden_size``, at least 1.
    Blocks of global expert ids are initialized from seeds of their own, so the model does not depend on the
    expert-parallel size.

    Args:
        num_local_experts: number of experts on this rank.
        config: transformer config.
        pg_collection: process groups; ``ep`` and ``expt_dp`` are used.
        name: unused; Megatron names the experts it builds.
    Raises:
        ValueError: as :func:`validate`.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        validate(config)
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.dp_group = pg_collection.ep, pg_collection.expt_dp
        self.ffn_hidden_size = config.moe_ffn_hidden_size
        num_inputs = 2 * self.ffn_hidden_size if config.gated_linear_unit else self.ffn_hidden_size
        self.weight1 = self._make_weight(num_inputs, config.init_method)
        self.weight2 = self._make_weight(self.ffn_hidden_size, config.output_layer_init_method, is_transposed=True)

    def forward(
        self, hidden_states: torch.Tensor, pairs: Pairs | torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Apply the experts.

        Args:
            hidden_states: [R, H].
            pairs: N pairs of rows and local experts. Megatron's own dispatchers pass [E] numbers of rows per expert
                instead, with the rows sorted by expert.
            probs: [N].
        Returns:
            [R, H] sums over the pairs of each row; None in place of a bias.
        """
        if not isinstance(pairs, Pairs):
            pairs = self._pairs_of_sorted_rows(hidden_states, pairs)
        out = granular_experts(
            hidden_states, self.weight1, self.weight2, probs, pairs, self._activate, self._kernel_activation()
        )
        return out, None

    def _kernel_activation(self) -> str | None:
        """Name of the activation in the fused kernels; None if the kernels do not have it."""
        config = self.config
        is_plain = config.activation_func_clamp_value is None and config.glu_linear_offset == 0
        return _KERNEL_ACTIVATIONS.get(config.activation_func) if is_plain else None

    def _activate(self, inputs: torch.Tensor) -> torch.Tensor:
        """Megatron's activation, gated or not, as ``MLP.forward`` applies it."""
        config = self.config
        if not config.gated_linear_unit:
            return config.activation_func(inputs)
        gate, linear = inputs.chunk(2, dim=-1)
        limit = config.activation_func_clamp_value
        if limit is not None:
            gate, linear = gate.clamp(max=limit), linear.clamp(min=-limit, max=limit)
        return config.activation_func(gate) * (linear + config.glu_linear_offset)

    def _pairs_of_sorted_rows(self, hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor) -> Pairs:
        num_rows = hidden_states.shape[0]
        rows = torch.arange(num_rows, device=hidden_states.device)
        ends = tokens_per_expert.to(rows.device).cumsum(0)
        ids = torch.searchsorted(ends, rows, right=True)
        return make_pairs(rows, ids, num_rows, self.num_local_experts)

    def _make_weight(
        self, num_rows: int, init_method: Callable[[torch.Tensor], object], is_transposed: bool = False
    ) -> torch.nn.Parameter:
        config = self.config
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        shape = (self.num_local_experts, num_rows, config.hidden_size)
        weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            # The seed is equal on all ranks of a pipeline stage, because Megatron seeds their host generators alike.
            seed = int(torch.randint(2**31, ()))
            first = self.ep_group.rank() * self.num_local_experts
            _initialize(weight.data, init_method, seed, first, is_transposed)
        mark_expert_weight(weight)
        return weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Shard the experts by global id, so that a checkpoint loads at any expert-parallel size."""
        weights = {f"{prefix}weight1": self.weight1, f"{prefix}weight2": self.weight2}
        return {
            key: sharded_by_expert(key, weight, sharded_offsets, self.ep_group, self.dp_group)
            for key, weight in weights.items()
        }

    def backward_dw(self) -> None:
        """Do nothing: the backward has already computed the weights' gradients."""


@torch.no_grad()
def _initialize(
    weight: torch.Tensor, init_method: Callable[[torch.Tensor], object], seed: int, first: int, is_transposed: bool
) -> None:
    """Initialize experts ``first, first + 1, ...``; each block of 256 global ids has a seed of its own.

    A method that looks at the shape gets one expert's matrix at a time, as in Megatron's projection.
    """
    end = first + weight.shape[0]
    with torch.random.fork_rng(devices=[]):
        for block in range(first // _EXPERTS_PER_SEED, -(-end // _EXPERTS_PER_SEED)):
            values = torch.empty(_EXPERTS_PER_SEED, *weight.shape[1:], dtype=torch.float32)
            torch.default_generator.manual_seed(seed + block)  # torch.manual_seed would reseed GPUs too
            if is_normal(init_method):
                init_method(values)
            else:
                for matrix in values.unbind():
                    init_method(matrix.t() if is_transposed else matrix)
            start, stop = max(first, block * _EXPERTS_PER_SEED), min(end, (block + 1) * _EXPERTS_PER_SEED)
            weight[start - first : stop - first] = values[
                start - block * _EXPERTS_PER_SEED : stop - block * _EXPERTS_PER_SEED
            ]
