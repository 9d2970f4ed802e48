"""Sets that are kept as plain arrays: prepared once from a package, then mapped from the cache, not read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchive.data.cache import cache_dir, new_folder, turn
from torchive.data.faults import Fault
from torchive.data.packages import obtain
from torchive.data.samples import SampleSetInfo
from torchive.structures import Sample


def prepared(info: SampleSetInfo, version: int, build: Callable[[list[Path], Path], None]) -> Path:
    """The folder that ``build(package files, folder)`` filled, built once for these hashes and this version."""
    key = "-".join([info.name, f"v{version}", *(package.sha256[:8] for package in info.packages)])
    target = cache_dir() / "prepared" / key
    if target.is_dir():
        return target
    with turn(target.with_name(f".{key}.lock")):
        if not target.is_dir():
            files = [obtain(package) for package in info.packages]
            print(f"torchive: {info.notice}", file=sys.stderr, flush=True)
            with new_folder(target) as scratch:
                build(files, scratch)
    return target


class MappedArray:
    """A ``.npy`` file, mapped on first use and again in each process that receives a pickled copy."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._array: np.ndarray[Any, Any] | None = None

    def __getitem__(self, index: Any) -> np.ndarray[Any, Any]:
        if self._array is None:
            self._array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return self._array[index]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_array": None}


class LabelledImages:
    """Images (C, H, W) of one size with one class each, out of a mapped array (M, H, W)."""

    left_out: tuple[Fault, ...] = ()
    channels = 1

    def __init__(
        self, info: SampleSetInfo, images: MappedArray, rows: np.ndarray[Any, Any], labels: Any, ids: Sequence[str]
    ) -> None:
        self.name, self.task, self.classes = info.name, info.task, info.classes
        self.licence, self.origin = info.licence, info.origin
        self.images, self.rows, self.labels, self.ids = images, rows, labels, tuple(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        image = torch.from_numpy(np.array(self.images[self.rows[index]]))[None]  # (1, H, W)
        return Sample(image, int(self.labels[index]), self.ids[index])
