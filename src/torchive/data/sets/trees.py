"""Trees: four aerial photographs cut into tiles that share no pixel; splits are photographs or regions of one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from defusedxml import ElementTree
from PIL import Image

from torchive.data import archives
from torchive.data.faults import Fault
from torchive.data.sets.arrays import MappedArray, prepared
from torchive.data.sets.registry import SAMPLE_SETS
from torchive.structures import Sample

_INFO = SAMPLE_SETS["trees"]
_DATA = "deepforest/data/"
_TILE = 400
_VISIBLE = 0.25  # a box cut by its tile's edge stays if this share of it is inside
_LARGE = "2019_YELL_2_528000_4978000_image_crop2"
_PHOTOS = ("OSBS_029", "SOAP_061", _LARGE, "2019_YELL_2_541000_4977000_image_crop")


def load(split: str) -> TreeTiles:
    """One split: the last photograph is ``test``; the lower two rows of the largest are ``val``; the rest is
    ``train``.
    """
    folder = prepared(_INFO, 1, _build)
    tiles = json.loads((folder / "tiles.json").read_text(encoding="utf-8"))
    return TreeTiles(folder, [tile for tile in tiles if tile["split"] == split])


class TreeTiles:
    """Tiles (3, up to 400, up to 400) with boxes (L, 4)."""

    left_out: tuple[Fault, ...] = ()
    channels = 3

    def __init__(self, folder: Path, tiles: list[dict[str, Any]]) -> None:
        self.name, self.task, self.classes = _INFO.name, _INFO.task, _INFO.classes
        self.licence, self.origin = _INFO.licence, _INFO.origin
        self.photos = {name: MappedArray(folder / f"{name}.npy") for name in _PHOTOS}
        self.tiles = tiles
        self.ids = tuple(tile["id"] for tile in tiles)

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> Sample:
        tile = self.tiles[index]
        x0, y0, x1, y1 = tile["region"]
        image = torch.from_numpy(np.array(self.photos[tile["photo"]][y0:y1, x0:x1])).permute(2, 0, 1).contiguous()
        boxes = torch.tensor(tile["boxes"], dtype=torch.float32).reshape(-1, 4)
        return Sample(image, {"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.int64)}, self.ids[index])


def _build(packages: list[Path], folder: Path) -> None:
    content = archives.read(packages[0], tuple(f"{_DATA}{name}{kind}" for name in _PHOTOS for kind in (".png", ".xml")))
    tiles: list[dict[str, Any]] = []
    for name in _PHOTOS:
        photo = np.asarray(Image.open(io.BytesIO(content[f"{_DATA}{name}.png"])).convert("RGB"))
        np.save(folder / f"{name}.npy", photo)
        tiles += _tiles(name, photo.shape[:2], _boxes(content[f"{_DATA}{name}.xml"]))
    (folder / "tiles.json").write_text(json.dumps(tiles), encoding="utf-8")


def _boxes(xml: bytes) -> np.ndarray[Any, Any]:
    tree = ElementTree.fromstring(xml)
    sides = ("xmin", "ymin", "xmax", "ymax")
    return np.array([[float(box.findtext(side)) for side in sides] for box in tree.iter("bndbox")])


def _tiles(name: str, size: tuple[int, int], boxes: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    rows, columns = (np.linspace(0, side, -(-side // _TILE) + 1).round().astype(int).tolist() for side in size)
    tiles = []
    for row in range(len(rows) - 1):
        for column in range(len(columns) - 1):
            region = columns[column], rows[row], columns[column + 1], rows[row + 1]
            below = row >= len(rows) - 3
            split = "test" if name == _PHOTOS[-1] else "val" if name == _LARGE and below else "train"
            entry = {"id": f"{name}/{row}-{column}", "photo": name, "region": region, "split": split}
            tiles.append({**entry, "boxes": _inside(boxes, region).tolist()})
    return tiles


def _inside(boxes: np.ndarray[Any, Any], region: tuple[int, int, int, int]) -> np.ndarray[Any, Any]:
    """The boxes cut to a region, in its pixels; those that show less than a quarter are dropped."""
    low, high = np.array(region[:2] * 2), np.array(region[2:] * 2)
    cut = np.clip(boxes, low, high)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], 1)
    visible = np.prod(cut[:, 2:] - cut[:, :2], 1)
    return (cut - low)[visible >= _VISIBLE * area]
