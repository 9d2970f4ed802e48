"""The pose-regularised head: key points are learnt beside the action, and their features feed the bottom-up map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchive.methods.blocks.attentional_pooling.head import AttentionalPooling


class PoseAttentionalPooling(nn.Module):
    """Map (N, C, H, W) to (N, K) scores; ``both`` gives the (N, J, H, W) heat maps of the key points, too.

    Args:
        in_channels: C.
        num_classes: K.
        keypoints: J.
        hidden: channels between the features and the heat maps; the bottom-up map is computed from these.
        options: those of ``AttentionalPooling``.

    Raises:
        ValueError: a number below one; in ``forward``, another number of channels.
    """

    def __init__(
        self, in_channels: int, num_classes: int, *, keypoints: int = 16, hidden: int = 768, **options: Any
    ) -> None:
        super().__init__()
        if min(keypoints, hidden) < 1:
            raise ValueError(f"keypoints and hidden must be >= 1, got {keypoints} and {hidden}")
        self.features = nn.Conv2d(in_channels, hidden, 1)
        self.heatmaps = nn.Conv2d(hidden, keypoints, 1)
        nn.init.normal_(self.features.weight, std=0.001)
        assert self.features.bias is not None
        nn.init.zeros_(self.features.bias)
        self.pooling = AttentionalPooling(in_channels, num_classes, source_channels=hidden, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooling(x, self._features(x))  # (N, K)

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (N, K) and heat maps (N, J, H, W)."""
        features = self._features(x)
        return self.pooling(x, features), self.heatmaps(features)

    def _features(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.features.in_channels:
            raise ValueError(f"expected (N, {self.features.in_channels}, H, W), got shape {tuple(x.shape)}")
        return self.features(x).relu()


class ActionPoseLoss(nn.Module):
    """Cross-entropy of the action plus ``weight`` times the L2 loss of the heat maps.

    The L2 loss of a sample is the sum over its known key points of half the mean squared error of the map.

    Args:
        weight: lambda, the weight of the pose.
        reduction: "none" (one value for each sample), "mean" or "sum".

    Raises:
        ValueError: an unknown ``reduction``; in ``forward``, heat maps and targets of different shapes.
    """

    def __init__(self, *, weight: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction must be none, mean or sum, got {reduction!r}")
        self.weight, self.reduction = weight, reduction

    def forward(
        self, scores: Tensor, heatmaps: Tensor, target: Tensor, pose: Tensor, known: Tensor | None = None
    ) -> Tensor:
        """The loss of (N, K) scores and (N, J, H, W) heat maps.

        Args:
            scores, heatmaps: what ``PoseAttentionalPooling.both`` gives.
            target: (N,) classes, or (N, K) numbers in [0, 1] for several labels at once (a sigmoid for each).
            pose: (N, J, H, W) heat maps to reach, see ``gaussian_heatmaps``.
            known: (N, J) bools; the key points that count. All if None.
        """
        if heatmaps.shape != pose.shape:
            raise ValueError(f"expected heat maps of shape {tuple(pose.shape)}, got {tuple(heatmaps.shape)}")
        if target.is_floating_point():
            action = F.binary_cross_entropy_with_logits(scores, target, reduction="none").mean(1)
        else:
            action = F.cross_entropy(scores, target, reduction="none")
        error = (heatmaps - pose).square().mean((2, 3)) / 2  # (N, J)
        if known is not None:
            error = error.masked_fill(~known, 0)
        loss = action + self.weight * error.sum(1)  # (N,)
        if self.reduction == "none":
            return loss
        return loss.sum() / max(len(loss), 1) if self.reduction == "mean" else loss.sum()


def gaussian_heatmaps(points: Tensor, size: Sequence[int], *, sigma: float = 1.0) -> Tensor:
    """Heat maps with a Gaussian of height one at each key point.

    Args:
        points: (N, J, 2), x and y in cells of the map, the centre of the first cell is (0, 0). A point that is not
            finite gives an empty map.
        size: H and W.
        sigma: deviation in cells.

    Returns:
        (N, J, H, W).
    """
    height, width = size
    x = torch.arange(width, device=points.device, dtype=points.dtype)
    y = torch.arange(height, device=points.device, dtype=points.dtype)
    across = (-((x - points[..., :1]) ** 2) / (2 * sigma**2)).exp()  # (N, J, W)
    down = (-((y - points[..., 1:]) ** 2) / (2 * sigma**2)).exp()
    return (down.unsqueeze(-1) * across.unsqueeze(-2)).nan_to_num(0.0)
