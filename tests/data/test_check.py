"""Each fault is found once, under its kind, with its file and line; nothing else is."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from torchive.data import DataError, Fault, check_data, open_data

from .annotations import voc_xml


def only(source: str | Path) -> Fault:
    faults = check_data(str(source)).faults
    assert len(faults) == 1, [str(fault) for fault in faults]
    return faults[0]


def huge_png(path: Path) -> None:
    """A valid PNG of 60,000 by 60,000 pixels in a few kilobytes: header, one line's worth of packed zeros, end."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 600_000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "zero-byte":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif how == "unreadable":
        path.write_bytes(b"this is no picture, whatever its name says")
    elif how == "bomb":
        huge_png(path)


@pytest.mark.parametrize("kind", ["zero-byte", "truncated", "unreadable", "bomb"])
def test_damaged_images_in_a_folder(folder: Path, kind: str) -> None:
    assert check_data(str(folder)).ok
    victim = folder / "cat" / "04.png"
    damage(victim, kind)
    fault = only(folder)
    assert (fault.kind, fault.file, fault.sample) == (kind, str(victim), "cat/04.png")


@pytest.mark.parametrize("kind", ["truncated", "bomb"])
def test_damaged_images_of_other_formats(tmp_path: Path, own_cache: Path, draw, kind: str) -> None:
    names = ("a.jpg", "b.tif", "c.webp", "d.gif", "e.bmp")
    (tmp_path / "t.csv").write_text("\n".join(["file,label", *(f"{name},x" for name in names)]))
    paths = [draw(tmp_path / name, size=(64, 64)) for name in names]
    assert check_data(str(tmp_path / "t.csv")).ok
    for path in paths:
        damage(path, kind)
    kinds = {Path(fault.file).name: fault.kind for fault in check_data(str(tmp_path / "t.csv")).faults}
    assert kinds == dict.fromkeys(names, kind)


@pytest.mark.parametrize("kind", ["missing", "zero-byte", "truncated", "unreadable", "bomb"])
def test_damaged_images_in_coco(coco: Path, kind: str) -> None:
    damage(coco / "images" / "3.png", kind)
    fault = only(coco / "ann.json")
    assert fault.kind == kind
    assert Path(fault.file).name == "3.png"


@pytest.fixture
def table(tmp_path: Path, draw, own_cache: Path) -> Callable[..., Path]:
    def write(*extra: str, header: str = "file,label") -> Path:
        for number in range(4):
            draw(tmp_path / f"{number}.png", seed=number)
        rows = [f"{number}.png,{'ab'[number % 2]}" for number in range(4)]
        if "xmin" in header:
            rows = [f"{row},1,1,6,6" for row in rows]
        (tmp_path / "classes.txt").write_text("a\nb\n")
        (tmp_path / "t.csv").write_text("\n".join([header, *rows, *extra]) + "\n")
        return tmp_path / "t.csv"

    return write


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("absent.png,a", "missing"),
        ("3.png,a", "duplicate"),
        ("0.png", "broken"),
        ("0.png,a,b", "broken"),
    ],
)
def test_faults_of_a_table_name_the_line(table, line: str, kind: str) -> None:
    file = table(line)
    fault = only(file)
    assert fault.kind == kind
    assert fault.line == 6 or f"{file}:6" in fault.message


def test_a_label_outside_the_class_list(table, draw) -> None:
    file = table("new.png,c")
    draw(file.with_name("new.png"), seed=9)
    fault = only(file)
    assert (fault.kind, fault.file, fault.line, fault.sample) == ("label", str(file), 6, "new.png")


