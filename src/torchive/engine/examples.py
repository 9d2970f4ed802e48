"""Predictions of both arms on the same test samples, small enough for a report; those that differ come first."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from torchive.data.samples import SampleSet
from torchive.engine.evaluate import Evaluation
from torchive.engine.metrics import IGNORED, confusion
from torchive.engine.recipe import Recipe
from torchive.ops.masks import mask_iou

_PER_GROUP = {"method": 10, "baseline": 10, "neither": 5, "both": 5}
_PER_TIE = {"method": 4, "baseline": 4, "both": 2}
_SIDE = {"classification": 112, "segmentation": 176, "detection": 300}
_SCORE = 0.5  # detections below are not drawn, and not counted
#: Colours of the classes of a mask, by turns; the first class is left transparent.
_COLOURS = (
    (79, 179, 255),
    (255, 138, 92),
    (110, 208, 140),
    (245, 197, 66),
    (196, 140, 255),
    (255, 120, 170),
    (90, 220, 220),
)


def side_by_side(
    baseline: Evaluation, method: Evaluation, samples: SampleSet, recipe: Recipe, *, seed: int
) -> dict[str, Any] | None:
    """Chosen samples with both arms' predictions as plain values, pictures as data URIs; None for other tasks.

    The choice depends on the predictions and the samples' ids alone.
    """
    if recipe.task not in _SIDE:
        return None
    note = (
        f"The test split of {len(samples):,} samples with the models of seed {seed}. Where the arms differ comes first."
    )
    show = {"classification": _classified, "segmentation": _segmented, "detection": _detected}[recipe.task]
    counts, chosen = show(baseline, method, samples)
    items = []
    for index, group, values in chosen:
        image, width, height = _picture(samples, index, recipe)
        items.append(
            {"id": samples.ids[index], "image": image, "width": width, "height": height, "group": group, **values}
        )
    return {"task": recipe.task, "seed": seed, "note": note, "counts": counts, "items": items}


_Chosen = list[tuple[int, str, dict[str, Any]]]


def _classified(baseline: Evaluation, method: Evaluation, samples: SampleSet) -> tuple[dict[str, int] | None, _Chosen]:
    scores = {"baseline": _stacked(baseline), "method": _stacked(method)}
    target = torch.tensor([int(t) for t in baseline.targets])
    labels = {arm: s.argmax(1) for arm, s in scores.items()}
    right = {arm: found == target for arm, found in labels.items()}
    members = {
        "method": right["method"] & ~right["baseline"],
        "baseline": right["baseline"] & ~right["method"],
        "neither": ~right["method"] & ~right["baseline"],
        "both": right["method"] & right["baseline"],
    }
    apart = (scores["method"] - scores["baseline"]).gather(1, target[:, None])[:, 0].abs()
    chosen: _Chosen = []
    for group, mask in members.items():
        for index in _spread(mask, apart, _PER_GROUP[group]):
            values: dict[str, Any] = {"truth": {"label": samples.classes[target[index]]}}
            for arm, found in labels.items():
                score = float(scores[arm][index, found[index]])
                values[arm] = {
                    "label": samples.classes[found[index]],
                    "right": bool(right[arm][index]),
                    "score_text": f"{score:.0%}".replace("%", "\N{NO-BREAK SPACE}%"),
                }
            chosen.append((index, group, values))
    return {group: int(mask.sum()) for group, mask in members.items()}, chosen


def _stacked(evaluation: Evaluation) -> Tensor:
    return torch.stack([p.scores.float() for p in evaluation.predictions])  # type: ignore[union-attr]


def _spread(mask: Tensor, apart: Tensor, count: int) -> list[int]:
    """Members evenly spread over the order of how far the arms are apart, the furthest first."""
    order = [i for i in apart.argsort(descending=True, stable=True).tolist() if mask[i]]
    if len(order) <= count:
        return order
    return [order[round(k * (len(order) - 1) / max(count - 1, 1))] for k in range(count)]


def _ties(baseline: Sequence[float], method: Sequence[float]) -> list[tuple[int, str]]:
    """Where each arm is furthest ahead, and where they are most alike."""
    apart = [m - b for b, m in zip(baseline, method, strict=True)]
    order = sorted(range(len(apart)), key=lambda i: -apart[i])
    ahead = [i for i in order if apart[i] > 0][: _PER_TIE["method"]]
    behind = [i for i in reversed(order) if apart[i] < 0][: _PER_TIE["baseline"]]
    rest = sorted(set(order) - set(ahead) - set(behind), key=lambda i: (abs(apart[i]), i))[: _PER_TIE["both"]]
    return [(i, group) for group, part in (("method", ahead), ("baseline", behind), ("both", rest)) for i in part]


def _segmented(baseline: Evaluation, method: Evaluation, samples: SampleSet) -> tuple[None, _Chosen]:
    arms = {"baseline": baseline, "method": method}
    classes = len(samples.classes)
    scores = {
        arm: [_iou(p.labels, t, classes) for p, t in zip(e.predictions, e.targets, strict=True)]  # type: ignore[union-attr]
        for arm, e in arms.items()
    }
    chosen: _Chosen = []
    for index, group in _ties(scores["baseline"], scores["method"]):
        values: dict[str, Any] = {"truth": {"mask": _mask(baseline.targets[index]), "score_text": ""}}
        for arm, evaluation in arms.items():
            labels = evaluation.predictions[index].labels  # type: ignore[union-attr]
            values[arm] = {"mask": _mask(labels), "score_text": f"IoU {scores[arm][index]:.2f}"}
        chosen.append((index, group, values))
    return None, chosen


def _iou(labels: Tensor, target: Tensor, classes: int) -> float:
    counts = confusion(labels, target, classes).double()
    hit, either = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    present = either > 0
    return float((hit[present] / either[present]).mean()) if present.any() else 1.0


def _detected(baseline: Evaluation, method: Evaluation, samples: SampleSet) -> tuple[None, _Chosen]:
    """Where both arms give masks, these are compared and drawn, otherwise boxes."""
    arms = {"baseline": baseline, "method": method}
    masked = all(p.masks is not None for e in arms.values() for p in e.predictions)  # type: ignore[union-attr]
    masked = masked and all("masks" in target for target in baseline.targets)
    counts = {
        arm: [_found(p, t, masked) for p, t in zip(e.predictions, e.targets, strict=True)] for arm, e in arms.items()
    }
    scores = {arm: [2 * f / max(f + x + f + m, 1) for f, x, m in rows] for arm, rows in counts.items()}
    chosen: _Chosen = []
    for index, group in _ties(scores["baseline"], scores["method"]):
        truth = baseline.targets[index]
        objects = f"{len(truth['boxes'])} objects"
        values: dict[str, Any] = {"truth": {"boxes": _boxes(truth["boxes"]), "score_text": objects}}
        if masked:
            values["truth"]["mask"] = _instances(truth["masks"])
        for arm, evaluation in arms.items():
            found, extra, missed = counts[arm][index]
            prediction: Any = evaluation.predictions[index]
            text = f"{found} found, {missed} missed, {extra} wrong"
            kept = prediction.scores >= _SCORE
            values[arm] = {"boxes": _boxes(prediction.boxes[kept]), "score_text": text}
            if masked:
                values[arm]["mask"] = _instances(prediction.masks[kept])
        chosen.append((index, group, values))
    return None, chosen


def _found(prediction: Any, target: dict[str, Tensor], masked: bool) -> tuple[int, int, int]:
    """Objects found (overlap of a half or more, right class), detections without an object, objects missed."""
    kept = prediction.scores >= _SCORE
    labels = prediction.labels[kept]
    if masked:
        overlap = mask_iou(prediction.masks[kept], target["masks"])
    else:
        overlap = box_iou(prediction.boxes[kept].float(), target["boxes"].float())
    overlap *= labels[:, None] == target["labels"][None]
    found = 0
    for row in range(len(labels)):  # highest score first
        if overlap.shape[1] and float(overlap[row].max()) >= 0.5:
            found += 1
            overlap[:, int(overlap[row].argmax())] = 0
    return found, len(labels) - found, len(target["boxes"]) - found


def _boxes(boxes: Tensor) -> list[list[float]]:
    return [[round(float(v), 1) for v in box] for box in boxes[:100]]


def _instances(masks: Tensor) -> str:
    """Masks (L, H, W), the first on top, each in a colour of its own."""
    rank = torch.arange(len(masks), 0, -1)  # the first has the highest number, which wins where masks overlap
    size = masks.shape[1:]
    top = torch.where(masks.bool(), rank[:, None, None], 0).amax(0) if len(masks) else torch.zeros(size)
    return _mask(torch.where(top > 0, (len(masks) - top) % 254 + 1, 0))


def _picture(samples: SampleSet, index: int, recipe: Recipe) -> tuple[str, int, int]:
    """The image as the model saw it, as a small JPEG; width and height are those of the model's input."""
    from PIL import Image

    from torchive.transforms import build
    from torchive.transforms.build import denormalise

    transform = build(recipe.task, image_size=recipe.data.image_size, train=False, channels=recipe.data.channels)
    image = denormalise(transform(samples[index]).image, recipe.task)
    array = (image * 255).round().to(torch.uint8)
    array = array[:3] if array.shape[0] >= 3 else array[:1].expand(3, -1, -1)
    height, width = array.shape[-2:]
    picture = Image.fromarray(array.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((_SIDE[recipe.task],) * 2)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=82)
    return _uri(stream, "jpeg"), width, height


def _mask(labels: Tensor) -> str:
    """Numbers of classes or objects as a PNG with a palette; 0 and ignored pixels are transparent."""
    from PIL import Image

    shown = torch.where(labels == IGNORED, 0, labels).clamp(0, 254).to(torch.uint8)
    picture = Image.fromarray(shown.contiguous().numpy()).convert("P")
    colours = [(0, 0, 0)] + [_COLOURS[i % len(_COLOURS)] for i in range(255)]
    picture.putpalette([part for colour in colours for part in colour])
    picture.thumbnail((_SIDE["segmentation"],) * 2, Image.Resampling.NEAREST)
    stream = io.BytesIO()
    picture.save(stream, "PNG", transparency=0, optimize=True)
    return _uri(stream, "png")


def _uri(stream: io.BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
