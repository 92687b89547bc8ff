"""Expert centers, and all else that the scores and the selection of their experts depend on.

Legend: E experts whose centers are held; others as in ``ops/__init__.py``.
"""

from dataclasses import dataclass
from typing import Self

import torch

from air_moe_megatron.ops.fine_scores import fine_topk
from air_moe_megatron.ops.ranking import CandidateRanking, Ranking, rank_candidates, rank_experts
from air_moe_megatron.ops.score_functions import selection_scores


@dataclass(frozen=True)
class Centers:
    """The centers of some experts.

    Experts have the scores ``z_e = <w_e, h> + b_e``. They are selected by ``function(z_e) + expert_bias_e`` if there is
    an expert bias, and otherwise by the scores themselves.
    """

    weight: torch.Tensor  # [E, H], any float dtype; the parameter itself, where these are a router's
    bias: torch.Tensor | None = None  # [E]
    score_function: str | None = None  # None without an expert bias
    expert_bias: torch.Tensor | None = None  # [E]

    @classmethod
    def of(cls, router: torch.nn.Module) -> Self:
        """The centers of a router that holds all of them, Megatron's ``TopKRouter`` or a subclass.

        Without an expert bias the score function is left out, because it keeps the order of the scores.
        """
        function = None if router.expert_bias is None else router.score_function
        return cls(router.weight, router.bias, function, router.expert_bias)

    def __getitem__(self, experts: slice) -> Self:
        """The centers of consecutive experts, as views; their ids then count from the first of them."""
        vectors = (self.weight, self.bias, self.expert_bias)
        weight, bias, expert_bias = (None if vector is None else vector[experts] for vector in vectors)
        return type(self)(weight, bias, self.score_function, expert_bias)

    def fine_topk(
        self,
        hidden: torch.Tensor,
        shortlist: torch.Tensor,
        probes: torch.Tensor,
        num_candidates: int,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the experts in each token's shortlists that are selected first; see ``ops.fine_scores.fine_topk``."""
        selection = (self.score_function, self.expert_bias)
        return fine_topk(hidden, self.weight, self.bias, shortlist, probes, num_candidates, dtype, *selection)

    def rank_experts(self, codewords: torch.Tensor, scale: torch.Tensor, shortlist_size: int) -> Ranking:
        """Rank all experts at some codewords; see ``ops.ranking.rank_experts``."""
        selection = (self.score_function, self.expert_bias)
        return rank_experts(codewords, scale, self.weight, self.bias, shortlist_size, *selection)

    def rank_candidates(
        self, codewords: torch.Tensor, scale: torch.Tensor, candidates: torch.Tensor, shortlist_size: int
    ) -> CandidateRanking:
        """Rank candidates [n, m] of n codewords; see ``ops.ranking.rank_candidates``."""
        selection = (self.score_function, self.expert_bias)
        return rank_candidates(codewords, scale, self.weight, self.bias, candidates, shortlist_size, *selection)

    def selection_scores(self, scores: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """The values that experts with some scores are selected by.

        Args:
            scores: [..., E]; with ``ids`` [..., n], the scores of these experts.
            ids: [..., n] of any integer dtype; for -1, no expert, the value means nothing. None means all experts.
        """
        expert_bias = self.expert_bias
        if expert_bias is not None and ids is not None:
            expert_bias = expert_bias[ids.clamp(min=0)]
        return selection_scores(scores, self.score_function, expert_bias)
