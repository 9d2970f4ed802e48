"""Boxes seen from points: FCOS's distances, centerness, overlap and assignment (Tian et al., arXiv:1904.01355)."""

from __future__ import annotations

import torch
from torch import Tensor

#: Pairs of a point and a box that are looked at together, which bounds the memory of an assignment.
_PAIRS = 2**24
#: Pixels of masks that are summed at a time.
_PIXELS = 2**26


def grid_points(grid: tuple[int, int], stride: int, like: Tensor) -> Tensor:
    """Points (H * W, 2), x and y in pixels, row by row: ``stride * index + stride // 2`` (section 3.1).

    Args:
        grid: H and W.
        stride: pixels of a cell.
        like: gives device and type; float32 at least, since half precision does not hold pixel numbers.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    y = torch.arange(grid[0], device=like.device, dtype=dtype) * stride + stride // 2
    x = torch.arange(grid[1], device=like.device, dtype=dtype) * stride + stride // 2
    return torch.stack([x.expand(grid), y[:, None].expand(grid)], -1).reshape(-1, 2)


def distances_of(boxes: Tensor, points: Tensor) -> Tensor:
    """Left, top, right and bottom (..., 4) of boxes (..., 4) as seen from points (..., 2) (eq. 1)."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)


def boxes_of(distances: Tensor, points: Tensor) -> Tensor:
    """Boxes (..., 4), the inverse of ``distances_of``."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], -1)


def centerness_of(distances: Tensor) -> Tensor:
    """``sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))`` (...) of distances (..., 4) above zero (eq. 3)."""
    first, second = distances[..., :2], distances[..., 2:]
    return (torch.minimum(first, second) / torch.maximum(first, second)).prod(-1).sqrt()


def distance_giou(predicted: Tensor, truth: Tensor, *, smooth: float = 0.0) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (...) of two boxes seen from one point, as distances (..., 4), neither below zero.

    Args:
        predicted, truth: left, top, right, bottom.
        smooth: added to the areas of intersection and union, in the square of the distances' unit.
    """
    area = (truth[..., :2] + truth[..., 2:]).prod(-1)
    own = (predicted[..., :2] + predicted[..., 2:]).prod(-1)
    least, most = torch.minimum(predicted, truth), torch.maximum(predicted, truth)
    inter = (least[..., :2] + least[..., 2:]).prod(-1)
    hull = (most[..., :2] + most[..., 2:]).prod(-1)
    union = area + own - inter
    iou = (inter + smooth) / (union + smooth)
    return iou, iou - (hull - union) / hull


def assign_points(
    points: Tensor,
    strides: Tensor,
    sizes: Tensor,
    boxes: Tensor,
    *,
    radius: float | None = 1.5,
    centres: Tensor | None = None,
) -> Tensor:
    """The row of the box (A,) that each point learns, or -1: the smallest of those it lies in (section 3.2).

    Args:
        points: (A, 2).
        strides: (A,), of each point's map.
        sizes: (A, 2): a point takes a box whose farthest side lies within these, both ends counted.
        boxes: (L, 4).
        radius: strides around a box's centre, along each axis, within which a point must lie, too; None is anywhere in
            the box. Borders do not count as inside.
        centres: (L, 2), instead of the boxes' own, such as the centres of mass of masks.
    """
    match = torch.full(points.shape[:1], -1, device=points.device)
    if not len(boxes):
        return match
    order = (boxes[:, 2:] - boxes[:, :2]).prod(-1).argsort(stable=True)  # the first that fits is the smallest
    box = boxes[order].to(points)
    centre = (box[:, :2] + box[:, 2:]) / 2 if centres is None else centres[order].to(points)
    rows = max(_PAIRS // len(boxes), 1)
    parts = []
    for point, stride, size in zip(points.split(rows), strides.split(rows), sizes.split(rows), strict=True):
        left, top = (point[:, k, None] - box[:, k] for k in (0, 1))  # (A, L)
        right, bottom = (box[:, k + 2] - point[:, k, None] for k in (0, 1))
        farthest = torch.maximum(torch.maximum(left, right), torch.maximum(top, bottom))
        fits = torch.minimum(torch.minimum(left, right), torch.minimum(top, bottom)) > 0
        fits &= (farthest >= size[:, :1]) & (farthest <= size[:, 1:])
        if radius is not None:
            reach = radius * stride[:, None]
            for k in (0, 1):
                fits &= (point[:, k, None] - centre[:, k]).abs() < reach
        parts.append(torch.where(fits.any(1), order[fits.to(torch.uint8).argmax(1)], -1))
    return torch.cat(parts)


def centres_of_mass(masks: Tensor, boxes: Tensor) -> Tensor:
    """x and y (L, 2) of the mean pixel of masks (L, H, W), 0 where the object is not, the first pixel being at zero; an
    empty mask has its box's centre.
    """
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    count, height, width = masks.shape
    x = torch.arange(width, device=masks.device, dtype=dtype)
    columns = torch.stack([torch.ones_like(x), x], 1)
    sums = columns.new_empty(count, height, 2)  # of each row its pixels and their x
    if masks.is_cpu:  # where an object's few rows are read alone: ten times as fast
        sums.zero_()
        there = (masks.any(2) != 0).to(torch.uint8)  # (L, H)
        ends = zip(there.argmax(1).tolist(), (height - there.flip(1).argmax(1)).tolist(), strict=True)
        for k, (top, bottom) in enumerate(ends):
            sums[k, top:bottom] = (masks[k, top:bottom] != 0).to(dtype) @ columns
    else:
        step = max(_PIXELS // max(height * width, 1), 1)
        for start in range(0, count, step):
            sums[start : start + step] = (masks[start : start + step] != 0).to(dtype) @ columns
    y = torch.arange(height, device=masks.device, dtype=dtype)
    mass = sums[..., 0].sum(1, keepdim=True)
    found = torch.cat([sums[..., 1].sum(1, keepdim=True), sums[..., 0] @ y[:, None]], 1) / mass.clamp(min=1)
    return torch.where(mass > 0, found, (boxes[:, :2] + boxes[:, 2:]) / 2)
