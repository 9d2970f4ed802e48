"""A second stage that gives each class a probability of its own, without a background: layers and loss.

Tan et al., "Equalization Loss for Long-Tailed Object Recognition", CVPR 2020, arXiv:2003.05176, section 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.nn.prior import init_classifier


class SigmoidPredictor(nn.Module):
    """Features (R, C) to logits (R, K + 1), whose first column, in the background's place, is zero, and deltas.

    Args:
        in_channels: C.
        num_classes: K.
        prior: score of every class at the start; the boxes start with weights of deviation 0.001.
    """

    def __init__(self, in_channels: int, num_classes: int, *, prior: float = 0.001) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, 4 * (num_classes + 1))
        init_classifier(self.cls_score, prior=prior)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        return F.pad(self.cls_score(x), (1, 0)), self.bbox_pred(x)  # (R, K + 1), (R, 4 (K + 1))


class SigmoidRegionLoss(nn.Module):
    """Both losses of a second stage over its R regions: K sigmoids, and smooth L1 of the positives' codes.

    Args:
        loss: of logits (R, K) and truths (R, K), a row of zeros for background, to each entry or row, with the
            reduction "none"; binary cross-entropy if None.
        beta: where smooth L1 turns from a square to a line.

    Raises:
        ValueError: a loss with another reduction.
    """

    def __init__(self, loss: nn.Module | None = None, *, beta: float = 1 / 9) -> None:
        super().__init__()
        if getattr(loss, "reduction", "none") != "none":
            raise ValueError(f"loss must have the reduction none, got {loss.reduction!r}")  # type: ignore[union-attr]
        self.loss = nn.BCEWithLogitsLoss(reduction="none") if loss is None else loss
        self.beta = beta

    def forward(self, logits: Tensor, deltas: Tensor, labels: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Of logits (R, K + 1), deltas (R, 4 (K + 1)), labels (R,), 0 for background, and codes (R, 4): two scalars."""
        truth = F.one_hot(labels, logits.shape[1])[:, 1:].to(logits.dtype)
        each: Tensor = self.loss(logits[:, 1:], truth)
        positive = torch.nonzero(labels > 0)[:, 0]
        found = deltas.unflatten(1, (-1, 4))[positive, labels[positive]]  # (P, 4)
        offsets = F.smooth_l1_loss(found, codes[positive].to(found), beta=self.beta, reduction="sum")
        count = max(len(labels), 1)
        return each.sum() / count, offsets / count
