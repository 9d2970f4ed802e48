"""Feature adaption: a 3x3 convolution whose taps the predicted shape moves; everywhere, or at chosen positions."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.methods.blocks.deformable_conv import deform_conv
from torchive.ops.sampling import corners, rows_of, weighted_rows

Source = Literal["shape", "features", "none"]
SOURCES = ("shape", "features", "none")


class FeatureAdaption(nn.Module):
    """Features (N, C, H, W) and shapes (N, 2, H, W) to features (N, C', H, W), ReLU at the end.

    The offsets of the 3x3 convolution's taps are a 1x1 convolution, without bias, of the shapes, through which no
    gradient passes. Zero offsets make it an ordinary convolution.

    Args:
        in_channels, out_channels: C and C'.
        offset_groups: groups of channels whose taps move together.
        adaption: what the offsets are made from: the "shape", the "features", or "none", an ordinary convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, offset_groups: int = 4, adaption: Source = "shape"
    ) -> None:
        super().__init__()
        if adaption not in SOURCES:
            raise ValueError(f"adaption must be one of {', '.join(SOURCES)}, got {adaption!r}")
        if in_channels % offset_groups:
            raise ValueError(f"{offset_groups} offset_groups do not divide {in_channels} channels")
        self.groups, self.adaption = offset_groups, adaption
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        nn.init.normal_(self.weight, std=0.01)
        self.offset: nn.Conv2d | None = None
        if adaption != "none":
            source = 2 if adaption == "shape" else in_channels
            self.offset = nn.Conv2d(source, 18 * offset_groups, 1, bias=False)
            if adaption == "shape":
                nn.init.normal_(self.offset.weight, std=0.1)
            else:
                nn.init.zeros_(self.offset.weight)

    def forward(self, x: Tensor, shapes: Tensor, turns: Tensor | None = None) -> Tensor:
        """With ``turns`` (N, 2, H, W), cosine and sine of an angle, the window is turned by it."""
        offset = self.offsets(x, shapes)
        if offset is None and turns is None:
            return F.conv2d(x, self.weight, padding=1).relu()
        if offset is None:
            offset = x.new_zeros(x.shape[0], 18 * self.groups, *x.shape[2:])
        if turns is not None:
            rows = turned_offsets(offset.permute(0, 2, 3, 1), turns.permute(0, 2, 3, 1))
            offset = rows.permute(0, 3, 1, 2)
        return deform_conv(x, offset, self.weight, padding=(1, 1)).relu()

    def offsets(self, x: Tensor, shapes: Tensor) -> Tensor | None:
        """(N, 18 G, H, W), rows and columns in cells for each tap of each group."""
        if self.offset is None:
            return None
        return self.offset(shapes.detach() if self.adaption == "shape" else x)

    def at(self, x: Tensor, shapes: Tensor, place: Tensor, turns: Tensor | None = None) -> Tensor:
        """The same at R positions ``place`` (R, 3), image, row and column, alone: (R, C')."""
        channels, height, width = x.shape[1:]
        image, row, column = place.unbind(1)
        kind = torch.promote_types(x.dtype, torch.float32)
        offset = x.new_zeros(len(place), 18 * self.groups)
        if self.offset is not None:
            source = shapes.detach() if self.adaption == "shape" else x
            offset = F.linear(source[image, :, row, column], self.offset.weight[:, :, 0, 0])
        if turns is not None:
            offset = turned_offsets(offset, turns[image, :, row, column])
        moved = offset.to(kind).unflatten(1, (self.groups, 9, 2)).transpose(1, 2)  # (R, 9, G, 2)
        start = torch.stack([row, column], 1)[:, None, None] + _taps(moved)[:, None]
        at = moved + start
        index, share = corners(at[..., 0], at[..., 1], height, width)  # (R, 9, G, 4)
        index = index + (image * (height * width)).to(index.dtype)[:, None, None, None]
        if self.groups > 1:
            index = index * self.groups + torch.arange(self.groups, device=x.device, dtype=index.dtype)[:, None]
        rows = weighted_rows(rows_of(x.to(kind), self.groups), index.flatten(0, 2), share.flatten(0, 2))
        columns = rows.reshape(len(place), 9 * channels).to(x.dtype)
        return F.linear(columns, self.weight.permute(0, 2, 3, 1).flatten(1)).relu()


def turned_offsets(offset: Tensor, turns: Tensor) -> Tensor:
    """Offsets (..., 18 G) of a 3x3 window whose moved taps are turned by the angle of ``turns`` (..., 2)."""
    moved = offset.unflatten(-1, (-1, 9, 2))
    taps = _taps(moved)
    y, x = (moved + taps).unbind(-1)
    cosine, sine = (part[..., None, None].to(offset.dtype) for part in turns.unbind(-1))
    turned = torch.stack([y * cosine + x * sine, x * cosine - y * sine], -1)
    return (turned - taps).flatten(-3)


def _taps(like: Tensor) -> Tensor:
    """Rows and columns (9, 2) of a 3x3 window's taps from its middle."""
    side = torch.arange(-1, 2, device=like.device, dtype=like.dtype)
    return torch.stack([side[:, None].expand(3, 3), side.expand(3, 3)], -1).reshape(9, 2)
