"""Detection figures against pycocotools on the same annotation file: boxes, masks, crowds, empty images, all sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as runs
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from torchive.data import open_data
from torchive.data.samples import SPLITS
from torchive.engine.metrics import metrics_of, record_of
from torchive.structures import Detections, Sample

CLASSES = ("cat", "dog", "bird")
_FIGURES = {
    "map": 0,
    "map_50": 1,
    "map_75": 2,
    "map_small": 3,
    "map_medium": 4,
    "map_large": 5,
    "mar_100": 8,
}


def ellipse(box: list[float], height: int, width: int) -> np.ndarray[Any, Any]:
    """The pixels (H, W) of the ellipse that a box x, y, w, h frames."""
    y, x = np.mgrid[:height, :width] + 0.5
    return ((x - box[0] - box[2] / 2) * 2 / box[2]) ** 2 + ((y - box[1] - box[3] / 2) * 2 / box[3]) ** 2 <= 1


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images of three sizes with up to eight ellipses of 4 to 150 pixels; a tenth are crowds, six have none."""
    root, draw = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    (root / "images").mkdir()
    images, annotations = [], []
    for number in range(40):
        width, height = ((200, 160), (120, 180), (96, 96))[number % 3]
        name = f"{number:02d}.png"
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(root / "images" / name)
        images.append({"id": 3 * number + 7, "file_name": name, "width": width, "height": height})
        for _ in range(0 if number % 7 == 3 else draw.integers(1, 9)):
            sides = np.minimum(np.exp(draw.uniform(np.log(4), np.log(150), 2)), (width, height))
            corner = draw.uniform(0, 1, 2) * ((width, height) - sides)
            mask = ellipse([*corner, *sides], height, width)
            if not mask.any():
                continue
            coded = runs.encode(np.asfortranarray(mask.astype(np.uint8)))
            entry = {"id": len(annotations) + 1, "image_id": 3 * number + 7, "area": int(mask.sum())}
            entry |= {"category_id": int(draw.choice([5, 9, 30], p=[0.6, 0.3, 0.1]))}
            entry |= {"bbox": runs.toBbox(coded).tolist(), "iscrowd": int(draw.random() < 0.1)}
            size, counts = coded["size"], coded["counts"].decode()
            annotations.append({**entry, "segmentation": {"size": list(size), "counts": counts}})
    categories = [{"id": key, "name": name} for key, name in zip((5, 9, 30), CLASSES, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations.json").write_text(json.dumps(content))
    return root


def found_in(sample: Sample, draw: np.random.Generator) -> Detections:
    """Most of the objects, moved a little, some twice or of another class, and some that are not there."""
    height, width = sample.image.shape[1:]
    boxes, labels = sample.target["boxes"].numpy(), sample.target["labels"].numpy()
    rows, names = [], []
    for box, label in zip(boxes, labels, strict=True):
        for _ in range(draw.choice([0, 1, 1, 1, 2])):
            moved = box + draw.normal(0, 0.08, 4) * np.tile(box[2:] - box[:2], 2)
            rows.append(moved)
            names.append(label if draw.random() < 0.85 else draw.integers(1, 4))
    for _ in range(draw.integers(0, 3)):
        corner = draw.uniform(0, 0.6, 2) * (width, height)
        rows.append(np.concatenate([corner, corner + draw.uniform(5, 60, 2)]))
        names.append(draw.integers(1, 4))
    found = torch.tensor(np.array(rows).reshape(-1, 4), dtype=torch.float32)
    found[:, 0::2], found[:, 1::2] = found[:, 0::2].clamp(0, width), found[:, 1::2].clamp(0, height)
    found = found[((found[:, 2:] - found[:, :2]) > 1).all(1)]
    kept = len(found)
    masks = [ellipse([x, y, r - x, b - y], height, width) for x, y, r, b in found.tolist()]
    scores = torch.from_numpy(draw.random(kept)).float()  # no two alike: ties are broken by the order of images
    return Detections(
        found,
        torch.tensor(names[:kept], dtype=torch.int64),
        scores,
        torch.from_numpy(np.stack(masks) if masks else np.zeros((0, height, width), bool)),
    )


def theirs(file: Path, found: dict[str, Detections], kind: str) -> tuple[dict[str, float], dict[str, float]]:
    """pycocotools' figures, and the average precision of each class."""
    truth = COCO(str(file))
    number = {entry["file_name"]: entry["id"] for entry in truth.dataset["images"]}
    rows: list[dict[str, Any]] = []
    for name, one in found.items():
        assert one.masks is not None
        for box, label, score, mask in zip(one.boxes.tolist(), one.labels, one.scores, one.masks, strict=True):
            entry: dict[str, Any] = {"image_id": number[name], "category_id": (5, 9, 30)[int(label) - 1]}
            entry["score"] = float(score)
            if kind == "segm":
                entry["segmentation"] = runs.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            else:
                entry["bbox"] = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            rows.append(entry)
    result = COCOeval(truth, truth.loadRes(rows), kind)
    result.evaluate()
    result.accumulate()
    result.summarize()
    precision = result.eval["precision"]  # overlaps, recalls, classes, areas, detections
    each = {
        name: float(precision[:, :, k, 0, 2][precision[:, :, k, 0, 2] > -1].mean()) for k, name in enumerate(CLASSES)
    }
    tight = precision[6:9, :, :, 0, 2]
    figures = {name: float(result.stats[k]) for name, k in _FIGURES.items()}
    return figures | {"map_80_90": float(tight[tight > -1].mean())}, each


@pytest.mark.parametrize("seed", [0, 1])
def test_figures_equal_pycocotools(coco: Path, seed: int) -> None:
    file, draw = coco / "annotations.json", np.random.default_rng(seed)
    samples = [sample for split in SPLITS for sample in open_data(f"coco:{file},{coco / 'images'}", split)]  # type: ignore[attr-defined]
    assert len(samples) == 40
    assert any(not len(sample.target["labels"]) for sample in samples)
    assert sum(int(sample.target["iscrowd"].sum()) for sample in samples) > 3
    found = {sample.id: found_in(sample, draw) for sample in samples}
    records = [record_of("detection", found[s.id], s.target, len(CLASSES)) for s in samples]
    ours = metrics_of("detection", records, CLASSES)
    for kind, prefix in (("bbox", ""), ("segm", "mask_")):
        figures, each = theirs(file, found, kind)
        assert 0.05 < figures["map"] < 0.9
        for name, value in figures.items():
            assert ours[f"{prefix}{name}"] == pytest.approx(value, abs=1e-12), (kind, name)
        if not prefix:
            assert {name: ours[f"map/{name}"] for name in CLASSES} == pytest.approx(each, abs=1e-12)
