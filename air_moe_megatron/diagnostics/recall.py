"""What the shortlists find, measured on a sample of tokens, and what is guaranteed of it.

Legend: n tokens of the sample, padding left out; others as in ``ops/__init__.py``.
"""

from typing import NamedTuple

import torch

from air_moe_megatron.diagnostics.bounds import (
    BOUND_SLACK,
    CHUNK,
    RANK_ERROR,
    log_growth,
    lowest_selected,
    orthogonal_lengths,
    selection_ranks,
    split,
    spread,
)
from air_moe_megatron.routers.air import AIRRouter

_OUT = float("-inf")


class SampleFigures(NamedTuple):
    """Figures of each token of a sample that is no padding."""

    codewords: torch.Tensor  # [n, P] int64, probed, nearest first
    mass_recall: torch.Tensor  # [n] fp32, exact softmax mass of the listed experts
    topk_recall: torch.Tensor  # [n] fp32, share of the exact top-k that the router found
    paper_bound: torch.Tensor  # [n] fp32, the paper's lower bound on the mass recall
    mass_bound: torch.Tensor  # [n] fp32, the data-dependent lower bound on the mass recall
    certified: torch.Tensor  # [n] bool, the top-k is proven to be the exact one


@torch.no_grad()
def measure(router: AIRRouter, num_verified: int | None = None) -> SampleFigures | None:
    """Recall, bounds and certificates of the tokens that a router kept of its last training forward.

    Everything is of the centers and lists as they are now. Bounds use constants of the nearest codeword that are made
    here, of the sampled tokens' codewords alone. Reads all expert centers a chunk at a time, so that nothing larger
    than [n, chunk] is made: ``4 * n * E * H`` FLOPs. Does not communicate. Source: derived in docs/theory.md.

    Every figure takes rounding into account: no bound exceeds the mass recall beside it, and no token is certified by
    rounding. Where scores are equal at the K-th place, each choice among them is an exact top-k, and ``topk_recall``
    may be less than 1 for a token that is certified.

    Args:
        router: with a sample, see ``AIRRouter.sample``.
        num_verified: unlisted experts whose scores a certificate may look at, those that could score highest; None
            means as many as stand in one list. With 0 the certificate reads constants only.
    Returns:
        the figures of n tokens, on the router's device; None without a sample, where all of it is padding, or where
        the router holds some of the centers only.

    Example: exact probabilities [0.5, 0.3, 0.2], a shortlist of the experts 0 and 2, and K = 2: mass recall 0.7, top-k
    recall 0.5, bounds of at most 0.7, not certified.
    """
    sample = router.sample
    if sample is None or not router.holds_all_centers:
        return None
    hidden, codewords = sample.hidden, sample.codewords
    if sample.padding_mask is not None:
        hidden, codewords = hidden[~sample.padding_mask], codewords[~sample.padding_mask]
    if hidden.shape[0] == 0:
        return None
    lists = router.index.shortlist.long()
    num_verified = lists.shape[1] if num_verified is None else num_verified
    function = None if router.expert_bias is None else router.score_function
    lowest, found = lowest_selected(router, hidden, codewords)

    hidden = hidden.float()
    direction = torch.nn.functional.normalize(router.codebook.codewords[codewords[:, 0]].float(), dim=1)
    along, residual, distance = split(hidden, direction)
    center, longest, radius, rounding, _ = centers = spread(router.weight, router.bias)
    error = centers.score_error(hidden)
    shift = residual @ center.double().unsqueeze(1)  # [n, 1]
    center_along = direction @ center.unsqueeze(1)  # [n, 1]

    ids = lists[codewords].flatten(1)  # [n, P*L], with repetitions
    masses = hidden.new_full((5, hidden.shape[0]), _OUT, dtype=torch.float64)  # logarithms
    best = hidden.new_empty(hidden.shape[0], 0)
    best_ids = ids.new_empty(hidden.shape[0], 0)
    num_above = ids.new_zeros(hidden.shape[0])  # unlisted experts that the constants do not exclude
    num_higher = torch.zeros_like(num_above)  # unlisted experts that their scores do not exclude
    rank_error = 0.0 if function is None else RANK_ERROR * (1.0 + router.expert_bias.abs().amax())
    for first in range(0, router.num_experts, CHUNK):
        chunk = slice(first, min(first + CHUNK, router.num_experts))
        weight = router.weight[chunk].float()
        logits, projections = hidden @ weight.t(), direction @ weight.t()  # [n, chunk]
        bias = 0.0 if router.bias is None else router.bias[chunk].float()
        logits = logits + bias
        # Of the same logits: of large ones, the rounding of two products may differ by more than any mass.
        columns = (ids - chunk.start).clamp(-1, logits.shape[1]) + 1  # first and last column: not of this chunk
        is_listed = torch.zeros(len(ids), logits.shape[1] + 2, dtype=torch.bool, device=ids.device)
        is_listed = is_listed.scatter_(1, columns, True)[:, 1:-1]

        at_anchor = along * projections + bias
        squares = (weight - center).square().sum(dim=1).double() * (1.0 + rounding)
        reach = orthogonal_lengths(squares, (projections - center_along).double(), rounding * longest)
        limit = distance * reach + 2.0 * error  # of what the residual adds
        growth = log_growth(logits.double() - at_anchor - shift, limit)
        parts = (
            logits.double().masked_fill(~is_listed, _OUT),
            logits.double().masked_fill(is_listed, _OUT),
            at_anchor.masked_fill(~is_listed, _OUT),
            at_anchor.masked_fill(is_listed, _OUT),
            (at_anchor + shift + growth).masked_fill(is_listed, _OUT),
        )
        masses = torch.logaddexp(masses, torch.stack([part.logsumexp(dim=1) for part in parts]))

        expert_bias = None if function is None else router.expert_bias[chunk]
        for upper, excess in ((at_anchor + shift + limit, num_above), (logits.double(), num_higher)):
            upper = selection_ranks(upper + 2.0 * error, function, expert_bias) + rank_error
            excess += ((upper > lowest) & ~is_listed).sum(dim=1)
        chunk_ids = torch.arange(chunk.start, chunk.stop, device=ids.device).expand_as(logits)
        logits = selection_ranks(logits, function, expert_bias)
        ranks = torch.cat((best, logits), dim=1)
        best, columns = ranks.topk(min(router.topk, ranks.shape[1]), dim=1)
        best_ids = torch.cat((best_ids, chunk_ids), dim=1).gather(1, columns)

    listed, unlisted, listed_at_anchor, unlisted_at_anchor, bounded = masses
    largest_gain = (2.0 * distance * radius + 4.0 * error).squeeze(1)
    return SampleFigures(
        codewords=codewords,
        mass_recall=torch.sigmoid(listed - unlisted).float(),
        topk_recall=(found.unsqueeze(2) == best_ids.unsqueeze(1)).any(dim=2).float().mean(dim=1),
        paper_bound=torch.sigmoid(listed_at_anchor - unlisted_at_anchor - largest_gain - BOUND_SLACK).float(),
        mass_bound=torch.sigmoid(listed - bounded - BOUND_SLACK).float(),
        certified=(num_higher == 0) & (num_above <= num_verified),
    )


def recall(router: AIRRouter) -> tuple[float, float] | None:
    """Means of mass and top-k recall of :func:`measure`; waits for the device."""
    figures = measure(router)
    if figures is None:
        return None
    return float(figures.mass_recall.mean()), float(figures.topk_recall.mean())
