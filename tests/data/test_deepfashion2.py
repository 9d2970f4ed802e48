"""DeepFashion2's annotations: what is read, what pairs, COCO's form, and what is said of damaged files."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ExifTags, Image, ImageFile

from torchive.data import DataError, check_data, open_data
from torchive.data.deepfashion2 import coco_annotations, item_pairs
from torchive.data.pair_order import pair_order
from torchive.data.readers.deepfashion2 import read_deepfashion2
from torchive.engine.recipe import load_recipe
from torchive.engine.selection import class_order
from torchive.engine.train import train
from torchive.structures.landmarks import DEEPFASHION2
from torchive.transforms import build


def item(label: int, style: int, box: tuple[int, int, int, int], **more: Any) -> dict[str, Any]:
    """One item in the form of the data; its landmarks lie on the box's diagonal, hidden, visible and not marked."""
    x1, y1, x2, y2 = box
    count = DEEPFASHION2.counts[label - 1]
    points: list[float] = []
    for k in range(count):
        seen = (2, 1, 0)[k % 3]
        points += [x1 + (x2 - x1) * k / count, y1 + (y2 - y1) * k / count, seen] if seen else [0, 0, 0]
    return {
        "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
        "scale": 2,
        "viewpoint": 3,
        "zoom_in": 1,
        "landmarks": points,
        "style": style,
        "bounding_box": list(box),
        "category_id": label,
        "occlusion": 1,
        "category_name": DEEPFASHION2.names[label - 1],
    } | more


USER = {"source": "user", "pair_id": 5, "item1": item(8, 1, (2, 2, 20, 30)), "item2": item(1, 0, (10, 4, 40, 22))}
SHOP = {"source": "shop", "pair_id": 5, "item1": item(1, 2, (0, 0, 30, 30)), "item2": item(8, 1, (4, 4, 40, 30))}
OTHER = {"source": "shop", "pair_id": 6, "item1": item(8, 1, (4, 4, 40, 30), occlusion=3)}


def write(root: Path, draw: Any, *contents: dict[str, Any], first: int = 1) -> Path:
    for number, content in enumerate(contents, first):
        draw(root / "image" / f"{number:06d}.jpg", size=(48, 32), seed=number)
        (root / "annos").mkdir(exist_ok=True)
        (root / "annos" / f"{number:06d}.json").write_text(json.dumps(content))
    return root


def test_what_is_read(tmp_path, draw, own_cache) -> None:
    root = tmp_path / "data"
    write(root / "train", draw, USER, SHOP)
    write(root / "validation", draw, OTHER, first=3)
    (root / "test" / "image").mkdir(parents=True)
    for source in (f"deepfashion2:{root}", str(root)):
        samples = open_data(source, "val")
        assert samples.ids == ("validation/000003",)
        assert samples.classes == DEEPFASHION2.names
    samples = open_data(str(root), "train")
    assert samples.pair_ids == [5] * len(samples)  # what shows the same items stays in one split
    everything = {name: samples[k].target for k, name in enumerate(samples.ids)}
    assert set(everything) == {"train/000001", "train/000002"}
    target = everything["train/000001"]
    assert target["boxes"].tolist() == [[2, 2, 20, 30], [10, 4, 40, 22]]
    assert target["labels"].tolist() == [8, 1]
    assert target["masks"].shape == (2, 32, 48)
    assert target["masks"].sum((1, 2)).tolist() == target["area"].tolist() == [18 * 28, 30 * 18]
    expected = {"pair_id": [5, 5], "style": [1, 0], "source": [1, 1], "scale": [2, 2], "occlusion": [1, 1]}
    assert {key: target[key].tolist() for key in expected} == expected
    points = target["keypoints"]
    assert points.shape == (2, 294, 3)
    assert (points[0, :168] == 0).all()
    assert (points[0, 182:] == 0).all()
    assert points[0, 169].tolist() == pytest.approx([2 + 18 / 14, 4, 1])
    assert (points[1, 25:] == 0).all()
    assert points[1, 0].tolist() == [10, 4, 2]
    assert everything["train/000002"]["source"].tolist() == [0, 0]
    assert check_data(str(root)).faults[0].kind == "empty-class"  # most of the 13 categories have no item here


def test_pairs_need_the_same_pair_and_style_and_another_source(tmp_path, draw) -> None:
    second = copy.deepcopy(USER)
    second["item2"]["style"] = 2
    index = read_deepfashion2(write(tmp_path, draw, USER, SHOP, OTHER, second))
    assert set(item_pairs(index.records)) == {
        (("000001", 0), ("000002", 1)),
        (("000004", 0), ("000002", 1)),
        (("000004", 1), ("000002", 0)),
    }


