"""The landmark branch: pooled regions to one heatmap for each landmark of the region's class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor

from torchive.structures.landmarks import DEEPFASHION2, LandmarkSpace

_CHUNK = 128  # regions whose low maps stand in memory at a time, outside training


class LandmarkHead(nn.Module):
    """Mask R-CNN's key point branch over the landmarks of several classes (section 4.1).

    Convolutions, a transposed one to all P landmarks, bilinear to twice the size; the layers are torchvision's. Only
    the maps of the region's own class are enlarged and come out, at most M of them, so no other map has a gradient.

    Args:
        channels: C of the pooled features.
        landmarks: number of landmarks of each class.
        width: of the convolutions.
        depth: their number.

    Raises:
        ValueError: counts that are negative or all zero.
    """

    slots: Tensor
    exists: Tensor

    def __init__(self, channels: int, landmarks: Sequence[int], *, width: int = 512, depth: int = 8) -> None:
        super().__init__()
        self.space = LandmarkSpace(tuple(landmarks))
        self.convs = KeypointRCNNHeads(channels, (width,) * depth)
        self.predictor = KeypointRCNNPredictor(width, self.space.total)
        slots = torch.zeros(len(landmarks), self.space.largest, dtype=torch.int64)
        exists = torch.zeros_like(slots, dtype=torch.bool)
        for label, count in enumerate(landmarks, 1):
            span = self.space.span(label)
            slots[label - 1, :count] = torch.arange(span.start, span.stop)
            exists[label - 1, :count] = True
        self.register_buffer("slots", slots, persistent=False)  # (K, M), rows of P
        self.register_buffer("exists", exists, persistent=False)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Logits (R, M, 4 s, 4 s) of the landmarks of labels (R,), from ``convs``' features (R, width, s, s).

        Rows of a class with fewer than M landmarks are filled with its first one; ``exists`` tells.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or len(features) <= _CHUNK:
            return self._maps(features, labels)
        parts = zip(features.split(_CHUNK), labels.split(_CHUNK), strict=True)
        return torch.cat([self._maps(x, label) for x, label in parts])

    def of_class(self, values: Tensor, labels: Tensor) -> Tensor:
        """The M rows (R, M, ...) of each label among values (R, P, ...)."""
        index = self.slots[(labels - 1).clamp(min=0)]
        index = index.view(*index.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
        return values.gather(1, index)

    def valid(self, labels: Tensor) -> Tensor:
        """Which of the M rows are landmarks of labels (R,): (R, M) bool."""
        return self.exists[(labels - 1).clamp(min=0)]

    def _maps(self, features: Tensor, labels: Tensor) -> Tensor:
        low = self.of_class(self.predictor.kps_score_lowres(features), labels)
        return F.interpolate(low, scale_factor=2.0, mode="bilinear", align_corners=False)


def landmark_counts(landmarks: Sequence[int] | str, num_classes: int) -> tuple[int, ...]:
    """The number of landmarks of each class; none at all, or "deepfashion2" for its 13 categories.

    Raises:
        ValueError: another name, or not one count for each class.
    """
    if isinstance(landmarks, str):
        if landmarks != "deepfashion2":
            raise ValueError(f"landmarks must be counts, one for each class, or deepfashion2, got {landmarks!r}")
        landmarks = DEEPFASHION2.counts
    if landmarks and len(landmarks) != num_classes:
        raise ValueError(
            f"expected a number of landmarks for each of {num_classes} classes, got {len(landmarks)}; "
            "landmarks=() does without"
        )
    return tuple(landmarks)
