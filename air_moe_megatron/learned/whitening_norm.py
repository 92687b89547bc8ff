"""WhiteningNorm: tokens centered, scaled and decorrelated by statistics of earlier batches.

Directions of much variance weigh most in a score. Batch-normalized scores, as those of product keys (He 2024, arXiv
2407.04153), have one variance each. So have the scores of whitened tokens, for centers of one length, and no score of
every expert is needed. docs/routers.md#whitened-tokens says what was measured.
"""

from collections.abc import Sequence

import torch

from air_moe_megatron.learned.learner import Learner, stacked, store
from air_moe_megatron.learned.running_norm import DECAY, EPSILON

SHRINKAGE = 0.5  # of the correlations towards none
_INTERVAL = 20  # updates between two factorizations at most


def is_factorized(num_updates: int) -> bool:
    """Whether an update makes the whitening anew: each of the first 20, then fewer, one in 20 from 200 on."""
    return num_updates % min(max(1, num_updates // 10), _INTERVAL) == 0


@torch.no_grad()
def whitening_of(covariance: torch.Tensor) -> torch.Tensor:
    """``L^-1 D^-1/2`` [..., H, H] fp32 of covariances [..., H, H]: D the diagonal, ``L L^T`` the correlations, shrunk.

    Correlations are shrunk halfway to the identity. So directions of much variance are scaled down, and those of hardly
    any are scaled up by no more than the square root of 2. In fp64. Where the sums of fp32 have lost the covariance
    beside a far larger mean, so that no factor exists, it is ``D^-1/2`` alone, as in the running norm.

    Example: the covariance [[4, 0], [0, 9]] gives [[1/2, 0], [0, 1/3]].
    """
    covariance = covariance.double()
    scale = (covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0.0) + EPSILON).rsqrt()
    shrunk = covariance * scale.unsqueeze(-2) * scale.unsqueeze(-1) * (1.0 - SHRINKAGE)
    shrunk.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    factor, failed_at = torch.linalg.cholesky_ex(shrunk)  # does not wait for the device
    whitening = torch.linalg.solve_triangular(factor, scale.diag_embed(), upper=False)
    return torch.where(failed_at[..., None, None] == 0, whitening, scale.diag_embed()).float()


class WhiteningNorm(Learner):
    """``A (h - mean)`` with running statistics; before the first update it changes nothing.

    A is :func:`whitening_of` the running covariance, or of what it was some updates ago (:func:`is_factorized`).
    ``statistics`` [H + 1, H + 1] are sums over tokens of the outer product of ``(h - mean, 1)`` with itself. A batch
    whose squares are beyond fp32 is dropped, as one with infinite tokens.
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
        self.statistics += rows.t() @ rows

    @staticmethod
    def num_tokens(statistics: torch.Tensor) -> torch.Tensor:
        """[...] tokens that statistics [..., H + 1, H + 1] hold."""
        return statistics[..., -1, -1]

    @staticmethod
    @torch.no_grad()
    def learn(norms: Sequence["WhiteningNorm"], statistics: torch.Tensor) -> None:
        """Move towards the mean and covariance of a global batch: the n-th update by 1/n, and by at least a tenth."""
        means = statistics.double() / statistics[:, -1:, -1:].double()
        shift = means[:, -1, :-1]
        batch_covariance = means[:, :-1, :-1] - shift.unsqueeze(2) * shift.unsqueeze(1)
        mean, covariance = stacked(norms, "mean", "covariance")
        updates = norms[0].updates_on_host + 1
        rate = max(1.0 / updates, 1.0 - DECAY)
        mean += rate * shift
        covariance += rate * (batch_covariance - covariance)
        store(norms, mean=mean, covariance=covariance)
        if is_factorized(updates):
            store(norms, whitening=whitening_of(covariance))
        for norm in norms:
            norm.count_update()
