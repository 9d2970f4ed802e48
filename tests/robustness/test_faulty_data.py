"""Damaged images and annotations: found by the check, refused by training, and nothing that was there is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from torchive.data import files
from torchive.engine.checkpoint import load_checkpoint

from .conftest import Ended, Run, assert_refused, assert_same, fingerprint

ENTITIES = "".join(f'<!ENTITY x{i} "{f"&x{i - 1};" * 10}">' for i in range(1, 10))
LAUGHS = f'<!DOCTYPE a [<!ENTITY x0 "ha">{ENTITIES}]>'
OUTSIDE = '<!DOCTYPE a [<!ENTITY x0 SYSTEM "file:///etc/hostname"><!ENTITY x9 "&x0;">]>'


def bomb(path: Path) -> None:
    """A PNG of 60,000 x 60,000 pixels in a few hundred bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(180_001))) + chunk(b"IEND", b"")
    )


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


IMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "truncated"),
    "header only": (lambda path: path.write_bytes(path.read_bytes()[:20]), "truncated"),
    "text": (lambda path: path.write_text("no picture"), "unreadable"),
    "empty": (lambda path: path.write_bytes(b""), "zero-byte"),
    "bomb": (bomb, "bomb"),
    "pipe": (pipe, "unreadable"),
}
PICTURES = {
    "folder": "folder/circle/003.png",
    "csv": "csv/pictures/003.png",
    "coco": "coco/images/003.png",
    "voc": "voc/JPEGImages/003.png",
    "masks": "masks/images/003.jpg",
}
SOURCES = {"csv": "csv/table.csv", "coco": "coco/annotations.json"}


def assert_both_refuse(kind: str, torchive: Run, continued: Run, *parts: str) -> None:
    """The check lists the fault, training refuses it in one line, and data and run are as they were."""
    places = [Path("runs"), *(Path(name) for name in ("coco", "csv", "masks", "voc"))]
    before = fingerprint(*places)
    listed = torchive("data", "check", SOURCES.get(kind, kind))
    assert (listed.status, listed.err) == (2, "")
    assert all(any(part in line for line in listed.out.splitlines()[:-1]) for part in parts), listed.out
    assert re.search(r"\d+ faults? \(", listed.out.splitlines()[-1])
    assert_refused(continued(kind), *parts)
    assert fingerprint(*places) == before


@pytest.mark.parametrize("how", IMAGES)
def test_damaged_images(how: str, torchive: Run, continued: Run) -> None:
    if how == "pipe" and os.name == "nt":
        return
    victim = Path(PICTURES["folder"])
    IMAGES[how][0](victim)
    assert_both_refuse("folder", torchive, continued, str(victim), IMAGES[how][1])


@pytest.mark.parametrize("kind", [kind for kind in PICTURES if kind != "folder"])
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_damaged_images_of_other_formats(kind: str, how: str, torchive: Run, continued: Run) -> None:
    victim = Path(PICTURES[kind])
    if how == "truncated":
        IMAGES[how][0](victim)
    else:
        victim.unlink()
    named = "masks/masks/003.png" if (kind, how) == ("masks", "missing") else str(victim)  # the mask has no image then
    assert_both_refuse(kind, torchive, continued, named, how)


