"""From raw outputs to detections: heatmaps to points, masks to the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchive.methods.detection.deepfashion2_match_rcnn.heads import LandmarkHead
from torchive.ops.images import box_factors
from torchive.ops.masks import paste_masks
from torchive.structures import Detections

_PER_DETECTION = ("boxes", "labels", "scores", "masks", "landmarks", "features")


def decode_detections(
    raw: dict[str, Tensor],
    image_sizes: Sequence[tuple[int, int]],
    head: LandmarkHead | None,
    *,
    mask_threshold: float = 0.5,
) -> list[Detections]:
    """Raw outputs to detections in pixels of ``image_sizes`` (height, width); ``head`` owns the landmarks."""
    found = []
    for k, original in enumerate(image_sizes):
        there = raw["scores"][k] >= 0
        row = {name: raw[name][k][there] for name in _PER_DETECTION if name in raw}
        scale = box_factors(raw["sizes"][k], original)
        box, points, masks = row["boxes"] * scale, None, None
        if "masks" in row:
            masks = paste_masks(row["masks"], box, original, threshold=mask_threshold)
        if "landmarks" in row and head is not None:
            points = whole_row(row["landmarks"][..., :2] * scale[:2], row["labels"], head)
        found.append(Detections(box, row["labels"], row["scores"], masks, points, features=row.get("features")))
    return found


def whole_row(points: Tensor, labels: Tensor, head: LandmarkHead) -> Tensor:
    """Points (D, M, 2) of the labels' own landmarks in the row of all: (D, P, 2), zeros elsewhere."""
    whole = points.new_zeros(len(points), head.space.total, 2)
    row, slot = torch.nonzero(head.valid(labels), as_tuple=True)
    whole[row, head.slots[labels[row] - 1, slot]] = points[row, slot]
    return whole


def decode_landmarks(logits: Tensor, boxes: Tensor) -> Tensor:
    """Points (R, M, 3), x, y in the boxes' pixels and probability of the cell, of logits (R, M, S, S), boxes (R, 4).

    The best cell, moved by up to half a cell to the top of the parabola through it and its neighbours along each axis;
    on the rim it stays. Plain tensor operations in fixed shapes.
    """
    size = logits.shape[-1]
    flat = logits.flatten(2)
    peak, cell = flat.max(2)  # (R, M)
    score = (peak - flat.logsumexp(2)).exp()
    y, x = torch.div(cell, size, rounding_mode="floor"), cell % size
    moved = [
        x + 0.5 + _top(flat, cell, 1, (x > 0) & (x < size - 1)),
        y + 0.5 + _top(flat, cell, size, (y > 0) & (y < size - 1)),
    ]
    share = torch.stack(moved, -1) / size
    points = boxes[:, None, :2] + share.to(boxes.dtype) * (boxes[:, 2:] - boxes[:, :2])[:, None]
    return torch.cat([points, score.to(points.dtype)[..., None]], -1)


def _top(flat: Tensor, cell: Tensor, step: int, inner: Tensor) -> Tensor:
    """Where between its neighbours, in cells from -0.5 to 0.5, the parabola through a peak and them has its top."""
    last = flat.shape[2] - 1
    before, at, after = (
        flat.gather(2, (cell + offset).clamp(0, last)[..., None])[..., 0] for offset in (-step, 0, step)
    )
    bend = 2 * at - before - after
    found = (after - before) / (2 * bend.clamp(min=1e-12))
    return torch.where(inner & (bend > 0), found.clamp(-0.5, 0.5), 0)
