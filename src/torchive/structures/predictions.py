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
class Segment:
    """One segment of a panoptic map: its id there, its category, whether it is a thing, and what is known of it."""

    id: int
    category: int
    isthing: bool
    score: float | None = None
    area: int | None = None
    crowd: bool = False


@dataclass(frozen=True)
class Panoptic:
    """One segment for each pixel: ``ids`` (H, W) int32, 0 for none, and a record of each id.

    Categories 1 to K are things, as detections' labels; 0 is the background and those above K are what else there is.
    """

    ids: Tensor
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Detections:
    """Objects of one image, highest score first, in pixels of the image that went in.

    ``boxes`` (L, 4) xyxy, ``labels`` (L,) from 1 to K, ``scores`` (L,) in [0, 1], ``masks`` (L, H, W) bool or None,
    ``keypoints`` (L, P, 2), x and y of P points, zeros where an object's class has no such point, or None,
    ``panoptic`` the segments of the whole image, or None, ``features`` (L, E), vectors by which objects are compared,
    or None.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None = None
    keypoints: Tensor | None = None
    panoptic: Panoptic | None = None
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Segmentation:
    """A class for each pixel: ``labels`` (H, W) int64, ``scores`` (K, H, W) or None."""

    labels: Tensor
    scores: Tensor | None = None


Prediction = Classification | Detections | Segmentation
