"""What the three groups cost."""

from __future__ import annotations

import torch
from torch import Tensor

from torchive.nn.pixel_cross_entropy import PixelCrossEntropy


def encoding_loss(raw: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """``semantic``, ``depth`` and ``direction``, each the mean over the pixels that count.

    Cross-entropy; where the direction is two numbers, the mean absolute difference over the objects' pixels. A group
    without a pixel that counts costs zero and still has a gradient.

    Args:
        raw: logits (N, k, H, W) of each group.
        truth: classes (N, H, W) of each group, 255 where a pixel counts nowhere; ``vectors`` (N, 2, H, W) and
            ``ignored`` (N, H, W).
    """
    entropy = PixelCrossEntropy()
    losses = {}
    for name, logits in raw.items():
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses[name] = entropy(wide, truth[name]) if name in truth else _distance(wide, truth)
    return losses


def _distance(found: Tensor, truth: dict[str, Tensor]) -> Tensor:
    vectors = truth["vectors"].to(found.dtype)
    counts = (vectors != 0).any(1, keepdim=True)
    return ((found - vectors).abs() * counts).sum() / (2 * counts.sum()).clamp(min=1)