BOX = "file,label,xmin,ymin,xmax,ymax"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("0.png,a,1,1,40,6", "box-outside"),
        ("0.png,a,-9,1,4,6", "box-outside"),
        ("0.png,a,20,20,24,24", "box-outside"),
        ("0.png,a,5,1,5,6", "box-empty"),
        ("0.png,a,6,1,5,6", "box-empty"),
        ("0.png,a,nan,1,5,6", "broken"),
        ("0.png,a,one,1,5,6", "broken"),
        ("0.png,c,1,1,5,6", "label"),
    ],
)
def test_faults_of_a_table_of_boxes(table, line: str, kind: str) -> None:
    file = table(line, header=BOX)
    fault = only(file)
    assert (fault.kind, fault.file, fault.line) == (kind, str(file), 6)


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("change", "kind", "named"),
    [
        (lambda c: c["annotations"][2].update(bbox=[2, 2, 60, 4]), "box-outside", "annotation 102"),
        (lambda c: c["annotations"][2].update(bbox=[2, 2, 0, 4]), "box-empty", "annotation 102"),
        (lambda c: c["annotations"][2].update(bbox=[2, 2, -1, 4]), "box-empty", "annotation 102"),
        (lambda c: c["annotations"][2].update(bbox=[2, 2, 4]), "broken", "annotation 102"),
        (lambda c: c["annotations"][2].update(bbox=[2, float("nan"), 4, 4]), "broken", "annotation 102"),
        (lambda c: c["annotations"][2].update(category_id=99), "label", "annotation 102"),
        (lambda c: c["annotations"][2].update(image_id=99), "broken", "annotation 102"),
        (lambda c: c["annotations"][2].update(id=101), "duplicate", "annotation 101"),
        (lambda c: c["annotations"][2].update(segmentation=[[1, 1, 2]]), "broken", "annotation 102"),
        (
            lambda c: c["annotations"][2].update(segmentation={"size": [9, 9], "counts": [81]}),
            "mask-size",
            "annotation 102",
        ),
        (
            lambda c: c["annotations"][2].update(segmentation={"size": [12, 16], "counts": [5]}),
            "broken",
            "annotation 102",
        ),
        (lambda c: c["images"].append(dict(c["images"][1])), "duplicate", "images[8]"),
        (lambda c: c["images"][1].update(width=99), "size", "1.png"),
        (lambda c: c["categories"].append({"id": 9, "name": "bird"}), "empty-class", "bird"),
        (lambda c: c.pop("categories"), "broken", "categories"),
    ],
)
def test_faults_of_coco_name_the_annotation(coco: Path, change: Any, kind: str, named: str) -> None:
    file = edit(coco / "ann.json", change)
    fault = only(file)
    assert (fault.kind, fault.file) == (kind, str(file))
    assert named in fault.message


def test_broken_json_names_the_line(coco: Path) -> None:
    (coco / "ann.json").write_text('{\n"images": [],\n"annotations": [}\n')
    fault = only(coco / "ann.json")
    assert (fault.kind, fault.line) == ("broken", 3)
    with pytest.raises(DataError, match="no sample is left"):
        open_data(str(coco / "ann.json"), skip_faulty=True)


@pytest.mark.parametrize(
    ("box", "name", "kind"),
    [
        ((1, 2, 30, 12), "cat", "box-outside"),
        ((5, 2, 4, 12), "cat", "box-empty"),
        ((1, 2, 8, 12), "cow", "label"),
    ],
)
def test_faults_of_voc_name_file_and_line(voc: Path, box: tuple[int, ...], name: str, kind: str) -> None:
    (voc / "classes.txt").write_text("cat\n")
    file = voc / "Annotations" / "2.xml"
    file.write_text(voc_xml(2, box, name))
    fault = only(voc)
    assert (fault.kind, fault.file, fault.line, fault.sample) == (kind, str(file), 4, "2")


@pytest.mark.parametrize(
    "start",
    [
        '<!DOCTYPE a [<!ENTITY x "xx"><!ENTITY y "&x;&x;&x;&x;">]>',
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>',
    ],
)
def test_xml_with_entities_is_never_expanded(voc: Path, start: str) -> None:
    file = voc / "Annotations" / "2.xml"
    file.write_text(start + voc_xml(2, (1, 2, 8, 12)).replace("cat", "&x;"))
    fault = only(voc)
    assert (fault.kind, fault.file) == ("broken", str(file))
    assert "entity" in fault.message


def test_broken_xml_names_the_line(voc: Path) -> None:
    (voc / "Annotations" / "2.xml").write_text("<annotation>\n<object>\n</annotation>")
    fault = only(voc)
    assert (fault.kind, fault.line) == ("broken", 3)


