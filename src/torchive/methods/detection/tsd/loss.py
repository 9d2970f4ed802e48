"""The progressive constraint: what is looked for at its own place must be found better than at the shared one."""

from __future__ import annotations

import torch
from torch import Tensor

from torchive.nn.regions import WEIGHTS, Regions, of_class
from torchive.ops.boxes import decode_boxes, paired_iou


def progressive_constraint(
    logits: Tensor,
    deltas: Tensor,
    moved: Tensor,
    sibling_logits: Tensor,
    sibling_deltas: Tensor,
    regions: Regions,
    *,
    margin: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """M_cls, the mean over the regions of images with positives, and M_loc, the mean over the positives.

    Args:
        logits, deltas: (R, K + 1) and (R, 4 (K + 1)) of TSD, ``moved`` (R, 4) what the deltas are relative to.
        sibling_logits, sibling_deltas: of the ordinary head, into which no gradient flows.
        regions: as of ``sample_regions``.
        margin: m_c and m_r.
    """
    labels = regions.labels
    positive = torch.nonzero(labels > 0)[:, 0]
    counted = torch.isin(regions.image, regions.image[positive])
    score, sibling = (of_label(part, labels) for part in (logits, sibling_logits.detach()))
    classification = shortfall(score, sibling, margin)[counted].sum() / counted.sum().clamp(min=1)

    truth, label = regions.truth[positive].to(moved), labels[positive]
    with torch.no_grad():
        boxes = decode_boxes(of_class(sibling_deltas[positive], label), regions.boxes[positive], WEIGHTS)
        sibling = paired_iou(boxes.to(truth), truth)
    boxes = decode_boxes(of_class(deltas[positive], label), moved[positive], WEIGHTS)
    localisation = shortfall(paired_iou(boxes, truth), sibling, margin)
    return classification, localisation.sum() / max(len(positive), 1)


def of_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax score (R,) of the assigned class."""
    return logits.softmax(1).gather(1, labels[:, None])[:, 0]


def shortfall(own: Tensor, sibling: Tensor, margin: float) -> Tensor:
    """How far ``own`` is from ``sibling`` and a margin, cut so that the sum does not pass one (eq. 6 and 7)."""
    return (sibling + (1 - sibling).clamp(max=margin) - own).relu()
