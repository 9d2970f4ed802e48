"""Solar cells: 2,624 electroluminescence photographs, grey, with the probability of a defect in four levels."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from torchive.data import archives
from torchive.data.samples import assign_splits
from torchive.data.sets.arrays import LabelledImages, MappedArray, prepared
from torchive.data.sets.registry import SAMPLE_SETS

_INFO = SAMPLE_SETS["solar"]
_DATA = "elpv_dataset/data/"


def load(split: str) -> LabelledImages:
    """One split, stratified by class and kind of cell (mono- or polycrystalline)."""
    folder = prepared(_INFO, 1, _build)
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    labels = [round(3 * float(row[1])) for row in table]
    splits = assign_splits(
        [row[0] for row in table], [(label, row[2]) for label, row in zip(labels, table, strict=True)]
    )
    rows = np.array([index for index, name in enumerate(splits) if name == split])
    ids = [table[index][0] for index in rows]
    return LabelledImages(_INFO, MappedArray(folder / "images.npy"), rows, np.array(labels)[rows], ids)


def _build(packages: list[Path], folder: Path) -> None:
    content = dict(archives.members(packages[0], lambda name: name.startswith(_DATA)))
    table = [line.split() for line in content[f"{_DATA}labels.csv"].decode().splitlines() if line.strip()]
    images = np.stack([np.asarray(Image.open(io.BytesIO(content[_DATA + row[0]])).convert("L")) for row in table])
    np.save(folder / "images.npy", images)  # (2624, 300, 300) uint8
    (folder / "table.json").write_text(json.dumps(table), encoding="utf-8")
