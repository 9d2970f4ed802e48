"""Each format is read as its own rules say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from torchive.data import DataError, open_data, read_image
from torchive.data.readers.source import Source, read_index

SPLITS = ("train", "val", "test")


def ids(source: str) -> dict[str, set[str]]:
    return {split: set(open_data(source, split).ids) for split in SPLITS}


def test_folder_classes_labels_and_split(folder: Path) -> None:
    found = ids(f"folder:{folder}")
    assert set().union(*found.values()) == {f"{('cat', 'dog')[n % 2]}/{n:02d}.png" for n in range(20)}
    assert sum(map(len, found.values())) == 20
    for split in SPLITS:
        samples = open_data(str(folder), split)
        assert samples.classes == ("cat", "dog")
        assert {samples[i].target for i in range(len(samples))} == {0, 1}
        assert all(samples[i].target == int(samples.ids[i].startswith("dog")) for i in range(len(samples)))
    assert samples[0].image.dtype == torch.uint8
    assert samples[0].image.shape == (3, 12, 16)


def test_folder_with_given_splits_keeps_them_and_cuts_the_lacking_one_from_train(tmp_path, draw, own_cache) -> None:
    for number in range(24):
        split = "train" if number < 18 else "valid"
        draw(tmp_path / "data" / split / ("a", "b")[number % 2] / f"{number}.png", seed=number)
    found = ids(str(tmp_path / "data"))
    assert all(name.startswith("valid/") for name in found["val"])
    assert len(found["val"]) == 6
    assert found["test"]
    assert all(name.startswith("train/") for name in found["test"] | found["train"])
    assert not found["test"] & found["train"]


def test_folder_honours_a_class_list(folder: Path) -> None:
    (folder / "classes.txt").write_text("dog\ncat\n")
    samples = open_data(f"folder:{folder}")
    assert samples.classes == ("dog", "cat")
    assert samples[list(samples.ids).index(next(i for i in samples.ids if i.startswith("dog")))].target == 0


def test_csv_of_labels(tmp_path, draw, own_cache) -> None:
    rows = ["path,class,subset"]
    for number in range(12):
        draw(tmp_path / "i" / f"{number}.png", seed=number)
        rows.append(f"i/{number}.png,{10 if number % 2 else 9},{('train', 'val', 'test')[number % 3]}")
    (tmp_path / "t.csv").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    samples = open_data(str(tmp_path / "t.csv"), "val")
    assert samples.classes == ("9", "10")
    assert samples.ids == ("i/1.png", "i/4.png", "i/7.png", "i/10.png")
    assert [samples[i].target for i in range(4)] == [1, 0, 1, 0]


def test_csv_without_header_and_with_semicolons(tmp_path, draw, own_cache) -> None:
    for number in range(6):
        draw(tmp_path / f"{number}.png", seed=number)
    (tmp_path / "t.csv").write_text("\n".join(f"{n}.png;{'ab'[n % 2]}" for n in range(6)))
    assert sum(len(open_data(f"csv:{tmp_path / 't.csv'}", split)) for split in SPLITS) == 6


def test_csv_of_boxes(tmp_path, draw, own_cache) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png", seed=1)
    header = "image_path,xmin,ymin,xmax,ymax,label,split"
    rows = ["a.png,1,2,5,6,oak,train", "a.png,0,0,3,3,elm,train", "b.png,,,,,,val"]
    (tmp_path / "boxes.csv").write_text("\n".join([header, *rows]))
    samples = open_data(f"csv:{tmp_path / 'boxes.csv'}", "train")
    assert (samples.task, samples.classes) == ("detection", ("elm", "oak"))
    target = samples[0].target
    assert target["boxes"].tolist() == [[1, 2, 5, 6], [0, 0, 3, 3]]
    assert target["labels"].tolist() == [2, 1]
    empty = open_data(f"csv:{tmp_path / 'boxes.csv'}", "val")[0].target
    assert empty["boxes"].shape == (0, 4)
    assert empty["labels"].dtype == torch.int64


def test_coco_boxes_labels_and_polygons(coco: Path) -> None:
    samples = open_data(f"coco:{coco / 'ann.json'},{coco / 'images'}")
    assert samples.classes == ("cat", "dog")  # categories in the order of their ids
    sample = samples[0]
    assert sample.target["boxes"].tolist() == [[2, 2, 8, 6]]
    assert sample.target["labels"].tolist() == [2 if int(Path(sample.id).stem) % 2 else 1]
    expected = torch.zeros(12, 16, dtype=torch.uint8)
    expected[2:6, 2:8] = 1
    assert torch.equal(sample.target["masks"][0], expected)


@pytest.mark.parametrize("text", [False, True])
def test_coco_runs(coco: Path, text: bool) -> None:
    mask = np.zeros((12, 16), np.uint8)
    mask[3:7, 4:9] = 1
    flat = mask.T.ravel()  # COCO counts along columns
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts: object = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    if text:
        from faster_coco_eval.core.mask import encode

        counts = encode(np.asfortranarray(mask))["counts"].decode()
    content = json.loads((coco / "ann.json").read_text())
    for entry in content["annotations"]:
        entry["segmentation"] = {"size": [12, 16], "counts": counts}
    (coco / "ann.json").write_text(json.dumps(content))
    assert np.array_equal(open_data(str(coco / "ann.json"))[0].target["masks"][0].numpy(), mask)


def test_coco_paths_by_split(coco: Path) -> None:
    for split in ("train", "val"):
        (coco / f"{split}.json").write_text((coco / "ann.json").read_text())
    source = f"coco:{coco}/{{split}}.json,{coco}/images"
    assert len(open_data(source, "val")) == 8
    assert all(name.startswith("val/") for name in open_data(source, "val").ids)


def without(coco: Path, split: str, *, shapes: int = 0, objects: bool = True) -> None:
    """A split's file in which the first objects lack their shapes, or in which no image has an object."""
    content = json.loads((coco / "ann.json").read_text())
    for entry in content["annotations"][:shapes]:
        del entry["segmentation"]
    if not objects:
        content["annotations"] = []
    (coco / f"{split}.json").write_text(json.dumps(content))


