"""Small data of each format, written anew for each test, and a cache of its own for those that do not fetch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .annotations import voc_xml

Draw = Callable[..., Path]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is empty."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("TORCHIVE_CACHE", str(cache))
    return cache


@pytest.fixture
def draw() -> Draw:
    """``draw(path, size=(width, height), seed=0)`` writes a picture of noise."""

    def write(path: Path, size: tuple[int, int] = (16, 12), seed: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return write


@pytest.fixture
def folder(tmp_path: Path, draw: Draw, own_cache: Path) -> Path:
    """Ten images of each of two classes."""
    root = tmp_path / "pictures"
    for number in range(20):
        draw(root / ("cat", "dog")[number % 2] / f"{number:02d}.png", seed=number)
    return root


@pytest.fixture
def coco(tmp_path: Path, draw: Draw, own_cache: Path) -> Path:
    """Eight images of 16 by 12 with a box and a polygon each."""
    root = tmp_path / "coco"
    images, annotations = [], []
    for number in range(8):
        draw(root / "images" / f"{number}.png", seed=number)
        images.append({"id": number, "file_name": f"{number}.png", "width": 16, "height": 12})
        polygon = [[2, 2, 8, 2, 8, 6, 2, 6]]
        box = {"image_id": number, "category_id": 7 if number % 2 else 3, "bbox": [2, 2, 6, 4], "segmentation": polygon}
        annotations.append({"id": 100 + number, **box, "iscrowd": 0, "area": 24})
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "ann.json").write_text(json.dumps(content), encoding="utf-8")
    return root


@pytest.fixture
def voc(tmp_path: Path, draw: Draw, own_cache: Path) -> Path:
    """Six images of 16 by 12 with a box each."""
    root = tmp_path / "voc"
    (root / "Annotations").mkdir(parents=True)
    for number in range(6):
        draw(root / "JPEGImages" / f"{number}.png", seed=number)
        (root / "Annotations" / f"{number}.xml").write_text(voc_xml(number, (1, 2, 8, 12)), encoding="utf-8")
    return root


@pytest.fixture
def masks(tmp_path: Path, draw: Draw, own_cache: Path) -> Path:
    """Eight images with masks of the classes 0 and 1 and the ignored 255."""
    root = tmp_path / "segmentation"
    (root / "masks").mkdir(parents=True)
    for number in range(8):
        draw(root / "images" / f"{number}.png", seed=number)
        mask = np.zeros((12, 16), np.uint8)
        mask[2:6, 3:9], mask[0, 0] = 1, 255
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    return root
