"""FLOPs of a router per layer and token, from its config alone; each router class has its own formula.

Vector products are counted, forward and backward; a multiplication and an addition are two FLOPs. Work that is linear
in the scores is not counted: softmax, top-k, sorting, norms, statistics of the codebook.
``tests/unit/test_router_flops.py`` compares the formulas with the FLOPs that torch counts while the routers run.
"""

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from air_moe_megatron.config import is_sharded


@dataclass(frozen=True)
class Rebuilds:
    """The parameters, beside the config, that decide the cost of rebuilding AIR's shortlists.

    Attributes:
        tokens_per_batch: tokens per global batch; the cost of rebuilds is divided by them.
        num_steps: steps of a training that starts with a new codebook, whose lists are rebuilt more often at first.
            None assumes an old codebook.
        on_gpu: whether rebuilds run on a GPU, where each scores all experts.
        num_ranks: number of ranks with tokens of their own. Each of them repeats work that the ranks do not share.
    """

    tokens_per_batch: int
    num_steps: int | None = None
    on_gpu: bool = False
    num_ranks: int = 1


@dataclass(frozen=True)
class RouterFlops:
    """FLOPs of one router per token."""

    forward: float
    backward: float
    refresh: float = 0.0  # rebuilds of AIR's shortlists, divided by the number of tokens
    norm: float = 0.0  # whitening of the tokens, forward and backward, and their covariance

    @property
    def total(self) -> float:
        """Sum of forward, backward, refresh and norm."""
        return self.forward + self.backward + self.refresh + self.norm


def of_norm(config: TransformerConfig) -> float:
    """FLOPs per token of a whitening norm; 0 for any other norm.

    They are ``6H^2``: ``2H^2`` each for forward, backward and covariance. With sharded routing the rank of a token
    whitens it forward only, and each of D owners forward and backward: ``(4 + 4D)H^2`` with the covariance.
    """
    if config.moe_router_input_norm != "whitening":
        return 0.0
    products = 2 + 2 * config.expert_model_parallel_size if is_sharded(config) else 3
    return 2.0 * products * config.hidden_size**2
