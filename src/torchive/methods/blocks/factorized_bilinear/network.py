"""The paper's networks for small images: pre-activation residual networks and a small Inception, with the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchive.methods.blocks.factorized_bilinear.head import FactorizedBilinearHead


class _Residual(nn.Module):
    """BN, ReLU and a convolution three times; the first of a stage has a convolution in its shortcut, too."""

    def __init__(self, channels: int, width: int, stride: int, first: bool) -> None:
        super().__init__()
        inner = width // 4
        self.enter = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(channels, inner, 1, stride),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, 1, 1),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1),
        )
        self.shortcut = nn.Conv2d(channels, width, 1, stride) if first else None

    def forward(self, x: Tensor) -> Tensor:
        entered = self.enter(x)
        return self.body(entered) + (x if self.shortcut is None else self.shortcut(entered))


class FactorizedResNet(nn.Module):
    """Pre-activation bottleneck network for images of 32 pixels, (N, C, H, W) to (N, K); 164 and 1001 in the paper.

    With ``options={"rank": 0, "act": "relu"}`` it is the paper's baseline.

    Args:
        depth: number of layers, 9 n + 2.
        num_classes: K.
        in_channels: C.
        options: those of ``FactorizedBilinearHead``.

    Raises:
        ValueError: another depth.
    """

    def __init__(
        self, depth: int = 164, *, num_classes: int = 100, in_channels: int = 3, options: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        if depth < 11 or (depth - 2) % 9:
            raise ValueError(f"depth must be 9 n + 2, such as 164, got {depth}")
        layers: list[nn.Module] = [nn.Conv2d(in_channels, 16, 3, 1, 1)]
        before = 16
        for stage, width in enumerate((64, 128, 256)):
            for block in range((depth - 2) // 9):
                layers.append(_Residual(before, width, 2 if stage and not block else 1, not block))
                before = width
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(before))
        self.head = FactorizedBilinearHead(before, num_classes, **(options or {}))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # (N, K)


class _Convolution(nn.Sequential):
    """Convolution with bias, BN and ReLU; ``last`` has no ReLU."""

    def __init__(self, channels: int, width: int, size: int, stride: int = 1, last: bool = False) -> None:
        parts: list[nn.Module] = [nn.Conv2d(channels, width, size, stride, size // 2), nn.BatchNorm2d(width)]
        super().__init__(*parts, *([] if last else [nn.ReLU()]))


class _Side(nn.Module):
    """Two branches side by side."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


class FactorizedInception(nn.Module):
    """Small Inception-BN for images of 32 pixels, (N, C, H, W) to (N, K).

    Args:
        num_classes: K.
        in_channels: C.
        options: those of ``FactorizedBilinearHead``.
    """

    def __init__(self, *, num_classes: int = 100, in_channels: int = 3, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = [_Convolution(in_channels, 96, 3)]
        before = 96
        plan: tuple[tuple[int, ...], ...] = (
            *((32, 32), (32, 48), (80,), (112, 48), (96, 64), (80, 80), (48, 96), (96,)),
            *((176, 160), (176, 160)),
        )
        for place, widths in enumerate(plan):
            if len(widths) == 1:
                layers.append(_Side(_Convolution(before, widths[0], 3, 2), nn.MaxPool2d(3, 2, 1)))
                before += widths[0]
                continue
            last = place == len(plan) - 1
            layers.append(
                _Side(_Convolution(before, widths[0], 1, last=last), _Convolution(before, widths[1], 3, last=last))
            )
            before = sum(widths)
        self.body = nn.Sequential(*layers)
        self.head = FactorizedBilinearHead(before, num_classes, **(options or {}))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # (N, K)