def test_as_coco(tmp_path, draw, own_cache) -> None:
    root = write(tmp_path / "data", draw, USER, OTHER)
    content = json.loads(json.dumps(coco_annotations(root)))
    assert [image["id"] for image in content["images"]] == [1, 2]
    assert content["images"][0] | {"id": 0} == {"id": 0, "file_name": "000001.jpg", "width": 48, "height": 32}
    first, second, third = content["annotations"]
    assert (first["bbox"], first["area"], first["iscrowd"]) == ([2, 2, 18, 28], 18 * 28, 0)
    assert (first["id"], second["id"], third["image_id"]) == (1, 2, 2)
    assert len(first["keypoints"]) == 882
    assert first["keypoints"][3 * 168 : 3 * 182] == USER["item1"]["landmarks"]
    assert not any(first["keypoints"][: 3 * 168] + first["keypoints"][3 * 182 :])
    assert first["num_keypoints"] == 10
    assert (third["occlusion"], third["pair_id"], third["style"], third["source"]) == (3, 6, 1, "shop")
    file = tmp_path / "coco.json"
    file.write_text(json.dumps(content))
    samples = open_data(f"coco:{file},{root / 'image'}", seed=2)
    target = samples[0].target
    assert target["masks"].sum() > 0
    assert len(samples.classes) == 13
    write(tmp_path / "both" / "train", draw, USER)
    write(tmp_path / "both" / "validation", draw, SHOP)
    with pytest.raises(DataError, match="of several splits name one"):
        coco_annotations(tmp_path / "both")
    assert len(coco_annotations(tmp_path / "both", "val")["annotations"]) == 2


def test_sizes_come_from_the_headers(tmp_path, draw, monkeypatch) -> None:
    """No image is decoded; one that lies on its side is as high as it is wide."""
    root = write(tmp_path, draw, SHOP, USER, USER)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (32, 48)).save(root / "image" / "000001.jpg", exif=turned)
    cut = root / "image" / "000003.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    sizes = [(image["width"], image["height"]) for image in coco_annotations(root)["images"]]
    assert sizes == [(48, 32)] * 3
    cut.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"000003\.jpg: "):
        coco_annotations(root)


def damaged(change: Any) -> dict[str, Any]:
    content = copy.deepcopy(USER)
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (
            lambda c: c.update(source="shops"),
            "broken",
            "source must be shop or user, got 'shops'; did you mean 'shop'?",
        ),
        (lambda c: c.update(pair_id="5"), "broken", "pair_id must be a whole number, got '5'"),
        (lambda c: c.update(itm3=c.pop("item2")), "broken", "unknown key 'itm3'; did you mean 'item1'?"),
        (
            lambda c: c["item1"].update(bbox=c["item1"].pop("bounding_box")),
            "broken",
            "item1: lacks bounding_box; is it 'bbox'?",
        ),
        (lambda c: c["item1"].update(zoom=c["item1"].pop("zoom_in")), "broken", "lacks zoom_in; is it 'zoom'?"),
        (lambda c: c["item1"].pop("style"), "broken", "item1: lacks style"),
        (
            lambda c: c["item2"].update(category_id=14),
            "label",
            "category_id must lie in 1 to 13, got 14; 'short sleeve",
        ),
        (
            lambda c: c["item1"].update(category_name="trouser"),
            "label",
            "category_id 8 is 'trousers', category_name says 'trouser'; did you mean 'trousers'?",
        ),
        (
            lambda c: c["item1"].update(landmarks=c["item1"]["landmarks"][:30]),
            "broken",
            "landmarks of 'trousers' must be 14 times x, y, v, 42 numbers, got 30; 30 are those of shorts",
        ),
        (lambda c: c["item1"]["landmarks"].__setitem__(2, 3), "broken", "v must be 0 .not marked., .*, got 3"),
        (lambda c: c["item1"].update(landmarks=None), "broken", "42 numbers, got None"),
        (lambda c: c["item1"].update(occlusion=0), "broken", "occlusion must be 1, 2 or 3, got 0"),
        (lambda c: c["item1"].update(style=-1), "broken", "style must be a whole number, .*, got -1"),
        (
            lambda c: c["item1"].update(bounding_box=[1, 2, 3]),
            "broken",
            r"bounding_box must be four numbers.*\[1, 2, 3",
        ),
        (lambda c: c.update(item1=[]), "broken", r"item1: expected an item's annotations, got \[\]"),
        (lambda c: c["item1"].update(bounding_box=[9, 9, 9, 20]), "box-empty", "item1: the box has no area"),
        (lambda c: c["item1"].update(segmentation=[[1, 2, 3]]), "broken", "item1: a polygon needs at least three"),
        (lambda c: c["item1"].update(bounding_box=[2, 2, 99, 20]), "box-outside", "item1: the box reaches outside"),
    ],
)
def test_damaged_annotations(tmp_path, draw, own_cache, change, kind, words) -> None:
    root = write(tmp_path / "data", draw, SHOP, damaged(change), OTHER)
    faults = [fault for fault in check_data(str(root)).faults if fault.kind != "empty-class"]
    assert {(fault.kind, fault.sample) for fault in faults} == {(kind, "000002")}
    with pytest.raises(DataError, match=words):
        open_data(str(root))
    left = sum(len(_opened(root, split)) for split in ("train", "val", "test"))
    assert left == 2


