"""Recall of the baselines' structures, fitted to the same expert centers, against the same exact routing.

They are fitted afterwards to centers that were trained without them. A router that is trained with its structure may do
better. These numbers say how much of a given routing the structure can express.

Legend: E experts, H hidden, G groups, n1 and n2 sub-keys of a half; others as in ``recall.py``.
"""

from collections.abc import Sequence

import torch

from air_moe_megatron.learned.codebook import Codebook
from air_moe_megatron.learned.lists import inverted_lists
from air_moe_megatron.tune.recall import DECAY, Layer, exact, recall_of_lists

_STEPS = 15  # of k-means over halves of the centers


@torch.no_grad()
def measure_groups(layer: Layer, num_groups: int, searched: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Recall of hierarchical routing: equal groups of similar centers, of which the best are searched.

    The groups are a balanced inverted file of the centers. A token searches the groups whose mean center scores
    highest.

    Args:
        layer: with its held-out tokens.
        num_groups: G, a divisor of E.
        searched: numbers of groups to search; each is measured.
    Returns:
        top-k and mass recall, [len(searched)] fp64 each.
    """
    centers, weight = layer.centers, layer.centers.weight.float()
    codebook = Codebook(num_groups, weight.shape[1], DECAY).to(weight.device)
    codebook.fit_experts(weight, is_first=True)
    groups = inverted_lists(codebook.codewords, weight, layer.num_experts // num_groups)  # [G, E/G]
    scores = layer.test.float() @ weight[groups.long()].mean(dim=1).t()
    if centers.bias is not None:
        scores += centers.bias.float()[groups.long()].mean(dim=1)
    probes = scores.topk(max(searched), dim=1).indices
    topk, mass, _ = recall_of_lists(layer, probes, [groups], searched)
    return topk[0], mass[0]


@torch.no_grad()
def measure_product_keys(layer: Layer, num_keys: tuple[int, int]) -> tuple[float, float]:
    """Recall of product keys: each half of a center is replaced by the mean of its cluster of halves.

    Unlike in a product-key router, several experts may share a pair of sub-keys; the lower id then wins ties.

    Args:
        layer: with its held-out tokens.
        num_keys: n1 and n2.
    Returns:
        the share of the exact top-k among the best K by sums of sub-key scores, and the exact mass of those K.
    """
    weight, bias = layer.centers.weight.float(), layer.centers.bias
    half = weight.shape[1] // 2
    parts = (weight[:, :half], weight[:, half:])
    keys = [_kmeans(part, number) for part, number in zip(parts, num_keys, strict=True)]
    found = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for rows, probs, best in exact(layer):
        tokens = layer.test[rows].float()
        sums = sum(
            (part @ centers.t())[:, assigned]
            for part, (centers, assigned) in zip((tokens[:, :half], tokens[:, half:]), keys, strict=True)
        )
        if bias is not None:
            sums += bias.float()
        ids = sums.topk(layer.topk, dim=1).indices
        found[0] += (ids.unsqueeze(2) == best.unsqueeze(1)).any(dim=2).double().mean(dim=1).sum()
        found[1] += probs.gather(1, ids).double().sum()
    topk, mass = (found / max(1, layer.test.shape[0])).tolist()
    return topk, mass


def _kmeans(points: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K-means of points [E, H] from evenly spread ids: [number, H] means, and [E] the index of each point's mean."""
    centers = points[torch.arange(number, device=points.device) * points.shape[0] // number].clone()
    for _ in range(_STEPS):
        nearest = (points @ centers.t() - centers.square().sum(dim=1) / 2).argmax(dim=1)
        counts = torch.bincount(nearest, minlength=number).unsqueeze(1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, points)
        centers = torch.where(counts > 0, sums / counts.clamp_min(1), centers)
    return centers, (points @ centers.t() - centers.square().sum(dim=1) / 2).argmax(dim=1)
