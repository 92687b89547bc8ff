"""The codebook of the coarse stage: adaptive spherical k-means, learned without gradients.

Pure functions come first, then the module that holds the buffers. Nothing here communicates. ``sync.py`` sums the
statistics over ranks and gives every rank the same sums, so every rank computes bitwise the same codewords.

Legend: T tokens, H hidden, C clusters, P probes, E experts. Derivation: docs/codebook.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from air_moe_megatron.learned.learner import Learner, stacked, store
from air_moe_megatron.ops.coarse import NUM_SCALARS, assign, token_statistics
from air_moe_megatron.ops.unit_vectors import unit_rows

_SEED = 20260504  # seeds the initial random codewords and the splits; the same on every rank, layer and run
FIRST_LLOYD_STEPS = 10  # k-means steps of the first fit to expert centers
# A fit to the tokens of a finished model: how many by default, and how often they are seen, in how many updates each.
FIT_TOKENS, FIT_PASSES, FIT_BATCHES = 16384, 4, 8
_STARVED = 0.1  # a codeword with less than this share of the mean load is revived


def window_decay(decay: float, num_updates: int) -> float:
    """Decay to use after ``num_updates`` updates: a young codebook averages over the latter half of its life.

    Tokens move quickly while a model is young, so the past must fade quickly. But a codebook that followed every batch
    would move tokens from list to list, and their experts would learn less.

    Example: decay 0.99 gives 0.33, 0.5, 0.6, ... and 0.99 from 197 updates on.
    """
    return min(decay, (1 + num_updates) / (3 + num_updates))


def update_from_tokens(
    codewords: torch.Tensor, ema: torch.Tensor, statistics: torch.Tensor, decay: float, num_updates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one step of adaptive spherical k-means for N codebooks: decay the sums, normalize them, revive codewords.

    The running sums start at zero, and only their ratios and directions are used. So they need no bias correction, and
    the first statistics replace the random start entirely. Waits for the device as :func:`split_loaded` does.

    Args:
        codewords: [N, C, H] fp32.
        ema: [N, C, H + 3] fp32, running sums.
        statistics: [N, C, H + 3] fp32, finite, summed over all ranks.
        decay: weight of the past.
        num_updates: number of updates so far, which seeds the splits.
    Returns:
        [N, C, H] new codewords, [N, C, H + 3] new running sums.
    """
    ema = decay * ema + (1.0 - decay) * statistics
    return split_loaded(_directions(ema, codewords), ema, statistics, num_updates)


