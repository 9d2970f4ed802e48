"""Pictures of coloured shapes, drawn for each test, in every format that is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

NAMES = ("circle", "square", "triangle")
WIDTH, HEIGHT = 56, 48
Box = tuple[int, int, int, int]
Picture = tuple[Image.Image, Image.Image, list[tuple[int, Box]]]


def picture(number: int, shapes: int = 1, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Picture:
    """An image, its mask of indices (0 the ground, then ``NAMES``), and (index into ``NAMES``, xyxy box) of each shape.
    The first shape is ``NAMES[number % 3]``."""
    draws = np.random.default_rng(number)
    width, height = size
    ground = draws.integers(0, 70, 3) + draws.integers(0, 25, (height, width, 1))
    image, mask = Image.fromarray(ground.astype(np.uint8)), Image.new("L", size)
    found = []
    for place in range(shapes):
        kind = (number + place) % len(NAMES)
        side = int(draws.integers(14, 20))
        x = int(draws.integers(1, width // shapes - side - 1)) + place * width // shapes
        y = int(draws.integers(1, height - side - 1))
        colour = tuple(int(value) for value in draws.integers(130, 255, 3))
        for canvas, fill in ((image, colour), (mask, kind + 1)):
            _draw(ImageDraw.Draw(canvas), kind, (x, y, x + side - 1, y + side - 1), fill)
        found.append((kind, (x, y, x + side, y + side)))
    return image, mask, found


def _draw(pen: ImageDraw.ImageDraw, kind: int, box: Box, fill: Any) -> None:
    x0, y0, x1, y1 = box
    if NAMES[kind] == "circle":
        pen.ellipse(box, fill=fill)
    elif NAMES[kind] == "square":
        pen.rectangle(box, fill=fill)
    else:
        pen.polygon([(x0, y1), (x1, y1), ((x0 + x1) // 2, y0)], fill=fill)


def draw_folder(root: Path, count: int = 24, splits: bool = False) -> Path:
    """A folder for each class; with ``splits`` under train, val and test."""
    for number in range(count):
        split = ("train", "train", "val", "test")[number // len(NAMES) % 4] if splits else ""
        place = root / split / NAMES[number % len(NAMES)]
        place.mkdir(parents=True, exist_ok=True)
        picture(number)[0].save(place / f"{number:03d}.png")
    return root


def draw_table(root: Path, count: int = 24, boxes: bool = False) -> Path:
    """``table.csv`` with a label, or with boxes, beside a folder of images."""
    (root / "pictures").mkdir(parents=True)
    rows = ["file,xmin,ymin,xmax,ymax,label" if boxes else "file,label"]
    for number in range(count):
        image, _, found = picture(number, 2 if boxes else 1)
        image.save(root / "pictures" / f"{number:03d}.png")
        for kind, box in found:
            sides = f"{','.join(map(str, box))}," if boxes else ""
            rows.append(f"pictures/{number:03d}.png,{sides}{NAMES[kind]}")
    (root / "table.csv").write_text("\n".join(rows) + "\n")
    return root / "table.csv"


def draw_coco(root: Path, count: int = 24, masks: bool = True) -> Path:
    """``annotations.json`` beside a folder of images; the shapes are a polygon and a run-length mask by turns."""
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(count):
        image, mask, found = picture(number, 2)
        image.save(root / "images" / f"{number:03d}.png")
        images.append({"id": number, "file_name": f"{number:03d}.png", "width": WIDTH, "height": HEIGHT})
        for kind, (x0, y0, x1, y1) in found:
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": 10 * (kind + 1), "iscrowd": 0}
            entry |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            if masks:
                shape = np.asarray(mask)[:, :] == kind + 1
                entry["segmentation"] = (
                    [[x0, y0, x1, y0, x1, y1, x0, y1]] if NAMES[kind] == "square" else _runs(shape.astype(np.uint8))
                )
            annotations.append(entry)
    categories = [{"id": 10 * (index + 1), "name": name} for index, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations.json").write_text(json.dumps(content))
    return root / "annotations.json"


def _runs(mask: np.ndarray[Any, Any]) -> dict[str, Any]:
    """COCO's uncompressed run lengths, down the columns, the first of zeros."""
    line = mask.T.reshape(-1)
    ends = [*np.flatnonzero(np.diff(line)) + 1, len(line)]
    counts = np.diff([0, *ends]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if line[0] else counts}


def draw_voc(root: Path, count: int = 24) -> Path:
    """``JPEGImages`` and ``Annotations``, whose boxes count from 1."""
    (root / "JPEGImages").mkdir(parents=True)
    (root / "Annotations").mkdir()
    for number in range(count):
        image, _, found = picture(number, 2)
        image.save(root / "JPEGImages" / f"{number:03d}.png")
        objects = "".join(
            f"<object>\n<name>{NAMES[kind]}</name>\n<bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>\n</object>\n"
            for kind, (x0, y0, x1, y1) in found
        )
        text = (
            f"<annotation>\n<filename>{number:03d}.png</filename>\n"
            f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>\n{objects}</annotation>\n"
        )
        (root / "Annotations" / f"{number:03d}.xml").write_text(text)
    return root


def draw_masks(root: Path, count: int = 24, named: bool = True) -> Path:
    """``images`` and ``masks`` of one stem; with ``named`` a class list beside them."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for number in range(count):
        image, mask, _ = picture(number, 2)
        image.save(root / "images" / f"{number:03d}.jpg", quality=95)
        mask.save(root / "masks" / f"{number:03d}.png")
    if named:
        (root / "classes.txt").write_text("\n".join(("ground", *NAMES)) + "\n")
    return root


FORMATS: dict[str, Callable[..., Path]] = {
    "folder": draw_folder,
    "csv": draw_table,
    "coco": draw_coco,
    "voc": draw_voc,
    "masks": draw_masks,
}
