"""COCO's panoptic files: what is read of them, each fault under its kind, and what follows for training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from torchive.data import DataError, check_data, open_data
from torchive.engine.build import build_trainable, fill_recipe
from torchive.engine.recipe import load_recipe
from torchive.engine.views import Subset, as_task, names_of, stuff_of
from torchive.ops.panoptic import true_panoptic

IDS = {"sky": 5, "cat": 70_000, "dog": 300, "crowd": 9}


def picture(path: Path) -> np.ndarray[Any, Any]:
    """Sky above, a cat in it, two dogs and a crowd of cats below, and one column of nothing."""
    ids = np.zeros((12, 16), np.int64)
    ids[:6, 1:] = IDS["sky"]
    ids[2:5, 3:7] = IDS["cat"]
    ids[6:12, 1:9] = IDS["dog"]
    ids[6:12, 9:] = IDS["crowd"]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(path)
    return ids


@pytest.fixture
def panoptic(tmp_path: Path, draw: Callable[..., Path], own_cache: Path) -> Path:
    """Eight images of 16 by 12."""
    root = tmp_path / "coco"
    images, annotations = [], []
    for number in range(8):
        draw(root / "images" / f"{number}.jpg", seed=number)
        picture(root / "panoptic" / f"{number}.png")
        images.append({"id": f"a{number}", "file_name": f"{number}.jpg", "width": 16, "height": 12})
        segments = [
            {"id": IDS["sky"], "category_id": 187, "iscrowd": 0},
            {"id": IDS["dog"], "category_id": 18},
            {"id": IDS["cat"], "category_id": 17, "area": 12},
            {"id": IDS["crowd"], "category_id": 17, "iscrowd": 1},
        ]
        annotations.append({"image_id": f"a{number}", "file_name": f"{number}.png", "segments_info": segments})
    categories = [
        {"id": 187, "name": "sky", "isthing": 0},
        {"id": 18, "name": "dog", "isthing": 1},
        {"id": 17, "name": "cat", "isthing": 1},
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "panoptic.json").write_text(json.dumps(content))
    return root


def test_things_become_objects_and_every_pixel_has_a_category(panoptic: Path) -> None:
    samples = open_data(f"panoptic:{panoptic / 'panoptic.json'}")  # folders as COCO names them
    assert (samples.classes, stuff_of(samples)) == (("cat", "dog"), ("sky",))
    assert samples.object_labels[0] == [2, 1, 1]  # type: ignore[attr-defined]
    target = samples[0].target
    assert target["labels"].tolist() == [2, 1, 1]
    assert target["iscrowd"].tolist() == [0, 0, 1]
    assert target["boxes"].tolist() == [[1, 6, 9, 12], [3, 2, 7, 5], [9, 6, 16, 12]]
    assert target["area"].tolist() == [48, 12, 42]
    expected = torch.full((12, 16), 255)
    expected[:6, 1:], expected[2:5, 3:7], expected[6:, 1:9], expected[6:, 9:] = 3, 1, 2, 1
    assert torch.equal(target["semantic"], expected)
    assert torch.equal(target["masks"][1].bool(), (expected == 1) & (torch.arange(12) < 6)[:, None])
    truth = true_panoptic(target, 2, (12, 16))
    assert sorted((s.category, s.isthing, s.area, s.crowd) for s in truth.segments) == [
        (1, True, 12, False),
        (1, True, 42, True),
        (2, True, 48, False),
        (3, False, 78, False),
    ]
    assert torch.equal(truth.ids == 0, expected == 255)


def test_pictures_of_one_channel_and_images_without_segments(panoptic: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        for entry in content["annotations"]:
            entry["segments_info"] = [] if entry["image_id"] != "a0" else [{"id": 5, "category_id": 18}]

    edit(panoptic, change)
    for number in range(8):
        ids = np.zeros((12, 16), np.uint8)
        ids[1:3, 2:4] = 5 if number == 0 else 0
        Image.fromarray(ids).save(panoptic / "panoptic" / f"{number}.png")
    source = str(f"panoptic:{panoptic / 'panoptic.json'},{panoptic / 'images'},{panoptic / 'panoptic'}")
    found = {s.id: s.target for split in ("train", "val", "test") for s in open_data(source, split)}  # type: ignore[attr-defined]
    assert found["0.jpg"]["boxes"].tolist() == [[2, 1, 4, 3]]
    assert found["1.jpg"]["masks"].shape == (0, 12, 16)
    assert found["1.jpg"]["boxes"].shape == (0, 4)
    assert (found["1.jpg"]["semantic"] == 255).all()


def edit(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((root / "panoptic.json").read_text())
    change(content)
    (root / "panoptic.json").write_text(json.dumps(content))


def of_second(content: dict[str, Any]) -> Any:
    return content["annotations"][1]["segments_info"]


@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        (lambda c: of_second(c)[0].update(category_id=4), "label", "category_id 4"),
        (lambda c: of_second(c)[0].update(id=0), "broken", "segment 0"),
        (lambda c: of_second(c)[0].update(id="5"), "broken", "segment 0"),
        (lambda c: of_second(c)[0].update(iscrowd="0"), "broken", "iscrowd"),
        (lambda c: c["annotations"][1].pop("segments_info"), "broken", "segments_info"),
        (lambda c: c["annotations"][1].update(image_id="zz"), "broken", "zz"),
        (lambda c: c["annotations"].append(dict(c["annotations"][1])), "duplicate", "a1"),
        (lambda c: of_second(c).append(dict(of_second(c)[0])), "duplicate", "id 5"),
        (lambda c: of_second(c).append({"id": 77, "category_id": 18}), "box-empty", "segment 77"),
        (lambda c: of_second(c).pop(0), "label", "ids 5"),
        (lambda c: c["annotations"].pop(1), "missing", "1.jpg"),
        (lambda c: c["categories"][0].pop("isthing"), "broken", "isthing"),
        (lambda c: c["categories"].append({"id": 19, "name": "horse", "isthing": 1}), "empty-class", "horse"),
        (lambda c: c.pop("annotations"), "broken", "annotations"),
    ],
)
def test_faults_name_what_is_wrong(panoptic: Path, change: Any, kind: str, named: str) -> None:
    source = f"panoptic:{panoptic / 'panoptic.json'}"
    assert check_data(source).ok
    edit(panoptic, change)
    faults = check_data(source).faults
    assert any(fault.kind == kind and named in fault.message for fault in faults), [str(f) for f in faults]
    assert {fault.sample for fault in faults} <= {None, "1.jpg"}


def test_a_picture_of_another_size_or_none(panoptic: Path) -> None:
    Image.fromarray(np.full((10, 16), 5, np.uint8)).save(panoptic / "panoptic" / "2.png")
    (panoptic / "panoptic" / "3.png").unlink()
    kinds = {(f.sample, f.kind) for f in check_data(f"panoptic:{panoptic / 'panoptic.json'}").faults}
    assert {("2.jpg", "mask-size"), ("3.jpg", "missing")} <= kinds


def test_as_boxes_alone_it_is_refused_with_the_way(panoptic: Path) -> None:
    with pytest.raises(DataError, match="write panoptic:"):
        open_data(str(panoptic / "panoptic.json"))


def test_seen_as_classes_of_pixels_stuff_has_its_own(panoptic: Path) -> None:
    samples = open_data(f"panoptic:{panoptic / 'panoptic.json'}")
    seen = as_task(samples, "segmentation")
    assert seen.classes == ("background", "cat", "dog", "sky")
    assert names_of(seen) == seen.classes
    assert torch.equal(seen[0].target, samples[0].target["semantic"])
    assert names_of(Subset(samples, [0])) == ("cat", "dog", "sky")


@pytest.mark.parametrize(
    ("recipe", "option", "value"),
    [
        ("panoptic_fpn", "stuff_classes", 1),
        ("htc", "semantic_classes", 4),
        ("instance_depth_direction", "stuff_classes", 1),
    ],
)
def test_the_number_of_kinds_of_stuff_comes_from_the_data(panoptic: Path, recipe: str, option: str, value: int) -> None:
    """And a model so built learns from them."""
    samples = open_data(f"panoptic:{panoptic / 'panoptic.json'}")
    base = load_recipe(recipe)
    filled = fill_recipe(base, samples).model.init_args
    assert filled[option] == value
    assert filled.get("background", False) is False
    model = build_trainable(base, samples)
    batch = [samples[k] for k in range(2)]
    images = [F.interpolate(s.image[None].float() / 255, scale_factor=4)[0] for s in batch]
    targets = [
        s.target
        | {"boxes": s.target["boxes"] * 4}
        | {k: s.target[k].repeat_interleave(4, -1).repeat_interleave(4, -2) for k in ("masks", "semantic")}
        for s in batch
    ]
    losses = model.losses(images, targets)  # type: ignore[operator]
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert bool(total.isfinite())
