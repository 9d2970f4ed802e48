"""COCO's figures of detections by faster-coco-eval, which are pycocotools' on the same annotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

#: Of objects up to 32 x 32 pixels, up to 96 x 96, and above.
SIZES = ("map_small", "map_medium", "map_large")

Values = dict[str, Tensor]


def coco_figures(records: Sequence[tuple[Values, Values]], kind: str) -> tuple[dict[str, float], dict[int, float]]:
    """The figures of all classes together, and the average precision of each label that has an object.

    ``map``, ``map_50``, ``map_75``, ``map_80_90``, the mean over the overlaps 0.8, 0.85 and 0.9, ``mar_100``, and of
    ``SIZES`` those that an object has. A figure of no object is zero.

    Args:
        records: of each image what was found, ``boxes`` (L, 4) xyxy, ``labels`` and ``scores`` (L,), and what there is,
            ``boxes``, ``labels``, and ``area`` and ``iscrowd`` where known.
        kind: "bbox", or "segm", which compares ``masks`` (L, H, W).
    """
    from faster_coco_eval import COCO, COCOeval_faster

    labels = sorted({label for pair in records for values in pair for label in values["labels"].tolist()})
    images: list[dict[str, Any]] = []
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for number, (mine, theirs) in enumerate(records):
        height, width = theirs["masks"].shape[1:] if kind == "segm" else (0, 0)
        images.append({"id": number, "height": height, "width": width})
        shapes = _shapes(theirs, kind)
        areas = theirs["area"].tolist() if "area" in theirs else [shape["area"] for shape in shapes]
        crowds = theirs["iscrowd"].tolist() if "iscrowd" in theirs else [0] * len(shapes)
        for shape, label, area, crowd in zip(shapes, theirs["labels"].tolist(), areas, crowds, strict=True):
            own = {"id": len(truth) + 1, "image_id": number, "category_id": label}
            truth.append({**shape, **own, "area": area, "iscrowd": int(crowd)})
        scored = zip(_shapes(mine, kind), mine["labels"].tolist(), mine["scores"].tolist(), strict=True)
        found += [{**s, "image_id": number, "category_id": label, "score": score} for s, label, score in scored]
    categories = [{"id": label, "name": str(label)} for label in labels]
    known = COCO({"images": images, "annotations": truth, "categories": categories})
    result = COCOeval_faster(known, known.loadRes(found), kind, print_function=lambda *_: None)
    result.evaluate()
    result.accumulate()
    precision = np.asarray(result.eval["precision"])  # (10 overlaps, 101 recalls, classes, all and three sizes, 3)
    recall = np.asarray(result.eval["recall"])  # (10 overlaps, classes, all and three sizes, 3)
    whole = precision[:, :, :, 0, -1]
    figures = {
        "map": _mean(whole),
        "map_50": _mean(whole[0]),
        "map_75": _mean(whole[5]),
        "map_80_90": _mean(whole[6:9]),
        "mar_100": _mean(recall[:, :, 0, -1]),
    }
    for place, name in enumerate(SIZES, 1):
        if (precision[:, :, :, place, -1] > -1).any():
            figures[name] = _mean(precision[:, :, :, place, -1])
    each = {label: _mean(whole[:, :, k]) for k, label in enumerate(labels) if (whole[:, :, k] > -1).any()}
    return figures, each


def _shapes(values: Values, kind: str) -> list[dict[str, Any]]:
    """Box or runs, and area, of each row, as COCO writes them."""
    if kind == "segm":
        from faster_coco_eval.core import mask as runs

        masks = values["masks"].bool().cpu().numpy().astype(np.uint8)
        coded = runs.encode(np.asfortranarray(masks.transpose(1, 2, 0))) if len(masks) else []
        return [{"segmentation": one, "area": float(runs.area(one))} for one in coded]
    boxes = values["boxes"].double()
    sides = boxes[:, 2:] - boxes[:, :2]
    rows = zip(boxes[:, :2].tolist(), sides.tolist(), sides.prod(1).tolist(), strict=True)
    return [{"bbox": [*corner, *side], "area": area} for corner, side, area in rows]


def _mean(values: np.ndarray[Any, Any]) -> float:
    """Of the values that an object stands behind, zero where there is none."""
    kept = values[values > -1]
    return float(kept.mean()) if kept.size else 0.0
