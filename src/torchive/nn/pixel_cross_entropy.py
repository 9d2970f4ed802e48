"""Cross-entropy over the pixels that count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PixelCrossEntropy(nn.Module):
    """Mean cross-entropy of (N, K, *S) logits and (N, *S) classes; zero, with a gradient path, where no pixel counts.

    Args:
        ignore_index: pixels with this class count nowhere.
        weight: of each class; the mean is then a weighted one, as torch's. All count the same if None.
    """

    reduction = "mean"
    weight: Tensor | None

    def __init__(self, *, ignore_index: int = 255, weight: Sequence[float] | None = None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.register_buffer("weight", None if weight is None else torch.tensor(weight), persistent=False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(prediction.dtype)
        total = F.cross_entropy(prediction, target, weight=weight, ignore_index=self.ignore_index, reduction="sum")
        counts = target != self.ignore_index
        if weight is None:
            return total / counts.sum().clamp(min=1)
        mass = (weight[torch.where(counts, target, 0)] * counts).sum()
        return total / torch.where(mass > 0, mass, 1)
