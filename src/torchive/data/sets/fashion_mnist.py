"""Fashion-MNIST: 70,000 photographs of clothes, 28 by 28, grey, ten classes."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from torchive.data import archives
from torchive.data.samples import assign_splits
from torchive.data.sets.arrays import LabelledImages, MappedArray, prepared
from torchive.data.sets.registry import SAMPLE_SETS

_INFO = SAMPLE_SETS["fashion-mnist"]
_DATA = "usr/share/datasets/fashion-mnist/"


def load(split: str) -> LabelledImages:
    """One split: the published test set is ``test``; a tenth of the published training set, by hash, is ``val``."""
    folder = prepared(_INFO, 1, _build)
    part = "t10k" if split == "test" else "train"
    labels = np.load(folder / f"{part}-labels.npy", allow_pickle=False)
    ids = [f"{part}/{index:05d}" for index in range(len(labels))]
    rows = np.arange(len(labels))
    if split != "test":
        splits = assign_splits(ids, labels.tolist(), splits=("train", "val"), shares=(0.9, 0.1))
        rows = np.flatnonzero(np.array(splits) == split)
    return LabelledImages(
        _INFO, MappedArray(folder / f"{part}-images.npy"), rows, labels[rows], [ids[row] for row in rows]
    )


def _build(packages: list[Path], folder: Path) -> None:
    names = tuple(
        f"{_DATA}{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    )
    content = archives.read(packages[0], names)
    for part in ("train", "t10k"):
        images = _idx(content[f"{_DATA}{part}-images-idx3-ubyte.gz"], 16).reshape(-1, 28, 28)
        np.save(folder / f"{part}-images.npy", images)
        np.save(folder / f"{part}-labels.npy", _idx(content[f"{_DATA}{part}-labels-idx1-ubyte.gz"], 8))


def _idx(packed: bytes, offset: int) -> np.ndarray[Any, Any]:
    return np.frombuffer(gzip.decompress(packed), np.uint8, offset=offset)
