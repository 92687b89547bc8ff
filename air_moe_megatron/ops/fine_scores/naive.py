"""Ground truth of the fine scores: gather every candidate's center, then one product each."""

import torch


def naive_fine_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    assignments: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.fine_scores.fine_scores`, with [T, P, L, H] in memory and plain autograd."""
    ids = shortlist[assignments].long()  # [T, P, L]
    present = ids >= 0
    ids = ids.clamp(min=0)
    scores = torch.einsum("th,tplh->tpl", hidden.to(dtype), weight[ids].to(dtype))
    if bias is not None:
        scores = scores + bias[ids].to(dtype)
    return scores.masked_fill(~present, float("-inf"))


def naive_fine_topk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    assignments: torch.Tensor,
    topk: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`air_moe_megatron.ops.fine_scores.fine_topk`: all scores, then the top-k."""
    scores, places = naive_fine_scores(hidden, weight, bias, shortlist, assignments, dtype).squeeze(1).topk(topk, dim=1)
    ids = shortlist[assignments[:, 0]].gather(1, places)
    return scores, ids.masked_fill(scores == float("-inf"), -1).int()
