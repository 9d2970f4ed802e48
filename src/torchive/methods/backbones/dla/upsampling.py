"""From maps of several strides to one map: iterative aggregation across scales, and what it is measured against."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.methods.backbones.dla.aggregation import AggregationNode, fan_out_init


class BilinearUp(nn.Module):
    """Depth-wise transposed convolution that starts as bilinear interpolation: (N, C, H, W) to (N, C, f H, f W).

    Away from the border it gives the values of ``F.interpolate`` (align_corners false); at the border the map fades, as
    if it were surrounded by zeros.

    Args:
        channels: C.
        factor: f, an even number or one.
        fixed: whether the weights are kept as they are.

    Raises:
        ValueError: ``channels`` below one, or ``factor`` neither one nor even.
    """

    def __init__(self, channels: int, *, factor: int, fixed: bool = False) -> None:
        super().__init__()
        if channels < 1 or factor < 1 or (factor > 1 and factor % 2):
            raise ValueError(f"expected channels >= 1 and an even factor (or 1), got {channels} and {factor}")
        self.channels, self.factor = channels, factor
        place = (torch.arange(2 * factor, dtype=torch.get_default_dtype()) + 0.5) / factor - 1
        line = 1 - place.abs() if factor > 1 else torch.ones(1)
        kernel = (line[:, None] * line).expand(channels, 1, -1, -1).contiguous()
        if fixed:
            self.register_buffer("weight", kernel)
        elif factor > 1:
            self.weight: Tensor = nn.Parameter(kernel)

    def forward(self, x: Tensor) -> Tensor:
        if self.factor == 1:
            return x
        return F.conv_transpose2d(x, self.weight, stride=self.factor, padding=self.factor // 2, groups=self.channels)


class IDAUp(nn.Module):
    """Join maps of falling resolution at the size of the first: [(N, C_i, H_i, W_i), ...] to a list of joined maps.

    Each map is projected (1x1, batch norm, ReLU) where its channels differ, upsampled, and joined to those before it by
    a 3x3 node; all intermediate results come out, the last is the aggregate of all.

    Args:
        in_channels: C_1, C_2, ..., two or more.
        out_channels: C of all results.
        factors: by which each map is upsampled.
        kernel_size: side of the nodes' convolution.

    Raises:
        ValueError: fewer than two maps, or another number of factors.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int, *, factors: Sequence[int], kernel_size: int = 3
    ) -> None:
        super().__init__()
        if len(in_channels) < 2 or len(factors) != len(in_channels):
            raise ValueError(
                f"expected two or more maps with a factor each, got {tuple(in_channels)}, {tuple(factors)}"
            )
        self.project = nn.ModuleList(_projection(c, out_channels) for c in in_channels)
        self.up = nn.ModuleList(BilinearUp(out_channels, factor=f) for f in factors)
        self.nodes = nn.ModuleList(
            AggregationNode((out_channels, out_channels), out_channels, kernel_size=kernel_size)
            for _ in in_channels[1:]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        x, *others = (up(project(m)) for up, project, m in zip(self.up, self.project, maps, strict=True))
        joined = []
        for node, other in zip(self.nodes, others, strict=True):
            x = node([x, cropped(other, x)])
            joined.append(x)
        return joined


class DLAUp(nn.Module):
    """All levels joined by repeated ``IDAUp``, deep to shallow, until each stands at the finest resolution.

    [(N, C_i, H_i, W_i), ...], finest first, to (N, C_1, H_1, W_1). The first pass joins the two deepest maps, the next
    the three deepest with what came out, and so on.

    Args:
        in_channels: C_1, C_2, ..., finest first.
        strides: pixels per cell of each map, rising by even factors.

    Raises:
        ValueError: fewer than two maps, or strides that do not fit.
    """

    def __init__(self, in_channels: Sequence[int], *, strides: Sequence[int]) -> None:
        super().__init__()
        _check(in_channels, strides)
        widths, scales = list(in_channels), list(strides)
        passes = []
        for first in range(len(widths) - 2, -1, -1):
            factors = [s // scales[first] for s in scales[first:]]
            passes.append(IDAUp(widths[first:], in_channels[first], factors=factors))
            for i in range(first + 1, len(widths)):
                widths[i], scales[i] = in_channels[first], scales[first]
        self.passes = nn.ModuleList(passes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        found = list(maps)
        for i, ida in enumerate(self.passes):
            found[-1 - i :] = ida(found[-2 - i :])
        return found[-1]


class SumUp(nn.Module):
    """Long skips as in a feature pyramid: each map projected, the coarser one upsampled and added, one 3x3 at the end.

    Arguments and shapes as ``DLAUp``; ``skips=False`` takes the coarsest map alone.
    """

    def __init__(self, in_channels: Sequence[int], *, strides: Sequence[int], skips: bool = True) -> None:
        super().__init__()
        _check(in_channels, strides)
        width = in_channels[0]
        taken = list(in_channels) if skips else [in_channels[-1]]
        self.skips, self.factor = skips, strides[-1] // strides[0]
        self.project = nn.ModuleList(_projection(c, width) for c in taken)
        factors = [b // a for a, b in itertools.pairwise(strides)] if skips else [self.factor]
        self.up = nn.ModuleList(BilinearUp(width, factor=f) for f in factors)
        self.node = AggregationNode((width,), width, kernel_size=3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        if not self.skips:
            return self.node([cropped(self.up[0](self.project[0](maps[-1])), maps[0])])
        *finer, x = (project(m) for project, m in zip(self.project, maps, strict=True))
        for up, m in zip(reversed(self.up), reversed(finer), strict=True):
            x = m + cropped(up(x), m)
        return self.node([x])


class NestedUp(nn.Module):
    """Nested skips as in UNet++: a node at level i and column j joins all nodes left of it and the upsampled one below.

    Arguments and shapes as ``DLAUp``, whose passes keep only the last node of each row.
    """

    def __init__(self, in_channels: Sequence[int], *, strides: Sequence[int]) -> None:
        super().__init__()
        _check(in_channels, strides)
        self.up, self.nodes = nn.ModuleList(), nn.ModuleList()
        for column in range(1, len(in_channels)):
            for i in range(len(in_channels) - column):
                below, width = in_channels[i + 1], in_channels[i]
                up = BilinearUp(width, factor=strides[i + 1] // strides[i])
                self.up.append(nn.Sequential(_projection(below, width), up))
                self.nodes.append(AggregationNode([width] * (column + 1), width, kernel_size=3))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        rows, steps = [[m] for m in maps], iter(zip(self.up, self.nodes, strict=True))
        for column in range(1, len(rows)):
            for i in range(len(rows) - column):
                up, node = next(steps)
                rows[i].append(node([*rows[i], cropped(up(rows[i + 1][column - 1]), rows[i][0])]))
        return rows[0][-1]


def cropped(x: Tensor, like: Tensor) -> Tensor:
    """The top left of a map, in the height and width of another."""
    return x[..., : like.shape[-2], : like.shape[-1]]


def _projection(channels: int, width: int) -> nn.Module:
    if channels == width:
        return nn.Identity()
    layers = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    fan_out_init(layers)
    return layers


def _check(in_channels: Sequence[int], strides: Sequence[int]) -> None:
    even = all(b % (2 * a) == 0 for a, b in itertools.pairwise(strides))
    if len(in_channels) < 2 or len(strides) != len(in_channels) or not even:
        raise ValueError(
            f"expected two or more maps whose strides rise by even factors, got channels {tuple(in_channels)} "
            f"and strides {tuple(strides)}"
        )
