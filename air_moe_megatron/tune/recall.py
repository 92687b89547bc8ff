"""Fit a codebook to the tokens of a layer, list the experts, and measure what the lists hold.

Legend: T tokens, H hidden, E experts, C clusters, L shortlist, P probes, M candidates, K top-k.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from air_moe_megatron.config import AIRFields
from air_moe_megatron.learned.centers import Centers
from air_moe_megatron.learned.codebook import FIT_BATCHES, FIT_PASSES, Codebook
from air_moe_megatron.learned.lists import list_every_expert, reserved_slots
from air_moe_megatron.ops.coarse import assign, assign_with_statistics
from air_moe_megatron.ops.ranking import Ranking

DECAY = AIRFields.moe_air_codebook_ema  # the default of a run
_SCORES = 2**25  # exact scores that are in memory at a time
_REPEATS = 3  # timed runs, after one to warm up


@dataclass(frozen=True)
class Layer:
    """A router's tokens and centers."""

    name: str
    fit: torch.Tensor  # [T, H] tokens as the router scores them, for the codebooks
    test: torch.Tensor  # [T, H] held-out tokens, for the recall
    centers: Centers  # of all experts
    topk: int
    codewords: torch.Tensor | None = None  # [C, H] of the checkpoint, if it has them
    lists: torch.Tensor | None = None  # [C, L] likewise

    @property
    def num_experts(self) -> int:
        """E."""
        return self.centers.weight.shape[0]


@torch.no_grad()
def fit_codebook(tokens: torch.Tensor, num_clusters: int) -> Codebook:
    """Learn a codebook from tokens [T, H] as training does: several passes of spherical k-means over several batches.

    The order of the tokens and the seed are fixed, so equal tokens give equal codewords.
    """
    codebook = Codebook(num_clusters, tokens.shape[1], DECAY).to(tokens.device)
    for _ in range(FIT_PASSES):
        for batch in range(FIT_BATCHES):  # every eighth token: neighbors in a text are alike
            hidden = tokens[batch::FIT_BATCHES]
            codebook.discard()
            codebook.accumulate(assign_with_statistics(hidden, codebook.codewords, 1)[1])
            codebook.apply_update(codebook.statistics, bool(codebook.statistics.isfinite().all()), len(hidden) > 0)
    return codebook


