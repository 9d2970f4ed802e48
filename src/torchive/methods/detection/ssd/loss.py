"""SSD's loss: localisation of the matched default boxes, confidence of those and of the hardest negatives."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.ops.boxes import encode_boxes
from torchive.ops.matching import hard_negatives

#: Variances 0.1 and 0.2 as weights of the code.
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def confidence_loss(
    logits: Tensor, labels: Tensor, mode: Literal["softmax", "sigmoid"], loss: nn.Module | None = None
) -> Tensor:
    """What each default box costs, (N, A), for labels 0 (background) to K.

    ``softmax``: cross-entropy of (N, A, K + 1) logits. ``sigmoid``: the sum of K binary cross-entropies of (N, A, K)
    logits, or of what ``loss`` gives for these logits and their truths.
    """
    if mode == "softmax":
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    truth = F.one_hot(labels, logits.shape[-1] + 1)[..., 1:].to(logits.dtype)
    if loss is not None:
        each: Tensor = loss(logits, truth)
        return each.sum(-1)
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(-1)


def multibox_loss(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    matches: Tensor,
    boxes: Tensor,
    labels: Tensor,
    *,
    mode: Literal["softmax", "sigmoid"] = "softmax",
    mining_ratio: float | None = 3.0,
    alpha: float = 1.0,
    loss: nn.Module | None = None,
) -> dict[str, Tensor]:
    """``classification`` and ``localisation``, both over the number of matched default boxes of the batch.

    Args:
        logits: (N, A, K + 1), or (N, A, K) with sigmoids.
        deltas: (N, A, 4).
        anchors: (A, 4) in the units of ``boxes``.
        matches: (N, A), row of ``boxes`` of each default box, -1 for background.
        boxes, labels: (L, 4) and (L,) of the whole batch.
        mode: one softmax or K sigmoids.
        mining_ratio: hardest negatives for each positive; None counts all negatives.
        alpha: weight of the localisation.
        loss: of sigmoid logits and truths, instead of binary cross-entropy.
    """
    positive = matches >= 0  # (N, A)
    target = matches.new_zeros(matches.shape)
    target[positive] = labels[matches[positive]]
    confidence = confidence_loss(logits, target, mode, loss)  # (N, A)
    negative = ~positive if mining_ratio is None else hard_negatives(confidence, positive, mining_ratio)
    count = positive.sum()
    # no positive, no loss: the sums below are then empty, or (without mining) are switched off
    scale = (count > 0).to(confidence.dtype) / count.clamp(min=1)
    rows = torch.nonzero(positive)  # (P, 2)
    code = encode_boxes(boxes[matches[positive]].to(deltas.dtype), anchors[rows[:, 1]], WEIGHTS)
    localisation = F.smooth_l1_loss(deltas[positive], code, reduction="sum")
    return {
        "classification": (confidence * (positive | negative)).sum() * scale,
        "localisation": alpha * localisation * scale,
    }
