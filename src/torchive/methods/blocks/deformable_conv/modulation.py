"""The note's question: can channels be modulated as finely as positions? A smooth map of gates for each group."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def total_variation(maps: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring cells of (N, C, H, W), a scalar; zero for constant maps."""
    parts = [maps.diff(dim=axis).abs() for axis in (2, 3)]
    count = sum(part.numel() for part in parts)
    return torch.stack([part.sum() for part in parts]).sum() / max(count, 1)


class ChannelModulation(nn.Module):
    """y = 2 sigmoid(gate(x)) x with one gate for each position and each group of channels: (N, C, H, W) to the same.

    Not in the paper: its offsets move positions, this weights channels, by a parallel branch in the same manner. A new
    module is the identity.

    Args:
        channels: C.
        groups: groups of channels that share a gate.
        kernel_size: odd side of the window that a gate sees.

    Raises:
        ValueError: ``groups`` that do not divide C, or an even window.
    """

    def __init__(self, channels: int, *, groups: int = 8, kernel_size: int = 3) -> None:
        super().__init__()
        if min(channels, groups, kernel_size) < 1 or channels % groups or kernel_size % 2 == 0:
            raise ValueError(
                f"groups must divide channels and kernel_size be odd, got {groups}, {channels} and {kernel_size}"
            )
        self.channels, self.groups = channels, groups
        self.gate = nn.Conv2d(channels, groups, kernel_size, padding=kernel_size // 2)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)  # type: ignore[arg-type]

    def gates(self, x: Tensor) -> Tensor:
        """(N, groups, H, W), each in (0, 2)."""
        return 2 * self.gate(x).sigmoid()

    def penalty(self, x: Tensor) -> Tensor:
        """Total variation of the gates, a scalar: what keeps them spatially continuous."""
        return total_variation(self.gates(x))

    def forward(self, x: Tensor) -> Tensor:
        return (x.unflatten(1, (self.groups, -1)) * self.gates(x).unsqueeze(2)).flatten(1, 2)  # (N, C, H, W)
