"""From raw outputs to faces: boxes and key points, averaged over those that overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import box_iou

from torchive.ops.boxes import clip_boxes, clip_to, keep_after_nms
from torchive.ops.images import fit_boxes
from torchive.structures import Detections

Blending = Literal["top", "mean", "none"]

#: Largest class logit that counts, as in the released graph.
CLIP = 100.0


def shapes_of(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Boxes and points (..., 4 + 2 P), xyxy and P times xy, of raw outputs relative to the anchors' centres.

    Args:
        deltas: (..., 4 + 2 P): place of the box's centre, its width and height, places of the points, in pixels.
        anchors: (..., 4), xyxy in pixels.
    """
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2
    half = deltas[..., 2:4] / 2
    middle = deltas[..., :2] + centre
    points = deltas[..., 4:].unflatten(-1, (-1, 2)) + centre[..., None, :]
    return torch.cat([middle - half, middle + half, points.flatten(-2)], -1)


def blend(
    shapes: Tensor, scores: Tensor, groups: Tensor, *, threshold: float = 0.3, blending: Blending = "top"
) -> tuple[Tensor, Tensor, Tensor]:
    """One shape for all that overlap: the mean of their numbers, weighted by their scores.

    The best one takes all that overlap it by more than ``threshold``, then the best one left, and so on: each shape
    belongs to the first of the boxes which suppression keeps that it overlaps, and these to themselves.

    Args:
        shapes: (M, 4 + D), xyxy boxes with further numbers behind, such as points; highest score first.
        scores: (M,), above zero, falling.
        groups: (M,), numbers of the classes; nothing is averaged over two.
        threshold: overlap.
        blending: the score of a mean is its group's "top" one, as in the released graph, or the group's "mean"; or
            "none" for plain suppression.

    Returns:
        Shapes (L, 4 + D), scores (L,), and the rows (L,) of the best of each group.
    """
    boxes = shapes[:, :4]
    kept = keep_after_nms(boxes, scores, groups, threshold)
    rows = torch.nonzero(kept)[:, 0]  # (L,)
    if blending == "none":
        return shapes[rows], scores[rows], rows
    near = (box_iou(boxes[rows], boxes) > threshold) & (groups[rows, None] == groups)  # (L, M)
    near[:, rows] = torch.eye(len(rows), dtype=torch.bool, device=rows.device)  # nobody else's, however it is rounded
    first = near & (near.cumsum(0) == 1)
    weight = first * scores  # (L, M)
    total = weight.sum(1)
    mean = weight @ shapes / total[:, None]
    return mean, scores[rows] if blending == "top" else total / first.sum(1), rows


def decode(
    raw: dict[str, Tensor],
    image_sizes: Sequence[tuple[int, int]],
    *,
    score_threshold: float = 0.05,
    candidates: int = 200,
    overlap: float = 0.3,
    blending: Blending = "top",
    max_detections: int = 100,
) -> list[Detections]:
    """One ``Detections`` with ``keypoints`` per image, in pixels of ``image_sizes`` (height, width).

    The ``candidates`` best pairs of anchor and class above the threshold are blended within each class; then the best.

    Raises:
        ValueError: an unknown ``blending``.
    """
    if blending not in ("top", "mean", "none"):
        raise ValueError(f"blending must be top, mean or none, got {blending!r}")
    wide = torch.promote_types(raw["deltas"].dtype, torch.float32)
    shapes = shapes_of(raw["deltas"].to(wide), raw["anchors"].to(wide))  # (N, A, 4 + 2 P)
    scores = raw["logits"].to(wide).clamp(-CLIP, CLIP).sigmoid()  # (N, A, K)
    best, where = scores.flatten(1).topk(min(candidates, scores[0].numel()), dim=1)  # (N, candidates)
    canvas = (int(raw["canvas"][0]), int(raw["canvas"][1]))
    found = []
    for shape, score, index, size in zip(shapes, best, where, image_sizes, strict=True):
        rows = torch.div(index, scores.shape[2], rounding_mode="floor")
        shape = torch.cat([_fitted(shape[rows, :4], size, canvas), _fitted(shape[rows, 4:], size, canvas)], 1)
        sure = (score > score_threshold) & (shape[:, 2:4] > shape[:, :2]).all(1)
        shape, score, group = shape[sure], score[sure], (index % scores.shape[2])[sure]
        shape, score, rows = blend(shape, score, group, threshold=overlap, blending=blending)
        order = score.argsort(descending=True, stable=True)[:max_detections]
        shape, score, label = shape[order], score[order], group[rows][order] + 1
        box = clip_boxes(shape[None, :, :4], shape.new_tensor([size]))[0]
        found.append(Detections(box, label, score, keypoints=shape[:, 4:].unflatten(1, (-1, 2))))
    return found


