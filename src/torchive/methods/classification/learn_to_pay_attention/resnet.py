"""The paper's residual network: its maps after each stage, and the last map, from which the global features come."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from torchive.nn.fcn import conv_norm_act
from torchive.protocols import Level


class ResNetMaps(nn.Module):
    """Images (N, C, H, W), any size, to the maps of a pre-activation ResNet's three stages and of a block behind them.

    He et al., ECCV 2016, arXiv:1603.05027: bottlenecks, the first of each stage with a convolution as shortcut. The
    block behind is the release's: it pools by two, convolves and pools by four; at 32 pixels its map has one position.

    Args:
        depth: 9 n + 2, counting the classifier; the paper's is 164.
        widths: channels of the three stages, multiples of four.
        stem_channels: of the first convolution.
        in_channels: C.

    Raises:
        ValueError: another ``depth`` or ``widths``; in ``forward``, an input with other channels.
    """

    def __init__(
        self,
        depth: int = 164,
        *,
        widths: Sequence[int] = (64, 128, 256),
        stem_channels: int = 16,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if depth < 11 or depth % 9 != 2:
            raise ValueError(f"depth must be 9 n + 2 with n >= 1 (11, 20, 29, ..), got {depth}")
        if len(widths) != 3 or min(widths) < 4 or any(width % 4 for width in widths):
            raise ValueError(f"widths must be three multiples of four, got {tuple(widths)}")
        self.in_channels = in_channels
        self.stem = nn.Conv2d(in_channels, stem_channels, 3, 1, 1, bias=False)
        self.stages = nn.ModuleList()
        before = stem_channels
        for place, width in enumerate(widths):
            stage = nn.Sequential()
            for i in range(depth // 9):
                stage.append(_Bottleneck(before, width, stride=2 if place and not i else 1))
                before = width
            self.stages.append(stage)
        self.act = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.last = conv_norm_act(before, before, 3)
        self.levels = tuple(Level(c, s) for c, s in zip((*widths, before), (1, 2, 4, 32), strict=True))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected (N, {self.in_channels}, H, W), got shape {tuple(x.shape)}")
        maps: list[Tensor] = []
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        x = F.max_pool2d(self.act(x), 2, ceil_mode=True)
        return [*maps, F.max_pool2d(self.last(x), 4, ceil_mode=True)]


class _Bottleneck(nn.Module):
    """x + branch(x), or convolution(relu(norm(x))) + branch(x) where the size changes."""

    def __init__(self, channels: int, width: int, *, stride: int) -> None:
        super().__init__()
        inner = width // 4
        self.before = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.branch = nn.Sequential(
            *conv_norm_act(channels, inner, 1, stride=stride),
            *conv_norm_act(inner, inner, 3),
            nn.Conv2d(inner, width, 1, bias=False),
        )
        same = channels == width and stride == 1
        self.shortcut = None if same else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        return (x if self.shortcut is None else self.shortcut(y)) + self.branch(y)