def edit(path: str, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(Path(path).read_text())
    change(content)
    Path(path).write_text(json.dumps(content))


def first(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content["annotations"][0].update(changes)


COCO = {
    "box outside": (first(bbox=[40, 10, 50, 10]), ["annotation 1", "outside the image of 56 x 48"]),
    "box without area": (first(bbox=[4, 4, 0, 9]), ["annotation 1", "no area"]),
    "box of text": (first(bbox=["4", 4, 3, 9]), ["annotation 1", "four numbers"]),
    "box of a thousand digits": (first(bbox=[10**1000, 4, 3, 9]), ["annotation 1", "four numbers"]),
    "label": (first(category_id=77), ["annotation 1", "category_id 77"]),
    "label that is a list": (first(category_id=[10]), ["annotation 1", "category_id [10]"]),
    "crowd as text": (first(iscrowd="0"), ["annotation 1", "iscrowd"]),
    "mask of another size": (first(segmentation={"size": [9, 9], "counts": [81]}), ["annotation 1", "[48, 56]"]),
    "mask of too many runs": (first(segmentation={"size": [48, 56], "counts": [2**40]}), ["annotation 1", "decoded"]),
    "mask of broken text": (first(segmentation={"size": [48, 56], "counts": "0" * 999}), ["annotation 1", "decoded"]),
    "endless polygon": (first(segmentation=[[-1e8, -1e8, 1e8, -1e8, 1e8, 1e8]]), ["annotation 1", "far outside"]),
    "no such image": (first(image_id=99), ["annotation 1", "image_id 99"]),
    "two of one id": (first(id=2), ["annotation 2", "another annotation"]),
    "image id that is a table": (lambda c: c["images"][0].update(id={}), ["images[0]", "lacks id"]),
    "zero in a file's name": (lambda c: c["images"][0].update(file_name="a\0b.png"), ["a\\x00b.png", "null byte"]),
    "broken Unicode": (lambda c: c["images"][0].update(file_name="\ud800.png"), ["\\ud800.png", "file's name"]),
    "no categories": (lambda c: c.pop("categories"), ["categories is not a list"]),
}


@pytest.mark.parametrize("how", COCO)
def test_faulty_coco(how: str, torchive: Run, continued: Run) -> None:
    change, parts = COCO[how]
    edit("coco/annotations.json", change)
    assert_both_refuse("coco", torchive, continued, "coco/", *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"images": [],\n "annotations": [}', ["annotations.json:2:", "not valid JSON"]),
        ("[" * 100_000, ["nested too deeply"]),
        ('{"images": [' + "9" * 5000 + "]}", ["not valid JSON", "4300 digits"]),
        ("[1, 2]", ["images is not a list"]),
        ("", ["annotations.json:1:", "not valid JSON"]),
    ],
    ids=["cut", "deep", "digits", "list", "empty"],
)
def test_broken_json(text: str, parts: list[str], place: Path, torchive: Run, continued: Run) -> None:
    Path("coco/annotations.json").write_text(text)
    assert_both_refuse("coco", torchive, continued, "coco/annotations.json", *parts)


def test_json_of_another_encoding(place: Path, torchive: Run, continued: Run) -> None:
    Path("coco/annotations.json").write_bytes(b"\xff\xfe{}")
    assert_refused(torchive("data", "check", "coco/annotations.json"), "coco/annotations.json", "UTF-8")
    assert_refused(continued("coco"), "coco/annotations.json", "UTF-8")


VOC: dict[str, tuple[Callable[[str], str], list[str]]] = {
    "cut": (lambda text: text[: len(text) // 2], ["003.xml:", "not valid XML"]),
    "entities": (lambda text: LAUGHS + text.replace("circle", "&x9;"), ["003.xml", "entity is not allowed"]),
    "file as an entity": (lambda text: OUTSIDE + text.replace("circle", "&x9;"), ["003.xml", "entity is not allowed"]),
    "box outside": (lambda text: re.sub(r"<xmax>\d+", "<xmax>99", text, count=1), ["003.xml:4:", "outside the image"]),
    "box of text": (lambda text: re.sub(r"<xmax>\d+", "<xmax>wide", text, count=1), ["003.xml:4:", "no number"]),
    "label": (lambda text: text.replace("circle", "oval"), ["003.xml:4:", "'oval' is not in the class list"]),
    "another size": (lambda text: text.replace("<width>56", "<width>65"), ["003.xml:1:", "65 x 48"]),
}


@pytest.mark.parametrize("how", VOC)
def test_faulty_voc(how: str, place: Path, torchive: Run, continued: Run) -> None:
    Path("voc/classes.txt").write_text("circle\nsquare\ntriangle\n")
    file = Path("voc/Annotations/003.xml")
    file.write_text(VOC[how][0](file.read_text()))
    assert_both_refuse("voc", torchive, continued, "voc/Annotations/", *VOC[how][1])


CSV: dict[str, tuple[Callable[[str], str], list[str]]] = {
    "label": (lambda text: text.replace("001.png,square", "001.png,sqare"), ["table.csv:3:", "'sqare' is not in"]),
    "cell too few": (lambda text: text.replace("001.png,square", "001.png"), ["table.csv:3:", "expected 2 values"]),
    "twice": (lambda text: text + "pictures/000.png,circle\n", ["table.csv:26:", "duplicate"]),
    "zero in a name": (lambda text: text.replace("001.png", "0\0.png"), ["0\\x00.png", "table.csv:3"]),
}


@pytest.mark.parametrize("how", CSV)
def test_faulty_tables(how: str, place: Path, torchive: Run, continued: Run) -> None:
    Path("csv/classes.txt").write_text("circle\nsquare\ntriangle\n")
    Path("csv/table.csv").write_text(CSV[how][0](Path("csv/table.csv").read_text()))
    assert_both_refuse("csv", torchive, continued, "table.csv", *CSV[how][1])


MASKS: dict[str, tuple[Image.Image, str]] = {
    "of another size": (Image.new("L", (48, 56)), "48 x 56, its image 56 x 48"),
    "with an unknown class": (Image.fromarray(np.full((48, 56), 9, np.uint8)), "holds 9"),
    "in colours": (Image.new("RGB", (56, 48)), "mode RGB"),
}


@pytest.mark.parametrize("how", MASKS)
def test_faulty_masks(how: str, place: Path, torchive: Run, continued: Run) -> None:
    MASKS[how][0].save("masks/masks/003.png")
    assert_both_refuse("masks", torchive, continued, "masks/masks/003.png", MASKS[how][1])


def test_skip_faulty_trains_and_lists_what_was_left_out(place: Path, torchive: Run) -> None:
    for how, name in (("truncated", "003"), ("empty", "006")):
        IMAGES[how][0](Path(f"folder/circle/{name}.png"))
    told = torchive("train", "small.yaml", "--data", "folder", "--skip-faulty", "--out", "runs/new", "--quiet")
    assert (told.status, told.err) == (0, "")
    assert "2 fault(s)" in told.out
    data = json.loads(Path("runs/new/environment.json").read_text())["data"]
    assert [fault.split(": ")[0] for fault in data["left_out"]] == [f"folder/circle/{n}.png" for n in ("003", "006")]
    assert sum(data["samples"].values()) < 22  # train and val; two of 24 are left out, the test split is not read


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_after_the_check(
    workers: int, place: Path, prepared: Path, continued: Run, torchive: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends in one line; once the image is mended it goes on, and ends as if nothing had happened."""
    assert continued("folder").status == 0
    whole = load_file("runs/folder/model.safetensors")
    shutil.rmtree("runs/folder")
    shutil.copytree(prepared / "runs" / "folder", "runs/folder")
    victims = sorted(Path("folder/circle").iterdir())
    real = files.read_image
    monkeypatch.setattr(files, "read_image", lambda path: (_cut(path, victims), real(path))[1])
    assert_refused(continued("folder", f"data.workers={workers}"), "folder/circle/", "truncated")
    assert load_checkpoint(Path("runs/folder/last.safetensors")).values["step"] >= 2
    monkeypatch.undo()
    monkeypatch.chdir(place)
    shutil.copytree(prepared / "folder", "folder", dirs_exist_ok=True)
    assert continued("folder").status == 0
    assert_same(load_file("runs/folder/model.safetensors"), whole)


def _cut(path: Path, victims: list[Path]) -> None:
    if path in victims:
        path.write_bytes(path.read_bytes()[:200])


def test_a_strip_that_would_grow_beyond_memory(place: Path, torchive: Run) -> None:
    Image.new("L", (2_000_000, 1)).save("folder/circle/strip.png")
    ended = torchive("train", "small.yaml", "--data", "folder", "--out", "runs/new", "--quiet", "data.image_size=64")
    assert_refused(ended, "circle/strip.png", "2000000 x 1")


ODD = {
    "nowhere": "no such file",
    "slar": "did you mean solar?",
    "folder/circle": "no folder for each class",
    "small.yaml": "not a kind of data",
    "folder:nowhere": "no such folder",
    "coco:coco/annotations.json,nowhere": "missing",
    "masks:masks/images": "no such folder",
}


@pytest.mark.parametrize("source", ODD)
def test_sources_that_are_none(source: str, place: Path, torchive: Run) -> None:
    if source == "nowhere":
        source = "./nowhere"
    ended = torchive("train", "small.yaml", "--data", source, "--out", "runs/new")
    assert_refused(ended, ODD.get(source, "no such file"))
    assert not Path("runs/new").exists()


@pytest.mark.parametrize("name", ["a #1", "yes", "12", "a: b", "[x]", "été 😀", "{split}x", "it's"])
def test_paths_of_any_characters(name: str, place: Path, torchive: Run) -> None:
    Path("folder").rename(name)
    told: Ended = torchive(
        "train", "small.yaml", "--data", f"./{name}", "--out", "runs/new", "--quiet", "train.steps=1"
    )
    if "{split}" in name:
        assert_refused(told, name)
        return
    assert (told.status, told.err) == (0, "")
    assert torchive("evaluate", "runs/new", "--data", f"./{name}").status == 0
