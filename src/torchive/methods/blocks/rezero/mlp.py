"""The fully connected network of the paper's first experiment."""

from __future__ import annotations

from torch import Tensor, nn

from torchive.methods.blocks.rezero.gate import ReZero


class ReZeroMLP(nn.Sequential):
    """L layers x + alpha relu(W x + b) of one width, W with variance 2 / C: (N, *, C) to the same shape.

    Args:
        channels: C.
        layers: L.
        start: alpha before training; 0 in the paper, 1 makes the plain residual network.
        rate: learning rate of alpha as a multiple of the others'.

    Raises:
        ValueError: ``channels`` or ``layers`` below one.
    """

    def __init__(self, channels: int, *, layers: int = 32, start: float = 0.0, rate: float = 1.0) -> None:
        if min(channels, layers) < 1:
            raise ValueError(f"channels and layers must be >= 1, got {channels} and {layers}")
        blocks = []
        for _ in range(layers):
            linear = nn.Linear(channels, channels)
            nn.init.kaiming_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
            blocks.append(ReZero(nn.Sequential(linear, nn.ReLU()), start=start, rate=rate))
        super().__init__(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)
