"""Bounds and certificates for any tokens of a router that is no longer trained. Proofs are in docs/theory.md.

They come from constants of all codewords. ``recall.py`` computes those of a few sampled tokens' codewords instead.

Legend: V verified experts, G angles, B bins of experts; others as in ``ops/__init__.py``.
"""

import math
from typing import NamedTuple

import torch

from air_moe_megatron.diagnostics.splits import (
    BOUND_SLACK,
    CHUNK,
    bennett,
    orthogonal_lengths,
    split,
    spread,
)
from air_moe_megatron.diagnostics.two_stages import TwoStages, selected
from air_moe_megatron.learned.codebook import Codebook
from air_moe_megatron.ops.fine_scores import fine_scores, fine_topk
from air_moe_megatron.ops.score_functions import selection_scores
from air_moe_megatron.routers.air import AIRRouter

_OUT = float("-inf")
_NUM_ANGLES = 33
_NUM_BINS = 8  # of experts, by their expert bias
_BLOCK = 2**22  # products of codewords and experts that are held at a time


class _Constants(NamedTuple):
    """Constants of each codeword. An expert is *outside* if it is neither in the codeword's list nor verified."""

    verified: torch.Tensor  # [C, V] int32, -1 where fewer are unlisted
    support: torch.Tensor  # [C, B, G] fp64, support function of the centers outside, at each angle
    log_mass: torch.Tensor  # [C] fp64, log mass of the experts outside, at the anchor of the typical token
    mean: torch.Tensor  # [C, H] fp64, mean of the centers outside, weighted by their mass at the anchor
    variance: torch.Tensor  # [C] fp64, their variance along the direction in which it is largest
    reach: torch.Tensor  # [C] fp64, the largest distance of a center outside from the mean