def _directions(sums: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """[..., H] directions of the token sums in ``sums`` [..., H + 3]; the row of ``otherwise`` where a sum is zero."""
    vectors = sums[..., : otherwise.shape[-1]]
    return torch.where(vectors.any(dim=-1, keepdim=True), unit_rows(vectors), otherwise)


def split_loaded(
    codewords: torch.Tensor, ema: torch.Tensor, statistics: torch.Tensor, num_updates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Revive starved codewords by the split rule: the i-th starved one takes half of the i-th most loaded one.

    Both halves start at the mean of the loaded cluster in this batch. They move apart along a random direction, each by
    ``tan(angle)/sqrt(H)``, a token's typical deviation in one direction. So the plane between them cuts the cluster in
    two. The running sums are halved too. A codeword is starved below a tenth of the mean running count. It is loaded
    if it has at least the mean, so that neither half starves at once. Deterministic: a function of the arguments alone.
    Source: derived in docs/codebook.md, after the cluster splitting of faiss.

    Waits for the device once per round. The last round splits nothing; usually it is the first or the second.

    Args, returns: as :func:`update_from_tokens`.
    """
    (num_codebooks, num_clusters, hidden_size), device = codewords.shape, codewords.device
    generators = None
    while True:  # ends: while a codeword is starved, another holds more than the mean and can be split
        counts = ema[:, :, hidden_size]
        mean_count = counts.mean(dim=1, keepdim=True)
        is_starved = counts < _STARVED * mean_count
        num_splits = torch.minimum(is_starved.sum(dim=1), (counts >= mean_count).sum(dim=1))
        splits_of = num_splits.tolist()
        if sum(splits_of) == 0:
            return codewords, ema
        if generators is None:
            generators = [torch.Generator().manual_seed(_SEED + num_updates) for _ in range(num_codebooks)]
            # Cut around the mean of this batch. A codeword averages over the past, and all tokens of this batch may
            # lie on one side of it. Rows of all codebooks are flattened, as in the indices below.
            means = _directions(statistics, codewords).flatten(0, 1)
            codewords, ema = (value.clone(memory_format=torch.contiguous_format) for value in (codewords, ema))
            flat_codewords, flat_ema = codewords.flatten(0, 1), ema.flatten(0, 1)  # views
            first_row = torch.arange(num_codebooks, device=device).unsqueeze(1) * num_clusters
        is_split = is_starved & (is_starved.cumsum(dim=1) <= num_splits.unsqueeze(1))
        starved = _flat_indices(is_split, sum(splits_of))
        by_load = first_row + torch.argsort(counts, dim=1, descending=True, stable=True)
        is_halved = torch.arange(num_clusters, device=device) < num_splits.unsqueeze(1)
        loaded = by_load.flatten()[_flat_indices(is_halved, sum(splits_of))]
        direction = torch.cat(
            [
                torch.randn(number, hidden_size, generator=generator, dtype=torch.float32)
                for number, generator in zip(splits_of, generators, strict=True)
            ]
        ).to(device)
        mean = means[loaded]
        direction = direction - (direction * mean).sum(dim=1, keepdim=True) * mean
        direction = torch.nn.functional.normalize(direction, dim=1)
        cosine = (flat_ema[loaded, :hidden_size].norm(dim=1) / flat_ema[loaded, hidden_size]).clamp(0.1, 1.0 - 1e-4)
        offset = (1.0 / cosine.square() - 1.0).sqrt().unsqueeze(1) / hidden_size**0.5
        flat_ema[loaded] *= 0.5
        flat_ema[starved] = flat_ema[loaded]
        for rows, sign in ((loaded, 1.0), (starved, -1.0)):
            halves = torch.nn.functional.normalize(mean + sign * offset * direction, dim=1)
            flat_codewords[rows] = means[rows] = halves
            flat_ema[rows, :hidden_size] = halves * flat_ema[rows, :hidden_size].norm(dim=1, keepdim=True)


def _flat_indices(chosen: torch.Tensor, number: int) -> torch.Tensor:
    """[number] flat indices at which ``chosen`` [N, C] is true; ``number`` is how many there are."""
    return torch.nonzero_static(chosen.flatten(), size=number).flatten()


def lloyd_step(codewords: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one Lloyd step of spherical k-means over the expert centers; a starved cluster takes half of a large one.

    Args:
        codewords: [C, H] fp32, unit rows.
        weight: [E, H] expert centers.
    Returns:
        [C, H] fp32 new codewords, unit rows; [C, H + 3] fp32 statistics of the experts at the old codewords.
    """
    statistics = token_statistics(weight, codewords, assign(weight, codewords, 1).squeeze(1))
    codewords, _ = update_from_tokens(codewords[None], torch.zeros_like(statistics)[None], statistics[None], 0.0, 0)
    return codewords[0], statistics


@dataclass(frozen=True)
class CodebookHealth:
    """How well a codebook represents the vectors that it was last fitted to: tokens, or expert centers.

    The first two fields are None until the codebook is fitted in this process: a checkpoint does not hold them.
    """

    quantization_error: float | None  # 1 - mean cosine between vector and codeword
    live_codewords: int | None  # number of codewords to which a vector was assigned
    num_dropped: int  # number of updates dropped so far because a token was not finite


class Codebook(Learner):
    """The codewords of one router, with their running statistics.

    Args:
        num_clusters: C.
        hidden_size: H.
        decay: weight of the past in each update; there is one update per global batch.
    """

    title = "codebook"

    def __init__(self, num_clusters: int, hidden_size: int, decay: float) -> None:
        super().__init__(num_clusters, hidden_size + NUM_SCALARS)
        self.decay = decay
        self.register_buffer("codewords", _random_directions(num_clusters, hidden_size))
        self.register_buffer("ema", torch.zeros_like(self.statistics))
        self.register_buffer("num_dropped", torch.zeros(1, dtype=torch.int64))
        # For logs only: mean cosine and number of live codewords in the last update.
        self.register_buffer("last_health", torch.full((2,), torch.nan, dtype=torch.float32), persistent=False)

    def typical_projections(self) -> torch.Tensor:
        """[C] fp32, mean length times mean cosine of each codeword's tokens; 1 for a codeword that has seen none."""
        counts, cosines, lengths = self.ema[:, -NUM_SCALARS:].unbind(dim=1)
        seen = counts.clamp_min(torch.finfo(torch.float32).tiny)
        return torch.where(counts > 0, (cosines / seen) * (lengths / seen), 1.0)

    def accumulate(self, statistics: torch.Tensor) -> None:
        """Add the statistics [C, H + 3] fp32 of one microbatch, made by :func:`token_statistics`."""
        self.statistics += statistics

    @staticmethod
    def num_tokens(statistics: torch.Tensor) -> torch.Tensor:
        """[...] number of tokens in statistics [..., C, H + 3]."""
        return statistics[..., -NUM_SCALARS].sum(dim=-1)

    def batch_key(self) -> tuple:
        """The base's key, and the decay."""
        return *super().batch_key(), self.decay

    @staticmethod
    @torch.no_grad()
    def learn(codebooks: Sequence["Codebook"], statistics: torch.Tensor) -> None:
        """Take one step of k-means; see the base class."""
        num_updates = codebooks[0].updates_on_host
        decay = window_decay(codebooks[0].decay, num_updates)
        arguments = statistics, decay, num_updates
        codewords, ema = update_from_tokens(*stacked(codebooks, "codewords", "ema"), *arguments)
        store(codebooks, codewords=codewords, ema=ema, last_health=health_of(statistics))
        for codebook in codebooks:
            codebook.count_update()

    def drop_note(self) -> str:
        """Text for the log: the number of updates dropped so far."""
        return f" ({int(self.num_dropped)} so far)"

    @torch.no_grad()
    def drop(self) -> None:
        """Count the lost global batch, both as dropped and as an update."""
        self.num_dropped += 1
        self.count_update()

    @torch.no_grad()
    def fit_experts(self, weight: torch.Tensor, is_first: bool) -> None:
        """Fit the codewords to the expert centers; every rank does the same on its own copy.

        Args:
            weight: [E, H] expert centers.
            is_first: whether to start from C centers spread evenly over the ids, instead of from the codewords.
        """
        if is_first:
            num_clusters = self.codewords.shape[0]
            ids = torch.arange(num_clusters, device=weight.device) * weight.shape[0] // num_clusters
            self.codewords.copy_(unit_rows(weight[ids]))
        for _ in range(FIRST_LLOYD_STEPS if is_first else 1):
            codewords, statistics = lloyd_step(self.codewords, weight)
            self.codewords.copy_(codewords)
            self.last_health.copy_(health_of(statistics))

    def health(self) -> CodebookHealth:
        """Read the metrics of the last update; waits for the device."""
        cosine, live = self.last_health.tolist()
        if math.isnan(cosine):
            return CodebookHealth(None, None, int(self.num_dropped))
        return CodebookHealth(1.0 - cosine, int(live), int(self.num_dropped))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        strict, missing_keys = args[1], args[2]
        names = [prefix + name for name in ("codewords", "ema", "num_updates", "num_dropped")]
        for name in ("codewords", "ema"):
            loaded, own = state_dict.get(prefix + name), self._buffers[name]
            if loaded is not None and loaded.shape != own.shape:
                raise ValueError(
                    f"checkpoint holds {prefix}{name} of shape {tuple(loaded.shape)}, but moe_air_num_clusters and "
                    f"hidden_size make it {tuple(own.shape)}; train with the codebook shape of the checkpoint"
                )
        num_missing = len(missing_keys)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if strict and not any(name in state_dict for name in names):
            del missing_keys[num_missing:]  # plain top-k routing has no codebook
        self.last_health.fill_(torch.nan)  # it is of the state before loading, and checkpoints do not hold it

    @torch.no_grad()
    def start_anew(self) -> None:
        """Forget all that was learned: start from random codewords, which the first fit replaces."""
        self.codewords.copy_(_random_directions(*self.codewords.shape))
        for started in (self.ema, self.num_updates, self.num_dropped):
            started.zero_()
        self.last_health.fill_(torch.nan)


def _random_directions(num_clusters: int, hidden_size: int) -> torch.Tensor:
    """[C, H] fp32 random unit rows, the same in every call."""
    generator = torch.Generator().manual_seed(_SEED)
    directions = torch.randn(num_clusters, hidden_size, generator=generator, dtype=torch.float32)
    return torch.nn.functional.normalize(directions, dim=1)


def health_of(statistics: torch.Tensor) -> torch.Tensor:
    """[..., 2] mean cosine between vectors and codewords, and number of live codewords, from [..., C, H + 3]."""
    counts, cosines, _ = statistics[..., -NUM_SCALARS:].unbind(dim=-1)
    mean_cosine = cosines.sum(dim=-1) / counts.sum(dim=-1).clamp_min(1.0)
    return torch.stack((mean_cosine, (counts > 0).sum(dim=-1)), dim=-1)
