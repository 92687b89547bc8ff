"""Parts of the lists: consecutive experts that are ranked by themselves; and keys of an expert's best codeword.

Legend: H hidden, E experts, C clusters, L shortlist, Q pool, S parts.
"""

from dataclasses import dataclass

import torch

from air_moe_megatron.ops.ranking import CandidateRanking, Ranking, rank_candidates, rank_experts

_ID_BITS = 2**31 - 1


def pack(score: torch.Tensor, codeword: torch.Tensor) -> torch.Tensor:
    """int64 keys that order fp32 scores, and codewords where scores are equal: NaN first, the lower codeword first."""
    bits = score.nan_to_num(torch.inf, torch.inf, -torch.inf).view(torch.int32)
    bits = bits ^ ((bits >> 31) & _ID_BITS)  # negative floats are ordered the other way round
    return (bits.long() << 32) | (codeword ^ _ID_BITS)


def unpack(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and codewords of keys; codeword 0 with the score -inf for an expert that was tried nowhere."""
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & _ID_BITS)).view(torch.float32), (keys & _ID_BITS) ^ _ID_BITS


@dataclass(frozen=True)
class Span:
    """Where a part lies."""

    experts: slice
    lists: slice  # columns of the lists [C, L]
    pool: slice  # columns of the pools [C, Q]


def spans(num_parts: int, num_experts: int, shortlist_size: int, pool_size: int) -> list[Span]:
    """Where each part lies; S divides the three sizes.

    Example: 2 parts of E = 8, L = 4, Q = 6: the second has the experts 4 to 7, the columns 2, 3 of lists and 3 to 5 of
    pools.
    """
    lengths = [size // num_parts for size in (num_experts, shortlist_size, pool_size)]
    return [Span(*(slice(number * length, (number + 1) * length) for length in lengths)) for number in range(num_parts)]


@dataclass(frozen=True)
class Part:
    """The experts of a span; their ids count from the first of them."""

    span: Span
    weight: torch.Tensor  # [E / S, H]
    bias: torch.Tensor | None  # [E / S]
    score_function: str | None
    expert_bias: torch.Tensor | None  # [E / S]

    def rank_experts(self, codewords: torch.Tensor, scale: torch.Tensor) -> Ranking:
        """Rank all of its experts at some codewords, for pools."""
        selection = (self._pool_size, self.score_function, self.expert_bias)
        return rank_experts(codewords, scale, self.weight, self.bias, *selection)

    def rank_candidates(
        self, codewords: torch.Tensor, scale: torch.Tensor, candidates: torch.Tensor
    ) -> CandidateRanking:
        """Rank candidates [n, m] of each codeword, for pools."""
        selection = (self._pool_size, self.score_function, self.expert_bias)
        return rank_candidates(codewords, scale, self.weight, self.bias, candidates, *selection)

    @property
    def _pool_size(self) -> int:
        return self.span.pool.stop - self.span.pool.start


def parts_of(
    of_spans: list[Span],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    score_function: str | None,
    expert_bias: torch.Tensor | None,
) -> list[Part]:
    """The parts that spans name; arguments as :func:`rank_experts` takes them."""
    vectors = (weight, bias, expert_bias)
    parts = []
    for span in of_spans:
        centers, biases, added = (None if vector is None else vector[span.experts] for vector in vectors)
        parts.append(Part(span, centers, biases, score_function, added))
    return parts
