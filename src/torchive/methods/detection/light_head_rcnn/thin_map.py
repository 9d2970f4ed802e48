"""Convolutions with a large window, made of two thin ones."""

from __future__ import annotations

from torch import Tensor, nn


class LargeSeparableConv(nn.Module):
    """(N, C, H, W) to (N, C', H, W) with a window of k x k: k x 1 then 1 x k, and 1 x k then k x 1, summed.

    Args:
        in_channels: C.
        out_channels: C'.
        inter_channels: between the two convolutions of a path; 256, or 64 in the paper's small form.
        kernel_size: k, odd.

    Raises:
        ValueError: an even ``kernel_size``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, inter_channels: int = 256, kernel_size: int = 15
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        column = {"kernel_size": (kernel_size, 1), "padding": (kernel_size // 2, 0)}
        row = {"kernel_size": (1, kernel_size), "padding": (0, kernel_size // 2)}
        self.column_first = nn.Sequential(
            nn.Conv2d(in_channels, inter_channels, **column),  # type: ignore[arg-type]
            nn.Conv2d(inter_channels, out_channels, **row),  # type: ignore[arg-type]
        )
        self.row_first = nn.Sequential(
            nn.Conv2d(in_channels, inter_channels, **row),  # type: ignore[arg-type]
            nn.Conv2d(inter_channels, out_channels, **column),  # type: ignore[arg-type]
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return self.column_first(x) + self.row_first(x)
