"""LowRankWhiteningNorm: tokens centered, scaled, and decorrelated along their few directions of largest variance.

Whitening (``whitening_norm.py``) costs H^2 numbers and ``6H^2`` FLOPs per token. A few directions carry most of the
effect, and these are learned and applied with ``12Hr`` FLOPs. docs/routers.md#whitened-tokens has the measured effect.
"""

from collections.abc import Sequence

import torch

from air_moe_megatron.learned.learner import stacked, store
from air_moe_megatron.learned.running_norm import EPSILON, RunningNorm, running_rate
from air_moe_megatron.learned.whitening_norm import SHRINKAGE
from air_moe_megatron.ops.dtypes import at_least_fp32
from air_moe_megatron.ops.norm import batch_sums, moments, normalize

_RANK = 32  # most directions
_RIDGE = 1e-3  # added to each correlation matrix, so that no direction vanishes
_LEAST_VARIANCE = 1e-3  # of a batch, over the running variance, for which directions are learned
_SEED = 1  # of the first directions, which are random and equal on all ranks


def rank_of_whitening(num_features: int) -> int:
    """Number r of directions of H features: 32, but at most half of them, and at least one."""
    return max(1, min(_RANK, num_features // 2))


@torch.no_grad()
def power_iteration(
    basis: torch.Tensor, eigenvalues: torch.Tensor, products: torch.Tensor, rate: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the estimated eigenvectors and eigenvalues of running correlations by one step of block power iteration.

    The past correlations are known along the basis only, as ``C = U diag(e) U^T``. With those of a batch, B, the
    running correlations are ``R = (1 - rate) C + rate B``. The step orthogonalizes ``R U``: with the eigenvalues s^2
    and eigenvectors V of ``(R U)^T (R U)``, the new basis is ``R U V / s`` and the new eigenvalues are s. So a fixed R
    leads to its r largest eigenvalues and their eigenvectors.

    Args:
        basis: U, [N, H, r] fp64 with orthonormal columns.
        eigenvalues: e, [N, r] fp64.
        products: ``B U``, [N, H, r] fp64.
        rate: weight of the batch, above 0 and at most 1.
    Returns:
        the new basis [N, H, r] and eigenvalues [N, r], ascending.
    """
    moved = (1.0 - rate) * basis * eigenvalues.unsqueeze(1) + rate * products + _RIDGE * basis
    squares, vectors = torch.linalg.eigh(moved.transpose(1, 2) @ moved)
    lengths = squares.clamp_min(_RIDGE**2).sqrt()
    return moved @ vectors / lengths.unsqueeze(1), lengths - _RIDGE


class LowRankWhiteningNorm(RunningNorm):
    """A running norm that also scales the r directions of largest variance down; before the first update an identity.

    Let x be the tokens that a running norm makes, e_i the r largest eigenvalues of their correlations, u_i the
    eigenvectors of these, and ``s_i = (e_i + 1) / 2`` the shrunk eigenvalues. The result is

        ``t^-1/2 (x + sum_i (sqrt(t / s_i) - 1) u_i u_i^T x)``.

    Here t is the mean of the shrunk eigenvalues of all other directions, which follows from the trace H.

    ``statistics`` [Hr + 3H + 1] are the sums over tokens of ``x (u^T x)``, [H, r], and those of the running norm.
    """

    title = "low-rank whitening norm"

    def __init__(self, num_features: int) -> None:
        rank = rank_of_whitening(num_features)
        super().__init__(num_features, num_products=num_features * rank)
        generator = torch.Generator().manual_seed(_SEED)
        first = torch.randn(num_features, rank, dtype=torch.float64, generator=generator, device="cpu")
        self.register_buffer("basis", torch.linalg.qr(first).Q.to(self.mean))
        self.register_buffer("eigenvalues", torch.ones(rank, dtype=torch.float32))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] whitened tokens, in the dtype of ``hidden``."""
        num_features, rank = self.basis.shape
        shrunk = (1.0 - SHRINKAGE) * self.eigenvalues + SHRINKAGE
        mean_of_others = ((num_features - shrunk.sum()) / max(1, num_features - rank)).clamp_min(SHRINKAGE)
        scaled = normalize(hidden, self.mean, self.scale(hidden.dtype) * mean_of_others.rsqrt())
        factors = ((mean_of_others / shrunk).sqrt() - 1.0).unsqueeze(1) * self.basis.t()
        return torch.addmm(scaled, scaled @ self.basis.to(hidden.dtype), factors.to(hidden.dtype))

    @torch.no_grad()
    def accumulate(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None) -> None:
        """As :meth:`RunningNorm.accumulate`; also adds the sums of ``x (u^T x)``, x scaled by the variance so far."""
        wide = hidden.to(at_least_fp32(hidden.dtype))
        scaled = normalize(wide, self.mean, self.scale(wide.dtype))
        if padding_mask is not None:
            scaled = scaled.masked_fill(padding_mask.unsqueeze(1), 0.0)
        with torch.autocast(hidden.device.type, enabled=False):
            products = scaled.t() @ (scaled @ self.basis.to(wide.dtype))
        self.statistics[: products.numel()] += products.flatten()
        self.statistics[products.numel() :] += batch_sums(hidden, self.mean, padding_mask)

    @staticmethod
    @torch.no_grad()
    def learn(norms: Sequence["LowRankWhiteningNorm"], statistics: torch.Tensor) -> None:
        """Move mean, variance and directions towards those of a global batch.

        Mean and variance move as in :class:`RunningNorm`. The first update leaves the directions as they are, because
        its products are those of tokens not yet scaled. From then on the n-th batch has the weight 1/n, at least a
        tenth. The products are those of tokens scaled by the *earlier* variance. They are divided by the batch's own
        mean variance on this scale, so that the trace of its correlations is H, however the tokens' length changes. A
        batch of nearly equal tokens tells nothing about directions.
        """
        num_features, rank = norms[0].basis.shape
        products, sums = statistics.split((num_features * rank, 3 * num_features + 1), dim=1)
        updates = norms[0].updates_on_host
        if updates > 0:
            shift, batch_variance, count = moments(sums)
            basis, eigenvalues, variance = (
                part.double() for part in stacked(norms, "basis", "eigenvalues", "variance")
            )
            center = shift * (variance + EPSILON).rsqrt()
            mean_variance = (batch_variance / (variance + EPSILON)).mean(dim=1).view(-1, 1, 1)
            products = products.double().view(-1, num_features, rank) / count.view(-1, 1, 1)
            products -= center.unsqueeze(2) * (center.unsqueeze(1) @ basis)
            past = basis * eigenvalues.unsqueeze(1)
            products = torch.where(mean_variance < _LEAST_VARIANCE, past, products / mean_variance)
            basis, eigenvalues = power_iteration(basis, eigenvalues, products, running_rate(updates))
            store(norms, basis=basis, eigenvalues=eigenvalues.clamp_max(num_features))  # the trace, up to rounding
        RunningNorm.learn(norms, sums)
