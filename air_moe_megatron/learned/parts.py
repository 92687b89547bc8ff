"""Parts of the lists, ranges of consecutive experts that are ranked independently; and keys of best codewords.

Legend: H hidden, E experts, C clusters, L shortlist, Q pool, S parts.
"""

from dataclasses import dataclass

import torch

from air_moe_megatron.ops.ranking import CandidateRanking, Ranking, rank_candidates, rank_experts

_ID_BITS = 2**31 - 1


def pack(score: torch.Tensor, codeword: torch.Tensor) -> torch.Tensor:
    """int64 keys whose maximum is the highest fp32 score (NaN counts as infinite), and on a tie the lower codeword."""
    bits = score.nan_to_num(torch.inf, torch.inf, -torch.inf).view(torch.int32)
    bits = bits ^ ((bits >> 31) & _ID_BITS)  # as integers, negative floats are in reverse order
    return (bits.long() << 32) | (codeword ^ _ID_BITS)


def unpack(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and codewords of keys; score -inf and codeword 0 for an expert that was tried at no codeword."""
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & _ID_BITS)).view(torch.float32), (keys & _ID_BITS) ^ _ID_BITS


@dataclass(frozen=True)
class Span:
    """The position of a part."""

    experts: slice  # expert ids
    lists: slice  # columns of the lists [C, L]
    pool: slice  # columns of the pools [C, Q]


def spans(num_parts: int, num_experts: int, shortlist_size: int, pool_size: int) -> list[Span]:
    """The position of each of S parts; S divides the three sizes.

    Example: with 2 parts of E = 8, L = 4 and Q = 6, the second part has the experts 4 to 7, the columns 2 and 3 of the
    lists, and the columns 3 to 5 of the pools.
    """
    lengths = [size // num_parts for size in (num_experts, shortlist_size, pool_size)]
    return [Span(*(slice(number * length, (number + 1) * length) for length in lengths)) for number in range(num_parts)]


@dataclass(frozen=True)
class Part:
    """The experts of one part; ids are relative to its first expert."""

    span: Span
    weight: torch.Tensor  # [E / S, H]
    bias: torch.Tensor | None  # [E / S]
    score_function: str | None
    expert_bias: torch.Tensor | None  # [E / S]

    def rank_experts(self, codewords: torch.Tensor, scale: torch.Tensor) -> Ranking:
        """Rank all experts of the part at some codewords, to make pools; see ``ops.ranking.rank_experts``."""
        selection = (self._pool_size, self.score_function, self.expert_bias)
        return rank_experts(codewords, scale, self.weight, self.bias, *selection)

    def rank_candidates(
        self, codewords: torch.Tensor, scale: torch.Tensor, candidates: torch.Tensor
    ) -> CandidateRanking:
        """Rank candidates [n, m] of n codewords, to make pools; see ``ops.ranking.rank_candidates``."""
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
    """Make the parts at some spans; the other arguments are as for :func:`rank_experts`."""
    vectors = (weight, bias, expert_bias)
    parts = []
    for span in of_spans:
        centers, biases, added = (None if vector is None else vector[span.experts] for vector in vectors)
        parts.append(Part(span, centers, biases, score_function, added))
    return parts
