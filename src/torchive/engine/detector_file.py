"""A detector with its decoding as one module, so that a file of it gives boxes, labels and scores."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from torchive.ops.images import side_factors
from torchive.ops.suppression import fixed_detections


class DetectorWithDecoding(nn.Module):
    """Images (N, C, H, W), as ``forward`` takes them, to ``boxes`` (N, D, 4) in their pixels, ``labels`` (N, D) from 1
    and ``scores`` (N, D), highest first; empty rows have score -1.

    Each class is suppressed on its own, by ONNX's NonMaxSuppression in a file. A detector with masks of its boxes gives
    these, ``masks`` (N, D, S, S), as well, one with ``masks_of`` what that gives, scores that are not set to zero in
    empty rows. Whatever the detector's own suppression may be, this one is hard.

    Args:
        model: with ``scored_boxes``, or one whose ``forward`` suppresses already.
        score_threshold, nms_threshold, max_detections: those of its ``predict`` if None.
        candidates: pairs of box and class of an image that are suppressed, the best ones.

    Raises:
        TypeError: the model has neither.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        max_detections: int | None = None,
        candidates: int = 2000,
    ) -> None:
        super().__init__()
        if not decodes(model):
            raise TypeError(f"{type(model).__name__} has no scored_boxes")
        self.model, self.candidates = model, candidates
        given = {"score_threshold": score_threshold, "nms_threshold": nms_threshold, "max_detections": max_detections}
        self.options = {**_defaults(model), **{name: value for name, value in given.items() if value is not None}}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        raw = self.model(images)
        if hasattr(self.model, "decoded"):  # overlaps are blended, or there are no boxes to suppress
            kept = {name: value for name, value in self.options.items() if name != "nms_threshold"}
            grouped: dict[str, Tensor] = self.model.decoded(raw, images.shape[2:], **kept)  # type: ignore[operator]
            return grouped
        if "labels" in raw:  # suppressed already, under the thresholds of the model
            boxes = raw["boxes"] * side_factors(raw["sizes"].to(raw["boxes"].dtype), images.shape[2:])[:, None]
            return {"boxes": boxes} | {name: raw[name] for name in ("labels", "scores", "masks") if name in raw}
        options = dict(self.options)
        if "centerness" in raw:  # the threshold is of a product, the score its root
            options["score_threshold"] = options["score_threshold"] ** 0.5
        boxes, scores = self.model.scored_boxes(raw, images.shape[2:])  # type: ignore[operator]
        found, labels, sure, rows = fixed_detections(boxes, scores, candidates=self.candidates, **options)
        given = {"boxes": found, "labels": labels, "scores": sure}
        return given | self.model.masks_of(raw, rows) if hasattr(self.model, "masks_of") else given  # type: ignore[operator]


def decodes(model: nn.Module) -> bool:
    """Whether a model can be put into ``DetectorWithDecoding``."""
    return hasattr(model, "scored_boxes") or (hasattr(model, "decoded") and images_at_a_time(model) != 0)


def images_at_a_time(model: nn.Module) -> int | None:
    """The batch that a file of a model with its decoding takes, None for any."""
    size: int | None = getattr(model, "decodes_batches_of", None)
    return size


def _defaults(model: nn.Module) -> dict[str, Any]:
    """The thresholds of a model's ``predict``: its ``thresholds`` where they depend on how it was built, else the
    defaults of the signature."""
    stated = inspect.signature(model.predict).parameters  # type: ignore[arg-type]
    names: tuple[str, ...] = ("score_threshold", "nms_threshold", "max_detections")
    if hasattr(model, "decoded"):  # the other defaults are those of ``decoded``
        names = tuple(name for name in names if name in stated)
    return {name: stated[name].default for name in names} | getattr(model, "thresholds", {})
