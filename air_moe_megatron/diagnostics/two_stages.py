"""What the two stages of routing depend on, of a router or of settings that no router has, and what they select.

Legend: as in ``ops/__init__.py``.
"""

from dataclasses import dataclass
from typing import Self

import torch

from air_moe_megatron.learned.centers import Centers
from air_moe_megatron.routers.air import AIRRouter

_SELECTION_ERROR = 2.0**-20  # rounding of score functions in fp32, relative to 1 plus the largest expert bias


@dataclass(frozen=True)
class TwoStages:
    """Codebook, lists and centers."""

    codewords: torch.Tensor  # [C, H]
    lists: torch.Tensor  # [C, L] int32; ids count from this rank's first expert
    centers: Centers  # of this rank's experts
    topk: int
    expert_bias: torch.Tensor | None = None  # [E], of all experts
    first_expert: int = 0  # global id of this rank's first expert
    group: torch.distributed.ProcessGroup | None = None  # ranks with the other centers; None if this rank has all

    @classmethod
    def of(cls, router: AIRRouter) -> Self:
        """Those of a router, as they are now."""
        return cls(
            codewords=router.codebook.codewords,
            lists=router.index.shortlist,
            centers=router.centers,
            topk=router.topk,
            expert_bias=router.expert_bias,
            first_expert=router.first_expert,
            group=router.center_group,
        )

    @property
    def selection_error(self) -> torch.Tensor | float:
        """Bound on the rounding of a selection score, beyond that of the score."""
        return 0.0 if self.expert_bias is None else _SELECTION_ERROR * (1.0 + self.expert_bias.abs().amax())


def selected(stages: TwoStages, hidden: torch.Tensor, probes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the top-k of each token in this rank's lists, and the values that it is selected by.

    Args:
        hidden: [T, H] tokens as the router scores them.
        probes: [T, P] int64, the codewords whose lists are searched.
    Returns:
        [T, w] fp64 selection scores, -inf where fewer experts are listed; [T, w] int32 expert ids that count from this
        rank's first expert, -1 for none. w is K, or the number of slots in the token's lists if it is smaller.
    """
    centers, lists = stages.centers, stages.lists
    width = min(stages.topk, probes.shape[1] * lists.shape[1])
    scores, found = centers.fine_topk(hidden, lists, probes, width, torch.float32)
    return centers.selection_scores(scores.double(), found).masked_fill(found < 0, float("-inf")), found
