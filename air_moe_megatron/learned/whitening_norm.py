"""WhiteningNorm: tokens centered, scaled and decorrelated by statistics of earlier batches.

A few directions carry most of the variance of hidden states. An expert's score is then mostly the token's place along
these, whatever else its center says, and the experts are chosen by what many tokens share. Batch-normalized scores
(product keys, He 2024, arXiv 2407.04153) do not have this: each score has the same variance. With whitened tokens the
scores of all centers of one length have the same variance too, and no score of every expert is needed. Derived in
docs/whitening.md.
"""

import torch

from air_moe_megatron.learned.learner import Learner
from air_moe_megatron.learned.running_norm import DECAY, EPSILON

SHRINKAGE = 0.5  # of the correlations towards none


@torch.no_grad()
def whitening_of(covariance: torch.Tensor) -> torch.Tensor:
    """``L^-1 D^-1/2`` [H, H] fp32 of a covariance [H, H]: D its diagonal, ``L L^T`` its correlations, shrunk.

    Correlations are shrunk halfway to the identity. So directions of much variance are scaled down, and those of hardly
    any are scaled up by no more than the square root of 2. In fp64.

    Example: the covariance [[4, 0], [0, 9]] gives [[1/2, 0], [0, 1/3]].
    """
    covariance = covariance.double()
    scale = (covariance.diagonal() + EPSILON).rsqrt()
    shrunk = covariance * scale * scale.unsqueeze(1) * (1.0 - SHRINKAGE)
    shrunk.diagonal().fill_(1.0)
    factor = torch.linalg.cholesky(shrunk)
    return torch.linalg.solve_triangular(factor, scale.diag(), upper=False).float()


class WhiteningNorm(Learner):
    """``A (h - mean)`` with running statistics; before the first update it changes nothing.

    A is :func:`whitening_of` the running covariance. ``statistics`` [H + 1, H + 1] are sums over tokens of the outer
    product of ``(h - mean, 1)`` with itself.
    """

    title = "whitening norm"

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features + 1, num_features + 1)
        self.register_buffer("mean", torch.zeros(num_features, dtype=torch.float32))
        self.register_buffer("covariance", torch.eye(num_features, dtype=torch.float32))
        self.register_buffer("whitening", torch.eye(num_features, dtype=torch.float32))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] whitened tokens, in their dtype."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return (hidden.to(wide) - self.mean).to(hidden.dtype) @ self.whitening.t().to(hidden.dtype)

    @torch.no_grad()
    def accumulate(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None) -> None:
        """Add the tokens [T, H] of one microbatch; ``padding_mask`` is [T] bool, True for padding, or None.

        Sums are taken around the running mean, which all ranks share.
        """
        rows = torch.nn.functional.pad(hidden.float() - self.mean, (0, 1), value=1.0)
        if padding_mask is not None:
            rows = rows.masked_fill(padding_mask.unsqueeze(1), 0.0)
        self.statistics.addmm_(rows.t(), rows)

    def num_tokens(self, statistics: torch.Tensor) -> torch.Tensor:
        """[] tokens that statistics [H + 1, H + 1] hold."""
        return statistics[-1, -1]

    @torch.no_grad()
    def _learn(self, statistics: torch.Tensor) -> None:
        """Move towards the mean and covariance of a global batch: the n-th update by 1/n, and by at least a tenth."""
        means = statistics.double() / statistics[-1, -1].double()
        shift = means[-1, :-1]
        covariance = means[:-1, :-1] - shift.outer(shift)
        self.num_updates += 1
        rate = (1.0 / self.num_updates.double()).clamp_min(1.0 - DECAY)
        self.mean += rate * shift
        self.covariance += rate * (covariance - self.covariance)
        self.whitening.copy_(whitening_of(self.covariance))
