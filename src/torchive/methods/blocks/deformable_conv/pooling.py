"""Pooling of regions whose bins are moved: the plain form for features, the position-sensitive form for score maps."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from torchive.ops.sampling import corners, rows_of, weighted_rows

Points = Literal["centres", "release"]


def deformable_roi_pool(
    x: Tensor,
    boxes: Tensor,
    offset: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    size: int = 7,
    scale: float = 1 / 16,
    position_sensitive: bool = False,
    samples: int = 4,
    gamma: float = 0.1,
    points: Points = "centres",
) -> Tensor:
    """y(i, j) = mean over the bin of x(p0 + p + dp_ij), dp_ij = gamma dp^_ij (w, h): (R, C, size, size), eq. 5 and 6.

    Args:
        x: (N, C, H, W); with ``position_sensitive`` (N, C size size, H, W), the maps of a channel side by side, and bin
            (i, j) reads the map i size + j.
        boxes: (R, 5), index of the image and x1, y1, x2, y2 in pixels.
        offset: dp^, (R, 2 K, size, size) as shares of the box's width and height, (dx, dy) for each of K groups of
            channels (classes); None does not move.
        mask: (R, K, size, size) factors of the bins, version 2.
        scale: cells for each pixel.
        samples: points along each side of a bin that stand for its area.
        gamma: factor of the offsets.
        points: "centres" takes the middles of the parts of a bin, as ``torchvision.ops.roi_align(aligned=True)``;
            "release" takes their corners, of boxes rounded to pixels, and averages those inside the map.

    Raises:
        ValueError: channels that do not divide, or offsets of another shape.
    """
    channels = x.shape[1] // size**2 if position_sensitive else x.shape[1]
    groups = 1 if offset is None else offset.shape[1] // 2
    wanted = (len(boxes), 2 * groups, size, size)
    if offset is not None and tuple(offset.shape) != wanted:
        raise ValueError(f"expected offsets {wanted}, got {tuple(offset.shape)}")
    if channels * (size**2 if position_sensitive else 1) != x.shape[1] or channels % groups:
        raise ValueError(f"{x.shape[1]} channels do not divide into {groups} groups of bins {size} x {size}")
    kind = torch.promote_types(x.dtype, torch.float32)
    image, boxes = boxes[:, 0].int(), boxes[:, 1:].to(kind)
    start, side = _extent(boxes, scale, points)  # (R, 2) each, x and y
    bins = torch.arange(size, device=x.device, dtype=kind)
    parts = torch.arange(samples, device=x.device, dtype=kind) + (0.5 if points == "centres" else 0.0)
    inner = (bins[:, None] + parts / samples) / size  # (size, samples) as shares of the side
    at = start[:, :, None, None] + inner * side[:, :, None, None]  # (R, 2, size, samples)
    at_x = at[:, 0, None, None, :, None, :]  # (R, K, row, column, sample row, sample column)
    at_y = at[:, 1, None, :, None, :, None]
    if offset is not None:
        moved = offset.to(kind).unflatten(1, (groups, 2)) * gamma * side[:, None, :, None, None]
        at_x = at_x + moved[:, :, 0, :, :, None, None]
        at_y = at_y + moved[:, :, 1, :, :, None, None]
    at_x, at_y = torch.broadcast_tensors(at_x, at_y)
    index, share = _points(at_y, at_x, x.shape[2:], points)  # type: ignore[arg-type]  # (R, K, size, size, points)
    if mask is not None:
        share = share * mask.to(kind).unsqueeze(-1)
    rows, index = _rows(x.to(kind), image, index, channels, size if position_sensitive else 0)
    pooled = weighted_rows(rows, index.flatten(0, 3), share.flatten(0, 3))  # (R K size size, C / K)
    pooled = pooled.reshape(len(boxes), groups, size, size, channels // groups)
    return pooled.permute(0, 1, 4, 2, 3).flatten(1, 2).to(x.dtype)  # (R, C, size, size)


def _extent(boxes: Tensor, scale: float, points: Points) -> tuple[Tensor, Tensor]:
    """First corner and sides, (R, 2) each, in cells."""
    if points == "centres":
        first, last = boxes[:, :2] * scale - 0.5, boxes[:, 2:] * scale - 0.5
        return first, last - first
    rounded = boxes.sign() * (boxes.abs() + 0.5).floor()  # halves away from zero
    first, last = rounded[:, :2] * scale - 0.5, (rounded[:, 2:] + 1) * scale - 0.5
    return first, (last - first).clamp(min=0.1)


def _points(y: Tensor, x: Tensor, size: tuple[int, int], points: Points) -> tuple[Tensor, Tensor]:
    """Cells and weights of the mean over the last two axes, (..., samples^2 4); beside the map its edge counts."""
    height, width = size
    border = 1.0 if points == "centres" else 0.5
    inside = (y >= -border) & (y <= height - 1 + border) & (x >= -border) & (x <= width - 1 + border)
    index, share = corners(y.clamp(0, height - 1), x.clamp(0, width - 1), height, width)
    count = inside.sum((-2, -1), keepdim=True).clamp(min=1) if points == "release" else y.shape[-1] ** 2
    share = share * (inside / count).unsqueeze(-1)
    return index.flatten(-3), share.flatten(-3)


def _rows(x: Tensor, image: Tensor, index: Tensor, channels: int, size: int) -> tuple[Tensor, Tensor]:
    """The map as rows, and the index (R, K, row, column, points) of a cell as that of its row."""
    groups, cells = index.shape[1], x.shape[2] * x.shape[3]
    group = torch.arange(groups, device=x.device, dtype=index.dtype).view(-1, 1, 1, 1)
    index = index + (image * cells).view(-1, 1, 1, 1, 1)
    if not size:
        return rows_of(x, groups), index * groups + group
    maps = x.unflatten(1, (groups, channels // groups, size**2)).permute(0, 4, 5, 3, 1, 2)  # (N, H, W, bin, K, C / K)
    place = torch.arange(size**2, device=x.device, dtype=index.dtype).view(size, size, 1)
    return maps.reshape(-1, channels // groups), (index * size**2 + place) * groups + group


class DeformableRoIPool(nn.Module):
    """Pool boxes, let a linear layer say how far each bin moves, and pool again: (R, C, size, size).

    A new layer is plain pooling: the offsets start at zero, and the mask at 1/2.

    Args:
        channels: C.
        size: bins along each side.
        scale: cells for each pixel.
        samples, gamma, points: as of ``deformable_roi_pool``.
        modulated: version 2: each bin is also weighted by a sigmoid.
        rate: multiple of the learning rate for the linear layer (``parameter_rules``).

    Raises:
        ValueError: sizes below one, or an unknown ``points``.
    """

    def __init__(
        self,
        channels: int,
        *,
        size: int = 7,
        scale: float = 1 / 16,
        samples: int = 4,
        gamma: float = 0.1,
        points: Points = "centres",
        modulated: bool = False,
        rate: float = 0.01,
    ) -> None:
        super().__init__()
        _check(channels, size, samples, points)
        self.channels, self.size, self.scale, self.samples = channels, size, scale, samples
        self.gamma, self.points, self.modulated, self.rate = gamma, points, modulated, rate
        self.offset = nn.Linear(channels * size**2, (3 if modulated else 2) * size**2)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        """Map (N, C, H, W) and boxes (R, 5), image and x1, y1, x2, y2 in pixels, to (R, C, size, size)."""
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"expected (N, {self.channels}, H, W), got shape {tuple(x.shape)}")
        options = {"size": self.size, "scale": self.scale, "samples": self.samples, "points": self.points}
        plain = deformable_roi_pool(x, boxes, **options)  # type: ignore[arg-type]
        found = self.offset(plain.flatten(1)).unflatten(1, (-1, self.size, self.size))  # (R, 2 or 3, size, size)
        mask = found[:, 2:].sigmoid() if self.modulated else None
        return deformable_roi_pool(x, boxes, found[:, :2], mask, gamma=self.gamma, **options)  # type: ignore[arg-type]

    def parameter_rules(self) -> dict[str, dict[str, float]]:
        """The learning rate of the linear layer."""
        return {"offset.weight": {"lr": self.rate}, "offset.bias": {"lr": self.rate}}


class DeformablePSRoIPool(nn.Module):
    """Position-sensitive scores of boxes, each bin of each class moved by offsets that a convolution gives.

    Score and offset maps are made from the same features; both are pooled position-sensitively, the offsets without
    being moved. A new layer is plain position-sensitive pooling.

    Args:
        in_channels: of the features.
        out_channels: scores of a bin: the classes and the background, or box codes.
        offset_groups: K groups of scores that move together; None is one for each, 1 suits box codes.
        size, scale, samples, gamma, points: as of ``DeformableRoIPool``.

    Raises:
        ValueError: sizes below one, groups that do not divide the scores, or an unknown ``points``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        offset_groups: int | None = None,
        size: int = 7,
        scale: float = 1 / 16,
        samples: int = 4,
        gamma: float = 0.1,
        points: Points = "centres",
    ) -> None:
        super().__init__()
        groups = out_channels if offset_groups is None else offset_groups
        _check(min(in_channels, out_channels, groups), size, samples, points)
        if out_channels % groups:
            raise ValueError(f"{groups} offset_groups do not divide {out_channels} out_channels")
        self.in_channels, self.size, self.scale, self.samples = in_channels, size, scale, samples
        self.gamma, self.points = gamma, points
        self.score = nn.Conv2d(in_channels, out_channels * size**2, 1)
        self.offset = nn.Conv2d(in_channels, 2 * groups * size**2, 1)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        """(N, C, H, W) and boxes (R, 5), image and x1, y1, x2, y2 in pixels, to (R, out_channels, size, size)."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected (N, {self.in_channels}, H, W), got shape {tuple(x.shape)}")
        options = {"size": self.size, "scale": self.scale, "samples": self.samples, "points": self.points}
        moved = deformable_roi_pool(self.offset(x), boxes, position_sensitive=True, **options)  # type: ignore[arg-type]
        return deformable_roi_pool(
            self.score(x),
            boxes,
            moved,
            position_sensitive=True,
            gamma=self.gamma,
            **options,  # type: ignore[arg-type]
        )


def _check(channels: int, size: int, samples: int, points: str) -> None:
    if min(channels, size, samples) < 1:
        raise ValueError(f"channels, size and samples must be >= 1, got {channels}, {size} and {samples}")
    if points not in ("centres", "release"):
        raise ValueError(f"points must be centres or release, got {points!r}")
