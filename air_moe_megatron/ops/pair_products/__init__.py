"""Two products over pairs of a token row and a weight row, which make up a layer of tiny experts.

``pair_dots`` is a dense-times-dense product sampled at the pairs, and ``pair_sums`` a sparse-times-dense product. Each
is the other's gradient. Both cost O(N * H) and make no [N, H] copy of the weights.
"""

from dataclasses import dataclass

import torch

from air_moe_megatron.ops.backend import use_kernels
from air_moe_megatron.ops.pair_products import eager
from air_moe_megatron.ops.segments import sort_into_segments

__all__ = ["Pairs", "make_pairs", "pair_dots", "pair_gradients", "pair_sums"]


@dataclass(frozen=True)
class Pairs:
    """Pairs of token rows and weight rows, sorted by token row and also by weight row."""

    rows: torch.Tensor  # [N] int64, ascending
    ids: torch.Tensor  # [N] int64, weight rows
    row_first: torch.Tensor  # [R + 1] int64, first pair of each token row; the last entry is N
    by_id: torch.Tensor  # [N] int64, indices of the pairs, sorted by weight row
    id_first: torch.Tensor  # [V + 1] int64, first slot of each weight row in ``by_id``; the last entry is N

    @property
    def num_rows(self) -> int:
        return self.row_first.numel() - 1

    @property
    def num_ids(self) -> int:
        return self.id_first.numel() - 1

    def split(self, parts: int) -> "Pairs":
        """Replace each weight row by ``parts`` consecutive rows: N * parts pairs, those of one pair together.

        Example: one pair (row 0, id 2) in 2 parts gives (row 0, id 4) and (row 0, id 5).
        """
        if parts == 1:
            return self
        part = torch.arange(parts, device=self.ids.device)
        counts = self.id_first.diff()
        sorted_ids = self.ids[self.by_id]
        first = self.id_first[:-1][sorted_ids]
        within = torch.arange(self.ids.numel(), device=self.ids.device) - first
        # Sorted by weight row: all pairs of its first part, then all of its second, ...
        slots = (first * parts + within).unsqueeze(1) + counts[sorted_ids].unsqueeze(1) * part
        pairs = self.by_id.unsqueeze(1) * parts + part
        starts = self.id_first[:-1].unsqueeze(1) * parts + counts.unsqueeze(1) * part
        return Pairs(
            rows=self.rows.repeat_interleave(parts),
            ids=(self.ids.unsqueeze(1) * parts + part).flatten(),
            row_first=self.row_first * parts,
            by_id=torch.empty_like(self.ids.repeat(parts)).index_copy_(0, slots.flatten(), pairs.flatten()),
            id_first=torch.cat((starts.flatten(), self.id_first[-1:] * parts)),
        )


@torch.compiler.disable
def make_pairs(rows: torch.Tensor, ids: torch.Tensor, num_rows: int, num_ids: int) -> Pairs:
    """Sort pairs by token row and by weight row. Does not wait for the device.

    Args:
        rows: [N] integer, token rows, ascending.
        ids: [N] integer, weight rows; a pair that occurs twice counts twice. Kernels skip ids of -1.
        num_rows: R.
        num_ids: V.
    Raises:
        ValueError: if rows and ids are not of equal length.

    Example: rows [0, 0, 1], ids [2, 0, 2], 2 rows and 3 ids give row_first [0, 2, 3], by_id [1, 0, 2] and
    id_first [0, 1, 1, 3].
    """
    if rows.dim() != 1 or rows.shape != ids.shape:
        raise ValueError(f"rows {tuple(rows.shape)} and ids {tuple(ids.shape)} must both be [N]")
    rows, ids = rows.long(), ids.long()
    by_id, id_first = sort_into_segments(ids, num_ids)
    return Pairs(
        rows=rows,
        ids=ids,
        row_first=torch.searchsorted(rows, torch.arange(num_rows + 1, device=rows.device)),
        by_id=by_id,
        id_first=id_first,
    )


