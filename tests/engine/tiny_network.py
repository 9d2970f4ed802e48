"""A network of a few hundred parameters, for comparisons that end in seconds."""

from __future__ import annotations

from torch import Tensor, nn


class Tiny(nn.Module):
    """(N, C, H, W) to (N, K) through two convolutions; ``wide`` gives the second another shape."""

    def __init__(self, *, num_classes: int = 2, in_channels: int = 3, wide: bool = False) -> None:
        super().__init__()
        width = 8 if wide else 6
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.body(self.stem(x)).mean((2, 3))))


class Other(Tiny):
    """Another class with the same parts and one more."""

    def __init__(self, *, num_classes: int = 2, in_channels: int = 3) -> None:
        super().__init__(num_classes=num_classes, in_channels=in_channels)
        self.scale = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.scale(self.body(self.stem(x)).mean((2, 3)))))
