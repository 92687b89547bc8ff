"""Floating-point operations of a router, from its config alone; each router class has its own formula.

Products of vectors are counted, forward and backward, of one layer and token. A multiplication and an addition are two
operations. What is linear in the scores is not counted: softmax, top-k, sorting, norms, statistics of the codebook.
``tests/unit/test_router_flops.py`` compares the formulas with the operations that torch counts while the routers run.
"""

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config import is_sharded


@dataclass(frozen=True)
class Rebuilds:
    """What the cost of AIR's rebuilds of the shortlists depends on beside the config.

    Attributes:
        tokens_per_batch: tokens of a global batch, over which rebuilds are spread.
        num_steps: of a training that starts with a new codebook, whose lists are rebuilt more often; None counts those
            of an old one.
        on_gpu: whether a GPU makes them, of all experts each time.
        num_ranks: ranks with tokens of their own, each of which makes what the ranks do not share.
    """

    tokens_per_batch: int
    num_steps: int | None = None
    on_gpu: bool = False
    num_ranks: int = 1


@dataclass(frozen=True)
class RouterFlops:
    """Operations per token of one router."""

    forward: float
    backward: float
    refresh: float = 0.0  # AIR's rebuilding of the shortlists, spread over all tokens
    norm: float = 0.0  # whitening the tokens, forward and backward, and their covariance

    @property
    def total(self) -> float:
        """Forward, backward, refresh and norm."""
        return self.forward + self.backward + self.refresh + self.norm


def of_norm(config: TransformerConfig) -> float:
    """Operations per token of a whitening norm; 0 of any other.

    ``6H^2``: forward, backward and covariance. With sharded routing each of D owners whitens a token again, forward and
    backward, after the rank of the token has: ``(4 + 4D)H^2``.
    """
    if config.moe_router_input_norm != "whitening":
        return 0.0
    products = 2 + 2 * config.expert_model_parallel_size if is_sharded(config) else 3
    return 2.0 * products * config.hidden_size**2
