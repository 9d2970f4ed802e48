"""Scenes: real cut-outs composed on real photographs, so that boxes, visible masks and alpha are exact.

Scene ``i`` of a split is a function of (split, i). Neither a cut-out nor a photograph of one split occurs in another,
and cut-outs of one family (``apple_red``, ``apple_green``) stay together.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from torchive.data import archives
from torchive.data.drawing import key_seed
from torchive.data.faults import Fault
from torchive.data.samples import assign_splits
from torchive.data.sets.arrays import MappedArray, prepared
from torchive.data.sets.registry import SAMPLE_SETS
from torchive.structures import Sample

_INFO = SAMPLE_SETS["scenes"]
_STAMPS = "usr/share/tuxpaint/stamps/"
_PHOTOS = "usr/share/backgrounds/"
_SIZE = 320
_COUNTS = {"train": 1000, "val": 200, "test": 200}
_FOLDERS = {
    "animals/birds": "birds",
    "animals/fish": "fish",
    "animals/insects": "insects",
    "animals/mammals": "mammals",
    "food/fruit": "fruit",
    "food/vegetables": "vegetables",
    "plants/flowers": "flowers",
}
_DRAWN = ("cartoon", "toys", "plastic")
_COLOURS = (800, 0.3)  # a photograph has at least so many colours, and so many per opaque pixel; a drawing has fewer
_SHARES = (0.6, 0.2, 0.2)
_LONGEST = 200  # cut-outs are kept no larger than this
_PHOTO_SIDE = 720  # shorter side of a background as kept
_VISIBLE = 0.4  # every object shows at least this share of its own pixels


def load(split: str) -> Scenes:
    """One split."""
    return Scenes(prepared(_INFO, 1, _build), split)


class Scenes:
    """Scenes (3, 320, 320) with boxes, labels and visible masks of one to six objects.

    Args:
        folder: of the prepared pictures.
        split: of which.
        shares: chance of each class to be drawn; all alike if None.
    """

    left_out: tuple[Fault, ...] = ()
    channels = 3
    labels_file = "labels"

    def __init__(self, folder: Path, split: str, shares: Sequence[float] | None = None) -> None:
        self.name, self.task, self.classes = _INFO.name, _INFO.task, _INFO.classes
        self.licence, self.origin = _INFO.licence, _INFO.origin
        table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        self.folder, self.split = folder, split
        self.shares = None if shares is None else tuple(share / sum(shares) for share in shares)
        self.cutouts = [entry for entry in table["cutouts"] if entry["split"] == split]
        self.photos = [entry for entry in table["photos"] if entry["split"] == split]
        self.pixels = MappedArray(folder / "pixels.npy")
        self.ids = tuple(f"{split}/{index:04d}" for index in range(_COUNTS[split]))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        image, shares, labels = self._compose(index)
        masks = shares > 0.5  # (L, H, W): at most one object has more than half of a pixel
        boxes = np.array([box_of(mask) for mask in masks], np.float32)
        target = {
            "boxes": torch.from_numpy(boxes),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": torch.from_numpy(masks.view(np.uint8)),
        }
        return Sample(torch.from_numpy(image), target, self.ids[index])

    def alpha(self, index: int) -> Tensor:
        """The share (L, H, W), in [0, 1], that each object has in each pixel after those in front of it."""
        return torch.from_numpy(self._compose(index)[1])

    def with_shares(self, shares: Sequence[float]) -> Scenes:
        """Scenes whose objects are drawn with these chances of the classes, as a long tail."""
        return Scenes(self.folder, self.split, shares)

    @cached_property
    def object_labels(self) -> list[list[int]]:
        """The labels of each scene's objects; worked out once and kept beside the prepared pictures."""
        key = key_seed("labels", self.split, str(self.shares), len(self)) if self.shares else self.split
        path = self.folder / f"{self.labels_file}-{key}.json"
        if not path.exists():
            labels = [[int(label) for label in self._compose(index, picture=False)[2]] for index in range(len(self))]
            partial = path.with_name(f"{path.name}.{os.getpid()}")
            partial.write_text(json.dumps(labels), encoding="utf-8")
            partial.replace(path)
        found: list[list[int]] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _compose(
        self, index: int, *, picture: bool = True
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[int]]:
        """Image, shares and labels; without ``picture`` the image is left empty and the draws are the same."""
        draw = np.random.default_rng(key_seed("scenes", self.split, index))
        canvas = self._background(draw, picture)  # (H, W, 3) float32
        shares: list[np.ndarray[Any, Any]] = []
        own: list[float] = []
        labels: list[int] = []
        wanted = int(draw.integers(1, 7))
        for _ in range(3 * wanted):
            kind = self._kind(draw)
            choices = [entry for entry in self.cutouts if entry["class"] == kind]
            colour, alpha = self._cutout(choices[draw.integers(len(choices))], draw, picture)
            found = in_front(alpha, shares, own, draw)
            if found is None:
                continue
            shares, own, (top, left) = found
            labels.append(self.classes.index(kind) + 1)
            height, width = alpha.shape
            if picture:
                part = canvas[top : top + height, left : left + width]
                part += alpha[..., None] * (colour - part)
            if len(labels) == wanted:
                break
        image = np.ascontiguousarray(canvas.round().clip(0, 255).astype(np.uint8).transpose(2, 0, 1))
        return image, np.stack(shares), labels

    def _kind(self, draw: np.random.Generator) -> str:
        if self.shares is None:
            return self.classes[draw.integers(len(self.classes))]
        drawn = int(np.searchsorted(np.cumsum(self.shares), draw.random(), side="right"))
        return self.classes[min(drawn, len(self.classes) - 1)]

    def _pixels(self, entry: dict[str, Any], channels: int) -> np.ndarray[Any, Any]:
        start, height, width = entry["start"], entry["height"], entry["width"]
        return np.asarray(self.pixels[start : start + height * width * channels]).reshape(height, width, channels)

    def _background(self, draw: np.random.Generator, picture: bool) -> np.ndarray[Any, Any]:
        entry = self.photos[draw.integers(len(self.photos))]
        shape = entry["height"], entry["width"]
        side = int(draw.integers(_SIZE, min(shape) + 1))
        top, left = (int(draw.integers(0, limit - side + 1)) for limit in shape)
        mirrored = draw.random() < 0.5
        if not picture:
            return np.zeros((0, 0, 3), np.float32)
        photo = self._pixels(entry, 3)
        part = Image.fromarray(np.ascontiguousarray(photo[top : top + side, left : left + side]))
        pixels = np.asarray(part.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC), np.float32)
        return np.array(pixels[:, ::-1] if mirrored else pixels)

    def _cutout(
        self, entry: dict[str, Any], draw: np.random.Generator, picture: bool
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        pixels = self._pixels(entry, 4)
        longest = max(pixels.shape[:2])
        scale = min(draw.uniform(48, 150) / longest, 1.6)
        size = [max(round(side * scale), 1) for side in (pixels.shape[1], pixels.shape[0])]
        angle = draw.uniform(-20, 20)
        mirrored = draw.random() < 0.5
        # Colours are scaled with their alpha, or the colour of transparent pixels would bleed into the edge.
        alpha = pixels[..., 3:].astype(np.float32) / 255
        share = _turn(alpha[..., 0] * 255, size, angle) / 255
        colour = np.zeros((*share.shape, 3), np.float32)
        if picture:
            turned = [_turn(plane, size, angle) for plane in np.moveaxis(pixels[..., :3] * alpha, 2, 0)]
            colour = np.stack(turned, 2) / np.maximum(share, 1e-3)[..., None]
        if mirrored:
            colour, share = colour[:, ::-1], share[:, ::-1]
        return colour.clip(0, 255), share


def _turn(plane: np.ndarray[Any, Any], size: list[int], angle: float) -> np.ndarray[Any, Any]:
    picture = Image.fromarray(np.ascontiguousarray(plane, np.float32)).resize(
        (size[0], size[1]), Image.Resampling.BILINEAR
    )
    turned = picture.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    return np.asarray(turned).clip(0, 255)


def on_canvas(alpha: np.ndarray[Any, Any], draw: np.random.Generator) -> tuple[np.ndarray[Any, Any], tuple[int, int]]:
    """The cut-out's alpha on an empty canvas, wholly inside, and where its corner is."""
    height, width = alpha.shape
    top, left = int(draw.integers(0, _SIZE - height + 1)), int(draw.integers(0, _SIZE - width + 1))
    layer = np.zeros((_SIZE, _SIZE), np.float32)
    layer[top : top + height, left : left + width] = alpha
    return layer, (top, left)


def in_front(
    alpha: np.ndarray[Any, Any], shares: list[np.ndarray[Any, Any]], own: list[float], draw: np.random.Generator
) -> tuple[list[np.ndarray[Any, Any]], list[float], tuple[int, int]] | None:
    """The shares of all objects with one more in front, their whole areas, and the new one's corner; None where it is
    too small or would hide too much of another.
    """
    front, corner = on_canvas(alpha, draw)
    area = float((front > 0.5).sum())
    behind = [share * (1 - front) for share in shares]
    if area < 100 or any((b > 0.5).sum() < _VISIBLE * o for b, o in zip(behind, own, strict=True)):
        return None
    return [*behind, front], [*own, area], corner


def box_of(mask: np.ndarray[Any, Any]) -> tuple[int, int, int, int]:
    """The box around a mask (H, W) that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _build(packages: list[Path], folder: Path) -> None:
    pixels: list[np.ndarray[Any, Any]] = []
    cutouts = [entry for entry in map(_stamp, *_listed(packages[0], _STAMPS, ".png")) if entry]
    families = sorted({(entry["class"], entry["family"]) for entry in cutouts})
    keys = ["/".join(family) for family in families]
    splits = assign_splits(keys, [family[0] for family in families], shares=_SHARES)
    split_of = dict(zip(families, splits, strict=True))
    start = 0
    for entry in cutouts:
        entry["split"] = split_of[entry["class"], entry["family"]]
    photos = [_photo(name, content) for name, content in zip(*_listed(packages[1], _PHOTOS, ".jpg"), strict=True)]
    names = [photo["id"] for photo in photos]
    for entry, split in zip(photos, assign_splits(names, [0] * len(names), shares=_SHARES), strict=True):
        entry["split"] = split
    for entry in [*cutouts, *photos]:
        array = entry.pop("pixels")
        entry.update(start=start, height=array.shape[0], width=array.shape[1])
        start += array.size
        pixels.append(array.ravel())
    np.save(folder / "pixels.npy", np.concatenate(pixels))
    (folder / "table.json").write_text(json.dumps({"cutouts": cutouts, "photos": photos}), encoding="utf-8")


def _listed(package: Path, prefix: str, suffix: str) -> tuple[list[str], list[bytes]]:
    found = dict(archives.members(package, lambda name: name.startswith(prefix) and name.endswith(suffix)))
    names = sorted(found)
    return [name.removeprefix(prefix) for name in names], [found[name] for name in names]


def _stamp(name: str, content: bytes) -> dict[str, Any] | None:
    """One photographed cut-out of a wanted class, or None: drawings and mirrored copies are left."""
    path = PurePosixPath(name)
    kind = next((kind for folder, kind in _FOLDERS.items() if name.startswith(f"{folder}/")), None)
    if kind is None or path.stem.endswith("_mirror") or set(path.parts) & set(_DRAWN):
        return None
    with Image.open(io.BytesIO(content)) as picture:
        if picture.mode != "RGBA":
            return None
        opaque = np.asarray(picture)
        inside = opaque[opaque[..., 3] > 128][:, :3].astype(np.int64) @ (65536, 256, 1)
        colours = len(np.unique(inside))
        if colours < _COLOURS[0] or colours < _COLOURS[1] * len(inside):
            return None
        cut = picture.crop(picture.getchannel("A").getbbox())
        cut.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
        pixels = np.asarray(cut)
    family = re.split(r"[-_0-9]", path.stem.lower())[0]
    return {"id": name, "class": kind, "family": family, "pixels": pixels}


def _photo(name: str, content: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(content)) as picture:
        scale = _PHOTO_SIDE / min(picture.size)
        size = round(picture.size[0] * scale), round(picture.size[1] * scale)
        return {"id": name, "pixels": np.asarray(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS))}
