"""A sound detector, as small as one can be, and detectors that each break one promise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from broken import Case, case
from torchive.structures import Detections

K = 3
CELL = 8


class SoundDetector(nn.Module):
    """One box per cell of eight pixels; each object is learned by the cell that holds its centre."""

    task = "detection"

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, CELL, CELL), nn.Conv2d(8, K + 1 + 4, 1)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [self.head(torch.tanh(self.body(self.checked(image)[None])))[0].flatten(1).T for image in inputs]

    def checked(self, image: Tensor) -> Tensor:
        if not image.is_floating_point():
            raise TypeError(f"expected a floating image, got {image.dtype}")
        return image

    def losses(self, inputs: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        classes, boxes = [], []
        for image, raw, target in zip(inputs, self(inputs), targets, strict=True):
            centre = (target["boxes"][:, :2] + target["boxes"][:, 2:]) / 2 // CELL
            index = (centre[:, 1] * (image.shape[-1] // CELL) + centre[:, 0]).long().clamp(max=len(raw) - 1)
            wanted = torch.zeros_like(raw[:, 0], dtype=torch.int64).index_put((index,), target["labels"])
            classes.append(F.cross_entropy(raw[:, : K + 1], wanted))
            boxes.append(self.distance(self.extent(image, raw[index]), target["boxes"]) / image.shape[-1])
        return {"classes": torch.stack(classes).mean(), "boxes": torch.stack(boxes).mean()}

    def distance(self, found: Tensor, wanted: Tensor) -> Tensor:
        return (found - wanted).abs().sum() / max(len(wanted), 1)

    def extent(self, image: Tensor, raw: Tensor) -> Tensor:
        scale = torch.tensor(image.shape[-2:]).flip(0).to(raw)
        first, second = raw[:, K + 1 :].sigmoid().view(-1, 2, 2).unbind(1)
        return torch.cat([torch.minimum(first, second) * scale, torch.maximum(first, second) * scale], 1)

    def predict(self, inputs: list[Tensor]) -> list[Detections]:
        return [self.best(image, raw) for image, raw in zip(inputs, self(inputs), strict=True)]

    def best(self, image: Tensor, raw: Tensor) -> Detections:
        scores, labels = raw[:, : K + 1].softmax(1)[:, 1:].max(1)
        scores, order = scores.sort(descending=True, stable=True)
        return Detections(self.extent(image, raw[order]), labels[order] + 1, scores)


class LeavesTheImage(SoundDetector):
    def best(self, image: Tensor, raw: Tensor) -> Detections:
        found = super().best(image, raw)
        return Detections(found.boxes * 2, found.labels, found.scores)


class CountsFromZero(SoundDetector):
    def best(self, image: Tensor, raw: Tensor) -> Detections:
        found = super().best(image, raw)
        return Detections(found.boxes, found.labels - 1, found.scores)


class ForgetsToSort(SoundDetector):
    def best(self, image: Tensor, raw: Tensor) -> Detections:
        scores, labels = raw[:, : K + 1].softmax(1)[:, 1:].max(1)
        return Detections(self.extent(image, raw), labels + 1, scores)


class PassesForwardBy(SoundDetector):
    def predict(self, inputs: list[Tensor]) -> list[Detections]:
        return [self.best(image, raw) for image, raw in zip(inputs, self.forward(inputs), strict=True)]


class GivesForwardMore(SoundDetector):
    def forward(self, inputs: list[Tensor], *, scale: Tensor | None = None) -> list[Tensor]:
        return super().forward(inputs)

    def predict(self, inputs: list[Tensor]) -> list[Detections]:
        raw = self(inputs, scale=torch.ones(1))
        return [self.best(image, one) for image, one in zip(inputs, raw, strict=True)]


class FetchesItsBoxes(SoundDetector):
    def best(self, image: Tensor, raw: Tensor) -> Detections:
        found = super().best(image, raw)
        return Detections(found.boxes.cpu(), found.labels, found.scores)


class NeedsAnObject(SoundDetector):
    def distance(self, found: Tensor, wanted: Tensor) -> Tensor:
        return (found - wanted).abs().sum() / len(wanted)


class NormalisesOverTheBatch(SoundDetector):
    def predict(self, inputs: list[Tensor]) -> list[Detections]:
        mean = torch.stack([image.mean() for image in inputs]).mean()
        return super().predict([image - mean for image in inputs])


class WritesIntoItsTargets(SoundDetector):
    def losses(self, inputs: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        found = super().losses(inputs, targets)
        for target in targets:
            target["boxes"] /= 2
        return found


TINY: dict[str, Any] = {"images": [[3, 32, 48], [3, 40, 32]], "target": {"kind": "boxes", "num_classes": K}}
SOUND: tuple[Case, ...] = (case(SoundDetector, "system", "", **TINY),)
BROKEN: tuple[Case, ...] = (
    case(LeavesTheImage, "system", "predict_contract", **TINY),
    case(CountsFromZero, "system", "predict_contract", **TINY),
    case(ForgetsToSort, "system", "predict_contract", **TINY),
    case(PassesForwardBy, "system", "predict_contract", **TINY),
    case(GivesForwardMore, "system", "predict_contract", **TINY),
    case(FetchesItsBoxes, "system", "other_device", **TINY),
    case(NeedsAnObject, "system", "empty_targets", **TINY),
    case(NormalisesOverTheBatch, "system", "batch_independence nan_stays", **TINY),
    case(WritesIntoItsTargets, "system", "input_unchanged", **TINY),
)
