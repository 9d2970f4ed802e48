"""What ``predict`` returns: one object per image, by task."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Classification:
    """Scores of one image: ``scores`` (K,) sums to one."""

    scores: Tensor

    @property
    def label(self) -> int:
        """Index of the highest score."""
        return int(self.scores.argmax())


@dataclass(frozen=True)
class Detections:
    """Objects of one image, highest score first, in pixels of the image that went in.

    ``boxes`` (L, 4) xyxy, ``labels`` (L,) from 1 to K, ``scores`` (L,) in [0, 1], ``masks`` (L, H, W) bool or None,
    ``keypoints`` (L, P, 2), x and y of P points, or None.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Segmentation:
    """A class for each pixel: ``labels`` (H, W) int64, ``scores`` (K, H, W) or None."""

    labels: Tensor
    scores: Tensor | None = None


Prediction = Classification | Detections | Segmentation
