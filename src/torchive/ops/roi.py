"""Pooling of regions from one feature map or a pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import ps_roi_align, roi_align

from torchive.ops.sampling import between, corners, rows_of, weighted_rows


def pyramid_level(boxes: Tensor, strides: Sequence[int], *, canonical_size: float = 224.0) -> Tensor:
    """Index into ``strides`` for each box (R, 4): ``floor(4 + log2(sqrt(area) / 224))``, where stride 16 is level 4.

    Lin et al., "Feature Pyramid Networks", CVPR 2017, arXiv:1612.03144, eq. 1.
    """
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    level = torch.floor(4 + torch.log2(side / canonical_size) + 1e-6)
    first = strides[0].bit_length() - 1
    last = first + len(strides) - 1
    return level.clamp(first, last).long().clamp(first, last) - first  # (R,); what is not a number is on the finest


def pool_regions(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image: Tensor,
    *,
    size: int = 7,
    sampling_ratio: int = 2,
    level_of: Tensor | None = None,
) -> Tensor:
    """RoIAlign of boxes (R, 4) in pixels of the images ``image`` (R,), each from its pyramid level: (R, C, size, size).

    torchvision's operator; on the CPU the same as sums of a map's rows, which take a fraction of its time. While
    compiling or exporting each box is pooled from each level and the right one is taken, which keeps all shapes fixed.
    ``level_of`` (R, 4) are boxes whose size chooses the level instead.
    """
    if maps[0].device.type == "cpu" and not torch.compiler.is_compiling():
        return _pool(maps, strides, boxes.detach(), image, size=size, samples=sampling_ratio, level_of=level_of)
    dtype = maps[0].dtype
    kind = torch.promote_types(dtype, torch.float32)  # half precision does not hold pixel numbers
    maps, regions = [x.to(kind) for x in maps], _operand(boxes, image).to(kind)  # (R, 5)
    if len(maps) == 1:
        return roi_align(maps[0], regions, size, 1 / strides[0], sampling_ratio).to(dtype)
    level = pyramid_level(boxes if level_of is None else level_of, strides)
    if torch.compiler.is_compiling():
        pooled = roi_align(maps[0], regions, size, 1 / strides[0], sampling_ratio)
        for k in range(1, len(maps)):
            other = roi_align(maps[k], regions, size, 1 / strides[k], sampling_ratio)
            pooled = torch.where((level == k)[:, None, None, None], other, pooled)
        return pooled.to(dtype)
    pooled = maps[0].new_zeros(len(boxes), maps[0].shape[1], size, size)
    for k, (feature, stride) in enumerate(zip(maps, strides, strict=True)):
        rows = torch.nonzero(level == k)[:, 0]
        pooled[rows] = roi_align(feature, regions[rows], size, 1 / stride, sampling_ratio)
    return pooled.to(dtype)


def pool_moved_regions(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image: Tensor,
    offsets: Tensor,
    *,
    size: int = 7,
    samples: int = 2,
) -> Tensor:
    """``pool_regions`` with each bin moved by ``offsets``, into which gradients flow: (R, C, size, size).

    Plain tensor operations, one gather for the whole pyramid; the level is that of the box as it was. Offsets of zero
    give RoIAlign with ``samples`` points along each side of a bin.

    Args:
        maps, strides: of the pyramid.
        boxes: (R, 4) in pixels of the images ``image`` (R,).
        offsets: (R, 2, size, size), or (R, 2, 1, 1) for the whole box: (dx, dy) in pixels.
        size: bins along each side.
        samples: points along each side of a bin.
    """
    return _pool(maps, strides, boxes, image, offsets, size=size, samples=samples)


def _pool(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    image: Tensor,
    offsets: Tensor | None = None,
    *,
    size: int,
    samples: int,
    level_of: Tensor | None = None,
) -> Tensor:
    kind = torch.promote_types(maps[0].dtype, torch.float32)
    images = maps[0].shape[0]
    level = torch.zeros_like(image)
    if len(maps) > 1:
        level = pyramid_level(boxes if level_of is None else level_of, strides)
    places, start = [], 0
    for x in maps:
        places.append([x.shape[2], x.shape[3], start])
        start += images * x.shape[2] * x.shape[3]
    place = torch.tensor(places, device=boxes.device, dtype=torch.int32)[level].view(-1, 3, 1, 1, 1, 1)
    height, width, first = place.unbind(1)  # (R, 1, 1, 1, 1) each
    stride = torch.tensor(strides, device=boxes.device, dtype=kind)[level][:, None]
    corner = boxes[:, :2].to(kind) / stride
    side = ((boxes[:, 2:] - boxes[:, :2]).to(kind) / stride).clamp(min=1)  # as RoIAlign's
    at_y, at_x = _grid(corner, side, size, samples)
    if offsets is not None:
        moved = offsets.to(kind) / stride[:, :, None, None]  # (R, 2, size or 1, size or 1)
        at_x, at_y = at_x + moved[:, 0, ..., None, None], at_y + moved[:, 1, ..., None, None]
    at_x, at_y = torch.broadcast_tensors(at_x, at_y)
    index, share = _bilinear(at_y, at_x, height, width)
    index = index + (first + image.view(-1, 1, 1, 1, 1) * height * width).flatten(1)[:, :, None, None]
    rows = [rows_of(x.to(kind)) for x in maps]
    table = torch.cat(rows) if len(rows) > 1 else rows[0]
    pooled = weighted_rows(table, index.flatten(0, 2), share.flatten(0, 2))  # (R size size, C)
    return pooled.view(-1, size, size, pooled.shape[1]).permute(0, 3, 1, 2).to(maps[0].dtype)


def pool_position_sensitive(
    x: Tensor, boxes: Tensor, image: Tensor, *, stride: int, size: int = 7, samples: int = 2
) -> Tensor:
    """Position-sensitive RoIAlign: bin (i, j) of channel c reads map c size^2 + i size + j; (R, C, size, size).

    torchvision's operator; while compiling or exporting the same in plain tensor operations.

    Args:
        x: (N, C size^2, H, W).
        boxes: (R, 4) in pixels of the images ``image`` (R,).
        stride: pixels of a cell.
        size: bins along each side.
        samples: points along each side of a bin.

    Raises:
        ValueError: channels that are no multiple of size^2.
    """
    if x.shape[1] % size**2:
        raise ValueError(f"expected a multiple of {size**2} channels, got {x.shape[1]}")
    if torch.compiler.is_compiling():
        return position_sensitive_plain(x, boxes, image, stride=stride, size=size, samples=samples)
    kind = torch.promote_types(x.dtype, torch.float32)  # the operator knows no bfloat16
    return ps_roi_align(x.to(kind), _operand(boxes, image).to(kind), size, 1 / stride, samples).to(x.dtype)


def position_sensitive_plain(
    x: Tensor, boxes: Tensor, image: Tensor, *, stride: int, size: int = 7, samples: int = 2
) -> Tensor:
    """``pool_position_sensitive`` as gathers and sums, for exports, and as a check of the operator."""
    kind = torch.promote_types(x.dtype, torch.float32)
    channels, (height, width) = x.shape[1] // size**2, x.shape[2:]
    boxes = boxes.to(kind) / stride
    at_y, at_x = torch.broadcast_tensors(*_grid(boxes[:, :2] - 0.5, boxes[:, 2:] - boxes[:, :2], size, samples))
    index, share = _bilinear(at_y, at_x, height, width)
    bins = torch.arange(size**2, device=x.device, dtype=index.dtype).view(1, size, size, 1)
    index = (index + image.view(-1, 1, 1, 1).to(index.dtype) * (height * width)) * size**2 + bins
    rows = x.to(kind).unflatten(1, (channels, size**2)).permute(0, 3, 4, 2, 1).reshape(-1, channels)
    pooled = weighted_rows(rows, index.flatten(0, 2), share.flatten(0, 2))  # (R size size, C)
    return pooled.view(-1, size, size, channels).permute(0, 3, 1, 2).to(x.dtype)


def _operand(boxes: Tensor, image: Tensor) -> Tensor:
    """What torchvision's operators take, (R, 5); they read out of bounds where a corner is no finite number."""
    boxes = torch.where(boxes.abs() < torch.inf, boxes, 0)
    return torch.cat([image[:, None].to(boxes.dtype), boxes], 1)


def _grid(corner: Tensor, side: Tensor, size: int, samples: int) -> tuple[Tensor, Tensor]:
    """Rows (R, size, 1, samples, 1) and columns (R, 1, size, 1, samples) of the points of each bin, in cells."""
    bins = torch.arange(size, device=corner.device, dtype=corner.dtype)
    parts = (torch.arange(samples, device=corner.device, dtype=corner.dtype) + 0.5) / samples
    inner = (bins[:, None] + parts) / size  # (size, samples), shares of the side
    at = corner[:, :, None, None] + inner * side[:, :, None, None]  # (R, 2, size, samples)
    return at[:, 1, :, None, :, None], at[:, 0, None, :, None, :]


def _bilinear(y: Tensor, x: Tensor, height: int | Tensor, width: int | Tensor) -> tuple[Tensor, Tensor]:
    """Cells and weights (R, size, size, 4 samples^2) of the mean over a bin's points; up to a cell outside counts."""
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    index, share = corners(between(y, 0, height - 1), between(x, 0, width - 1), height, width)
    share = share * (inside / (y.shape[-1] * y.shape[-2])).unsqueeze(-1)
    return index.flatten(-3), share.flatten(-3)
