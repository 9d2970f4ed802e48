"""From a backbone's maps to raw outputs: convolutions at each scale, coarsest first, each joined to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.methods.detection.yolov3.darknet import conv


class Scale(nn.Module):
    """One scale: what comes from the coarser one joined to this map, some convolutions, and the output layer.

    Args:
        in_channels: of this scale's map.
        channels: F; wide convolutions have 2 F.
        coarser: channels that the coarser scale hands on, 0 for the coarsest.
        outputs: of the output layer.
        depth: convolutions before the output branch: five in YOLOv3, one in the tiny form.
    """

    def __init__(self, in_channels: int, channels: int, coarser: int, outputs: int, depth: int) -> None:
        super().__init__()
        self.lateral = conv(coarser, channels, 1) if coarser else None
        joined = in_channels + (channels if coarser else 0)
        layers, width = [], joined
        for k in range(depth):
            narrow = k % 2 == 0
            layers.append(conv(width, channels if narrow else 2 * channels, 1 if narrow else 3))
            width = channels if narrow else 2 * channels
        self.body = nn.Sequential(*layers)
        self.wide = conv(width, 2 * channels, 3)
        self.out = nn.Conv2d(2 * channels, outputs, 1)
        self.channels = width

    def forward(self, x: Tensor, coarser: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output (N, outputs, H, W), and the map (N, F, H, W) that the finer scale takes."""
        if self.lateral is not None and coarser is not None:
            above = F.interpolate(self.lateral(coarser), size=x.shape[2:], mode="nearest")
            x = torch.cat([above, x], 1)
        x = self.body(x)
        return self.out(self.wide(x)), x


class Neck(nn.Module):
    """Scales over maps, finest first, to outputs of the same sizes, finest first.

    Args:
        channels: of the maps.
        widths: F of each scale.
        outputs: of each scale's output layer.
        depths: of each scale.
    """

    def __init__(
        self, channels: Sequence[int], widths: Sequence[int], outputs: Sequence[int], depths: Sequence[int]
    ) -> None:
        super().__init__()
        scales: list[Scale] = []
        for c, f, o, d in list(zip(channels, widths, outputs, depths, strict=True))[::-1]:
            scales.append(Scale(c, f, scales[-1].channels if scales else 0, o, d))
        self.scales = nn.ModuleList(scales)  # coarsest first, the order of the released weights

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        x: Tensor | None = None
        for scale, level in zip(self.scales, reversed(maps), strict=True):
            out, x = scale(level, x)
            found.append(out)
        return found[::-1]