class FrozenBounds:
    """Certificates and mass bounds for any tokens of a router whose centers, lists and codebook stay as they are.

    For each codeword it keeps V *verified* experts: the unlisted ones that could score highest for a typical token. It
    scores them for each token and bounds all others by constants. That is O(V*H) work per token beyond the fine scores,
    O(H) with ``num_verified=0``. Each call also reads the centers once, to find out whether they have changed. A bias
    becomes one more component of the centers. Source: derived in docs/theory.md.

    Construction takes ``2*C*E*H`` FLOPs, with mass bounds ``2*C*E*H*(H + 2)``. The object holds ``C*(V + 33*B)``
    numbers, with mass bounds ``C*H`` more; B is 1 without an expert bias. Does not communicate.

    Args:
        router: an AIR router that has lists.
        num_verified: V; None means L.
        with_mass: whether :meth:`mass_bound` will be called.
    Raises:
        ValueError: if ``num_verified`` is negative or the router is sharded.

    Example: if the lists hold all experts, nothing is outside: every token is certified and every bound is 1.
    """

    def __init__(self, router: AIRRouter, num_verified: int | None = None, with_mass: bool = True) -> None:
        if router.center_group is not None:
            raise ValueError("the router holds some of the centers only; build it without moe_air_shard_experts")
        size = router.index.shortlist.shape[1] if num_verified is None else num_verified
        if size < 0:
            raise ValueError(f"num_verified ({num_verified}) must be at least 0")
        self.router, self.with_mass = router, with_mass
        self._made_of = router.index.identify(router.codebook, router.centers)
        with torch.no_grad():
            self._build(min(size, router.num_experts))

    def _build(self, num_verified: int) -> None:
        router = self.router
        weight = self._lift(router.weight.float(), router.bias)
        self._spread = spread(weight, None)
        length, ratio = _typical(router.codebook)
        directions = router.codebook.codewords.double()
        if router.bias is not None:  # the anchor of the typical token, with the 1 that multiplies the bias
            directions = self._lift(directions * length, router.bias, 1.0)
            length = (length.square() + 1.0).sqrt()
        directions = torch.nn.functional.normalize(directions, dim=1, eps=1e-300)
        self._directions, self._length = directions, length  # [C, H], [C, 1] fp64
        self._angles = torch.linspace(0.0, math.pi / 2, _NUM_ANGLES, dtype=torch.float64, device=weight.device)
        if router.expert_bias is None:
            bins, self._bin_bias = [slice(None)], None
        else:
            bins = [ids for ids in router.expert_bias.argsort().chunk(_NUM_BINS) if ids.numel()]
            self._bin_bias = torch.stack([router.expert_bias[ids].amax() for ids in bins]).double()
        squares = (weight - self._spread.origin).square().sum(dim=1).double() * (1.0 + self._spread.rounding)
        size = max(1, _BLOCK // weight.shape[0])
        blocks = torch.arange(directions.shape[0], device=weight.device).split(size)
        parts = [self._constants(rows, weight, squares, length * ratio, bins, num_verified) for rows in blocks]
        self.constants = _Constants(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def _lift(self, rows: torch.Tensor, bias: torch.Tensor | None, value: float | None = None) -> torch.Tensor:
        """Append a component to the rows if there is a bias: the bias itself, or ``value``."""
        if bias is None:
            return rows
        column = bias.to(rows.dtype).unsqueeze(1) if value is None else rows.new_full((len(rows), 1), value)
        return torch.cat((rows, column), dim=1)

    def _constants(
        self,
        rows: torch.Tensor,
        weight: torch.Tensor,
        squares: torch.Tensor,
        typical_distance: torch.Tensor,
        bins: list[slice | torch.Tensor],
        num_verified: int,
    ) -> _Constants:
        """Constants of the codewords ``rows``."""
        origin, longest, _, rounding, _ = self._spread
        directions, length = self._directions[rows], self._length[rows]
        projections = directions.float() @ weight.t()  # [rows, E]
        from_origin = projections.double() - directions @ origin.double().unsqueeze(1)
        projections = projections.double()
        reach = orthogonal_lengths(squares, from_origin, rounding * longest)
        lists = self.router.index.shortlist[rows]
        is_outside = _without(torch.ones_like(reach, dtype=torch.bool), lists)
        key = self.router.centers.selection_scores(length * projections + typical_distance[rows] * reach)
        verified = key.masked_fill(~is_outside, _OUT).topk(num_verified, dim=1).indices
        verified = verified.masked_fill(~is_outside.gather(1, verified), -1)
        is_outside = _without(is_outside, verified)
        support = torch.stack(
            [
                torch.stack([values[:, ids].amax(dim=1) for ids in bins], dim=1)
                for angle in self._angles
                for values in [(angle.cos() * projections + angle.sin() * reach).masked_fill(~is_outside, _OUT)]
            ],
            dim=2,
        )
        log_masses = (length * projections).masked_fill(~is_outside, _OUT)
        log_mass = log_masses.logsumexp(dim=1)
        none = log_mass.new_zeros(len(rows))
        if not self.with_mass:
            return _Constants(verified.int(), support, log_mass, none.unsqueeze(1), none, none)
        shares = (log_masses - log_mass.unsqueeze(1)).exp().nan_to_num(0.0)
        moments = self._moments(weight, shares)
        offset = moments[:, :, -1]  # of the mean from the origin
        covariance = moments[:, :, :-1] - offset.unsqueeze(2) * offset.unsqueeze(1)
        variance = torch.linalg.eigvalsh(covariance)[:, -1].clamp(min=0)
        # Even a variance far below the rounding of the moments matters: phi of a large residual may be exp(300).
        variance += BOUND_SLACK * moments.diagonal(dim1=1, dim2=2).sum(dim=1)
        distances = squares + offset.square().sum(dim=1, keepdim=True)
        distances -= 2.0 * torch.cat([offset @ (x - origin).double().t() for x in weight.split(CHUNK)], dim=1)
        distances += 2.0 * rounding * longest.square()
        furthest = distances.masked_fill(~is_outside, 0.0).amax(dim=1).clamp(min=0).sqrt()
        return _Constants(verified.int(), support, log_mass, origin + offset, variance, furthest)

    def _moments(self, weight: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """[rows, H, H + 1] fp64: second moments and means of the centers relative to the origin, weighted by shares."""
        moments = 0.0
        for x, share in zip(weight.split(CHUNK), shares.split(CHUNK, dim=1), strict=True):
            x = (x - self._spread.origin).double()
            ones = torch.cat((x, x.new_ones(len(x), 1)), dim=1)
            moments = moments + torch.stack([(x * one.unsqueeze(1)).t() @ ones for one in share])
        return moments

    def _require_unchanged(self) -> None:
        if self.router.index.identify(self.router.codebook, self.router.centers) != self._made_of:
            raise ValueError(
                "the router's centers, biases, lists or codewords have changed since its constants were made; make "
                "FrozenBounds anew"
            )

    def _verified_scores(self, hidden: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
        """[T, V] fp64 scores of the verified experts of each token's nearest codeword."""
        verified = self.constants.verified
        if verified.shape[1] == 0:
            return hidden.new_empty(len(hidden), 0, dtype=torch.float64)
        weights = (self.router.weight, self.router.bias)
        return fine_scores(hidden, *weights, verified, nearest.unsqueeze(1), torch.float32).squeeze(1).double()

    @torch.no_grad()
    def certified(self, hidden: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
        """Say for which tokens the top-k is proven to be that of an exact router.

        Args:
            hidden: [T, H], tokens as the router scores them, after its input norm.
            probes: [T, P] int64, as ``Routes.probed``.
        Returns:
            [T] bool.
        Raises:
            ValueError: if the router has changed since its constants were made.
        """
        self._require_unchanged()
        router, nearest = self.router, probes[:, 0]
        stages = TwoStages.of(router)
        lowest = selected(stages, hidden, probes)[0].amin(dim=1, keepdim=True)
        ids = self.constants.verified[nearest]
        scores = self._verified_scores(hidden, nearest)
        lifted = self._lift(hidden.float(), router.bias, 1.0)
        error = 4.0 * self._spread.score_error(lifted)
        parts = split(lifted, self._directions[nearest])
        angle = torch.atan2(parts.distance, parts.along)  # [T, 1]
        step = math.pi / 2 / (_NUM_ANGLES - 1)
        lower = (angle / step).floor().long().clamp(0, _NUM_ANGLES - 2)  # the grid's angle below
        size = torch.hypot(parts.along, parts.distance) / math.sin(step)
        left = size * torch.sin((lower + 1) * step - angle).clamp(min=0)
        right = size * torch.sin(angle - lower * step).clamp(min=0)
        support = self.constants.support[nearest]  # [T, B, G]
        lower = lower.unsqueeze(2).expand(-1, support.shape[1], 1)
        most = left * support.gather(2, lower).squeeze(2) + right * support.gather(2, lower + 1).squeeze(2)
        most = most + parts.residual @ self._spread.origin.double().unsqueeze(1) + error
        most = most.masked_fill(angle > math.pi / 2, math.inf)
        is_empty = support[:, :, 0] == _OUT
        centers = stages.centers
        most = selection_scores(most, centers.score_function, self._bin_bias).masked_fill(is_empty, _OUT)
        computed = centers.selection_scores(scores + error, ids)
        counts = (ids >= 0) & ~self._are_candidates(probes, ids)
        return (torch.cat((most, computed.masked_fill(~counts, _OUT)), dim=1) + stages.selection_error <= lowest).all(
            dim=1
        )

    def _are_candidates(self, probes: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """[T, V] bool: which of the experts ``ids`` [T, V] are in a list that the token searches."""
        listed = self.router.index.shortlist[probes].flatten(1).sort(dim=1).values  # [T, P*L]
        slots = torch.searchsorted(listed, ids).clamp(max=listed.shape[1] - 1)
        return listed.gather(1, slots) == ids

    @torch.no_grad()
    def mass_bound(self, hidden: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
        """Lower bounds on the softmax mass that the lists hold.

        Args:
            hidden, probes: as in :meth:`certified`.
        Returns:
            [T] fp32.
        Raises:
            ValueError: as :meth:`certified`, or if the object was made with ``with_mass=False``.
        """
        if not self.with_mass:
            raise ValueError("FrozenBounds (with_mass=False) must be made with_mass=True to bound the mass")
        self._require_unchanged()
        router, nearest = self.router, probes[:, 0]
        lists, weights = router.index.shortlist, (router.weight, router.bias)
        num_listed = probes.shape[1] * lists.shape[1]
        candidates = fine_topk(hidden, *weights, lists, probes, num_listed, torch.float32)[0].double()
        known = fine_scores(hidden, *weights, lists, nearest.unsqueeze(1), torch.float32).squeeze(1).double()
        known = torch.cat((known, self._verified_scores(hidden, nearest)), dim=1)
        lifted = self._lift(hidden.float(), router.bias, 1.0).double()
        _, _, log_mass, mean, variance, reach = (values[nearest] for values in self.constants)
        residual = lifted - self._length[nearest] * self._directions[nearest]
        distance = residual.norm(dim=1)
        limit, gain = distance * reach, variance * distance.square()
        in_range = limit < 300.0
        growth = torch.where(in_range, torch.log1p(gain * bennett(torch.where(in_range, limit, 0.0))), limit)
        unknown = log_mass + (residual * mean).sum(dim=1) + growth
        at_anchor = self._length[nearest].squeeze(1) * self._spread.longest * self._spread.rounding
        error = 4.0 * (self._spread.score_error(lifted).squeeze(1) + at_anchor) + BOUND_SLACK
        everything = torch.logaddexp(known.logsumexp(dim=1), unknown)
        return (candidates.logsumexp(dim=1) - everything - error).clamp(max=0.0).exp().float()


def _without(is_member: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """``is_member`` [R, E] with False at the ids [R, N] of each row; -1 stands for no id."""
    padded = torch.nn.functional.pad(is_member, (0, 1))
    return padded.scatter(1, ids.long().remainder(padded.shape[1]), False)[:, :-1]


def _typical(codebook: Codebook) -> tuple[torch.Tensor, torch.Tensor]:
    """[C, 1] fp64 each: mean projection of a codeword's tokens, and tangent of their angle to it; 1 if it saw none."""
    length = codebook.typical_projections().double().unsqueeze(1)
    counts, cosines = codebook.ema[:, -3].double(), codebook.ema[:, -2].double()
    cosine = torch.where(counts > 0, cosines / counts.clamp(min=1e-300), 0.5**0.5).clamp(1e-3, 1.0).unsqueeze(1)
    return length.clamp(min=0.0), (1.0 - cosine.square()).sqrt() / cosine
