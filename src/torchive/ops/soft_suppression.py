"""Suppression that lowers scores instead of dropping boxes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou


def soft_detections(
    boxes: Tensor,
    scores: Tensor,
    *,
    sigma: float = 0.5,
    score_threshold: float = 0.05,
    max_detections: int = 100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``best_detections``, but an overlap only lowers a score: by ``exp(-IoU^2 / sigma)`` for each detection of the
    class that is already taken.

    Bodla et al., "Soft-NMS", ICCV 2017, arXiv:1704.04503, eq. 3. One step for each detection that comes out, whatever
    the number of candidates.

    Args:
        boxes: (P, K, 4), or (P, 1, 4) where all classes share them.
        scores: (P, K).
        sigma: width of the decay; a small one is hard suppression.
        score_threshold: what does not score more, at first or after the decay, is dropped.
        max_detections: D at most.
    """
    sure = (scores > score_threshold) & ((boxes[..., 2:] - boxes[..., :2]).amin(-1) >= 1e-2)
    row, label = torch.nonzero(sure, as_tuple=True)
    box = boxes[row, label if boxes.shape[1] > 1 else torch.zeros_like(label)]
    left = scores[row, label]
    taken: list[Tensor] = []
    found: list[Tensor] = []
    for _ in range(min(max_detections, len(left))):
        value, best = left.max(0)
        if not value > score_threshold:
            break
        taken.append(best)
        found.append(value)
        decay = (-(box_iou(box[best][None], box)[0] ** 2) / sigma).exp()
        left = torch.where(label == label[best], left * decay, left).index_fill(0, best, -1)
    kept = torch.stack(taken) if taken else row[:0]
    score = torch.stack(found) if found else left[:0]
    return box[kept], label[kept] + 1, score, row[kept]
