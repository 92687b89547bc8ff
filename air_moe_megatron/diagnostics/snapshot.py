"""The snapshot of the codebooks: a map of the codewords, and the load, recall and token ids of each."""

from typing import Any

import torch

from air_moe_megatron.diagnostics.metrics import RouterSums
from air_moe_megatron.diagnostics.observation import CodewordCounter, most_frequent
from air_moe_megatron.diagnostics.watch import knows_token_ids
from air_moe_megatron.process_groups import group_size
from air_moe_megatron.routers import AIRRouter
from air_moe_megatron.routers.base import CompactRouter
from air_moe_megatron.routers.losses import layer_of

_KEPT = 0.9
"""Decay of earlier samples in a codeword's recall, per measurement."""

_PLANE_STEPS, _PLANE_SEED = 20, 20260504


class CodewordRecall:
    """Running mean of the top-k recall of each codeword's sampled tokens. Each update forgets a tenth of the past.

    Args:
        num_clusters: C.
    """

    def __init__(self, num_clusters: int) -> None:
        self._sums = torch.zeros(2, num_clusters, dtype=torch.float64)  # recall, and tokens

    def add(self, sums: torch.Tensor) -> None:
        """Add sums [2, C] fp64 of recall and of tokens."""
        self._sums = _KEPT * self._sums + sums

    def means(self) -> list[float | None]:
        """The mean of each codeword; None if no token was seen."""
        return [total / count if count else None for total, count in self._sums.t().tolist()]


def gather_pairs(
    counters: dict[CompactRouter, CodewordCounter], destination: int, group: torch.distributed.ProcessGroup | None
) -> dict[CompactRouter, torch.Tensor]:
    """Gather the counted token ids of all ranks on one rank.

    Communicates: one gather over ``group`` of 512 KiB for each router whose token ids are known. Every rank must call
    it.

    Args:
        counters: those of the AIR routers.
        destination: global rank that gets the ids; it must be in the group if any ids are known.
    Returns:
        for each router with known ids [n] int64, as a counter keeps them; empty on other ranks.
    """
    known = [router for router in counters if knows_token_ids(router)]
    if not known:
        return {}
    pairs = torch.stack([counters[router].pairs for router in known])  # [routers, capacity]
    gathered = [pairs]
    if group_size(group) > 1:
        is_destination = torch.distributed.get_rank() == destination
        gathered = [torch.empty_like(pairs) for _ in range(group_size(group))] if is_destination else None
        torch.distributed.gather(pairs, gathered, dst=destination, group=group)
        if not is_destination:
            return {}
    return dict(zip(known, torch.cat(gathered, dim=1), strict=True))


def codebook_snapshot(
    router: AIRRouter, sums: RouterSums, recall: CodewordRecall, pairs: torch.Tensor | None
) -> dict[str, Any]:
    """One layer of the snapshot. Does not communicate, but waits for the device.

    Args:
        sums: measurements of the step.
        recall: recall of the codewords, these sums included.
        pairs: [n] int64 as :func:`gather_pairs` returns them; None or all negative if token ids are unknown.
    """
    plane = principal_plane(router.codebook.codewords).t().tolist()
    snapshot: dict[str, Any] = {"layer": layer_of(router), "x": plane[0], "y": plane[1]}
    snapshot["load"] = [int(load) for load in sums.codeword_load.tolist()]
    snapshot["recall"] = recall.means()
    if pairs is not None and bool((pairs >= 0).any()):
        snapshot["tokens"] = most_frequent(pairs, router.sizes.num_clusters)
    return snapshot


@torch.no_grad()
def principal_plane(codewords: torch.Tensor) -> torch.Tensor:
    """Project codewords [C, H] on their first two principal components: [C, 2], deterministic.

    It is a subspace iteration from a seeded start: torch's own low-rank PCA would draw from the training's generator.
    The sign of each component makes its largest coordinate positive.
    """
    centered = codewords.float() - codewords.float().mean(dim=0)
    generator = torch.Generator().manual_seed(_PLANE_SEED)
    width = min(8, *centered.shape)
    basis = torch.randn(centered.shape[1], width, generator=generator, dtype=torch.float32).to(centered.device)
    for _ in range(_PLANE_STEPS):
        basis = torch.linalg.qr(centered.t() @ (centered @ basis)).Q
    # Within the subspace, the components are those of a small matrix.
    projected = centered @ basis  # [C, width]
    components = torch.linalg.eigh(projected.t() @ projected).eigenvectors.flip(1)[:, :2]
    plane = projected @ components
    plane = plane * plane.gather(0, plane.abs().argmax(dim=0, keepdim=True)).sign()
    return torch.nn.functional.pad(plane, (0, 2 - plane.shape[1]))
