"""The thirteen operations of the search space, with the padding of the release.

Strided windows are padded as TensorFlow's "SAME" does: (k - 1) // 2 zeros before and after a side of odd length, one
less before a side of even length. Means leave the padding out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-3


def pad_same(x: Tensor, kernel_size: int | tuple[int, int], value: float = 0.0) -> Tensor:
    """The map with the border that a window of stride 2 needs; (N, C, H, W) to (N, C, H + ..., W + ...)."""
    tall, wide = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    height, width = x.shape[-2:]
    left, right = _border(width, wide)
    top, bottom = _border(height, tall)
    return F.pad(x, (left, right, top, bottom), value=value)


def _border(side: int, window: int) -> tuple[int, int]:
    if window == 1:
        return 0, 0
    after = (window - 1) // 2
    # the last one behind an even side is never reached; with it all sizes are (side - 1) // 2 + 1, also symbolically
    return after - 1 + side % 2, after + 1 - side % 2


class SameConv(nn.Conv2d):
    """A convolution without bias whose output has ceil(side / stride) cells a side; an axis of one tap has no stride.

    The exception is a kernel of 1x1, which takes every ``stride``-th cell.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        tall, wide = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        steps = (stride, stride) if tall == wide else (stride if tall > 1 else 1, stride if wide > 1 else 1)
        self.window = (dilation * (tall - 1) + 1, dilation * (wide - 1) + 1)
        border = (self.window[0] // 2, self.window[1] // 2) if stride == 1 else (0, 0)
        super().__init__(
            in_channels, out_channels, (tall, wide), steps, border, dilation=dilation, groups=groups, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        if max(self.stride) == 1 or max(self.window) == 1:
            return super().forward(x)
        return super().forward(pad_same(x, self.window))


class MaxPool(nn.Module):
    """Largest value of a window: (N, C, H, W) to (N, C, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return F.max_pool2d(x, self.kernel_size, 1, self.kernel_size // 2)
        return F.max_pool2d(pad_same(x, self.kernel_size, float("-inf")), self.kernel_size, 2)


class MeanPool(nn.Module):
    """Mean of a 3x3 window without its padding: (N, C, H, W) to (N, C, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        inside = pad_same(torch.ones_like(x[:1, :1]), 3)
        return F.avg_pool2d(pad_same(x, 3), 3, 2) / F.avg_pool2d(inside, 3, 2)


def norm(channels: int) -> nn.BatchNorm2d:
    """The batch norm of all parts."""
    return nn.BatchNorm2d(channels, eps=EPS)


def relu_conv(in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1) -> nn.Sequential:
    """ReLU, convolution, batch norm."""
    conv = SameConv(in_channels, out_channels, kernel_size, stride=stride)
    return nn.Sequential(nn.ReLU(), conv, norm(out_channels))


def _separable(in_channels: int, channels: int, side: int, stride: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, step in ((in_channels, stride), (channels, 1)):  # the whole sequence twice
        layers += [
            nn.ReLU(),
            SameConv(before, before, side, stride=step, groups=before),
            SameConv(before, channels, 1),
            norm(channels),
        ]
    return nn.Sequential(*layers)


def _line(in_channels: int, channels: int, side: int, stride: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, kernel in ((in_channels, (1, side)), (channels, (side, 1))):
        layers += [nn.ReLU(), SameConv(before, channels, kernel, stride=stride), norm(channels)]
    return nn.Sequential(*layers)


def _dilated(in_channels: int, channels: int, side: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(), SameConv(in_channels, channels, side, stride=stride, dilation=2), norm(channels))


def _pooled(pool: nn.Module, in_channels: int, channels: int) -> nn.Module:
    if in_channels == channels:
        return pool
    return nn.Sequential(pool, SameConv(in_channels, channels, 1), norm(channels))


def _max(in_channels: int, channels: int, side: int, stride: int) -> nn.Module:
    return _pooled(MaxPool(side, stride), in_channels, channels)


def _mean(in_channels: int, channels: int, side: int, stride: int) -> nn.Module:
    return _pooled(MeanPool(stride), in_channels, channels)


def _identity(in_channels: int, channels: int, side: int, stride: int) -> nn.Module:
    same = in_channels == channels and stride == 1
    return nn.Identity() if same else relu_conv(in_channels, channels, side, stride)


#: name -> builder and side of the window.
OPERATIONS: dict[str, tuple[Callable[[int, int, int, int], nn.Module], int]] = {
    "identity": (_identity, 1),
    "line_3": (_line, 3),
    "line_7": (_line, 7),
    "dilated_3x3": (_dilated, 3),
    "average_3x3": (_mean, 3),
    "max_3x3": (_max, 3),
    "max_5x5": (_max, 5),
    "max_7x7": (_max, 7),
    "convolution_1x1": (relu_conv, 1),
    "convolution_3x3": (relu_conv, 3),
    "separable_3x3": (_separable, 3),
    "separable_5x5": (_separable, 5),
    "separable_7x7": (_separable, 7),
}


def build_operation(name: str, in_channels: int, channels: int, *, stride: int = 1) -> nn.Module:
    """The operation of a name: (N, C, H, W) to (N, F, ceil(H / stride), ceil(W / stride))."""
    build, side = OPERATIONS[name]
    return build(in_channels, channels, side, stride)