@torch.no_grad()
def make_lists(layer: Layer, codebook: Codebook, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Lists [C, L] of several lengths L, each as by a full rebuild: the best experts, and those in no other list."""
    ranking = layer.centers.rank_experts(codebook.codewords, codebook.typical_projections(), max(sizes))
    num_clusters = codebook.codewords.shape[0]
    return [
        list_every_expert(
            Ranking(ranking.lists[:, :size], ranking.nearest, ranking.score),
            reserved_slots(layer.num_experts, num_clusters, size, layer.topk),
        )
        for size in sizes
    ]


@torch.no_grad()
def exact(layer: Layer) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """The exact routing of the held-out tokens, a few at a time, so that no [T, E] tensor is made.

    Yields:
        slice of the tokens; [n, E] softmax over all experts; [n, K] ids of the exact top-k.
    """
    for rows, logits, best in _exact_topk(layer):
        yield rows, logits.softmax(dim=1), best


@torch.no_grad()
def _exact_topk(layer: Layer) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """As :func:`exact`, with the [n, E] logits in place of their softmax."""
    centers, weight = layer.centers, layer.centers.weight.float()
    size = max(1, _SCORES // layer.num_experts)
    for first in range(0, layer.test.shape[0], size):
        rows = slice(first, min(first + size, layer.test.shape[0]))
        logits = layer.test[rows].float() @ weight.t()
        if centers.bias is not None:
            logits += centers.bias.float()
        yield rows, logits, centers.selection_scores(logits).topk(layer.topk, dim=1).indices


@torch.no_grad()
def recall_of_lists(
    layer: Layer,
    probes: torch.Tensor,
    lists: Sequence[torch.Tensor],
    probe_counts: Sequence[int],
    candidate_counts: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Measure what the lists of each held-out token hold, for several lengths and numbers of lists at once.

    Args:
        layer: with its held-out tokens.
        probes: [T, P] int64, the lists of each token, best first; P at least the largest of ``probe_counts``.
        lists: for each length, [C, L] int32 expert ids, distinct within a row.
        probe_counts: numbers of lists to search; each is measured.
        candidate_counts: numbers M of candidates; each is measured. More than P * L count as P * L.
    Returns:
        top-k recall (share of the exact top-k that the lists hold) and mass recall (exact softmax mass that they hold):
        [lengths, probe counts] fp64 each, means over the tokens. Then the mass of the best M candidates:
        [candidate counts, lengths, probe counts].

    Example: exact probabilities [0.5, 0.3, 0.2], K = 2 and a list of the experts 0 and 2: top-k 0.5, mass 0.7, and the
    best candidate has the mass 0.5.
    """
    counted = torch.tensor(probe_counts, device=probes.device)
    order = torch.arange(max(probe_counts), device=probes.device)
    shape = (2 + len(candidate_counts), len(lists), len(probe_counts))
    found = torch.zeros(shape, dtype=torch.float64, device=probes.device)
    for rows, probs, best in exact(layer):
        for number, listed in enumerate(lists):
            ids = listed.long()[probes[rows, : max(probe_counts)]]  # [n, P, L]
            # [n, E]: the first list that an expert is in
            first = torch.full(probs.shape, max(probe_counts), dtype=torch.uint8, device=ids.device)
            for position in reversed(range(ids.shape[1])):
                first.scatter_(1, ids[:, position], position)
            hits = first.gather(1, best).unsqueeze(2) < counted  # [n, K, probe counts]
            is_new = first.gather(1, ids.flatten(1)).view_as(ids) == order.view(-1, 1)
            masses = probs.gather(1, ids.flatten(1)).view_as(ids) * is_new  # [n, P, L]
            mass = masses.sum(dim=2).double().cumsum(dim=1)  # [n, P]
            found[0, number] += hits.double().mean(dim=1).sum(dim=0)
            found[1, number] += mass[:, counted - 1].sum(dim=0)
            if candidate_counts:
                for column, num_probes in enumerate(probe_counts):
                    found[2:, number, column] += _mass_of_best(masses[:, :num_probes].flatten(1), candidate_counts)
    found /= max(1, layer.test.shape[0])
    return found[0], found[1], found[2:]


def _mass_of_best(masses: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
    """[len(numbers)] fp64: the sum of each token's M largest masses [n, N], summed over the tokens, for several M."""
    numbers = [min(number, masses.shape[1]) for number in numbers]
    largest = masses.topk(max(numbers), dim=1).values.double().sum(dim=0).cumsum(dim=0)
    return largest[[number - 1 for number in numbers]]


@torch.no_grad()
def time_search(layer: Layer, codewords: torch.Tensor, lists: torch.Tensor, num_probes: int) -> float:
    """Seconds per token of both stages of a forward: the least of some repeats, because other load only adds time."""

    def run() -> None:
        probes = assign(layer.test, codewords, num_probes)
        layer.centers.fine_topk(layer.test, lists, probes, layer.topk, torch.float32)

    return _least_seconds(run, layer.test)


@torch.no_grad()
def time_exact(layer: Layer) -> float:
    """Seconds per token of scoring all experts and of the top-k, without probabilities, as in :func:`time_search`."""

    def run() -> None:
        for _ in _exact_topk(layer):
            pass

    return _least_seconds(run, layer.test)


def _least_seconds(run: Callable[[], None], tokens: torch.Tensor) -> float:
    seconds = []
    for _ in range(_REPEATS + 1):
        if tokens.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if tokens.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / max(1, tokens.shape[0])
