"""The metrics of each task, computed from one small record per sample, so that shards add up without duplicates."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchive.engine.coco_figures import SIZES, coco_figures
from torchive.engine.detection_errors import detection_errors, score_overlap
from torchive.nn.landmark_precision import by_part
from torchive.ops.panoptic import panoptic_quality, quality_counts, true_panoptic
from torchive.structures import Detections
from torchive.structures.landmarks import DEEPFASHION2, LandmarkSpace

IGNORED = 255


@dataclass(frozen=True)
class Metric:
    """One figure: its name, whether more is better, the task, and its unit ("share" lies in 0 to 1)."""

    name: str
    higher_is_better: bool
    task: str
    unit: str = "share"


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", True, "classification"),
        Metric("balanced_accuracy", True, "classification"),
        Metric("log_loss", False, "classification", "nats"),
        Metric("calibration_error", False, "classification"),
        Metric("mean_iou", True, "segmentation"),
        Metric("dice", True, "segmentation"),
        Metric("pixel_accuracy", True, "segmentation"),
        Metric("map", True, "detection"),
        Metric("map_50", True, "detection"),
        Metric("map_75", True, "detection"),
        Metric("map_80_90", True, "detection"),
        Metric("mar_100", True, "detection"),
        *(Metric(name, True, "detection") for name in SIZES),
        Metric("score_overlap", True, "detection", "rank correlation"),
        Metric("mask_map", True, "detection"),
        *(Metric(f"landmark_{name}", True, "detection") for name in ("map", "map_50", "map_75")),
        *(Metric(f"top_{k}", True, "detection") for k in (1, 5, 10, 20)),
        Metric("pq", True, "detection"),
        Metric("sq", True, "detection"),
        Metric("rq", True, "detection"),
        Metric("pq_things", True, "detection"),
        Metric("pq_stuff", True, "detection"),
        Metric("knn_accuracy", True, "selfsupervised"),
        Metric("linear_accuracy", True, "selfsupervised"),
        Metric("verification_accuracy", True, "embedding"),
        Metric("verification_auc", True, "embedding"),
        Metric("true_accepts", True, "embedding"),
        Metric("rank_1", True, "embedding"),
    )
}

#: The metric that decides where a recipe names none.
DECIDES = {
    "classification": "accuracy",
    "segmentation": "mean_iou",
    "detection": "map",
    "selfsupervised": "knn_accuracy",
    "embedding": "true_accepts",
}


def record_of(task: str, prediction: Any, target: Any, classes: int) -> Any:
    """What the metrics of a task need of one sample."""
    if task == "classification":
        return prediction.scores.float().cpu(), int(target)
    if task == "segmentation":
        return confusion(prediction.labels.cpu(), target.cpu(), classes)
    found, target = _boxes(prediction), {key: value.cpu() for key, value in target.items()}
    if prediction.panoptic is not None and "masks" in target:
        ids = prediction.panoptic.ids.cpu()
        truth = true_panoptic(target, classes, ids.shape)
        found["panoptic"] = quality_counts(replace(prediction.panoptic, ids=ids), truth)
    return found, target


def metrics_of(
    task: str,
    records: Sequence[Any],
    classes: Sequence[str],
    stuff: Sequence[str] = (),
    space: LandmarkSpace | None = None,
) -> dict[str, float]:
    """All metrics of a task over the records of its samples.

    Args:
        stuff: names of the categories after the classes.
        space: the landmarks of targets with ``keypoints``, with sigmas; 294 of them are DeepFashion2's if None. Others
            are not scored, which is warned of.
    """
    if task == "classification":
        return _classification(records, classes)
    return _segmentation(records, classes) if task == "segmentation" else _detection(records, classes, stuff, space)


def confusion(labels: Tensor, target: Tensor, classes: int) -> Tensor:
    """Counts (K, K) of pixels, target by prediction; pixels of 255 are left out."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(labels, target, classes, ignore_index=IGNORED, validate_args=False)


def _classification(records: Sequence[tuple[Tensor, int]], classes: Sequence[str]) -> dict[str, float]:
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
        multiclass_recall,
    )

    scores, target = torch.stack([s for s, _ in records]), torch.tensor([t for _, t in records])
    count = scores.shape[1]
    recall = multiclass_recall(scores, target, count, average="none")
    present = target.bincount(minlength=count) > 0
    chosen = scores.gather(1, target[:, None]).clamp_min(1e-12)
    result = {
        "accuracy": float(multiclass_accuracy(scores, target, count, average="micro")),
        "balanced_accuracy": float(recall[present].mean()),
        "log_loss": float(-chosen.log().mean()),
        "calibration_error": float(multiclass_calibration_error(scores, target, count, n_bins=15)),
    }
    return result | {f"recall/{classes[i]}": float(recall[i]) for i in range(min(count, len(classes))) if present[i]}


