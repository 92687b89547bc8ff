"""Recall of the shortlists on a sample of tokens, and what is guaranteed about it.

Legend: n tokens of the sample, padding left out; D ranks that share the centers, R tokens of the samples of all of
them; others as in ``ops/__init__.py``.
"""

from typing import NamedTuple

import torch

from air_moe_megatron.diagnostics.splits import (
    BOUND_SLACK,
    CHUNK,
    Spread,
    log_growth,
    orthogonal_lengths,
    split,
    spread,
)
from air_moe_megatron.diagnostics.two_stages import TwoStages, selected
from air_moe_megatron.routers.air import AIRRouter, TokenSample
from air_moe_megatron.routers.sharded.exchange import RowExchange

_OUT = float("-inf")


class SampleMetrics(NamedTuple):
    """Metrics of each token of a sample, padding left out."""

    probed: torch.Tensor  # [n, P] int64, the codewords whose lists are searched, nearest first
    mass_recall: torch.Tensor  # [n] fp32, exact softmax mass of the listed experts
    topk_recall: torch.Tensor  # [n] fp32, share of the exact top-k that the router found
    paper_bound: torch.Tensor  # [n] fp32, the paper's lower bound on the mass recall
    mass_bound: torch.Tensor  # [n] fp32, the data-dependent lower bound on the mass recall
    certified: torch.Tensor  # [n] bool, the top-k is proven to be the exact one


@torch.no_grad()
def measure(
    router: AIRRouter, num_verified: int | None = None, sample: TokenSample | None = None
) -> SampleMetrics | None:
    """Compute recall, bounds and certificates of tokens, by default those that a router kept from training.

    All metrics refer to the current centers and lists. Bounds use constants of the nearest codeword, which are computed
    here for the sampled tokens' codewords only. Expert centers are read a chunk at a time, so that no tensor is larger
    than [n, chunk]: ``4 * n * E * H`` FLOPs. Source: derived in docs/theory.md.

    A sharded router communicates over the D ranks of its ``center_group``. Each of them must call this, even if its
    sample is empty. Each rank gets the n tokens of all ranks, scores its own centers, and returns sums, maxima and the
    best K. With b bytes per hidden number, a rank sends all-gathers of ``D * n * (H * b + 4 * P + 8)`` bytes and of a
    number, all-to-alls of ``D * n * (32 * K + 56)`` bytes, and all-reduces of ``H + 3`` fp32 numbers. The host waits
    for the device once more.

    The selection is that of scores in fp32. A router that scores in bf16 may choose otherwise among nearly equal
    scores. Every metric allows for the rounding of fp32: no bound exceeds the measured mass recall, and no token is
    certified by rounding.
    If scores tie at the K-th rank, each choice among them is an exact top-k, so ``topk_recall`` may be less than 1 for
    a certified token.

    Args:
        router: whose lists and centers are measured.
        num_verified: how many unlisted experts, those that could score highest, a certificate may score; None means
            the length of a list. With 0 the certificate uses constants only.
        sample: tokens as the router scores them; None means those of its last training forward, ``router.sample``.
    Returns:
        the metrics of this rank's n tokens, on the router's device; None without a sample, or if all of it is padding.

    Example: exact probabilities [0.5, 0.3, 0.2], a shortlist of the experts 0 and 2, and K = 2 give mass recall 0.7,
    top-k recall 0.5, bounds of at most 0.7, and no certificate.
    """
    sample = sample or router.sample
    # All ranks that share the centers have a sample or none: they run a sharded router together.
    return None if sample is None else measure_sample(TwoStages.of(router), sample, num_verified)


@torch.no_grad()
def measure_sample(stages: TwoStages, sample: TokenSample, num_verified: int | None = None) -> SampleMetrics | None:
    """See :func:`measure`; of any codewords and lists, without a router."""
    hidden, probes = sample.hidden, sample.probed
    if sample.padding_mask is not None:
        hidden, probes = hidden[~sample.padding_mask], probes[~sample.padding_mask]
    if stages.group is None and hidden.shape[0] == 0:
        return None
    exchange = RowExchange(stages.group, hidden.shape[0], {}, hidden.device)
    rows, row_probes = exchange.gather(hidden), exchange.gather(probes.int()).long()

    selection, found = selected(stages, rows, row_probes)
    selection, found = _to_homes(exchange, selection, _global_ids(stages, found))  # [D, n, w]
    best = selection.transpose(0, 1).flatten(1).topk(stages.topk, dim=1)
    found = found.transpose(0, 1).flatten(1).gather(1, best.indices)
    lowest = exchange.gather(best.values.amin(dim=1, keepdim=True))

    num_listed = exchange.num_ranks * stages.lists.shape[1]
    extent = spread(stages.centers.weight, stages.centers.bias, stages.group)
    scanned = _scan(stages, extent, rows, row_probes, lowest)
    masses, counts, selection, ids = _to_homes(exchange, *scanned)  # [D, n, ...]
    if hidden.shape[0] == 0:
        return None
    listed, unlisted, listed_at_anchor, unlisted_at_anchor, bounded = masses.logsumexp(dim=0).unbind(dim=1)
    num_above, num_higher = counts.sum(dim=0).unbind(dim=1)
    best_ids = ids.transpose(0, 1).flatten(1)
    best_ids = best_ids.gather(1, selection.transpose(0, 1).flatten(1).topk(stages.topk, dim=1).indices)
    distance = split(hidden.float(), _directions(stages, probes)).distance
    largest_gain = (2.0 * distance * extent.radius + 4.0 * extent.score_error(hidden.float())).squeeze(1)
    return SampleMetrics(
        probed=probes,
        mass_recall=torch.sigmoid(listed - unlisted).float(),
        topk_recall=(found.unsqueeze(2) == best_ids.unsqueeze(1)).any(dim=2).float().mean(dim=1),
        paper_bound=torch.sigmoid(listed_at_anchor - unlisted_at_anchor - largest_gain - BOUND_SLACK).float(),
        mass_bound=torch.sigmoid(listed - bounded - BOUND_SLACK).float(),
        certified=(num_higher == 0) & (num_above <= (num_listed if num_verified is None else num_verified)),
    )


