"""Ground truth of the fine scores: gather every candidate's center, then one product each."""

import torch


def naive_fine_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shortlist: torch.Tensor,
    probes: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As :func:`air_moe_megatron.ops.fine_scores.fine_scores`, with [T, P, L, H] in memory and plain autograd."""
    ids = shortlist[probes].long()  # [T, P, L]
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
    probes: torch.Tensor,
    num_candidates: int,
    dtype: torch.dtype,
    score_function: str | None = None,
    expert_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`air_moe_megatron.ops.fine_scores.fine_topk`: token by token, best first."""
    scores = naive_fine_scores(hidden, weight, bias, shortlist, probes, dtype)
    ranks = scores.detach()
    if expert_bias is not None:
        function = {"sigmoid": torch.sigmoid, "sqrtsoftplus": lambda x: torch.nn.functional.softplus(x).sqrt()}
        ranks = function[score_function](ranks) + expert_bias[shortlist[probes].clamp(min=0)]
    best_scores = torch.full((hidden.shape[0], num_candidates), float("-inf"), dtype=dtype, device=hidden.device)
    best_ids = torch.full((hidden.shape[0], num_candidates), -1, dtype=torch.int32, device=hidden.device)
    for token, searched in enumerate(probes):
        ids = shortlist[searched].flatten().tolist()
        slots = {expert: slot for slot, expert in reversed(list(enumerate(ids))) if expert >= 0}  # the first of each
        by_rank = sorted(slots.items(), key=lambda item: (-ranks[token].flatten()[item[1]].item(), item[1]))
        for column, (expert, slot) in enumerate(by_rank[:num_candidates]):
            best_scores[token, column], best_ids[token, column] = scores[token].flatten()[slot], expert
    return best_scores, best_ids
