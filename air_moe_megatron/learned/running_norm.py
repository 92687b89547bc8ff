"""RunningNorm: features centered and scaled by statistics of earlier batches.

For tokens before they are scored (``moe_router_input_norm``), and for the queries of product keys when evaluating.
Hidden states share a large mean, above all in a young model: their directions are then nearly one, and the experts that
lie along it win every token. Without the mean the differences between tokens decide. It is what PEER's batch norm does
for its queries (He 2024, arXiv 2407.04153), with statistics that are learned like the codebook: without gradients, once
per global batch, from sums over all ranks. So no token sees the others of its batch, training and evaluation compute
the same, and the one all-reduce of ``sync.py`` carries the sums.
"""

import torch

from air_moe_megatron.learned.learner import Learner

DECAY = 0.9  # weight of the past per global batch
EPSILON = 1e-5
# Squares of larger numbers are summed apart and scaled: fp32 then holds the squares of all finite numbers.
_LARGE, _SCALE = 2.0**40, 2.0**-80


@torch.no_grad()
def batch_sums(hidden: torch.Tensor, mean: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """Sum what mean and variance of a batch need; :func:`moments` reads it, after sums over ranks too.

    Args:
        hidden: [T, H], any float dtype.
        mean: [H], the point around which the sums are taken, so that the variance loses no digits.
        padding_mask: [T] bool, True for padding, or None if there is none.
    Returns:
        [3H + 1] fp32 or wider: sums of ``h - mean``; of its squares up to 2^80; of larger ones, times 2^-160; and the
        number of tokens.

    Example: hidden [[1], [4]] around the mean [1] gives [3, 9, 0, 2].
    """
    centered = hidden.to(torch.promote_types(hidden.dtype, torch.float32)) - mean
    if padding_mask is None:
        count = centered.new_full((1,), centered.shape[0])
    else:
        centered = centered.masked_fill(padding_mask.unsqueeze(1), 0.0)
        count = (~padding_mask).sum().to(centered.dtype).view(1)
    is_large = centered.abs() > _LARGE
    small = torch.where(is_large, 0.0, centered).square().sum(dim=0)
    large = torch.where(is_large, centered * _SCALE, 0.0).square().sum(dim=0)
    return torch.cat((centered.sum(dim=0), small, large, count))


def moments(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read the sums [3H + 1] of :func:`batch_sums`: shift of the mean [H], variance [H] and count [], all fp64.

    Example: [3, 9, 0, 2] gives the shift 1.5, the variance 4.5 - 2.25 = 2.25 and the count 2.
    """
    sums = sums.double()
    count = sums[-1]
    shift, small, large = (sums[:-1] / count.clamp_min(1.0)).chunk(3)
    return shift, (small + large / _SCALE**2 - shift.square()).clamp_min(0.0), count


class RunningNorm(Learner):
    """``(h - mean) / sqrt(variance + 1e-5)`` with running statistics; before the first update it changes nothing.

    ``statistics`` are those of :func:`batch_sums`.
    """

    title = "running norm"

    def __init__(self, num_features: int) -> None:
        super().__init__(3 * num_features + 1)
        self.register_buffer("mean", torch.zeros(num_features, dtype=torch.float32))
        # The square of a finite fp32 number may be beyond fp32.
        self.register_buffer("variance", torch.ones(num_features, dtype=torch.float64))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] normalized tokens, in their dtype."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        scale = (self.variance + EPSILON).rsqrt().to(wide)
        return ((hidden.to(wide) - self.mean) * scale).to(hidden.dtype)

    @torch.no_grad()
    def accumulate(self, hidden: torch.Tensor, padding_mask: torch.Tensor | None) -> None:
        """Add the tokens [T, H] of one microbatch; ``padding_mask`` is [T] bool, True for padding, or None.

        Sums are taken around the running mean, which all ranks share.
        """
        self.statistics += batch_sums(hidden, self.mean, padding_mask)

    def num_tokens(self, statistics: torch.Tensor) -> torch.Tensor:
        """[] tokens that statistics [3H + 1] hold."""
        return statistics[-1]

    @torch.no_grad()
    def _learn(self, statistics: torch.Tensor) -> None:
        """Move towards the mean and variance of a global batch: the n-th update by 1/n, and by at least a tenth."""
        shift, variance, _ = moments(statistics)
        self.num_updates += 1
        rate = (1.0 / self.num_updates.double()).clamp_min(1.0 - DECAY)
        self.mean += rate * shift
        self.variance += rate * (variance - self.variance)
