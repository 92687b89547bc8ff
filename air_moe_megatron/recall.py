"""Exact recall of the shortlists, measured on a sample of tokens.

Legend: n tokens of the sample; others as in ``ops/__init__.py``.
"""

import torch

from air_moe_megatron.ops.fine_scores import fine_topk
from air_moe_megatron.ops.score_functions import SCORE_FUNCTIONS
from air_moe_megatron.routers.air import AIRRouter

_CHUNK = 16384  # experts whose exact scores are held at a time


@torch.no_grad()
def recall(router: AIRRouter) -> tuple[float, float] | None:
    """Mass and top-k recall of a router's shortlists, on the tokens that it kept of its last training forward.

    Reads the scores of all experts a chunk at a time, so that nothing larger than [tokens, chunk] is made:
    ``2 * tokens * E * H`` FLOPs. Waits for the device; does not communicate.

    Args:
        router: with a sample, see ``AIRRouter.sample``.
    Returns:
        mass recall, the exact softmax mass over all experts that the shortlists hold, and top-k recall, the share of
        the exact top-k among the top-k of the shortlists; means over the tokens. None without a sample.

    Example: exact probabilities [0.5, 0.3, 0.2], a shortlist of the experts 0 and 2, and K = 2: mass 0.7, top-k 0.5.
    """
    sample = router.sample
    if sample is None or sample.hidden.shape[0] == 0:
        return None
    hidden = sample.hidden.float()
    lists = router.index.shortlist.long()
    ids = lists[sample.codewords].flatten(1)  # [n, P*L], with repetitions
    mass = hidden.new_full((hidden.shape[0],), float("-inf"))
    listed_mass = mass.clone()
    best = hidden.new_empty(hidden.shape[0], 0)
    best_ids = ids.new_empty(hidden.shape[0], 0)
    for first in range(0, router.num_experts, _CHUNK):
        chunk = slice(first, min(first + _CHUNK, router.num_experts))
        logits = hidden @ router.weight[chunk].float().t()
        if router.bias is not None:
            logits += router.bias[chunk].float()
        mass = torch.logaddexp(mass, logits.logsumexp(dim=1))
        # Of the same logits: of large ones, the rounding of two products may differ by more than any mass.
        columns = (ids - chunk.start).clamp(-1, logits.shape[1]) + 1  # first and last column: not of this chunk
        is_listed = torch.zeros(len(ids), logits.shape[1] + 2, dtype=torch.bool, device=ids.device)
        is_listed = is_listed.scatter_(1, columns, True)[:, 1:-1]
        listed_mass = torch.logaddexp(listed_mass, logits.masked_fill(~is_listed, float("-inf")).logsumexp(dim=1))
        chunk_ids = torch.arange(chunk.start, chunk.stop, device=ids.device).expand_as(logits)
        if router.expert_bias is not None:
            logits = SCORE_FUNCTIONS[router.score_function](logits) + router.expert_bias[chunk]
        ranks = torch.cat((best, logits), dim=1)
        best, columns = ranks.topk(min(router.topk, ranks.shape[1]), dim=1)
        best_ids = torch.cat((best_ids, chunk_ids), dim=1).gather(1, columns)
    function = None if router.expert_bias is None else router.score_function
    weights = (router.weight, router.bias)
    found = fine_topk(
        sample.hidden, *weights, lists, sample.codewords, router.topk, torch.float32, function, router.expert_bias
    )[1]
    shares = torch.stack(
        (
            (listed_mass - mass).exp(),
            (found.unsqueeze(2) == best_ids.unsqueeze(1)).any(dim=2).float().mean(dim=1),
        )
    )
    if sample.padding_mask is not None:
        shares = shares[:, ~sample.padding_mask]
    return tuple(shares.mean(dim=1).tolist()) if shares.shape[1] else None
