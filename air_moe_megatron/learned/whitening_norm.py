"""WhiteningNorm: tokens centered, scaled and decorrelated by statistics of earlier batches.

Directions with large variance dominate a score. Batch-normalized scores, such as those of product keys (He 2024, arXiv
2407.04153), all have the same variance. So do the scores of whitened tokens and centers of equal length, without
scoring every expert. docs/routers.md#whitened-tokens has the measured effect.
"""

from collections.abc import Sequence

import torch

from air_moe_megatron.learned.learner import Learner, stacked, store
from air_moe_megatron.learned.running_norm import EPSILON, running_rate
from air_moe_megatron.ops.dtypes import at_least_fp32

SHRINKAGE = 0.5  # weight of the identity when correlations are shrunk towards it
_INTERVAL = 20  # most updates between two factorizations


def is_factorized(num_updates: int) -> bool:
    """Whether an update recomputes the whitening: each of the first 20 does, then fewer, from 200 on one in 20."""
    return num_updates % min(max(1, num_updates // 10), _INTERVAL) == 0


@torch.no_grad()
def whitening_of(covariance: torch.Tensor) -> torch.Tensor:
    """Whitening matrix ``L^-1 D^-1/2`` [..., H, H] fp32 of covariances [..., H, H]; computed in fp64.

    D is the diagonal, and ``L L^T`` are the correlations, shrunk halfway to the identity. So directions with large
    variance are scaled down, and those with hardly any are scaled up by at most sqrt(2). If the shrunk correlations
    have no Cholesky factor, the result is ``D^-1/2``, as in the running norm. That happens when fp32 sums lose the
    covariance beside a far larger mean.

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

    A is :func:`whitening_of` the running covariance as of the last factorization (:func:`is_factorized`).
    ``statistics`` [H + 1, H + 1] fp32 are sums over tokens of the outer product of ``(h - mean, 1)`` with itself. A
    batch whose squares overflow fp32 is dropped, like one with infinite tokens.
    """

    title = "whitening norm"

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features + 1, num_features + 1)
        self.register_buffer("mean", torch.zeros(num_features, dtype=torch.float32))
        self.register_buffer("covariance", torch.eye(num_features, dtype=torch.float32))
        self.register_buffer("whitening", torch.eye(num_features, dtype=torch.float32))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] whitened tokens, in the dtype of ``hidden``."""
        wide = at_least_fp32(hidden.dtype)
        return (hidden.to(wide) - self.mean).to(hidden.dtype) @ self.whitening.t().to(hidden.dtype)

    @torch.no_grad()
    def accumulate(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None) -> None:
        """Add the tokens [T, H] of one microbatch; ``padding_mask`` is [T] bool, True for padding, or None.

        Sums are taken around the running mean, which all ranks share.
        """
        rows = torch.nn.functional.pad(hidden.float() - self.mean, (0, 1), value=1.0)
        if padding_mask is not None:
            rows = rows.masked_fill(padding_mask.unsqueeze(1), 0.0)
        with torch.autocast(rows.device.type, enabled=False):  # the sums also count the tokens
            self.statistics += rows.t() @ rows

    @staticmethod
    def num_tokens(statistics: torch.Tensor) -> torch.Tensor:
        """[...] number of tokens in statistics [..., H + 1, H + 1]."""
        return statistics[..., -1, -1]

    @staticmethod
    @torch.no_grad()
    def learn(norms: Sequence["WhiteningNorm"], statistics: torch.Tensor) -> None:
        """Move mean and covariance towards those of a global batch: in update n by 1/n, but at least by a tenth."""
        means = statistics.double() / statistics[:, -1:, -1:].double()
        shift = means[:, -1, :-1]
        batch_covariance = means[:, :-1, :-1] - shift.unsqueeze(2) * shift.unsqueeze(1)
        mean, covariance = stacked(norms, "mean", "covariance")
        updates = norms[0].updates_on_host + 1
        rate = running_rate(updates)
        mean += rate * shift
        covariance += rate * (batch_covariance - covariance)
        store(norms, mean=mean, covariance=covariance)
        if is_factorized(updates):
            store(norms, whitening=whitening_of(covariance))
        for norm in norms:
            norm.count_update()
