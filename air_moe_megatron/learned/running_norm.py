"""RunningNorm: features centered and scaled by statistics of earlier batches.

It normalizes tokens before they are scored (``moe_router_input_norm``), and the queries of product keys in evaluation.
Hidden states share a large mean, above all in a young model. So they all point nearly the same way, and the experts
in that direction win every token. Without the mean the differences between tokens decide. PEER's batch norm does this
for its queries (He 2024, arXiv 2407.04153). Here the statistics are learned like the codebook: without gradients, once
per global batch, from sums over all ranks. So no token sees the others of its batch, training and evaluation compute
the same function, and the one all-reduce of ``sync.py`` carries the sums.
"""

from collections.abc import Sequence

import torch

from air_moe_megatron.learned.learner import Learner, stacked, store
from air_moe_megatron.ops.dtypes import at_least_fp32
from air_moe_megatron.ops.norm import batch_sums, moments, normalize

_DECAY = 0.9  # weight of the past per global batch
EPSILON = 1e-5


def running_rate(number: int) -> float:
    """Weight of a batch in the running statistics, in update ``number``, counted from 1: 1/number, at least a tenth."""
    return max(1.0 / number, 1.0 - _DECAY)


class RunningNorm(Learner):
    """``(h - mean) / sqrt(variance + 1e-5)`` with running statistics, which start at mean 0 and variance 1.

    ``statistics`` are the sums that :func:`batch_sums` returns, after the sums of a subclass.

    Args:
        num_features: H.
        num_products: number of further sums, those of a subclass.
    """

    title = "running norm"

    def __init__(self, num_features: int, num_products: int = 0) -> None:
        super().__init__(num_products + 3 * num_features + 1)
        self.register_buffer("mean", torch.zeros(num_features, dtype=torch.float32))
        # fp64, because the square of a finite fp32 number may overflow fp32.
        self.register_buffer("variance", torch.ones(num_features, dtype=torch.float64))

    def scale(self, dtype: torch.dtype) -> torch.Tensor:
        """[H] ``1 / sqrt(variance + 1e-5)``, in fp32 or a wider ``dtype``."""
        return (self.variance + EPSILON).rsqrt().to(at_least_fp32(dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] normalized tokens, in the dtype of ``hidden``."""
        return normalize(hidden, self.mean, self.scale(hidden.dtype))

    @torch.no_grad()
    def accumulate(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None) -> None:
        """Add the tokens [T, H] of one microbatch; ``padding_mask`` is [T] bool, True for padding, or None.

        Sums are taken around the running mean, which all ranks share.
        """
        self.statistics += batch_sums(hidden, self.mean, padding_mask)

    @staticmethod
    def num_tokens(statistics: torch.Tensor) -> torch.Tensor:
        """[...] number of tokens, which ends the statistics."""
        return statistics[..., -1]

    @staticmethod
    @torch.no_grad()
    def learn(norms: Sequence["RunningNorm"], statistics: torch.Tensor) -> None:
        """Move mean and variance towards those of a global batch: in update n by 1/n, but at least by a tenth."""
        shift, variance, _ = moments(statistics)
        mean, running = stacked(norms, "mean", "variance")
        rate = running_rate(norms[0].updates_on_host + 1)
        mean += rate * shift
        running += rate * (variance - running)
        store(norms, mean=mean, variance=running)
        for norm in norms:
            norm.count_update()
