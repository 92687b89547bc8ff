"""What the newest snapshot tells of the codebooks: a map, loads, recall, and the token ids of each codeword."""

from typing import Any

import torch

from air_moe_megatron.diagnostics.figures import RouterSums, layer_of
from air_moe_megatron.diagnostics.watch import knows_token_ids
from air_moe_megatron.process_groups import group_size
from air_moe_megatron.routers import AIRRouter
from air_moe_megatron.routers.base import CompactRouter
from air_moe_megatron.routers.observation import CodewordCounter, most_frequent

_KEPT = 0.9
"""Weight of earlier samples in the recall of a codeword, each time that it is measured anew."""

_PLANE_STEPS, _PLANE_SEED = 20, 20260504


class CodewordRecall:
    """Running mean of the top-k recall of the sampled tokens of each codeword, which forgets a tenth each time.

    Args:
        num_clusters: C.
    """

    def __init__(self, num_clusters: int) -> None:
        self._sums = torch.zeros(2, num_clusters, dtype=torch.float64)  # recall, and tokens

    def add(self, sums: torch.Tensor) -> None:
        """Add sums [2, C] fp64 of recall and of tokens."""
        self._sums = _KEPT * self._sums + sums

    def means(self) -> list[float | None]:
        """Of each codeword; None where no token was seen."""
        return [total / count if count else None for total, count in self._sums.t().tolist()]


def gather_pairs(
    counters: dict[CompactRouter, CodewordCounter], destination: int, group: torch.distributed.ProcessGroup | None
) -> dict[CompactRouter, torch.Tensor]:
    """Bring the counted token ids of all ranks to one of them.

    Communicates: one gather over ``group`` of 512 KiB for each router whose token ids are at hand; every rank must call
    it.

    Args:
        counters: of the AIR routers.
        destination: the global rank, which is in the group where any ids are at hand.
    Returns:
        for each router with ids [n] int64, as a counter keeps them; empty on other ranks.
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
    """One layer of the snapshot; does not communicate, and waits for the device.

    Args:
        sums: of the step.
        recall: of the codewords, these sums included.
        pairs: [n] int64 token ids of the codewords; None, or without any, where they are not known.
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
    """[C, 2]: codewords [C, H] on their first two principal components; deterministic.

    By subspace iteration from a seeded start: torch's own low-rank PCA would draw from the generator of the training.
    A component points where its largest entry is positive.
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
