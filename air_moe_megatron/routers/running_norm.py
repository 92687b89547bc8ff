"""RunningNorm: features centred and scaled by statistics of earlier batches.

For tokens before they are scored (``moe_router_input_norm``), and for the queries of product keys when evaluating.
Hidden states share a large mean, above all in a young model: their directions are then nearly one, and the experts that
lie along it win every token. Without the mean the differences between tokens decide. It is what PEER's batch norm does
for its queries (He 2024, arXiv 2407.04153), with statistics that are learned like the codebook: without gradients, once
per global batch, from sums over all ranks. So no token sees the others of its batch, training and evaluation compute
the same, and the one all-reduce of ``sync.py`` carries the sums.

Legend: T tokens, H hidden.
"""

import torch

from air_moe_megatron.learner import Learner

_DECAY = 0.9  # weight of the past per global batch
EPSILON = 1e-5


class RunningNorm(Learner):
    """``(h - mean) / sqrt(variance + 1e-5)`` with running statistics; before the first update it changes nothing.

    ``statistics`` are the sums of ``h - mean`` and of its squares, and the number of tokens.
    """

    title = "running norm"

    def __init__(self, num_features: int) -> None:
        super().__init__(2 * num_features + 1)
        self.register_buffer("mean", torch.zeros(num_features, dtype=torch.float32))
        self.register_buffer("variance", torch.ones(num_features, dtype=torch.float32))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] normalised tokens, in their dtype."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        scale = (self.variance + EPSILON).rsqrt()
        return ((hidden.to(wide) - self.mean) * scale).to(hidden.dtype)

    @torch.no_grad()
    def accumulate(self, hidden: torch.Tensor, keep: torch.Tensor | None) -> None:
        """Add the tokens [T, H] of one microbatch; ``keep`` is [T] bool, True for tokens that count, or None.

        Sums are taken around the running mean, which all ranks share, so that the variance loses no digits.
        """
        centred = hidden.float() - self.mean
        if keep is None:
            count = centred.new_full((1,), centred.shape[0])
        else:
            centred = torch.where(keep.unsqueeze(1), centred, 0.0)
            count = keep.sum().to(centred.dtype).view(1)
        self.statistics += torch.cat((centred.sum(dim=0), centred.square().sum(dim=0), count))

    def num_tokens(self, statistics: torch.Tensor) -> torch.Tensor:
        """[] tokens that statistics [2H + 1] hold."""
        return statistics[-1]

    @torch.no_grad()
    def _learn(self, statistics: torch.Tensor) -> None:
        """Move towards the mean and variance of a global batch: the n-th update by 1/n, and by at least a tenth."""
        shift, square = (statistics[:-1] / statistics[-1]).chunk(2)
        self.num_updates += 1
        rate = (1.0 / self.num_updates.float()).clamp_min(1.0 - _DECAY)
        self.mean += rate * shift
        self.variance += rate * ((square - shift.square()).clamp_min(0.0) - self.variance)