def _segmentation(records: Sequence[Tensor], classes: Sequence[str]) -> dict[str, float]:
    counts = torch.stack(list(records)).sum(0)  # integers, so the order of the samples does not matter
    hit = counts.diagonal().double()
    either = counts.sum(0).double() + counts.sum(1).double()
    present = either > 0
    iou, dice = hit / (either - hit).clamp_min(1), 2 * hit / either.clamp_min(1)
    result = {
        "mean_iou": float(iou[present].mean()),
        "dice": float(dice[present].mean()),
        "pixel_accuracy": float(hit.sum() / counts.sum().clamp_min(1)),
    }
    return result | {f"iou/{name}": float(iou[i]) for i, name in enumerate(classes) if present[i]}


def _boxes(found: Detections) -> dict[str, Tensor]:
    values = {"boxes": found.boxes, "scores": found.scores, "labels": found.labels}
    if found.masks is not None:
        values["masks"] = found.masks.bool()
    values |= {key: value for key in ("keypoints", "features") if (value := getattr(found, key)) is not None}
    return {key: value.detach().cpu() for key, value in values.items()}


def _detection(
    records: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]],
    classes: Sequence[str],
    stuff: Sequence[str],
    space: LandmarkSpace | None,
) -> dict[str, float]:
    result: dict[str, float] = {}
    for kind, prefix in (("bbox", ""), ("segm", "mask_")):
        if kind == "segm" and not all("masks" in found and "masks" in target for found, target in records):
            continue
        figures, each = coco_figures(records, kind)
        result |= {f"{prefix}{name}": value for name, value in figures.items()}
        if prefix == "" and len(classes) > 1:
            result |= {f"map/{classes[label - 1]}": v for label, v in each.items() if 1 <= label <= len(classes)}
    if records and all("keypoints" in part for record in records for part in record):
        result |= _landmarks(records, space)
    if all("panoptic" in found for found, _ in records):
        result |= _panoptic(torch.stack([found["panoptic"] for found, _ in records]).sum(0), classes, stuff)
    return result | {"score_overlap": score_overlap(records)} | detection_errors(records)


def _landmarks(
    records: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]], space: LandmarkSpace | None
) -> dict[str, float]:
    """``landmark_map`` of marked and ``visible_map`` of visible landmarks, and all figures by part."""
    count = records[0][1]["keypoints"].shape[1]
    if space is None and count == DEEPFASHION2.total:
        space = DEEPFASHION2
    if space is None or not space.sigmas or space.total != count:
        warnings.warn(
            f"the {count} landmarks of the targets are not scored: that needs a sample set whose landmark_space is a "
            f"structures.landmarks.LandmarkSpace of {count} with sigmas",
            stacklevel=2,
        )
        return {}
    found = [Detections(f["boxes"], f["labels"], f["scores"], f.get("masks"), f["keypoints"]) for f, _ in records]
    figures = by_part(found, [target for _, target in records], space)
    names = {"marked/": "landmark_", "visible/": "visible_", "mask/": "mask_", "box/": ""}
    result: dict[str, float] = {}
    for name, value in figures.items():
        kind = next(prefix for prefix in names if name.startswith(prefix))
        if kind in ("marked/", "visible/") or name.count("/") > 1:  # the others are known over all objects
            result[names[kind] + name.removeprefix(kind)] = value
    return result


def _panoptic(counts: Tensor, classes: Sequence[str], stuff: Sequence[str]) -> dict[str, float]:
    """Panoptic quality of sums (255, 4), the mean over the categories that occur, over things and over stuff, and of
    each but the background."""
    quality = panoptic_quality(counts)
    occurs = ~quality[:, 0].isnan()
    result = dict(zip(("pq", "sq", "rq"), quality[occurs].mean(0).nan_to_num().tolist(), strict=True))
    is_thing = torch.zeros_like(occurs)
    is_thing[1 : len(classes) + 1] = True
    for name, kind in (("pq_things", is_thing), ("pq_stuff", ~is_thing)):
        if (occurs & kind).any():
            result[name] = float(quality[occurs & kind, 0].mean())
    return result | {f"pq/{n}": float(quality[k, 0]) for k, n in enumerate([*classes, *stuff], 1) if occurs[k]}
