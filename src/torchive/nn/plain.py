"""A plain convolutional network that is small enough for sweeps on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class PlainNetwork(nn.Module):
    """Pairs of 3x3 convolutions with batch norm and ReLU, the first of each pair with stride 2: (N, C, H, W) to (N, K).

    With n widths an image of 2**n pixels ends as a single position, so that the last norms see one number per image and
    channel: the hardest case for batch statistics.

    Args:
        widths: channels of each pair.
        num_classes: K; 0 leaves the last layer out and gives the pooled features.
        in_channels: C.

    Raises:
        ValueError: no widths, or one below 1.
    """

    def __init__(
        self, widths: Sequence[int] = (16, 32, 32, 64), *, num_classes: int = 10, in_channels: int = 3
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"widths must hold numbers of at least 1, got {tuple(widths)}")
        layers: list[nn.Module] = []
        before = in_channels
        for width in widths:
            for stride in (2, 1):
                layers += [nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                before = width
        self.body = nn.Sequential(*layers)
        self.head: nn.Module = nn.Linear(before, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))  # (N, K)