def _directions(stages: TwoStages, probes: torch.Tensor) -> torch.Tensor:
    """[n, H] unit vectors of the nearest codewords."""
    return torch.nn.functional.normalize(stages.codewords[probes[:, 0]].float(), dim=1)


def _global_ids(stages: TwoStages, ids: torch.Tensor) -> torch.Tensor:
    """Ids that count from this rank's first expert, converted to ids of the model in fp64; -1 stays."""
    return torch.where(ids < 0, ids, ids + stages.first_expert).double()  # exact, and sent with other fp64 values


def _to_homes(exchange: RowExchange, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Send fp64 values [R, w] back to the ranks of their tokens: [D, n, w], one from each rank. One all-to-all."""
    sizes = [value.shape[1] for value in values]
    return exchange.to_homes(torch.cat(values, dim=1)).split(sizes, dim=2)


def _scan(
    stages: TwoStages, extent: Spread, hidden: torch.Tensor, probes: torch.Tensor, lowest: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Score tokens [R, H] against this rank's centers, a chunk at a time.

    Args:
        extent: location and extent of all centers.
        probes: [R, P] int64, the codewords whose lists are searched.
        lowest: [R, 1] fp64, the lowest selection score among each token's selected experts.
    Returns:
        all fp64: [R, 5] log masses of the listed and of the unlisted experts, of both at the anchor, and a bound on the
        unlisted ones; [R, 2] numbers of unlisted experts that the constants do not exclude, and that their scores do
        not exclude; [R, K] each: selection scores and ids of the best experts, -inf and -1 if there are fewer.
    """
    own, lists = stages.centers, stages.lists.long()
    hidden = hidden.float()
    direction = _directions(stages, probes)
    along, residual, distance = split(hidden, direction)
    origin, longest, _, rounding, _ = extent
    error = extent.score_error(hidden)
    shift = residual @ origin.double().unsqueeze(1)  # [R, 1]
    origin_along = direction @ origin.unsqueeze(1)  # [R, 1]

    ids = lists[probes].flatten(1)  # [R, P*L], with repetitions
    masses = hidden.new_full((5, hidden.shape[0]), _OUT, dtype=torch.float64)  # logarithms
    best = hidden.new_full((hidden.shape[0], stages.topk), _OUT)
    best_ids = ids.new_full(best.shape, -1)
    num_above = ids.new_zeros(hidden.shape[0])
    num_higher = torch.zeros_like(num_above)
    num_experts, selection_error = own.weight.shape[0], stages.selection_error
    for first in range(0, num_experts, CHUNK):
        chunk = slice(first, min(first + CHUNK, num_experts))
        centers = own[chunk]
        weight = centers.weight.float()
        logits, projections = hidden @ weight.t(), direction @ weight.t()  # [R, chunk]
        bias = 0.0 if centers.bias is None else centers.bias.float()
        logits = logits + bias
        # Both masses use the same logits: the rounding of two products of large ones may differ by more than any mass.
        columns = (ids - chunk.start).clamp(-1, logits.shape[1]) + 1  # first and last column: not of this chunk
        is_listed = torch.zeros(len(ids), logits.shape[1] + 2, dtype=torch.bool, device=ids.device)
        is_listed = is_listed.scatter_(1, columns, True)[:, 1:-1]

        at_anchor = along * projections + bias
        squares = (weight - origin).square().sum(dim=1).double() * (1.0 + rounding)
        reach = orthogonal_lengths(squares, (projections - origin_along).double(), rounding * longest)
        limit = distance * reach + 2.0 * error  # on what the residual adds
        growth = log_growth(logits.double() - at_anchor - shift, limit)
        parts = (
            logits.double().masked_fill(~is_listed, _OUT),
            logits.double().masked_fill(is_listed, _OUT),
            at_anchor.masked_fill(~is_listed, _OUT),
            at_anchor.masked_fill(is_listed, _OUT),
            (at_anchor + shift + growth).masked_fill(is_listed, _OUT),
        )
        masses = torch.logaddexp(masses, torch.stack([part.logsumexp(dim=1) for part in parts]))

        for upper, excess in ((at_anchor + shift + limit, num_above), (logits.double(), num_higher)):
            upper = centers.selection_scores(upper + 2.0 * error) + selection_error
            excess += ((upper > lowest) & ~is_listed).sum(dim=1)
        chunk_ids = torch.arange(chunk.start, chunk.stop, device=ids.device).expand_as(logits)
        selection = torch.cat((best, centers.selection_scores(logits)), dim=1)
        best, columns = selection.topk(stages.topk, dim=1)
        best_ids = torch.cat((best_ids, chunk_ids), dim=1).gather(1, columns)
    counts = torch.stack((num_above, num_higher), dim=1).double()
    return masses.t(), counts, best.double(), _global_ids(stages, best_ids)


def recall(router: AIRRouter, sample: TokenSample | None = None) -> tuple[float, float] | None:
    """Mean mass and top-k recall by :func:`measure`, or None. Communicates as it does, and waits for the device."""
    metrics = measure(router, sample=sample)
    if metrics is None:
        return None
    return float(metrics.mass_recall.mean()), float(metrics.topk_recall.mean())
