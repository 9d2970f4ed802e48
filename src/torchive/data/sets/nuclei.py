"""Nuclei: one fluorescence photograph with an id for each nucleus, cut into tiles; the splits share no pixel."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from torchive.data import archives
from torchive.data.faults import Fault
from torchive.data.samples import SampleSetInfo
from torchive.data.sets.arrays import prepared
from torchive.data.sets.registry import SAMPLE_SETS
from torchive.structures import Sample

_DATA = "stardist/data/images/"
_TILE = 128
#: Columns of each split, and the step between its tiles: only training tiles overlap, and only each other.
_REGIONS = {"train": (0, 256, 64), "val": (256, 384, 128), "test": (384, 512, 128)}


def load(split: str) -> NucleusTiles:
    """One split: the left half of the photograph is ``train``, the next quarter ``val``, the last ``test``."""
    return load_as(SAMPLE_SETS["nuclei"], split)


def load_as(info: SampleSetInfo, split: str) -> NucleusTiles:
    """One split, with a class for each pixel or with boxes and masks, as ``info.task`` says."""
    folder = prepared(SAMPLE_SETS["nuclei"], 1, _build)
    return NucleusTiles(info, np.load(folder / "image.npy"), np.load(folder / "mask.npy"), split)


class NucleusTiles:
    """Tiles (1, 128, 128)."""

    left_out: tuple[Fault, ...] = ()
    channels = 1

    def __init__(
        self, info: SampleSetInfo, image: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], split: str
    ) -> None:
        self.name, self.task, self.classes = info.name, info.task, info.classes
        self.licence, self.origin = info.licence, info.origin
        self.image, self.mask = image, mask
        left, right, step = _REGIONS[split]
        tops, lefts = range(0, len(image) - _TILE + 1, step), range(left, right - _TILE + 1, step)
        self.places = [(top, start) for top in tops for start in lefts]
        self.ids = tuple(f"img2d/{top:03d}-{start:03d}" for top, start in self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        top, left = self.places[index]
        part = slice(top, top + _TILE), slice(left, left + _TILE)
        image = torch.from_numpy(np.array(self.image[part]))[None]
        mask = torch.from_numpy(self.mask[part].astype(np.int64))
        target = (mask > 0).long() if self.task == "segmentation" else instances(mask)
        return Sample(image, target, self.ids[index])


def instances(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Boxes, labels and masks of an image (H, W) of ids, 0 being background.

    A nucleus of one pixel has a box of one.
    """
    ids = mask.unique()
    masks = mask == ids[ids > 0][:, None, None]  # (L, H, W)
    rows, columns = masks.any(2), masks.any(1)
    first = [line.int().argmax(1) if len(line) else line.new_zeros(0) for line in (columns, rows)]
    last = [
        line.shape[1] - line.flip(1).int().argmax(1) if len(line) else line.new_zeros(0) for line in (columns, rows)
    ]
    boxes = torch.stack([*first, *last], 1).float().reshape(-1, 4)
    return {"boxes": boxes, "labels": torch.ones(len(masks), dtype=torch.int64), "masks": masks.to(torch.uint8)}


def _build(packages: list[Path], folder: Path) -> None:
    names = f"{_DATA}img2d.tif", f"{_DATA}mask2d.tif"
    content = archives.read(packages[0], names)
    image, mask = (np.array(Image.open(io.BytesIO(content[name]))) for name in names)
    np.save(folder / "image.npy", image.astype(np.uint8))  # 16 bits in the file, but no value above 235
    np.save(folder / "mask.npy", mask.astype(np.uint8))