def test_a_split_without_an_object_takes_no_masks_from_the_others(coco: Path) -> None:
    without(coco, "train")
    without(coco, "val", objects=False)
    source = f"coco:{coco}/{{split}}.json,{coco}/images"
    train, val = (open_data(source, split) for split in ("train", "val"))
    assert train[0].target["masks"].shape == (1, 12, 16)
    assert val[0].target["masks"].shape == (0, 12, 16)
    assert train.notes == ()


def test_a_split_that_lacks_shapes_is_named_to_all(coco: Path) -> None:
    without(coco, "train")
    without(coco, "val", shapes=2)
    without(coco, "test", shapes=8)
    samples = open_data(f"coco:{coco}/{{split}}.json,{coco}/images")
    assert "masks" not in samples[0].target
    partly, *others = samples.notes
    assert partly.startswith(f"{coco}/val.json: 2 of 8 objects have no segmentation")
    assert [note.split(": ")[0] for note in others] == [f"{coco}/val.json", f"{coco}/test.json"]
    assert all("the other splits" in note for note in others)
    (coco / "train.json").unlink()
    only = read_index(Source("coco", (f"{coco}/{{split}}.json", f"{coco}/images")), ("test",))
    assert (only.masks, only.notes) == (False, [])


def test_voc_counts_from_one_and_reads_its_splits(voc: Path) -> None:
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    for split, stems in (("train", "0\n1\n2\n"), ("val", "3\n4\n"), ("test", "5\n")):
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text(stems)
    samples = open_data(str(voc), "val")
    assert samples.ids == ("3", "4")
    assert samples[0].target["boxes"].tolist() == [[0, 1, 8, 12]]
    assert samples[0].target["labels"].tolist() == [1]


def test_masks_keep_indices_and_the_ignored_value(masks: Path) -> None:
    for source in (str(masks), f"masks:{masks}/images,{masks}/masks"):
        samples = open_data(source)
        assert (samples.task, samples.classes) == ("segmentation", ("0", "1"))
        target = samples[0].target
        assert target.dtype == torch.int64
        assert target[0, 0] == 255
        assert target[3, 4] == 1


def test_sixteen_bits_are_scaled_and_palettes_are_colours(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65535], [257, 32896]], np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0].tolist() == [[0, 255], [1, 128]]
    Image.new("RGB", (2, 2), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png")[:, 0, 0].tolist() == [10, 20, 30]


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    picture = Image.new("RGB", (6, 4))
    exif = picture.getexif()
    exif[274] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 6, 4)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("sollar", "did you mean solar"),
        ("folder:{tmp}/absent", "no such folder"),
        ("{tmp}/absent.csv", "no such file"),
        ("coco:{tmp}/x.json,{tmp},more", "expected coco:"),
        ("csv:", "expected csv:"),
        ("{tmp}", "expected folder:"),
    ],
)
def test_a_wrong_source_is_one_clear_line(tmp_path: Path, own_cache: Path, source: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        open_data(source.replace("{tmp}", str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_wrong_split_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="train, val, test"):
        open_data(str(folder), "training")
