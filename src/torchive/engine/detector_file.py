"""A detector with its decoding as one module, so that a file of it gives boxes, labels and scores."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from torchive.ops.images import side_factors
from torchive.ops.suppression import fixed_detections

_DESCRIBED = "torchive.protocols.FileDetector says what a detector's file needs"


class DetectorWithDecoding(nn.Module):
    """Images (N, C, H, W), as ``forward`` takes them, to ``boxes`` (N, D, 4) in their pixels, ``labels`` (N, D) from 1
    and ``scores`` (N, D), highest first; empty rows have score -1.

    Each class is suppressed on its own, by ONNX's NonMaxSuppression in a file. A detector with masks of its boxes gives
    these, ``masks`` (N, D, S, S), as well, one with ``masks_of`` what that gives, scores that are not set to zero in
    empty rows. Whatever the detector's own suppression may be, this one is hard.

    Args:
        model: a ``torchive.protocols.FileDetector``: with ``scored_boxes``, ``detect`` or ``decoded``.
        score_threshold, nms_threshold, max_detections: those of its ``predict`` if None.
        candidates: pairs of box and class of an image that are suppressed, the best ones.

    Raises:
        TypeError: the model has none of these, or its thresholds are not known.
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
            raise TypeError(
                f"{type(model).__name__} has no scored_boxes, nor detect or decoded in its place; {_DESCRIBED}"
            )
        self.model, self.candidates = model, candidates
        given = {"score_threshold": score_threshold, "nms_threshold": nms_threshold, "max_detections": max_detections}
        self.options = _options(model, {name: value for name, value in given.items() if value is not None})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        model: Any = self.model
        size = images.shape[2:]
        if hasattr(model, "decoded"):  # overlaps are blended, or there are no boxes to suppress
            kept = {name: value for name, value in self.options.items() if name != "nms_threshold"}
            grouped: dict[str, Tensor] = model.decoded(model(images), size, **kept)
            return grouped
        if hasattr(model, "detect"):  # later branches read what is detected
            raw = model.detect(images, candidates=self.candidates, **self.options)
            boxes = raw["boxes"] * side_factors(raw["sizes"].to(raw["boxes"].dtype), size)[:, None]
            return {"boxes": boxes} | {name: raw[name] for name in ("labels", "scores", "masks") if name in raw}
        raw, options = model(images), dict(self.options)
        if hasattr(model, "score_cut"):
            options["score_threshold"] = model.score_cut(options["score_threshold"])
        boxes, scores = model.scored_boxes(raw, size)
        found, labels, sure, rows = fixed_detections(boxes, scores, candidates=self.candidates, **options)
        given = {"boxes": found, "labels": labels, "scores": sure}
        return given | model.masks_of(raw, rows) if hasattr(model, "masks_of") else given


def decodes(model: nn.Module) -> bool:
    """Whether a model can be put into ``DetectorWithDecoding``."""
    grouped = hasattr(model, "decoded") and images_at_a_time(model) != 0
    return grouped or hasattr(model, "scored_boxes") or hasattr(model, "detect")


def images_at_a_time(model: nn.Module) -> int | None:
    """The batch that a file of a model with its decoding takes, None for any."""
    size: int | None = getattr(model, "decodes_batches_of", None)
    return size


def _options(model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """The thresholds given, else those of a model's ``predict``: its ``thresholds`` where they depend on how it was
    built, else the defaults of the signature.

    Raises:
        TypeError: one is nowhere.
    """
    predict: Any = getattr(model, "predict", None)
    stated = inspect.signature(predict).parameters if predict is not None else {}
    names = ("score_threshold", "nms_threshold", "max_detections")
    defaults = {name: stated[name].default for name in names if name in stated}
    options = {name: value for name, value in defaults.items() if value is not inspect.Parameter.empty}
    options |= {**getattr(model, "thresholds", {}), **given}
    lacking = [name for name in names if options.get(name) is None]
    if lacking and not hasattr(model, "decoded"):  # the other defaults are those of ``decoded``
        raise TypeError(
            f"{type(model).__name__} states no {' and no '.join(lacking)}: predict needs a default, or thresholds a "
            f"value; {_DESCRIBED}"
        )
    return options
