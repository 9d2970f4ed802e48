"""Bilinear sampling of a map as weighted sums of its rows: one row of channels for each position."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rows_of(x: Tensor, groups: int = 1) -> Tensor:
    """(N, C, H, W) to (N H W groups, C / groups); of a channels-last map a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1] // groups)


def corners(y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The four cells around each position, as index ``row * width + column`` and bilinear weight, both (..., 4).

    ``y`` and ``x`` are in cells, 0 is the middle of the first. What lies outside the map weighs nothing, as if the map
    went on with zeros. The weights carry the gradient to the positions.
    """
    y, x = y.clamp(-2, height + 1), x.clamp(-2, width + 1)  # infinities have no fraction
    top, left = y.detach().floor(), x.detach().floor()
    rows, weight_y = _pair(top, y - top, height)
    columns, weight_x = _pair(left, x - left, width)
    index = rows.unsqueeze(-1) * width + columns.unsqueeze(-2)
    return index.flatten(-2), (weight_y.unsqueeze(-1) * weight_x.unsqueeze(-2)).flatten(-2)


def _pair(first: Tensor, share: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Two neighbouring cells of one axis with their weights, (..., 2)."""
    both = torch.stack([first, first + 1], -1)
    inside = (both >= 0) & (both < size)
    weight = torch.stack([1 - share, share], -1) * inside
    return both.int().clamp(0, size - 1), weight  # in this order also where it is not a number


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
