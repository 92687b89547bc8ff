"""Ground truth of the ranking: all scores in memory, stable sorts."""

import torch

_ACTIVATIONS = {"sigmoid": torch.sigmoid, "sqrtsoftplus": lambda scores: torch.nn.functional.softplus(scores).sqrt()}


def naive_scores(
    codewords: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    score_function: str | None = None,
    expert_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """[C, E] scores by which experts are ranked at each codeword, in the dtype of the codewords."""
    scores = codewords @ weight.to(codewords.dtype).t()
    if bias is not None or score_function is not None:
        scores = scores * scale.unsqueeze(1)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if score_function is not None:
        scores = _ACTIVATIONS[score_function](scores) + expert_bias.to(scores.dtype)
    return scores


def naive_rank_experts(
    codewords: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist_size: int,
    score_function: str | None = None,
    expert_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`air_moe_megatron.ops.ranking.rank_experts`; the lower id wins a tie."""
    scores = naive_scores(codewords, scale, weight, bias, score_function, expert_bias)
    lists = scores.sort(dim=1, descending=True, stable=True).indices[:, :shortlist_size]
    score, nearest = (part[0] for part in scores.sort(dim=0, descending=True, stable=True))
    return lists, nearest, score