@torch.compiler.disable
def pair_dots(hidden: torch.Tensor, weight: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Dot product of each pair's token row and weight row.

    Differentiable in hidden and weight; the weight's gradient is added to ``weight.main_grad`` if it exists
    (``ops/weight_gradient.py``). Does not wait for the device.

    Args:
        hidden: [R, H], any float dtype.
        weight: [..., H] of V rows, any float dtype.
        pairs: N pairs.
    Returns:
        [N], fp32 or the wider dtype of hidden and weight if that is wider.
    Raises:
        ValueError: if the shapes do not fit together.

    Example: hidden [[1, 2]], weight [[1, 0], [0, 1], [1, 1]], the pairs (0, 2) and (0, 0) give [3, 1].
    """
    if hidden.dim() != 2 or hidden.shape[0] != pairs.num_rows:
        raise ValueError(f"hidden {tuple(hidden.shape)} must be [R, H] with R = {pairs.num_rows}")
    _check_weight(weight, pairs)
    if hidden.shape[1] != weight.shape[-1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must have the same last dimension"
        )
    if use_kernels("pair_products", hidden, weight):
        from air_moe_megatron.ops.pair_products import kernels

        return kernels.pair_dots(hidden, weight, pairs)
    return eager.pair_dots(hidden, weight, pairs)


@torch.compiler.disable
@torch.no_grad()
def pair_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    pairs: Pairs,
    grad_dots: torch.Tensor,
    need_hidden: bool = True,
    need_weight: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of :func:`pair_dots`, without computing the dot products again.

    The weight's gradient is added to ``weight.main_grad`` if it exists (``ops/weight_gradient.py``). Does not wait for
    the device.

    Args:
        hidden, weight, pairs: as :func:`pair_dots`.
        grad_dots: [N], any float dtype.
        need_hidden, need_weight: whether to compute the gradient of hidden and of weight.
    Returns:
        gradients of hidden [R, H] and of weight, each None if not needed.
    Raises:
        ValueError: if the shapes do not fit together.

    Example: hidden [[1, 2]], weight [[1, 0], [0, 1]], the pair (0, 1) and the gradient 3 give hidden [[0, 3]] and
    weight [[0, 0], [3, 6]].
    """
    if grad_dots.shape != pairs.ids.shape:
        raise ValueError(f"grad_dots {tuple(grad_dots.shape)} must be [N] with N = {pairs.ids.numel()}")
    _check_weight(weight, pairs)
    if use_kernels("pair_products", hidden, weight):
        from air_moe_megatron.ops.pair_products import kernels

        return kernels.pair_gradients(hidden, weight, pairs, grad_dots, need_hidden, need_weight)
    return eager.pair_gradients(hidden, weight, pairs, grad_dots, need_hidden, need_weight)


@torch.compiler.disable
def pair_sums(values: torch.Tensor, weight: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """Sum the weight rows of each token row, weighted by the pairs' values.

    Differentiable in values and weight, like :func:`pair_dots`.

    Args:
        values: [N], any float dtype.
        weight: [..., H] of V rows.
        pairs: N pairs.
    Returns:
        [R, H] in the dtype of weight; zero where a row has no pairs.
    Raises:
        ValueError: if the shapes do not fit together.

    Example: values [2, 1], weight [[1, 0], [0, 1], [1, 1]], the pairs (0, 2) and (0, 0) give [[3, 2]].
    """
    if values.shape != pairs.ids.shape:
        raise ValueError(f"values {tuple(values.shape)} must be [N] with N = {pairs.ids.numel()}")
    _check_weight(weight, pairs)
    if use_kernels("pair_products", values, weight):
        from air_moe_megatron.ops.pair_products import kernels

        return kernels.pair_sums(values, weight, pairs)
    return eager.pair_sums(values, weight, pairs)


def _check_weight(weight: torch.Tensor, pairs: Pairs) -> None:
    if weight.dim() < 2 or weight.numel() != pairs.num_ids * weight.shape[-1]:
        raise ValueError(f"weight {tuple(weight.shape)} must hold V = {pairs.num_ids} rows")
