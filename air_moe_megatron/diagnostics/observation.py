"""Counts over the tokens of one step, for logs only; made only in steps that measure.

Legend: T tokens, C clusters, P probes.
"""

import torch


class CodewordCounter:
    """Counts the tokens of one AIR router by nearest codeword, and keeps the token ids of some of them.

    It neither communicates nor waits for the device. Each attempt at a step begins with :meth:`discard`.

    Args:
        num_clusters: C.
        capacity: number of tokens whose ids are kept; these are the first of the step.
        device: device of the counts.
    """

    def __init__(self, num_clusters: int, capacity: int, device: torch.device) -> None:
        self.load = torch.zeros(num_clusters, dtype=torch.int64, device=device)  # [C] tokens
        # [capacity] ``codeword << 32 | token id``, -1 in an empty entry
        self.pairs = torch.full((capacity,), -1, dtype=torch.int64, device=device)
        self.token_ids: torch.Tensor | None = None  # [batch, sequence] of the microbatch; None if not known
        self._num_pairs = 0

    @torch.no_grad()
    def observe(self, probes: torch.Tensor, padding_mask: torch.Tensor | None, token_ids: torch.Tensor | None) -> None:
        """Count a microbatch.

        Args:
            probes: [T, P] int64, nearest first.
            padding_mask: [T] bool, True for padding, which does not count; None if there is none.
            token_ids: [T] int64; None if not known.
        """
        nearest = probes[:, 0]
        counted = torch.ones_like(nearest) if padding_mask is None else (~padding_mask).long()
        self.load.scatter_add_(0, nearest, counted)
        if token_ids is None:
            return
        kept = slice(self._num_pairs, min(self._num_pairs + nearest.numel(), self.pairs.numel()))
        pairs = (nearest << 32 | token_ids).masked_fill(counted == 0, -1)
        self.pairs[kept] = pairs[: kept.stop - kept.start]
        self._num_pairs = kept.stop

    def discard(self) -> None:
        """Begin an attempt at the step: forget all counts."""
        self.load.zero_()
        self.pairs.fill_(-1)
        self._num_pairs = 0


def most_frequent(pairs: torch.Tensor, num_clusters: int, most: int = 5) -> list[list[list[int]]]:
    """The most frequent token ids of each codeword, with their counts; waits for the device.

    Args:
        pairs: [n] int64, ``pairs`` of a :class:`CodewordCounter`.
        num_clusters: C.
        most: largest number of ids per codeword.
    Returns:
        C lists of [token id, count], the most frequent first; of equally frequent ids, the smaller first.

    Example: tokens 7, 7, 3 of codeword 1 of 2 give [[], [[7, 2], [3, 1]]].
    """
    values, counts = pairs[pairs >= 0].cpu().unique(return_counts=True)  # in order of codeword and id
    order = counts.argsort(descending=True, stable=True)
    order = order[(values[order] >> 32).argsort(stable=True)]
    values, counts = values[order], counts[order]
    nearest = values >> 32
    first = torch.searchsorted(nearest, nearest)  # where the codeword begins
    is_kept = torch.arange(values.numel()) - first < most
    found: list[list[list[int]]] = [[] for _ in range(num_clusters)]
    rows = torch.stack((nearest, values & (2**32 - 1), counts), dim=1)[is_kept]
    for codeword, token_id, count in rows.tolist():
        found[codeword].append([token_id, count])
    return found
