"""A sample set over the user's own files."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchive.data.faults import DataError, Fault
from torchive.data.images import image_size, read_image, read_mask
from torchive.data.readers.coco import decode_shape
from torchive.data.readers.index import Index, Objects, Record
from torchive.data.samples import SPLITS, assign_splits
from torchive.structures import Sample


class FileSamples:
    """Samples read from files when asked for. Images are colour (3, H, W), whatever the files hold."""

    licence = "the user's own"
    channels = 3

    def __init__(self, source: str, index: Index, records: Sequence[Record], left_out: Sequence[Fault]) -> None:
        self.name, self.task, self.classes = source, index.task, index.classes
        self.origin = source
        self.records, self.masks = tuple(records), index.masks
        self.left_out = tuple(left_out)
        self.ids = tuple(record.id for record in records)

    @property
    def labels(self) -> list[int]:
        """The class of each sample of a classification set, read from no image."""
        return [int(record.target) for record in self.records]

    @property
    def object_labels(self) -> list[list[int]]:
        """The labels, from 1, of the objects of each sample of a detection set, read from no image."""
        return [list(record.target.labels) for record in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        image = read_image(record.image)
        target = record.target
        if isinstance(target, Path):
            target = read_mask(target)
        elif isinstance(target, Objects):
            target = box_target(target, image_size(image), self.masks)
        return Sample(image, target, record.id)


def box_target(objects: Objects, size: tuple[int, int], masks: bool) -> dict[str, Any]:
    """The target of one image: boxes cut to the image, labels, area and crowd, and masks where the data have them."""
    height, width = size
    boxes = np.array(objects.boxes, np.float32).reshape(-1, 4)
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    target = {
        "boxes": torch.from_numpy(boxes),
        "labels": torch.tensor(objects.labels, dtype=torch.int64),
        "area": torch.from_numpy((boxes[:, 2:] - boxes[:, :2]).prod(1)),
        "iscrowd": torch.tensor(objects.crowd, dtype=torch.int64),
    }
    if masks:
        shapes = [np.zeros(size, np.uint8) if shape is None else decode_shape(shape, size) for shape in objects.shapes]
        target["masks"] = torch.from_numpy(np.stack(shapes) if shapes else np.zeros((0, *size), np.uint8))
        target["area"] = target["masks"].flatten(1).sum(1).float()
    return target


def choose_split(index: Index, split: str, seed: int) -> list[Record]:
    """The records of one split. Those that the data assign stay; a split that the data lack is cut out of ``train``,
    and
    all three out of the whole where there is none, by the hash of the id."""
    given = {record.split for record in index.records} - {None}
    free = [record for record in index.records if record.split is None or (given and record.split == "train")]
    lacking = [name for name in SPLITS[1:] if name not in given]
    if not lacking:
        return [record for record in index.records if (record.split or "train") == split]
    parts = ("train", *lacking)
    shares = (1 - 0.15 * len(lacking), *(0.15 for _ in lacking))
    names = assign_splits([r.id for r in free], [_stratum(r) for r in free], seed=seed, splits=parts, shares=shares)
    place = {record.id: name for record, name in zip(free, names, strict=True)}
    return [record for record in index.records if place.get(record.id, record.split) == split]


def _stratum(record: Record) -> Hashable:
    return record.target if isinstance(record.target, int) else None


def file_samples(
    source: str, index: Index, faults: Sequence[Fault], split: str, *, skip_faulty: bool, seed: int
) -> FileSamples:
    """One split without its faulty samples.

    A class that no box has is no reason to refuse: category lists of COCO files hold classes that a file does not use.

    Raises:
        DataError: there are faults and ``skip_faulty`` is not set, or no sample is left.
    """
    if index.task == "detection":
        faults = [fault for fault in faults if fault.kind != "empty-class"]
    if faults and not skip_faulty:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}{more}; `torchive data check` lists all, --skip-faulty trains without them")
    records = choose_split(index, split, seed)
    faulty = {fault.sample for fault in faults}
    kept = [record for record in records if record.id not in faulty]
    if not kept:
        few = f"{len(index.records)} samples are too few to cut train, val and test out of them"
        reason = f"{len(records)} are faulty, the first: {faults[0]}" if records else few
        raise DataError(f"{source}: no sample is left for {split}: {reason}")
    return FileSamples(source, index, kept, faults)
