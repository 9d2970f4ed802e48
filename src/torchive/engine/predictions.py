"""Predictions of images by a trained run, in pixels of these images, and as values for a JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchive.engine.evaluate import on_cpu, on_device_of
from torchive.engine.run import LoadedRun
from torchive.structures import Classification, Detections, Panoptic, Prediction, Sample, Segmentation


def predict_images(loaded: LoadedRun, images: Sequence[Tensor]) -> list[Prediction]:
    """Predictions of uint8 images (C, H, W) of any sizes, in pixels of these images."""
    from torchive.data import collate
    from torchive.transforms import build

    recipe = loaded.recipe
    transform = build(recipe.task, image_size=recipe.data.image_size, train=False, channels=loaded.channels)
    ready = [transform(Sample(image, None, str(i))) for i, image in enumerate(images)]
    if recipe.task == "detection":  # a list of images of any sizes
        ready = [replace(sample, target={}) for sample in ready]
    same = {tuple(sample.image.shape) for sample in ready}
    groups = [ready] if len(same) == 1 or recipe.task == "detection" else [[sample] for sample in ready]
    found: list[Prediction] = []
    for group in groups:
        batch = on_device_of(loaded.model, collate(group), channels_last=recipe.train.channels_last)
        found += [on_cpu(one) for one in loaded.model.predict(batch.inputs)]  # type: ignore[operator]
    shapes = [sample.image.shape[-2:] for sample in ready]
    return [to_source(p, s, i.shape[-2:]) for p, s, i in zip(found, shapes, images, strict=True)]


def to_source(found: Prediction, size: Sequence[int], source: Sequence[int]) -> Prediction:
    """A prediction in pixels of the transformed image as one in pixels of the source."""
    height, width = source
    if tuple(size) == (height, width) or isinstance(found, Classification):
        return found
    if isinstance(found, Segmentation):
        if found.scores is None:
            labels = F.interpolate(found.labels[None, None].float(), size=(height, width), mode="nearest")
            return Segmentation(labels[0, 0].long())
        scores = F.interpolate(found.scores[None], size=(height, width), mode="bilinear", align_corners=False)[0]
        return Segmentation(scores.argmax(0), scores)
    factor = found.boxes.new_tensor([width / size[1], height / size[0]]).repeat(2)
    limit = found.boxes.new_tensor([width, height]).repeat(2)
    masks = found.masks
    if masks is not None:
        masks = F.interpolate(masks[:, None].float(), size=(height, width), mode="bilinear")[:, 0] >= 0.5
    boxes = (found.boxes * factor).clamp_min(0).minimum(limit)
    points = None if found.keypoints is None else found.keypoints * factor[:2]
    panoptic = found.panoptic
    if panoptic is not None:
        ids = F.interpolate(panoptic.ids[None, None].float(), size=(height, width), mode="nearest")[0, 0].int()
        panoptic = resized_panoptic(ids, panoptic)
    return Detections(boxes, found.labels, found.scores, masks, points, panoptic, found.features)


def resized_panoptic(ids: Tensor, panoptic: Panoptic) -> Panoptic:
    """The segments that are left in a resized map, with their new areas."""
    areas = dict(zip(*(part.tolist() for part in ids.unique(return_counts=True)), strict=True))
    segments = [s if s.area is None else replace(s, area=areas.get(s.id)) for s in panoptic.segments if s.id in areas]
    return Panoptic(ids, tuple(segments))


def values_of(found: Prediction, classes: Sequence[str]) -> dict[str, Any]:
    """What a JSON file says of one image: class and scores, objects, or shares of the pixels."""
    if isinstance(found, Classification):
        scores = {name: round(float(s), 6) for name, s in zip(classes, found.scores, strict=False)}
        return {
            "label": found.label,
            "class": classes[found.label],
            "score": scores[classes[found.label]],
            "scores": scores,
        }
    if isinstance(found, Segmentation):
        counts = found.labels.flatten().bincount(minlength=len(classes)).double() / found.labels.numel()
        return {"shares": {name: round(float(counts[i]), 6) for i, name in enumerate(classes)}}
    objects = []
    rows = zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
    for index, (box, label, score) in enumerate(rows):
        entry = {"box": [round(side, 2) for side in box], "label": label, "class": classes[label - 1]}
        entry["score"] = round(score, 6)
        if found.masks is not None:
            entry["mask"] = run_lengths(found.masks[index])
        if found.keypoints is not None:
            entry["keypoints"] = [[round(side, 2) for side in point] for point in found.keypoints[index].tolist()]
        objects.append(entry)
    if found.panoptic is None:
        return {"objects": objects}
    named = ["background", *classes]
    segments = []
    for segment in found.panoptic.segments:
        name = named[segment.category] if segment.category < len(named) else f"stuff {segment.category}"
        known = {key: value for key, value in asdict(segment).items() if value is not None and key != "crowd"}
        segments.append({**known, "class": name})
    return {"objects": objects, "segments": segments}


def run_lengths(mask: Tensor) -> dict[str, list[int]]:
    """A mask (H, W) as run lengths down the columns, the first of zeros: COCO's uncompressed form."""
    line = mask.bool().T.flatten()
    change = (line[1:] != line[:-1]).nonzero().flatten() + 1
    ends = torch.cat([change.new_zeros(1), change, change.new_tensor([line.numel()])])
    counts = ends.diff().tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if len(line) and bool(line[0]) else counts}
