"""Boxes laid over feature maps: SSD's default boxes in fractions of the image, and anchors in pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def default_scales(sources: int, *, low: float = 0.2, high: float = 0.9, first: float = 0.1) -> list[float]:
    """SSD's scales (arXiv:1512.02325, eq. 4), one more than there are sources: the last serves the extra box of ratio
    one.

    ``first`` for the finest source, then ``s_k = low + (high - low) (k - 1) / (m - 1)`` for the other m, the formula
    continued by one step.
    """
    if sources == 1:
        return [low, high]
    m = sources - 1
    step = (high - low) / max(m - 1, 1)
    return [first, *(low + step * k for k in range(m + 1))]


def default_shapes(scale: float, following: float, ratios: Sequence[float]) -> list[tuple[float, float]]:
    """Width and height, in fractions of the image, of one cell's default boxes.

    The square of ``scale``, the square of ``sqrt(scale * following)``, then ``w = s sqrt(a)``, ``h = s / sqrt(a)``
    for each a of ``ratios`` and its inverse.
    """
    between = math.sqrt(scale * following)
    shapes = [(scale, scale), (between, between)]
    for ratio in ratios:
        root = math.sqrt(ratio)
        shapes += [(scale * root, scale / root), (scale / root, scale * root)]
    return shapes


def default_boxes(
    grids: Sequence[Sequence[int]], shapes: Sequence[Tensor], steps: Sequence[float] | None = None
) -> Tensor:
    """Default boxes (A, 4), xyxy in fractions of the image: source by source, row by row, cell by cell.

    Args:
        grids: height and width of each source.
        shapes: (B, 2) of each source: width and height of a cell's boxes.
        steps: distance of the centres, in fractions of the image; one cell of the source, the paper's choice, if None.
    """
    parts = []
    for k, ((height, width), shape) in enumerate(zip(grids, shapes, strict=True)):
        shape = shape.to(torch.promote_types(shape.dtype, torch.float32))
        dy, dx = (1 / height, 1 / width) if steps is None else (steps[k], steps[k])
        y = (torch.arange(height, device=shape.device, dtype=shape.dtype) + 0.5) * dy
        x = (torch.arange(width, device=shape.device, dtype=shape.dtype) + 0.5) * dx
        centre = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1)[:, :, None]
        half = shape / 2  # (B, 2)
        parts.append(torch.cat([centre - half, centre + half], -1).reshape(-1, 4))  # (H * W * B, 4)
    return torch.cat(parts)


def cell_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Anchors (B, 4) around the origin, each size for each ratio height / width, corners rounded to whole pixels."""
    scale = torch.tensor(sizes, dtype=torch.float32)
    root = torch.tensor(ratios, dtype=torch.float32).sqrt()
    width, height = ((1 / root)[:, None] * scale).flatten(), (root[:, None] * scale).flatten()
    return (torch.stack([-width, -height, width, height], 1) / 2).round()


def grid_anchors(grid: Sequence[int], stride: int, cell: Tensor) -> Tensor:
    """Anchors (H * W * B, 4) in pixels: ``cell`` (B, 4) moved to each multiple of ``stride``."""
    height, width = grid
    cell = cell.to(torch.promote_types(cell.dtype, torch.float32))  # half precision does not hold pixel numbers
    y = torch.arange(height, device=cell.device, dtype=cell.dtype) * stride
    x = torch.arange(width, device=cell.device, dtype=cell.dtype) * stride
    place = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1)  # (H, W, 2)
    return (place.repeat(1, 1, 2)[:, :, None] + cell).reshape(-1, 4)


def centred_anchors(grids: Sequence[Sequence[int]], strides: Sequence[int], shapes: Sequence[Tensor]) -> Tensor:
    """Anchors (A, 4) centred in their cells, map by map, row by row, cell by cell; shapes (B, 2) in pixels."""
    parts = []
    for (height, width), stride, shape in zip(grids, strides, shapes, strict=True):
        half = (shape / 2).repeat(1, 2) * shape.new_tensor([-1.0, -1.0, 1.0, 1.0])  # (B, 4)
        parts.append(grid_anchors((height, width), stride, half + stride / 2))
    return torch.cat(parts)


def shape_iou(a: Tensor, b: Tensor) -> Tensor:
    """Overlap (L, M) of shapes (L, 2) and (M, 2), width and height, laid over one centre."""
    inter = torch.minimum(a[:, None], b).prod(-1)
    return inter / (a.prod(-1)[:, None] + b.prod(-1) - inter)


def kmeans_anchors(shapes: Tensor, k: int, *, steps: int = 100, seed: int = 0) -> tuple[Tensor, list[float]]:
    """k shapes (k, 2), by area, that stand for the shapes (L, 2) of boxes, and the cost after each step.

    k-means with the distance 1 - IoU (Redmon and Farhadi, arXiv:1612.08242, section 2): each shape joins the centre it
    overlaps most, each centre becomes the mean of its shapes unless that raises its cost; the cost, the mean distance,
    so never rises. The first centres are drawn far from each other.

    Raises:
        ValueError: less than one centre, fewer shapes than centres, or a side of zero.
    """
    if not 1 <= k <= len(shapes) or not bool((shapes > 0).all()):
        raise ValueError(f"expected 1 to {len(shapes)} centres and sides above zero, got k={k}")
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes.double()
    centres = shapes[torch.randint(len(shapes), (1,), generator=generator)]
    while len(centres) < k:
        far = (1 - shape_iou(shapes, centres)).amin(1).clamp(min=0) ** 2 + 1e-12
        centres = torch.cat([centres, shapes[torch.multinomial(far, 1, generator=generator)]])
    costs: list[float] = []
    for _ in range(steps):
        distance = 1 - shape_iou(shapes, centres)  # (L, k)
        nearest = distance.argmin(1)
        costs.append(float(distance.amin(1).mean()))
        if len(costs) > 1 and costs[-1] >= costs[-2] - 1e-12:
            break
        member = torch.nn.functional.one_hot(nearest, k).to(shapes)  # (L, k)
        mean = (member.T @ shapes) / member.sum(0).clamp(min=1)[:, None]
        mean = torch.where(member.any(0)[:, None], mean, centres)
        better = ((1 - shape_iou(shapes, mean)) * member).sum(0) <= (distance * member).sum(0)
        centres = torch.where(better[:, None], mean, centres)
    return centres[centres.prod(1).argsort()].float(), costs
