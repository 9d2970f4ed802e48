"""Emoji: people in two styles and six skin tones; one style is trained on, the other is tested."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from torchive.data import archives
from torchive.data.samples import SampleSetInfo, assign_splits
from torchive.data.sets.arrays import LabelledImages, MappedArray, prepared
from torchive.data.sets.registry import SAMPLE_SETS
from torchive.structures import Sample

_STYLES = ("twitter", "google")  # in the order of the packages
_TONES = 6


class ColourDrawings(LabelledImages):
    """Drawings (3, 64, 64) on white."""

    channels = 3

    def __getitem__(self, index: int) -> Sample:
        image = torch.from_numpy(np.array(self.images[self.rows[index]]))
        return Sample(image, int(self.labels[index]), self.ids[index])


def load(split: str) -> ColourDrawings:
    """One split of the people in 165 roles."""
    return load_people(SAMPLE_SETS["emoji"], split)


def load_people(info: SampleSetInfo, split: str) -> ColourDrawings:
    """One split of a set whose classes are short names of the packages.

    ``train`` is all of one style; a third of each class in the other is ``val``, the rest ``test``.
    """
    folder = prepared(info, 1, partial(_build, info))
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    ids, labels, styles = ([row[part] for row in table] for part in range(3))
    other = [index for index, style in enumerate(styles) if style == _STYLES[1]]
    places = assign_splits(
        [ids[index] for index in other],
        [labels[index] for index in other],
        splits=("test", "val"),
        shares=(2 / 3, 1 / 3),
    )
    of = dict(zip(other, places, strict=True))
    rows = np.array([index for index in range(len(table)) if of.get(index, "train") == split])
    return ColourDrawings(
        info, MappedArray(folder / "images.npy"), rows, np.array(labels)[rows], [ids[row] for row in rows]
    )


def _taken(entries: list[dict[str, Any]], info: SampleSetInfo) -> list[dict[str, Any]]:
    """The entries of the classes, each in all skin tones, sorted by code point."""
    return sorted(
        (e for e in entries if e["short_name"] in info.classes and len(e.get("skin_variations", ())) == _TONES - 1),
        key=lambda entry: str(entry["unified"]),
    )


def _wanted(name: str) -> bool:
    return name == "package/emoji.json" or name.startswith(tuple(f"package/img/{style}/64/" for style in _STYLES))


def _build(info: SampleSetInfo, packages: list[Path], folder: Path) -> None:
    images, table = [], []
    for style, package in zip(_STYLES, packages, strict=True):
        prefix = f"package/img/{style}/64/"
        content = dict(archives.members(package, _wanted))
        for entry in _taken(json.loads(content["package/emoji.json"]), info):
            label = info.classes.index(entry["short_name"])
            for file in (entry["image"], *(tone["image"] for tone in entry["skin_variations"].values())):
                drawing = Image.open(io.BytesIO(content[prefix + file])).convert("RGBA")
                white = Image.new("RGBA", drawing.size, (255, 255, 255, 255))
                images.append(np.asarray(Image.alpha_composite(white, drawing).convert("RGB")).transpose(2, 0, 1))
                table.append((f"{style}/{file.removesuffix('.png')}", label, style))
    np.save(folder / "images.npy", np.stack(images))  # (M, 3, 64, 64) uint8
    (folder / "table.json").write_text(json.dumps(table), encoding="utf-8")