def _opened(root: Path, split: str) -> Any:
    try:
        return open_data(str(root), split, skip_faulty=True)
    except DataError:
        return ()


def test_broken_files(tmp_path, draw, own_cache) -> None:
    root = write(tmp_path / "data", draw, SHOP, USER)
    for text, words in (
        ("{", "not valid JSON"),
        ("[]", "expected source, pair_id and items, got list"),
        ("[" * 100_000, "not valid JSON"),
    ):
        (root / "annos" / "000002.json").write_text(text)
        with pytest.raises(DataError, match=words):
            open_data(str(root))
    with pytest.raises(DataError, match=r"expected annos/\*.json and image/"):
        open_data(f"deepfashion2:{tmp_path / 'image'}")
    (root / "annos" / "000002.json").write_text(json.dumps(USER))
    (root / "image" / "000002.jpg").unlink()
    with pytest.raises(DataError, match="missing"):
        open_data(str(root))


def test_an_image_without_items(tmp_path, draw, own_cache) -> None:
    root = write(tmp_path, draw, *([{"source": "user", "pair_id": 9}, USER, SHOP] * 2))
    parts = [_opened(root, split) for split in ("train", "val", "test")]
    targets = [samples[k].target for samples in parts for k in range(len(samples))]
    empty = [target for target in targets if not len(target["labels"])]
    assert (len(targets), len(empty)) == (6, 2)
    for target in empty:
        assert target["keypoints"].shape == (0, 294, 3)
        assert target["style"].shape == target["labels"].shape == (0,)


def test_landmarks_follow_the_image_and_are_not_mirrored(tmp_path, draw, own_cache) -> None:
    root = write(tmp_path, draw, USER, SHOP)
    index = read_deepfashion2(root)
    assert not index.faults
    sample = open_data(str(root))[0]
    small = build("detection", image_size=24, train=True, augment=["light"])(sample)
    torch.testing.assert_close(small.target["keypoints"][..., :2], sample.target["keypoints"][..., :2] / 2)
    assert torch.equal(small.target["keypoints"][..., 2], sample.target["keypoints"][..., 2])
    for name in ("flip", "iou_crop"):
        with pytest.raises(ValueError, match=r"does not move landmarks, .* as augment: \[light\]"):
            build("detection", image_size=24, train=True, augment=[name])(sample)


def test_a_batch_holds_whole_pairs(tmp_path, draw, own_cache) -> None:
    pairs = [3, 1, 2, 1, 3, 2, 2]
    order = pair_order(pairs, 0)
    for epoch in range(4):
        found = order(epoch)
        assert sorted(found) == list(range(7))
        shown = [pairs[k] for k in found]
        assert sum(a != b for a, b in pairwise(shown)) == 2
    assert order(0) == order(0)
    assert {tuple(order(k)) for k in range(20)} != {tuple(order(0))}
    contents = [{**content, "pair_id": k} for k in range(30) for content in (USER, SHOP)]
    samples = open_data(str(write(tmp_path, draw, *contents)))
    recipe = load_recipe("detection/nuclei_htc", [])
    listed = class_order(recipe, samples, None)(0)
    shown = [samples.pair_ids[k] for k in listed]
    assert shown[::2] == shown[1::2]


def test_training_and_scoring_from_the_files(tmp_path, draw, own_cache) -> None:
    """The recipe on these files: all five losses, and at the end boxes, masks, landmarks and retrieval by part."""
    contents = [
        {**copy.deepcopy(content), "pair_id": k} for k in range(12) for content in (USER, {**SHOP, "source": "shop"})
    ]
    source = f"deepfashion2:{write(tmp_path / 'data', draw, *contents)}"
    overrides = [
        "model.init_args.backbone=timm/test_efficientnet",
        "model.init_args.landmarks=deepfashion2",
        "model.init_args.landmark_channels=8",
        "model.init_args.channels=8",
        "model.init_args.matching=pose+class",
        f"data.source={source}",
        "data.augment=[light]",
        "data.image_size=64",
        "data.workers=0",
        "train.steps=2",
        "metric=landmark_map",
    ]
    result = train(load_recipe("detection/pairs_match_rcnn", overrides), tmp_path / "run")
    steps = [line for line in result.history if line["kind"] == "train"]
    assert {"loss_classifier", "loss_box_reg", "loss_mask", "loss_keypoint", "loss_pair"} <= set(steps[-1])
    assert all(value >= 0 for key, value in steps[-1].items() if key.startswith("loss"))
    wanted = {"map", "mask_map", "landmark_map", "visible_map", "landmark_map/scale/moderate", "map/occlusion/slight"}
    assert wanted | {"top_1", "top_20", "top_20/viewpoint/side or back", "missed"} <= set(result.metrics)
