"""Bilinear sampling of a map as weighted sums of its rows: one row of channels for each position."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rows_of(x: Tensor, groups: int = 1) -> Tensor:
    """(N, C, H, W) to (N H W groups, C / groups); of a channels-last map a view.

    Each row lies in one piece; of rows that do not, as a view of one contiguous image has, sums are many times slower.
    """
    return x.permute(0, 2, 3, 1).contiguous().view(-1, x.shape[1] // groups)


def corners(y: Tensor, x: Tensor, height: int | Tensor, width: int | Tensor) -> tuple[Tensor, Tensor]:
    """The four cells around each position, as index ``row * width + column`` and bilinear weight, both (..., 4).

    ``y`` and ``x`` are in cells, 0 is the middle of the first. What lies outside the map weighs nothing, as if the map
    went on with zeros. The weights carry the gradient to the positions. Sizes may be int32 tensors that broadcast,
    where positions lie on maps of different sizes.
    """
    y, x = between(y, -2, height + 1), between(x, -2, width + 1)  # infinities have no fraction
    top, bottom, weight_top, weight_bottom = _pair(y, height)
    left, right, weight_left, weight_right = _pair(x, width)
    top, bottom = top * width, bottom * width
    index = [row + column for row in (top, bottom) for column in (left, right)]
    weights = [a * b for a in (weight_top, weight_bottom) for b in (weight_left, weight_right)]
    return torch.stack(index, -1), torch.stack(weights, -1)  # put together last: short last axes are slow


def between(at: Tensor, low: int, high: int | Tensor) -> Tensor:
    """``clamp`` whose upper limit may be a tensor."""
    if isinstance(high, Tensor):
        return torch.minimum(at.clamp(min=low), high.to(at.dtype))
    return at.clamp(low, high)


def _pair(at: Tensor, size: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two neighbouring cells of one axis, and their weights."""
    floor = at.detach().floor()
    share, first = at - floor, floor.int()
    found, weights = [], []
    for cell, weight in ((first, 1 - share), (first + 1, share)):
        weights.append(weight * ((cell >= 0) & (cell < size)))
        found.append(between(cell, 0, size - 1))  # in this order also where it is not a number
    return found[0], found[1], weights[0], weights[1]


def weighted_rows(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """sum_k weight[..., k] rows[index[..., k]]: (R, C), (B, K), (B, K) to (B, C).

    Outside of graphs it is one fused sum; compilers and exporters get gathers.
    """
    if not torch.compiler.is_compiling() and index.numel():
        return F.embedding_bag(index, rows, mode="sum", per_sample_weights=weight)
    total = rows.index_select(0, index[:, 0]) * weight[:, :1]
    for k in range(1, index.shape[1]):
        total = total + rows.index_select(0, index[:, k]) * weight[:, k : k + 1]
    return total
