"""What two-stage detectors share: how images come in, and how thresholds go into what is exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from torchive.nn.regions import decode_regions, scored_regions
from torchive.ops.images import batch_images, check_images
from torchive.structures import Detections


class TwoStage(nn.Module):
    """A detector that resizes and pads its images itself; it sets ``in_channels``, ``image_size`` and ``strides``."""

    task = "detection"
    in_channels: int
    image_size: int | None
    strides: tuple[int, ...]

    def _batch(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Images resized and padded to (N, C, H, W), and their sizes (N, 2) before padding."""
        check_images(inputs, self.in_channels)
        return batch_images(inputs, shorter=self.image_size, divisor=max(self.strides[-1] // 2, 16))


class DetectsRegions(TwoStage):
    """A detector whose regions, suppressed after ``forward``, are its detections."""

    def scored_boxes(self, raw: dict[str, Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What ``predict`` suppresses: boxes (N, P, K, 4) or (N, P, 1, 4) in pixels of images of ``size`` (height,
        width), scores (N, P, K); of proposals alone (N, P, 1, 4) and (N, P, 1)."""
        return scored_regions(self._final(raw), size, **self._coding())

    @property
    def thresholds(self) -> dict[str, float]:
        """Those that depend on how the detector was built, for what ``decode`` is not given or given as None."""
        return {}

    def decode(
        self, raw: dict[str, Tensor], image_sizes: Sequence[tuple[int, int]], **options: Any
    ) -> list[Detections]:
        """Raw outputs to detections in pixels of ``image_sizes``; options as those of ``predict``."""
        given = {name: value for name, value in options.items() if value is not None}
        return decode_regions(self._final(raw), image_sizes, **self._coding(), **{**self.thresholds, **given})

    def _final(self, raw: dict[str, Tensor]) -> dict[str, Tensor]:
        """The raw outputs as ``decode_regions`` takes them."""
        return raw

    def _coding(self) -> dict[str, Any]:
        """How class scores and boxes are coded, as options of ``class_boxes``; ``proposals_only`` without a second
        stage."""
        return {}


class DetectsInForward(TwoStage):
    """A detector whose later branches read its detections, so that suppression is a part of ``forward``.

    ``detected`` are the thresholds of ``forward``, and so of its exported file, by the names of ``fixed_detections``;
    ``_raw`` gives the raw outputs under any.
    """

    detected: ClassVar[dict[str, Any]]
    _raw: Callable[..., dict[str, Tensor]]

    def detect(self, inputs: Tensor | Sequence[Tensor], **options: Any) -> dict[str, Tensor]:
        """Raw outputs, as of ``forward``, under other thresholds: ``score_threshold``, ``nms_threshold``,
        ``max_detections`` and ``candidates`` as of ``fixed_detections``, those of ``forward`` where not given."""
        options = {**self.detected, **options}
        if options == self.detected:  # by ``forward``, in whose place an exported file may stand
            raw: dict[str, Tensor] = self(inputs)
            return raw
        return self._raw(inputs, **options)
