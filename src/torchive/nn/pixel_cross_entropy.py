"""Cross-entropy over the pixels that count."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PixelCrossEntropy(nn.Module):
    """Mean cross-entropy of (N, K, *S) logits and (N, *S) classes; zero, with a gradient path, where no pixel counts.

    Args:
        ignore_index: pixels with this class count nowhere.
    """

    reduction = "mean"

    def __init__(self, *, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        total = F.cross_entropy(prediction, target, ignore_index=self.ignore_index, reduction="sum")
        return total / (target != self.ignore_index).sum().clamp(min=1)
