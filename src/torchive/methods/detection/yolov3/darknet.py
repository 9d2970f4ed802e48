"""Darknet-53 and the tiny network: convolutions with batch norm and a leaky ReLU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from torchive.protocols import Level


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Module:
    """Convolution without bias, batch norm, leaky ReLU of slope 0.1; the size is kept, or halved with stride 2."""
    act = partial(nn.LeakyReLU, negative_slope=0.1)
    return Conv2dNormActivation(in_channels, out_channels, kernel_size, stride, activation_layer=act, inplace=True)


class ResidualUnit(nn.Module):
    """x + conv3x3(conv1x1(x)), with half of the channels in between: (N, C, H, W) to the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.expand = conv(channels, channels // 2, 1), conv(channels // 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.expand(self.squeeze(x))


class Darknet53(nn.Module):
    """Five stages of residual units, each begun by a convolution of stride 2: (N, C, H, W) to the last three maps.

    Args:
        in_channels: C.
        channels: of the stem; a stage has twice as many as what comes before it.
        units: residual units of each stage.

    Raises:
        ValueError: odd ``channels``, or less than three stages.
    """

    def __init__(self, *, in_channels: int = 3, channels: int = 32, units: Sequence[int] = (1, 2, 8, 8, 4)) -> None:
        super().__init__()
        if channels < 2 or channels % 2 or len(units) < 3:
            raise ValueError(f"expected even channels >= 2 and three stages or more, got {channels} and {list(units)}")
        self.stem = conv(in_channels, channels, 3)
        self.stages = nn.ModuleList()
        levels = []
        for stage, count in enumerate(units):
            width = channels * 2 ** (stage + 1)
            self.stages.append(
                nn.Sequential(conv(width // 2, width, 3, 2), *(ResidualUnit(width) for _ in range(count)))
            )
            levels.append(Level(width, 2 ** (stage + 1)))
        self.levels = tuple(levels[-3:])

    def forward(self, x: Tensor) -> list[Tensor]:
        maps, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[-3:]


class TinyDarknet(nn.Module):
    """Seven convolutions with max pooling between them: (N, C, H, W) to maps of stride 16 and 32.

    The last pooling has stride one and looks one cell to the right and below, as in the release.

    Args:
        in_channels: C.
        channels: of the first convolution.
    """

    def __init__(self, *, in_channels: int = 3, channels: int = 16) -> None:
        super().__init__()
        widths = [in_channels, *(channels * 2**k for k in range(7))]
        self.layers = nn.ModuleList(conv(a, b, 3) for a, b in pairwise(widths))
        self.levels = (Level(widths[5], 16), Level(widths[7], 32))

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = x
        for k, layer in enumerate(self.layers):
            x = layer(x)
            if k == 4:
                fine = x
            if k < 5:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            elif k == 5:
                x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=float("-inf")), 2, 1)
        return [fine, x]
