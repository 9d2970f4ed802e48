"""What boxes and key points of matched anchors cost, relative to the size of the face."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Distance of the eyes as a share of the box's side: what the released weights give for the 29 faces of one photograph.
EYES = 0.42
#: Smallest distance of the eyes that counts, as a share of the box's side and in pixels: a profile's eyes may coincide.
NEAREST, PIXEL = 0.1, 1.0


def face_sizes(boxes: Tensor, points: Tensor) -> Tensor:
    """By what errors are divided (L,): the distance of the eyes, the first two points, or ``EYES`` of the box's side.

    It is at least ``NEAREST`` of the side and ``PIXEL``.

    Args:
        boxes: (L, 4), xyxy in pixels.
        points: (L, P, 3): x, y, and above zero where the point is given.
    """
    side = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    if points.shape[1] < 2:
        return (EYES * side).clamp(min=PIXEL)
    eyes = (points[:, 0, :2] - points[:, 1, :2]).norm(dim=1)
    known = (points[:, :2, 2] > 0).all(1) & (eyes > 0)
    return torch.where(known, torch.maximum(eyes, NEAREST * side), EYES * side).clamp(min=PIXEL)


def shape_losses(
    deltas: Tensor, anchors: Tensor, matches: Tensor, boxes: Tensor, points: Tensor
) -> tuple[Tensor, Tensor]:
    """Smooth L1 of boxes and of points, sums over the positives (P in number).

    Args:
        deltas: (N, A, 4 + 2 P), as of ``shapes_of``.
        anchors: (A, 4), xyxy.
        matches: (N, A), row of ``boxes`` of each anchor, -1 for background.
        boxes: (L, 4) of the batch. points: (L, P, 3).
    """
    image, place = torch.nonzero(matches >= 0, as_tuple=True)
    row = matches[image, place]
    centre = (anchors[place, :2] + anchors[place, 2:]) / 2
    box = boxes[row]
    code = torch.cat([(box[:, :2] + box[:, 2:]) / 2 - centre, box[:, 2:] - box[:, :2]], 1)
    chosen = deltas[image, place]
    size = face_sizes(boxes, points)[row, None]
    localisation = F.smooth_l1_loss(chosen[:, :4] / size, code / size, reduction="sum")
    there = points[row, :, 2:] > 0
    wanted = torch.where(there, points[row, :, :2] - centre[:, None], 0.0) / size[:, None]
    given = torch.where(there, chosen[:, 4:].unflatten(1, (-1, 2)) / size[:, None], 0.0)
    return localisation, F.smooth_l1_loss(given, wanted, reduction="sum")


def points_of(target: dict[str, Tensor], keypoints: int, number: int) -> Tensor:
    """A target's ``keypoints`` (L, P, 3), or zeros where it has none.

    Raises:
        ValueError: another shape.
    """
    points, count = target.get("keypoints"), len(target["boxes"])
    if points is None:
        return target["boxes"].new_zeros(count, keypoints, 3)
    if tuple(points.shape) != (count, keypoints, 3):
        raise ValueError(f"target {number}: expected keypoints {(count, keypoints, 3)}, got {tuple(points.shape)}")
    return points


def joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The rows of all images in ``like``'s type."""
    return torch.cat([part.to(like.dtype) for part in parts])
