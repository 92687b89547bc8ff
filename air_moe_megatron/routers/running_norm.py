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

from air_moe_megatron.codebook import Float32Buffers

_DECAY = 0.9  # weight of the past per global batch; the first batch counts alone, the n-th 1/n until that is less
EPSILON = 1e-5


class RunningNorm(Float32Buffers):
    """``(h - mean) / sqrt(variance + 1e-5)`` with running statistics: fp32, equal on all ranks, saved and restored.

    Before the first update it changes nothing. Life of a training step: ``accumulate`` in each microbatch's forward,
    ``discard`` when the step is attempted again, ``apply_update`` with the sums over ranks after a successful step.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("variance", torch.ones(num_features))
        self.register_buffer("num_updates", torch.zeros(1, dtype=torch.int64))
        # Sums of (h - mean) and of its squares, and the number of tokens.
        self.register_buffer("statistics", torch.zeros(2 * num_features + 1), persistent=False)

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

    def discard(self) -> None:
        """Forget what was accumulated since the last update."""
        self.statistics.zero_()

    @torch.no_grad()
    def apply_update(self, statistics: torch.Tensor, finite: bool) -> None:
        """Move towards the mean and variance of a global batch; does not wait for the device.

        Args:
            statistics: [2H + 1] fp32, summed over all ranks.
            finite: whether all of them are, as every rank has found alike; otherwise nothing changes.
        """
        if not finite:
            return
        count = statistics[-1]
        shift, square = (statistics[:-1] / count.clamp_min(1.0)).chunk(2)
        self.num_updates += (count > 0).long()
        rate = (1.0 / self.num_updates.clamp_min(1)).clamp_min(1.0 - _DECAY) * (count > 0)
        self.mean += rate * shift
        self.variance += rate * ((square - shift.square()).clamp_min(0.0) - self.variance)