def test_an_image_without_annotation_is_not_dropped_silently(voc: Path, draw) -> None:
    picture = draw(voc / "JPEGImages" / "new.png")
    assert (only(voc).kind, only(voc).file) == ("missing", str(picture))
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    (voc / "ImageSets" / "Main" / "train.txt").write_text("0\n1\n9\n")
    assert (only(voc).kind, only(voc).sample) == ("missing", "9")


def test_a_link_to_nowhere_is_missing(folder: Path) -> None:
    (folder / "cat" / "new.png").symlink_to(folder / "nowhere.png")
    assert (only(folder).kind, only(folder).sample) == ("missing", "cat/new.png")


def test_a_mask_of_another_size(masks: Path) -> None:
    Image.fromarray(np.ones((5, 5), np.uint8)).save(masks / "masks" / "1.png")
    fault = only(masks)
    assert (fault.kind, Path(fault.file).name) == ("mask-size", "1.png")


def test_a_mask_with_an_index_outside_the_class_list(masks: Path) -> None:
    (masks / "classes.txt").write_text("ground\nroad\n")
    Image.fromarray(np.full((12, 16), 7, np.uint8)).save(masks / "masks" / "1.png")
    assert only(masks).kind == "label"


def test_masks_and_images_without_partner(masks: Path) -> None:
    (masks / "masks" / "1.png").unlink()
    (masks / "images" / "2.png").unlink()
    assert sorted(fault.kind for fault in check_data(str(masks)).faults) == ["missing", "missing"]


def test_a_colour_mask_is_unreadable(masks: Path) -> None:
    Image.new("RGB", (16, 12)).save(masks / "masks" / "1.png")
    assert only(masks).kind == "unreadable"


def test_masks_of_black_and_white_are_questioned(masks: Path) -> None:
    for file in (masks / "masks").iterdir():
        Image.fromarray(np.full((12, 16), 255, np.uint8)).save(file)
    assert only(masks).kind == "label"


def test_empty_class_and_stray_files_of_a_folder(folder: Path, draw) -> None:
    (folder / "fox").mkdir()
    assert (only(folder).kind, only(folder).message) == ("empty-class", "the class 'fox' has no sample")
    draw(folder / "fox" / "1.png")
    (folder / "fox" / "notes.txt").write_text("seen at dawn")
    assert check_data(str(folder)).ok
    draw(folder / "stray.png")
    assert only(folder).kind == "label"


def test_training_refuses_faults_unless_told_and_then_lists_them(folder: Path) -> None:
    damage(folder / "cat" / "04.png", "truncated")
    damage(folder / "dog" / "05.png", "zero-byte")
    with pytest.raises(DataError, match=r"04\.png: truncated.*and 1 more") as caught:
        open_data(str(folder))
    assert "\n" not in str(caught.value)
    kept = [open_data(str(folder), split, skip_faulty=True) for split in ("train", "val", "test")]
    assert sum(map(len, kept)) == 18
    assert [fault.kind for fault in kept[0].left_out] == ["truncated", "zero-byte"]
    assert not {"cat/04.png", "dog/05.png"} & {name for part in kept for name in part.ids}


def test_leaving_samples_out_moves_no_other_sample(folder: Path) -> None:
    before = {split: set(open_data(str(folder), split).ids) for split in ("train", "val", "test")}
    damage(folder / "cat" / "04.png", "truncated")
    for split, names in before.items():
        assert set(open_data(str(folder), split, skip_faulty=True).ids) == names - {"cat/04.png"}


def test_a_check_is_kept_until_a_file_changes(folder: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_data(str(folder)).ok
    reads: list[Path] = []
    from torchive.data import check

    real = check.read_image
    monkeypatch.setattr(check, "read_image", lambda path: (reads.append(path), real(path))[1])
    open_data(str(folder))
    assert not reads
    damage(folder / "cat" / "04.png", "truncated")
    assert only(folder).kind == "truncated"
    assert len(reads) == 20


def test_the_report_in_text_and_json(folder: Path) -> None:
    damage(folder / "cat" / "04.png", "zero-byte")
    report = check_data(str(folder))
    assert not report.ok
    assert report.render().splitlines()[-1].endswith("20 samples, 2 classes (classification): 1 fault (1 zero-byte)")
    assert type(report).from_json(json.loads(json.dumps(report.to_json()))) == report
