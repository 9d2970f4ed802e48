"""From raw outputs to boxes and detections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor

from torchive.methods.detection.yolov3.loss import Coding
from torchive.ops.boxes import clip_boxes, clip_to, decode_boxes, decode_cells
from torchive.ops.images import fit_boxes
from torchive.structures import Detections


def boxes_of(deltas: Tensor, anchors: Tensor, strides: Tensor, coding: Coding = "logistic") -> Tensor:
    """Boxes (N, A, 4) of raw deltas (N, A, 4), in pixels of the network's input."""
    if coding == "rcnn":
        return decode_boxes(deltas, anchors)
    places = deltas[..., :2].sigmoid() if coding == "logistic" else deltas[..., :2]
    return decode_cells(places, deltas[..., 2:], anchors, strides)


def scored_cells(raw: dict[str, Tensor], size: Sequence[int], coding: Coding = "logistic") -> tuple[Tensor, Tensor]:
    """Boxes (N, A, 1, 4) cut to a canvas of ``size`` (height, width), and objectness times class (N, A, K)."""
    boxes, scores = _boxes_and_scores(raw, coding)
    return clip_to(boxes, size)[:, :, None], scores


def _boxes_and_scores(raw: dict[str, Tensor], coding: Coding) -> tuple[Tensor, Tensor]:
    """Boxes (N, A, 4) in pixels of the canvas, and objectness times class (N, A, K)."""
    boxes = boxes_of(raw["deltas"].float(), raw["anchors"].float(), raw["strides"].float(), coding)
    return boxes, raw["objectness"].float().sigmoid()[..., None] * raw["logits"].float().sigmoid()


def decode(
    raw: dict[str, Tensor],
    image_sizes: Sequence[tuple[int, int]],
    *,
    coding: Coding = "logistic",
    score_threshold: float = 0.005,
    candidates: int = 1000,
    nms_threshold: float = 0.45,
    max_detections: int = 100,
) -> list[Detections]:
    """One ``Detections`` per image, boxes in pixels of ``image_sizes`` (height, width).

    The score is objectness times class; the ``candidates`` best pairs of box and class above the threshold;
    suppression within each class.
    """
    boxes, scores = _boxes_and_scores(raw, coding)
    best, where = scores.flatten(1).topk(min(candidates, scores[0].numel()), dim=1)  # (N, candidates)
    canvas = (int(raw["canvas"][0]), int(raw["canvas"][1]))
    found = []
    for box, score, index, size in zip(boxes, best, where, image_sizes, strict=True):
        sure = score > score_threshold
        score, index = score[sure], index[sure]
        label = index % scores.shape[2] + 1
        box = fit_boxes(box[torch.div(index, scores.shape[2], rounding_mode="floor")], size, canvas, back=True)
        box = clip_boxes(box[None], box.new_tensor([size]))[0]
        real = (box[:, 2:] > box[:, :2]).all(1)  # a box may lie wholly in the frame
        box, score, label = box[real], score[real], label[real]
        kept = torchvision.ops.batched_nms(box, score, label, nms_threshold)[:max_detections]
        found.append(Detections(box[kept], label[kept], score[kept]))
    return found
