"""From SSD's raw outputs to detections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torchvision
from torch import Tensor

from torchive.methods.detection.ssd.loss import WEIGHTS
from torchive.ops.boxes import decode_boxes
from torchive.structures import Detections


def decode(
    raw: dict[str, Tensor],
    image_sizes: Sequence[tuple[int, int]],
    *,
    mode: Literal["softmax", "sigmoid"] = "softmax",
    score_threshold: float = 0.01,
    candidates: int = 400,
    nms_threshold: float = 0.45,
    max_detections: int = 200,
) -> list[Detections]:
    """One ``Detections`` per image, boxes in pixels of ``image_sizes`` (height, width).

    For each class the ``candidates`` best scores above the threshold; suppression within each class; the best of all
    classes.
    """
    boxes = decode_boxes(raw["deltas"].float(), raw["anchors"].float(), WEIGHTS).clamp(0, 1)  # (N, A, 4), fractions
    logits = raw["logits"].float()
    scores = logits.softmax(-1)[..., 1:] if mode == "softmax" else logits.sigmoid()  # (N, A, K)
    best, where = scores.transpose(1, 2).topk(min(candidates, scores.shape[1]), dim=2)  # (N, K, candidates)
    labels = torch.arange(1, scores.shape[2] + 1, device=scores.device)[:, None].expand(best.shape[1:])
    found = []
    for box, score, index, (height, width) in zip(boxes, best, where, image_sizes, strict=True):
        sure = score > score_threshold
        box = box[index[sure]] * box.new_tensor([width, height, width, height])
        score, label = score[sure], labels[sure]
        kept = torchvision.ops.batched_nms(box, score, label, nms_threshold)[:max_detections]
        found.append(Detections(box[kept], label[kept], score[kept]))
    return found
