"""From scored boxes of one image to its detections."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor


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
    sure = (scores > score_threshold) & ((boxes[..., 2:] - boxes[..., :2]).amin(-1) >= 1e-2)
    row, label = torch.nonzero(sure, as_tuple=True)
    box = boxes[row, label if boxes.shape[1] > 1 else torch.zeros_like(label)]
    score = scores[row, label]
    kept = torchvision.ops.batched_nms(box, score, label, nms_threshold)[:max_detections]
    return box[kept], label[kept] + 1, score[kept], row[kept]
