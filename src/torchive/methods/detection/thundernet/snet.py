"""SNet: ShuffleNetV2 with 5x5 depthwise convolutions, three widths."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from torchive.protocols import Level

Variant = Literal[49, 146, 535]
#: Channels of the stem and of the three stages, and of a last 1x1 convolution.
WIDTHS: dict[int, tuple[int, int, int, int, int | None]] = {
    49: (24, 60, 120, 240, 512),
    146: (24, 132, 264, 528, None),
    535: (48, 248, 496, 992, None),
}


class SNet(nn.Module):
    """Images (N, C, H, W) to maps of strides 8, 16 and 32, or with ``num_classes`` to logits (N, K).

    Args:
        variant: 49, 146 or 535, the million multiplications of an image of 224 pixels.
        in_channels: C.
        num_classes: K, for the classifier that is trained first; None is the backbone.

    Raises:
        ValueError: another variant.
    """

    def __init__(self, variant: Variant = 146, *, in_channels: int = 3, num_classes: int | None = None) -> None:
        super().__init__()
        if variant not in WIDTHS:
            raise ValueError(f"variant must be 49, 146 or 535, got {variant}")
        stem, *stages, last = WIDTHS[variant]
        self.stem = nn.Sequential(*_conv(in_channels, stem, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        made, before = [], stem
        for width, count in zip(stages, (4, 8, 4), strict=True):
            assert width is not None
            units = [ShuffleUnit(before, width, stride=2)]
            units += [ShuffleUnit(width, width) for _ in range(count - 1)]
            made.append(nn.Sequential(*units))
            before = width
        if last is not None:
            made[-1].append(nn.Sequential(*_conv(before, last, 1), nn.ReLU()))
            before = last
        self.stages = nn.ModuleList(made)
        ends = [stages[0], stages[1], before]
        self.levels = tuple(Level(c, s) for c, s in zip(ends, (8, 16, 32), strict=True))
        self.classifier = None if num_classes is None else nn.Linear(before, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps if self.classifier is None else self.classifier(x.mean((2, 3)))


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's unit, (N, C, H, W) to (N, C', H / stride, W / stride), with a depthwise window of five.

    With stride 1 the channels of the two halves before it are interleaved first, and the first half passes as it is.
    Ma et al., "ShuffleNet V2", ECCV 2018, arXiv:1807.11164, shuffle at the end instead, which renames channels only.

    Args:
        in_channels: C.
        out_channels: C', C where the stride is 1.
        stride: 1, or 2, where the second path starts from the whole input.
        kernel_size: of the depthwise convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, kernel_size: int = 5) -> None:
        super().__init__()
        self.stride = stride
        entering = in_channels if stride == 2 else in_channels // 2
        middle = out_channels // 2
        self.branch = nn.Sequential(
            *_conv(entering, middle, 1),
            nn.ReLU(),
            *_conv(middle, middle, kernel_size, stride, groups=middle),
            *_conv(middle, out_channels - entering, 1),
            nn.ReLU(),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2:
            self.shortcut = nn.Sequential(
                *_conv(entering, entering, kernel_size, stride, groups=entering),
                *_conv(entering, entering, 1),
                nn.ReLU(),
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            return torch.cat([self.shortcut(x), self.branch(x)], 1)
        half = x.shape[1] // 2
        # interleaved a0 b0 a1 b1 ..., of which the first half is a0 .. and b0 .., and the second the rest
        mixed = x.unflatten(1, (2, half)).transpose(1, 2).flatten(1, 2)
        passed, worked = mixed.chunk(2, 1)
        return torch.cat([passed, self.branch(worked)], 1)


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias, and its batch norm."""
    padding = kernel_size // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]
