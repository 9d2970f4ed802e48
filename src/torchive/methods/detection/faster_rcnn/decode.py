"""From Faster R-CNN's raw outputs to detections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor

from torchive.ops.boxes import clip_boxes, decode_boxes
from torchive.structures import Detections

#: Weights of the second stage's box code.
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def decode(
    raw: dict[str, Tensor],
    image_sizes: Sequence[tuple[int, int]],
    *,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    max_detections: int = 100,
) -> list[Detections]:
    """One ``Detections`` per image, boxes in pixels of ``image_sizes`` (height, width); suppression within each class.

    Without a second stage (no ``class_logits``) the proposals are the detections, of class 1, scored by their
    objectness.
    """
    proposals, valid = raw["proposals"].float(), raw["proposal_scores"] >= 0  # (N, P, 4), (N, P)
    if "class_logits" in raw:
        scores = raw["class_logits"].float().softmax(-1)[..., 1:]  # (N, P, K)
        deltas = raw["box_deltas"].float().unflatten(2, (-1, 4))[:, :, 1:]  # (N, P, K, 4)
        boxes = clip_boxes(decode_boxes(deltas, proposals[:, :, None], WEIGHTS), raw["sizes"])
    else:
        scores, boxes = raw["proposal_scores"].float()[..., None], proposals[:, :, None]
    scores = torch.where(valid[..., None], scores, -1)
    labels = torch.arange(1, scores.shape[2] + 1, device=scores.device).expand(scores.shape[1:])
    found = []
    for box, score, size, (height, width) in zip(boxes, scores, raw["sizes"], image_sizes, strict=True):
        sure = (score > score_threshold) & ((box[..., 2:] - box[..., :2]).amin(-1) >= 1e-2)
        box, score, label = box[sure], score[sure], labels[sure]
        kept = torchvision.ops.batched_nms(box, score, label, nms_threshold)[:max_detections]
        scale = (box.new_tensor([height, width]) / size.to(box.dtype))[[1, 0, 1, 0]]
        found.append(Detections(box[kept] * scale, label[kept], score[kept]))
    return found
