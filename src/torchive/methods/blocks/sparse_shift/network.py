"""FE-Net: inverted bottlenecks around a shift, in blocks that let a part of the channels pass."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchive.methods.blocks.sparse_shift.shift import SparseShift

Mixing = Literal["sparse", "active", "grouped", "depthwise"]
Downsampling = Literal["pool", "shift"]


def mixer(mixing: Mixing, channels: int, stride: int = 1, **options: Any) -> nn.Module:
    """What mixes positions in a unit: a shift, or for comparison a depthwise convolution.

    Raises:
        ValueError: an unknown name.
    """
    if mixing == "depthwise":
        return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    if mixing not in ("sparse", "active", "grouped"):
        raise ValueError(f"mixing must be sparse, active, grouped or depthwise, got {mixing!r}")
    return SparseShift(channels, variant=mixing, stride=stride, **({} if mixing == "grouped" else options))


class ShiftUnit(nn.Module):
    """IB-SSL and IB-Pool, (N, C_in, H, W) to (N, C_out, H', W'): 1x1, norm, ReLU, shift or pool, 1x1, norm.

    Args:
        in_channels, out_channels: C_in and C_out.
        expansion: channels between, as a multiple of C_out or C_in.
        expanded: "output" as in the release, or "input", which gives the paper's costs.
        residual: whether the input is added.
        downsampling: None keeps the sides; "pool" averages windows of 2x2, "shift" reads every second position.
        mixing: "sparse", "active", "grouped", or "depthwise" for a 3x3 convolution.
        options: further arguments of ``SparseShift``.

    Raises:
        ValueError: a residual that changes the channels or sides, or an unknown ``mixing`` or ``downsampling``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int = 6,
        expanded: Literal["output", "input"] = "output",
        residual: bool = False,
        downsampling: Downsampling | None = None,
        mixing: Mixing = "sparse",
        **options: Any,
    ) -> None:
        super().__init__()
        if residual and (in_channels != out_channels or downsampling):
            raise ValueError(f"a residual needs equal ends, got {in_channels} and {out_channels} and {downsampling!r}")
        if downsampling not in (None, "pool", "shift"):
            raise ValueError(f"downsampling must be None, pool or shift, got {downsampling!r}")
        if expanded not in ("output", "input"):
            raise ValueError(f"expanded must be output or input, got {expanded!r}")
        middle = expansion * (out_channels if expanded == "output" else in_channels)
        self.residual = residual
        self.expand = nn.Conv2d(in_channels, middle, 1, bias=False)
        self.expand_norm = nn.BatchNorm2d(middle)
        stride = 2 if downsampling == "shift" else 1
        self.mix = nn.AvgPool2d(2) if downsampling == "pool" else mixer(mixing, middle, stride, **options)
        self.project = nn.Conv2d(middle, out_channels, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.expand_norm(self.expand(x)))  # (N, e C_out, H, W)
        y = self.project_norm(self.project(self.mix(y)))  # (N, C_out, H', W')
        return x + y if self.residual else y


class FEBlock(nn.Module):
    """The fully exploited block, (N, C_in, H, W) to (N, C_out, H', W'): each unit works on twice the channels.

    Args:
        in_channels, out_channels: C_in and C_out.
        units: 3 or 4; the first works on 1/4 or 1/8 of the channels.
        downsampling: of the last unit, which has no residual.
        options: further arguments of ``ShiftUnit``.

    Raises:
        ValueError: channels that do not divide.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        units: int = 4,
        downsampling: Downsampling | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        parts = 2 ** (units - 1)
        if units < 2 or in_channels % parts:
            raise ValueError(f"{units} units need a multiple of {parts} channels, got {in_channels}")
        self.group = in_channels // parts
        widths = [self.group * 2**i for i in range(units - 1)]
        self.units = nn.ModuleList(ShiftUnit(width, width, residual=True, **options) for width in widths)
        self.last = ShiftUnit(in_channels, out_channels, downsampling=downsampling, **options)

    def forward(self, x: Tensor) -> Tensor:
        at = x.shape[1] - self.group
        y = x[:, at:]  # the last channels go through all units
        for unit in self.units:
            width = y.shape[1]
            y = torch.cat([x[:, at - width : at], unit(y)], 1)
            at -= width
        return self.last(y)


class FENet(nn.Module):
    """FE-Net, images (N, C, H, W) of 32 pixels or more to logits (N, K).

    Args:
        num_classes: K.
        in_channels: C.
        multiplier: of the channels; 1 and 1.375 in the paper. 16 of them must be even.
        mixing, expanded: as of ``ShiftUnit``, in all units.
        downsampling: "pool" as in the paper, or "shift".
        feature_dim: channels before the mean over positions.
        drop: chance of a feature to be dropped.
        options: further arguments of ``SparseShift``.

    Raises:
        ValueError: a multiplier whose channels do not divide; in ``forward``, images that are too small.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        multiplier: float = 1.0,
        mixing: Mixing = "sparse",
        downsampling: Downsampling = "pool",
        expanded: Literal["output", "input"] = "output",
        feature_dim: int = 1932,
        drop: float = 0.2,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        c = int(16 * multiplier)
        if c < 2 or c % 2:
            raise ValueError(f"16 x multiplier must be an even number of channels, got {c} for {multiplier}")
        every: dict[str, Any] = {"mixing": mixing, "expanded": expanded, **(options or {})}
        smaller: dict[str, Any] = {"downsampling": downsampling, **every}
        self.stem = nn.Conv2d(in_channels, c, 3, 2, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(c)
        self.blocks = nn.Sequential(
            ShiftUnit(c, c, expansion=4, **every),
            ShiftUnit(c, 2 * c, expansion=5, **smaller),
            FEBlock(2 * c, 4 * c, units=3, **smaller),
            FEBlock(4 * c, 8 * c, units=4, **smaller),
            FEBlock(8 * c, 8 * c, units=4, **every),
            FEBlock(8 * c, 16 * c, units=4, **smaller),
            FEBlock(16 * c, 16 * c, units=3, **every),
        )
        self.final = nn.Conv2d(16 * c, feature_dim, 1, bias=False)
        self.final_norm = nn.BatchNorm2d(feature_dim)
        self.drop = nn.Dropout(drop)
        self.classifier = nn.Linear(feature_dim, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        if min(inputs.shape[2:]) < 32:
            raise ValueError(f"expected images of 32 pixels or more, got shape {tuple(inputs.shape)}")
        y = self.blocks(self.stem_norm(self.stem(inputs)))  # (N, 16 c, H / 32, W / 32)
        y = F.relu(self.final_norm(self.final(y)))
        return self.classifier(self.drop(y.mean((2, 3))))  # (N, K)
