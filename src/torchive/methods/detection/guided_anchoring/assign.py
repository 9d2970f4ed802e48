"""What each position learns: whether an object's centre is there, and which object's shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchive.methods.detection.guided_anchoring.anchors import Centre, sampled_shapes
from torchive.ops.matching import IGNORED, NEGATIVE


def level_of(sides: Tensor, strides: Sequence[int], scale: float = 8.0) -> Tensor:
    """Number (L,) of the map that each object of ``sides`` (L, 2) belongs to, by its area."""
    side = sides.prod(-1).sqrt()
    level = ((side / (scale * strides[0])).log2() + 0.5).floor()
    return level.clamp(0, len(strides) - 1).long()


def location_targets(
    boxes: Tensor,
    level: Tensor,
    grids: Sequence[Sequence[int]],
    strides: Sequence[int],
    *,
    centre: Centre = "middle",
    centre_ratio: float = 0.2,
    ignore_ratio: float = 0.5,
) -> Tensor:
    """Each position (A,) of all maps: 1 in the middle of an object, 0 elsewhere, -1 where it does not count.

    The region of ``centre_ratio`` of a box is positive on the box's map; what is left of the region of
    ``ignore_ratio`` does not count, and neither does that region on the maps beside. A positive position stays one
    where another object says ignore.

    Args:
        boxes: (L, 4) in pixels.
        level: (L,), the map of each box.
        grids: height and width of each map.
        strides: pixels for each cell.
        centre: as of ``base_squares``; the release's "corner" has no position beyond the right and the lower edge, so
            that an object there may have none.
    """
    parts = []
    for k, ((height, width), stride) in enumerate(zip(grids, strides, strict=True)):
        inner, outer = (
            _regions(boxes / stride, ratio, height, width, centre) for ratio in (centre_ratio, ignore_ratio)
        )
        positive = _covered(*inner, level == k)
        ignored = _covered(*outer, (level - k).abs() <= 1)
        parts.append(torch.where(positive, 1, torch.where(ignored, -1, 0)).flatten())
    return torch.cat(parts)


def _regions(boxes: Tensor, ratio: float, height: int, width: int, centre: Centre) -> tuple[Tensor, Tensor]:
    """Rows (L, H) and columns (L, W) of the middle part of boxes, in cells, that has ``ratio`` of their sides."""
    shift = 0.5 if centre == "middle" else 0.0
    share = (1 - ratio) / 2
    first = ((1 - share) * boxes[:, :2] + share * boxes[:, 2:] - shift).round()
    last = (share * boxes[:, :2] + (1 - share) * boxes[:, 2:] - shift).round()
    limits = boxes.new_tensor([width, height])
    if centre == "middle":
        limits = limits - 1
    first, last = (torch.minimum(end.clamp(min=0), limits) for end in (first, last))
    inside = []
    for axis, size in ((1, height), (0, width)):
        cell = torch.arange(size, device=boxes.device)
        inside.append((cell >= first[:, axis, None]) & (cell <= last[:, axis, None]))
    return inside[0], inside[1]


def _covered(rows: Tensor, columns: Tensor, chosen: Tensor) -> Tensor:
    """Cells (H, W) that lie in the region of one of the ``chosen`` (L,) boxes."""
    return ((rows & chosen[:, None]).float().T @ columns.float()) > 0


def sampled_overlaps(
    places: Tensor,
    strides: Tensor,
    sides: Tensor,
    *,
    scale: float = 8.0,
    shapes: Sequence[Sequence[float]] | None = None,
) -> Tensor:
    """vIoU (L, A): the largest overlap of nine sampled shapes at each position with each object (eq. 5).

    Args:
        places: (L, A, 2), each position relative to each object's centre, along the object's sides.
        strides: (A,) of each position's map.
        sides: (L, 2) of the objects.
        scale: of the sampled shapes, in strides.
        shapes: width and height of the sampled shapes in strides, instead of the nine.
    """
    best = torch.zeros_like(places[..., 0])
    half, area = sides[:, None] / 2, sides.prod(-1)[:, None]
    for shape in sampled_shapes(scale) if shapes is None else shapes:
        side = strides[:, None] * strides.new_tensor(shape)  # (A, 2)
        low, high = torch.maximum(places - side / 2, -half), torch.minimum(places + side / 2, half)
        inter = (high - low).clamp(min=0).prod(-1)
        best = torch.maximum(best, inter / (side.prod(-1) + area - inter))
    return best


def free_overlaps(places: Tensor, sides: Tensor) -> Tensor:
    """The exact maximum over all (w, h) of the overlap (L, A), arguments as of ``sampled_overlaps``.

    Half the anchor's side in a row is t. Where its ends lie between the object's nearer and farther end, the overlap
    rises or falls with t for every height alike, so t is one of these two distances, and four anchors are enough.
    """
    away, half = places.abs(), sides[:, None] / 2
    near, far = half - away, half + away  # to the nearer and the farther end; near < 0 outside
    best, area = torch.zeros_like(away[..., 0]), sides.prod(-1)[:, None]
    for reach_x, length_x in ((near[..., 0], 2 * near[..., 0]), (far[..., 0], 2 * half[..., 0])):
        for reach_y, length_y in ((near[..., 1], 2 * near[..., 1]), (far[..., 1], 2 * half[..., 1])):
            inter = length_x.clamp(min=0) * length_y.clamp(min=0)
            union = 4 * reach_x.clamp(min=0) * reach_y.clamp(min=0) + area - inter
            best = torch.maximum(best, inter / union)
    return best


def assign(overlaps: Tensor, *, positive: float, negative: float, low: float) -> Tensor:
    """The object's row (A,) of each of A anchors, -1 for background, -2 where it does not count; overlaps (L, A).

    Positive from an overlap of ``positive``, or as the best of an object with at least ``low``, all of equal overlap
    and of several objects the last; background below ``negative``.
    """
    objects, anchors = overlaps.shape
    if objects == 0:
        return torch.full((anchors,), NEGATIVE, dtype=torch.int64, device=overlaps.device)
    best, row = overlaps.max(0)
    found = torch.where(best >= positive, row, torch.where(best < negative, NEGATIVE, IGNORED))
    if anchors == 0:
        return found
    top = overlaps.amax(1, keepdim=True)
    favourite = (overlaps == top) & (top >= low) & (top > 0)
    number = torch.arange(objects, device=overlaps.device)[:, None]
    owner = torch.where(favourite, number, -1).amax(0)
    return torch.where(owner >= 0, owner, found)
