"""Footprints: the neighbours of every position, and their sum with a weight for each position and group of channels.

Both loop over the k x k taps, on views of the padded map: no column matrix is formed where none is needed, and the
backward pass writes one padded map instead of one for each tap.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True)
class Footprint:
    """k x k positions around every ``stride``-th position, ``dilation`` apart; k is odd."""

    kernel_size: int
    stride: int = 1
    dilation: int = 1

    @property
    def padding(self) -> int:
        """Border on each side, so that the centre of the first footprint is the first position."""
        return self.dilation * (self.kernel_size // 2)

    def outputs(self, side: int) -> int:
        """Positions along a side of so many."""
        return (side - 1) // self.stride + 1

    def pad(self, x: Tensor) -> Tensor:
        """(N, C, H, W) with its borders reflected."""
        return F.pad(x, (self.padding,) * 4, mode="reflect") if self.padding else x

    def rows(self, first: int, last: int) -> slice:
        """The rows of the padded map that the output rows first..last - 1 read."""
        return slice(first * self.stride, (last - 1) * self.stride + self.dilation * (self.kernel_size - 1) + 1)

    def taps(self, x: Tensor, height: int, width: int) -> Iterator[Tensor]:
        """Views (..., height, width) of a padded map (..., H, W), row by row of the footprint."""
        reach_y, reach_x = (height - 1) * self.stride + 1, (width - 1) * self.stride + 1
        for i in range(self.kernel_size):
            for j in range(self.kernel_size):
                y, z = i * self.dilation, j * self.dilation
                yield x[..., y : y + reach_y : self.stride, z : z + reach_x : self.stride]


def neighbours(padded: Tensor, footprint: Footprint, height: int, width: int) -> Tensor:
    """x_j for all j in R(i): a padded (N, C, Hp, Wp) to (N, C, k * k, height, width)."""
    if torch.is_grad_enabled() and padded.requires_grad and not torch.compiler.is_exporting():
        return _Neighbours.apply(padded, footprint, height, width)
    return torch.stack(list(footprint.taps(padded, height, width)), 2)


def weighted_sum(padded: Tensor, weight: Tensor, footprint: Footprint) -> Tensor:
    """sum_j alpha_ij x_j: a padded (N, C, Hp, Wp) and (N, G, k * k, H, W) to (N, C, H, W); channel c takes c mod G."""
    weight = weight.to(padded.dtype)
    grouped = padded.unflatten(1, (-1, weight.shape[1]))  # (N, C / G, G, Hp, Wp)
    needed = padded.requires_grad or weight.requires_grad
    if torch.is_grad_enabled() and needed and not torch.compiler.is_exporting():
        return _WeightedSum.apply(grouped, weight, footprint).flatten(1, 2)
    return _sum(grouped, weight, footprint).flatten(1, 2)


def aggregate(x: Tensor, weight: Tensor, *, kernel_size: int, stride: int = 1, dilation: int = 1) -> Tensor:
    """The release's aggregation with reflected borders.

    Args:
        x: (N, C, H, W).
        weight: (N, G, k * k, H', W'), G a divisor of C; H' and W' are the positions at every ``stride``-th place.

    Returns:
        (N, C, H', W').

    Raises:
        ValueError: shapes that do not fit, or a map that is not larger than its border.
    """
    footprint = Footprint(kernel_size, stride, dilation)
    height, width = (footprint.outputs(side) for side in x.shape[2:])
    expected = (x.shape[0], kernel_size**2, height, width)
    if weight.ndim != 5 or (weight.shape[0], *weight.shape[2:]) != expected or x.shape[1] % weight.shape[1]:
        raise ValueError(
            f"expected weights (N, G, {kernel_size**2}, {height}, {width}) with G a divisor of {x.shape[1]}, "
            f"got shape {tuple(weight.shape)}"
        )
    require_size(x, footprint)
    return weighted_sum(footprint.pad(x), weight, footprint)


def require_size(x: Tensor, footprint: Footprint) -> None:
    """Refuse a map that a reflected border does not fit.

    Raises:
        ValueError: a side is not above the border.
    """
    least = footprint.padding + 1
    if min(x.shape[2:]) < least:
        where = f"a {footprint.kernel_size} x {footprint.kernel_size} footprint"
        raise ValueError(f"{where} needs maps of at least {least} x {least}, got shape {tuple(x.shape)}")


def _sum(grouped: Tensor, weight: Tensor, footprint: Footprint) -> Tensor:
    height, width = weight.shape[3:]
    y: Tensor | None = None
    for t, tap in enumerate(footprint.taps(grouped, height, width)):
        own = weight[:, None, :, t]  # (N, 1, G, H, W)
        y = tap * own if y is None else torch.addcmul(y, tap, own)
    assert y is not None
    return y


class _Neighbours(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, footprint: Footprint, height: int, width: int) -> Tensor:
        ctx.shape, ctx.footprint = padded.shape, footprint
        return torch.stack(list(footprint.taps(padded, height, width)), 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        found = grad.new_zeros(ctx.shape)
        for tap, own in zip(ctx.footprint.taps(found, *grad.shape[3:]), grad.unbind(2), strict=True):
            tap.add_(own)
        return found, None, None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grouped: Tensor, weight: Tensor, footprint: Footprint) -> Tensor:
        ctx.save_for_backward(grouped, weight)
        ctx.footprint = footprint
        height, width = weight.shape[3:]
        y = grouped.new_zeros(*grouped.shape[:3], height, width)
        for t, tap in enumerate(footprint.taps(grouped, height, width)):
            y.addcmul_(tap, weight[:, None, :, t])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        grouped, weight = ctx.saved_tensors
        shape, footprint = grad.shape[3:], ctx.footprint
        dx, dweight = torch.zeros_like(grouped), torch.empty_like(weight)
        pairs = zip(footprint.taps(grouped, *shape), footprint.taps(dx, *shape), strict=True)
        for t, (tap, dtap) in enumerate(pairs):
            torch.sum(grad * tap, 1, out=dweight[:, :, t])
            dtap.addcmul_(grad, weight[:, None, :, t])
        return dx, dweight, None
