"""Which prediction owns which object, and what the predictions of a batch cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from torchive.ops.anchors import shape_iou
from torchive.ops.boxes import encode_boxes, encode_cells
from torchive.ops.matching import IGNORED, NEGATIVE

Coding = Literal["logistic", "linear", "rcnn"]


def owners(boxes: Tensor, shapes: Sequence[Tensor], grids: Sequence[tuple[int, int]], strides: Sequence[int]) -> Tensor:
    """The one prediction (L,) of each box: the best of all shapes, at the cell that holds the centre.

    Args:
        boxes: (L, 4), xyxy in pixels of the network's input.
        shapes: (B, 2) of each map, width and height in pixels.
        grids: height and width of each map.
        strides: pixels of a cell.
    """
    counts = [len(shape) for shape in shapes]
    level = torch.repeat_interleave(torch.arange(len(shapes)), torch.tensor(counts)).to(boxes.device)
    within = torch.cat([torch.arange(count) for count in counts]).to(boxes.device)
    best = shape_iou(boxes[:, 2:] - boxes[:, :2], torch.cat(list(shapes)).to(boxes)).argmax(1)  # (L,)
    sizes = torch.tensor([[h, w, s, b] for (h, w), s, b in zip(grids, strides, counts, strict=True)])
    starts = F.pad((sizes[:, 0] * sizes[:, 1] * sizes[:, 3]).cumsum(0), (1, 0))[:-1].to(boxes.device)
    height, width, stride, count = sizes.to(boxes.device)[level[best]].unbind(1)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    column = (centre[:, 0] / stride).long().clamp(min=0).minimum(width - 1)
    row = (centre[:, 1] / stride).long().clamp(min=0).minimum(height - 1)
    return starts[level[best]] + (row * width + column) * count + within[best]


def assign(
    predicted: Tensor, boxes: Tensor, own: Tensor, *, ignore: float = 0.5, accept: float | None = None
) -> Tensor:
    """Of each prediction (A,) the row of its box, -1 for none, -2 where its objectness does not count.

    Args:
        predicted: (A, 4), decoded boxes in the units of ``boxes``.
        boxes: (L, 4).
        own: (L,), as of ``owners``; of boxes that want one prediction the last has it.
        ignore: a prediction without a box that overlaps one by more is left out.
        accept: a prediction that overlaps a box by more learns it too; None is off, as in the release.
    """
    match = torch.full((len(predicted),), NEGATIVE, device=boxes.device)
    if not len(boxes):
        return match
    overlap, nearest = box_iou(predicted, boxes).max(1)  # (A,)
    match = torch.where(overlap > ignore, IGNORED, match)
    if accept is not None:
        match = torch.where(overlap > accept, nearest, match)
    last = torch.full_like(match, NEGATIVE).scatter_reduce(0, own, torch.arange(len(boxes), device=own.device), "amax")
    return torch.where(last >= 0, last, match)


def class_targets(match: Tensor, labels: Tensor, own: Tensor, num_classes: int) -> Tensor:
    """Truths (P, K) of the P matched predictions: the label, and those of the boxes that lost the prediction to it."""
    truth = torch.zeros(len(match), num_classes, device=match.device)
    held = match >= 0
    truth[held] = F.one_hot(labels[match[held]] - 1, num_classes).to(truth)
    truth[own, labels - 1] = 1.0
    return truth[held]


def code_loss(raw: Tensor, boxes: Tensor, anchors: Tensor, strides: Tensor, coding: Coding) -> Tensor:
    """What the places and sizes (P, 4) of matched predictions cost, (P,).

    ``logistic``: cross-entropy of the place, of a centre outside the cell that of its nearest border, and half the
    squared error of the log ratios; ``linear``: squared errors of both; ``rcnn``: smooth L1 of Faster R-CNN's code.
    """
    if coding == "rcnn":
        return F.smooth_l1_loss(raw, encode_boxes(boxes, anchors), reduction="none").sum(-1)
    code = encode_cells(boxes, anchors, strides)
    stretch = (raw[:, 2:] - code[:, 2:]).square().sum(-1) / 2
    if coding == "linear":
        return (raw[:, :2] - code[:, :2]).square().sum(-1) / 2 + stretch
    return F.binary_cross_entropy_with_logits(raw[:, :2], code[:, :2].clamp(0, 1), reduction="none").sum(-1) + stretch


def yolo_loss(
    raw: dict[str, Tensor],
    matches: Sequence[Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    own: Sequence[Tensor],
    canvas: tuple[int, int],
    *,
    coding: Coding = "logistic",
    loss: nn.Module | None = None,
) -> dict[str, Tensor]:
    """``localisation``, ``objectness`` and ``classification``: sums over an image, the mean over the batch.

    Args:
        raw: as of ``YOLOv3.forward``.
        matches: (A,) of each image, as of ``assign``.
        boxes, labels, own: (L, 4), (L,) and (L,) of each image.
        canvas: height and width of the network's input.
        coding: of the boxes.
        loss: of objectness logits and truths, instead of binary cross-entropy.
    """
    match = torch.stack(list(matches))  # (N, A)
    image, place = torch.nonzero(match >= 0, as_tuple=True)  # (P,)
    chosen = torch.cat([box[m[m >= 0]] for box, m in zip(boxes, matches, strict=True)])  # (P, 4)
    truth = torch.cat(
        [class_targets(m, label, o, raw["logits"].shape[-1]) for m, label, o in zip(matches, labels, own, strict=True)]
    )
    wide = torch.promote_types(raw["deltas"].dtype, torch.float32)
    deltas, logits, objectness = (raw[key].to(wide) for key in ("deltas", "logits", "objectness"))
    size = ((chosen[:, 2:] - chosen[:, :2]) / chosen.new_tensor([canvas[1], canvas[0]])).clamp(max=1)
    code = code_loss(deltas[image, place], chosen, raw["anchors"][place], raw["strides"][place], coding)
    there = (match >= 0).to(objectness)
    each: Tensor = (loss or nn.BCEWithLogitsLoss(reduction="none"))(objectness, there)
    classes = F.binary_cross_entropy_with_logits(logits[image, place], truth.to(wide), reduction="sum")
    return {
        "localisation": (code * (2 - size.prod(-1))).sum() / len(match),
        "objectness": (each * (match != IGNORED)).sum() / len(match),
        "classification": classes / len(match),
    }
