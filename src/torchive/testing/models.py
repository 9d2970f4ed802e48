"""Networks small enough to test with."""

from __future__ import annotations

from torch import Tensor, nn


class SmallNetwork(nn.Module):
    """A two-layer classifier: ``body`` to (N, 16, H/2, W/2), a global mean, ``head`` to (N, K).

    Args:
        num_classes: K.
        in_channels: C.
    """

    def __init__(self, *, num_classes: int = 4, in_channels: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))  # (N, K)
