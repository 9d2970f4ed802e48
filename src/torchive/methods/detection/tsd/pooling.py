"""Features of regions whose bins, or who as a whole, were moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from torchive.methods.blocks.deformable_conv import deformable_roi_pool
from torchive.ops.roi import pool_moved_regions, pool_regions, pyramid_level

Points = Literal["centres", "release"]


def pool_bins(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image: Tensor,
    shift: Tensor,
    *,
    size: int = 7,
    samples: int = 4,
    points: Points = "centres",
) -> Tensor:
    """(R, C, size, size) of boxes (R, 4), bins moved by ``shift`` (R, 2, size, size) as shares of the box's sides."""
    if points == "release":
        return _released(maps, strides, boxes, image, shift, size, samples)
    sides = (boxes[:, 2:] - boxes[:, :2])[..., None, None]
    return pool_moved_regions(maps, strides, boxes, image, shift * sides, size=size, samples=samples)


def pool_box(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image: Tensor,
    shift: Tensor,
    *,
    size: int = 7,
    samples: int = 4,
    points: Points = "centres",
) -> Tensor:
    """(R, C, size, size) of boxes (R, 4) moved as a whole by ``shift`` (R, 2) as shares of their sides.

    RoIAlign at the new place where no gradient is wanted for the shift, which torchvision's operator has none for.
    """
    if points == "release":
        return _released(maps, strides, boxes, image, shift[..., None, None].expand(-1, -1, size, size), size, samples)
    offset = shift * (boxes[:, 2:] - boxes[:, :2])
    if offset.requires_grad:
        return pool_moved_regions(maps, strides, boxes, image, offset[..., None, None], size=size, samples=samples)
    moved = boxes + offset.repeat(1, 2)
    return pool_regions(maps, strides, moved, image, size=size, sampling_ratio=samples, level_of=boxes)


def _released(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image: Tensor,
    shift: Tensor,
    size: int,
    samples: int,
) -> Tensor:
    """The release's operator, level by level; its boxes end on their last pixel."""
    level = pyramid_level(boxes, strides)
    ends = torch.cat([boxes[:, :2], boxes[:, 2:] - 1], 1)
    rois = torch.cat([image[:, None].to(boxes.dtype), ends], 1)
    pooled = maps[0].new_zeros(len(boxes), maps[0].shape[1], size, size)
    for k, (feature, stride) in enumerate(zip(maps, strides, strict=True)):
        options = {"size": size, "scale": 1 / stride, "samples": samples, "gamma": 1.0, "points": "release"}
        if torch.compiler.is_compiling():
            other = deformable_roi_pool(feature, rois, shift, **options)  # type: ignore[arg-type]
            pooled = torch.where((level == k)[:, None, None, None], other, pooled)
            continue
        rows = torch.nonzero(level == k)[:, 0]
        found = deformable_roi_pool(feature, rois[rows], shift[rows], **options)  # type: ignore[arg-type]
        pooled = pooled.index_copy(0, rows, found.to(pooled.dtype))
    return pooled
