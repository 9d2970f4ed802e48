"""Feature pyramid attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from torchive.nn.fcn import Norm, conv_norm_act


class FeaturePyramidAttention(nn.Module):
    """Map (N, C, H, W) to (N, out_channels, H, W): each position weighed by a pyramid of ever coarser context.

    Where the pyramid gives one everywhere, this is a 1x1 convolution plus a global context. In training batch norm
    needs a batch of two or more, since the global branch and small pyramids have one position; ``norm`` takes another.

    Args:
        in_channels: C.
        out_channels: channels of the result.
        pyramid_channels: channels of the attention: 1 for one map for all channels, or ``out_channels``.
        kernels: sides of the windows, finest level first; odd numbers. Each level halves the size.
        pool: how a level halves: "max", "average", or "stride", its first convolution's stride.
        global_branch: whether the global context is added.
        norm: normalisation after each convolution: a function of the number of channels.
        align_corners: how linear resizing treats the borders.

    Raises:
        ValueError: a number of channels below one, ``pyramid_channels`` neither 1 nor ``out_channels``, an even or no
            kernel, or an unknown ``pool``; in ``forward``, an input with other channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        pyramid_channels: int = 1,
        kernels: Sequence[int] = (7, 5, 3),
        pool: Literal["max", "average", "stride"] = "max",
        global_branch: bool = True,
        norm: Norm = nn.BatchNorm2d,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels) < 1 or pyramid_channels not in (1, out_channels):
            raise ValueError(
                f"expected channels >= 1 and pyramid_channels 1 or {out_channels}, got in_channels={in_channels}, "
                f"out_channels={out_channels} and pyramid_channels={pyramid_channels}"
            )
        if not kernels or any(k < 1 or k % 2 == 0 for k in kernels):
            raise ValueError(f"kernels must be odd numbers, got {tuple(kernels)}")
        if pool not in ("max", "average", "stride"):
            raise ValueError(f"pool must be max, average or stride, got {pool!r}")
        self.in_channels, self.align_corners = in_channels, align_corners
        self.master = conv_norm_act(in_channels, out_channels, 1, norm)
        self.context = conv_norm_act(in_channels, out_channels, 1, norm) if global_branch else None
        self.down, self.across = nn.ModuleList(), nn.ModuleList()
        for level, k in enumerate(kernels):
            before = pyramid_channels if level else in_channels
            halve: dict[str, nn.Module] = {
                "max": nn.MaxPool2d(2, ceil_mode=True),
                "average": nn.AvgPool2d(2, ceil_mode=True),
                "stride": nn.Identity(),
            }
            conv = conv_norm_act(before, pyramid_channels, k, norm, stride=2 if pool == "stride" else 1)
            self.down.append(nn.Sequential(halve[pool], conv))
            self.across.append(conv_norm_act(pyramid_channels, pyramid_channels, k, norm))

    @classmethod
    def from_channels(cls, channels: int, **options: Any) -> FeaturePyramidAttention:
        """The block for C channels, to be put behind another part; it changes what passes from the start."""
        return cls(channels, channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        self._checked(x)
        # first, so that its gradient, which is not channels-last, is added last
        context = None if self.context is None else self.context(x.mean((2, 3), keepdim=True))
        y = self.master(x) * self._pyramid(x)  # (N, out, H, W)
        return y if context is None else y + context

    def attention(self, x: Tensor) -> Tensor:
        """a: (N, C, H, W) to (N, pyramid_channels, H, W), zero or more."""
        return self._pyramid(self._checked(x))

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected (N, {self.in_channels}, H, W), got shape {tuple(x.shape)}")
        return x

    def _pyramid(self, x: Tensor) -> Tensor:
        maps = [x]
        for down in self.down:
            maps.append(down(maps[-1]))
        y: Tensor | None = None
        for level in range(len(self.across), 0, -1):
            here = self.across[level - 1](maps[level])
            y = F.interpolate(
                here if y is None else here + y,
                size=maps[level - 1].shape[2:],
                mode="bilinear",
                align_corners=self.align_corners,
            )
        assert y is not None
        return y
