"""From scored boxes to detections."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor

from torchive.ops.boxes import keep_after_nms


def has_area(boxes: Tensor) -> Tensor:
    """Whether boxes (..., 4) in pixels have sides of a hundredth of a pixel at least: (...,) bool."""
    return (boxes[..., 2:] - boxes[..., :2]).amin(-1) >= 1e-2


def best_detections(
    boxes: Tensor,
    scores: Tensor,
    *,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes (D, 4), labels (D,) from 1 to K, scores (D,) and rows (D,) of what stays, highest score first.

    Each class is suppressed on its own; sides below a hundredth of a pixel are dropped.

    Args:
        boxes: (P, K, 4), or (P, 1, 4) where all classes share them.
        scores: (P, K).
        score_threshold: what does not score more is dropped.
        nms_threshold: overlap above which the lower score of a class goes.
        max_detections: D at most.
    """
    sure = (scores > score_threshold) & has_area(boxes)
    row, label = torch.nonzero(sure, as_tuple=True)
    box = boxes[row, label if boxes.shape[1] > 1 else torch.zeros_like(label)]
    score = scores[row, label]
    kept = torchvision.ops.batched_nms(box, score, label, nms_threshold)[:max_detections]
    return box[kept], label[kept] + 1, score[kept], row[kept]


def fixed_detections(
    boxes: Tensor,
    scores: Tensor,
    *,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 100,
    candidates: int = 2000,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes (N, D, 4), labels (N, D) from 1 to K, scores (N, D), highest first, and rows (N, D) of P; empty ones have
    score -1 and zeros.

    As ``best_detections`` of each image, in shapes that do not depend on the data, so that a further stage can read
    the boxes in an exported file.

    Args:
        boxes: (N, P, K, 4), or (N, P, 1, 4) where all classes share them.
        scores: (N, P, K).
        score_threshold: what does not score more is dropped.
        nms_threshold: overlap above which the lower score of a class goes.
        max_detections: D at most; less where P K is.
        candidates: pairs of box and class of an image that are suppressed, the best ones.
    """
    classes = scores.shape[2]
    score, pair = scores.flatten(1).topk(min(candidates, scores.shape[1] * classes), 1)  # (N, M)
    row, label = torch.div(pair, classes, rounding_mode="floor"), pair % classes
    place = row * boxes.shape[2] + (label if boxes.shape[2] > 1 else 0)
    box = boxes.flatten(1, 2).gather(1, place[..., None].expand(-1, -1, 4))  # (N, M, 4)
    sure = (score > score_threshold) & has_area(box)
    score = score.masked_fill(~sure, -1)
    if torch.compiler.is_compiling():
        group = torch.arange(box.shape[0], device=box.device)[:, None] * classes + label
        keep = keep_after_nms(box.flatten(0, 1), score.flatten(), group.flatten(), nms_threshold).view_as(score)
    else:
        keep = torch.zeros_like(sure)
        for k in range(len(box)):
            index = torch.nonzero(sure[k])[:, 0]
            kept = torchvision.ops.batched_nms(box[k, index], score[k, index], label[k, index], nms_threshold)
            keep[k, index[kept]] = True
    score, index = score.masked_fill(~keep, -1).topk(min(max_detections, score.shape[1]), 1)
    box, label, there = box.gather(1, index[..., None].expand(-1, -1, 4)), label.gather(1, index) + 1, score >= 0
    row = torch.where(there, row.gather(1, index), 0)
    return torch.where(there[..., None], box, 0), torch.where(there, label, 0), score, row
