"""Blocks of depthwise and pointwise convolutions, and the two networks that are made of them."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from torchive.protocols import Level

Norm = Callable[[int], nn.Module]

#: Blocks of each network: single or double, channels, stride.
LAYOUTS: dict[str, tuple[tuple[str, int, int], ...]] = {
    "paper": (
        *(("single", channels, stride) for channels, stride in ((24, 1), (24, 1), (48, 2), (48, 1), (48, 1))),
        *(("double", 96, stride) for stride in (2, 1, 1, 2, 1, 1)),
    ),
    "short_range": (
        *(("single", channels, stride) for channels, stride in ((24, 1), (28, 1), (32, 2), (36, 1), (42, 1))),
        *(("single", channels, stride) for channels, stride in ((48, 2), (56, 1), (64, 1), (72, 1), (80, 1), (88, 1))),
        *(("single", 96, stride) for stride in (2, 1, 1, 1, 1)),
    ),
}


class EndPadded(nn.Conv2d):
    """Convolution of stride two that pads even sides as TensorFlow does: (N, C, H, W) to (N, C', ceil(H / 2),
    ceil(W / 2)).

    An even side has k - 2 zeros, one more at its end than at its start. An odd one starts as an even one, so that a
    graph needs no look at its size; TensorFlow would put one zero more there and one less at its end.
    """

    def forward(self, x: Tensor) -> Tensor:
        start = max((self.kernel_size[0] - 2) // 2, 0)
        end = self.kernel_size[0] - 1 - start  # the last one is for odd sides
        return super().forward(F.pad(x, (start, end, start, end)))


def convolution(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, groups: int = 1, norm: Norm | None = None
) -> nn.Sequential:
    """Convolution that keeps or halves the size, then ``norm``; a bias where there is none."""
    if stride == 2:
        conv: nn.Conv2d = EndPadded(in_channels, out_channels, kernel_size, 2, groups=groups, bias=norm is None)
    else:
        pad = kernel_size // 2
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=pad, groups=groups, bias=norm is None)
    return nn.Sequential(conv, norm(out_channels)) if norm is not None else nn.Sequential(conv)


def separable(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, norm: Norm | None = None
) -> nn.Sequential:
    """Depthwise convolution, then a pointwise one."""
    return nn.Sequential(
        convolution(in_channels, in_channels, kernel_size, stride=stride, groups=in_channels, norm=norm),
        convolution(in_channels, out_channels, 1, norm=norm),
    )


class BlazeBlock(nn.Module):
    """ReLU of a separable convolution plus the input: (N, C, H, W) to (N, C', H, W), or to half the size, rounded up.

    With convolutions of zeros it is the ReLU of the input, pooled where the stride is two, with channels of zeros.

    Args:
        in_channels: C.
        out_channels: C', at least C.
        kernel_size: of the depthwise convolution, odd.
        stride: 1 or 2.
        norm: after each convolution; None for biases instead, as in the released weights.

    Raises:
        ValueError: fewer channels out than in, an even kernel, or another stride.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 5,
        stride: int = 1,
        norm: Norm | None = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        _check(in_channels, out_channels, kernel_size, stride)
        self.stride, self.extra = stride, out_channels - in_channels
        self.body = separable(in_channels, out_channels, kernel_size, stride=stride, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + shortcut(x, self.stride, self.extra))


class DoubleBlazeBlock(nn.Module):
    """Two separable convolutions with few channels between them, plus the input: shapes as of ``BlazeBlock``.

    Args:
        in_channels: C.
        out_channels: C', at least C.
        inter_channels: channels in the middle.
        kernel_size: of both depthwise convolutions, odd.
        stride: of the first one, 1 or 2.
        norm: as of ``BlazeBlock``.

    Raises:
        ValueError: as ``BlazeBlock``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        inter_channels: int = 24,
        kernel_size: int = 5,
        stride: int = 1,
        norm: Norm | None = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        _check(in_channels, out_channels, kernel_size, stride)
        self.stride, self.extra = stride, out_channels - in_channels
        self.squeeze = separable(in_channels, inter_channels, kernel_size, stride=stride, norm=norm)
        self.expand = separable(inter_channels, out_channels, kernel_size, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.expand(F.relu(self.squeeze(x))) + shortcut(x, self.stride, self.extra))


def shortcut(x: Tensor, stride: int, extra: int) -> Tensor:
    """The input, pooled over 2 x 2 where the stride is two, and ``extra`` channels of zeros behind its own."""
    if stride == 2:
        x = F.max_pool2d(x, 2, ceil_mode=True)
    return F.pad(x, (0, 0, 0, 0, 0, extra)) if extra else x


class BlazeNet(nn.Module):
    """A convolution of stride two and blocks: (N, C, H, W) to the maps of stride 8 and 16.

    Args:
        variant: "paper", single and double blocks; or "short_range", the released model's single ones.
        in_channels: C.
        kernel_size: of the depthwise convolutions; 5 for the paper's network, 3 for the other one if None.
        norm: as of ``BlazeBlock``.

    Raises:
        ValueError: another variant, or an even kernel.
    """

    def __init__(
        self,
        variant: str = "paper",
        *,
        in_channels: int = 3,
        kernel_size: int | None = None,
        norm: Norm | None = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if variant not in LAYOUTS:
            raise ValueError(f"variant must be one of {', '.join(LAYOUTS)}, got {variant!r}")
        side = kernel_size if kernel_size is not None else 5 if variant == "paper" else 3
        self.stem = convolution(in_channels, 24, 5, stride=2, norm=norm)
        self.blocks = nn.ModuleList()
        width, step = 24, 2
        ends: dict[int, tuple[int, Level]] = {}
        for number, (kind, channels, stride) in enumerate(LAYOUTS[variant]):
            block = BlazeBlock if kind == "single" else DoubleBlazeBlock
            self.blocks.append(block(width, channels, kernel_size=side, stride=stride, norm=norm))
            width, step = channels, step * stride
            ends[step] = (number, Level(channels, step))
        self.ends = tuple(number for number, _ in ends.values())[-2:]
        self.levels = tuple(level for _, level in ends.values())[-2:]

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = F.relu(self.stem(x)), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.ends:
                maps.append(x)
        return maps


def _check(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
    if not 1 <= in_channels <= out_channels:
        raise ValueError(f"a block has at least as many channels out as in, got {in_channels} and {out_channels}")
    if kernel_size < 1 or kernel_size % 2 == 0 or stride not in (1, 2):
        raise ValueError(f"expected an odd kernel_size and stride 1 or 2, got {kernel_size} and {stride}")