def fixed_faces(
    raw: dict[str, Tensor],
    size: Sequence[int],
    *,
    score_threshold: float = 0.05,
    candidates: int = 200,
    overlap: float = 0.3,
    max_detections: int = 100,
) -> dict[str, Tensor]:
    """As ``decode`` with "top" blending, in shapes that do not depend on the data, for a canvas of ``size``.

    ``boxes`` (N, D, 4) in pixels, ``labels`` and ``scores`` (N, D), -1 in empty rows, ``keypoints`` (N, D, P, 2).
    """
    shapes = shapes_of(raw["deltas"].float(), raw["anchors"].float())  # (N, A, 4 + 2 P)
    scores = raw["logits"].float().clamp(-CLIP, CLIP).sigmoid()  # (N, A, K)
    images, classes = scores.shape[0], scores.shape[2]
    score, index = scores.flatten(1).topk(min(candidates, scores.shape[1] * classes), 1)  # (N, M)
    row = torch.div(index, classes, rounding_mode="floor")
    group = torch.arange(images, device=index.device)[:, None] * classes + index % classes
    shape = shapes.gather(1, row[..., None].expand(-1, -1, shapes.shape[2]))
    sure = (score > score_threshold) & (shape[..., 2:4] > shape[..., :2]).all(-1)
    score = score.masked_fill(~sure, -1)
    kept = keep_after_nms(shape[..., :4].flatten(0, 1), score.flatten(), group.flatten(), overlap).view_as(sure) & sure
    pairs = (group[:, :, None] == group[:, None]) & sure[:, None]
    near = kept[:, :, None] & (
        (pairs & ~kept[:, None] & (_overlaps(shape[..., :4]) > overlap))
        | torch.eye(score.shape[1], device=score.device).bool()
    )
    weight = (near & (near.cumsum(1) == 1)) * score[:, None]  # of each shape the first that suppression keeps
    mean = weight @ shape / weight.sum(2, keepdim=True).clamp(min=1e-12)
    best, place = score.masked_fill(~kept, -1).topk(min(max_detections, score.shape[1]), 1)
    there = best >= 0
    found = torch.where(there[..., None], mean.gather(1, place[..., None].expand(-1, -1, mean.shape[2])), 0)
    return {
        "boxes": clip_to(found[..., :4], size),
        "labels": torch.where(there, index.gather(1, place) % classes + 1, 0),
        "scores": best,
        "keypoints": found[..., 4:].unflatten(2, (-1, 2)),
    }


def _overlaps(boxes: Tensor) -> Tensor:
    """IoU (N, M, M) of boxes (N, M, 4) with each other."""
    one, other = boxes[:, :, None], boxes[:, None]
    sides = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp(min=0)
    both, area = sides.prod(-1), (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    return both / (area[:, :, None] + area[:, None] - both)


def _fitted(values: Tensor, size: tuple[int, int], canvas: tuple[int, int]) -> Tensor:
    """Pairs of x and y (L, 2 P) in the frame as pairs in the image."""
    pairs = values.unflatten(1, (-1, 2)).repeat(1, 1, 2)
    return fit_boxes(pairs, size, canvas, back=True)[..., :2].flatten(1)
