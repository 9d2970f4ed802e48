"""A sample set over the user's own files."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import masks_to_boxes

from torchive.data.faults import DataError, Fault
from torchive.data.images import image_size, read_ids, read_image, read_mask
from torchive.data.readers.coco import decode_shape
from torchive.data.readers.index import Index, Objects, Record, Segments
from torchive.data.readers.masks import IGNORED
from torchive.data.samples import SPLITS, assign_splits
from torchive.structures import Sample


class FileSamples:
    """Samples read from files when asked for. Images are colour (3, H, W), whatever the files hold."""

    licence = "the user's own"
    channels = 3

    def __init__(self, source: str, index: Index, records: Sequence[Record], left_out: Sequence[Fault]) -> None:
        self.name, self.task, self.classes = source, index.task, index.classes
        self.origin = source
        self.records, self.masks, self.landmarks = tuple(records), index.masks, index.channels
        self.left_out, self.notes, self.stuff = tuple(left_out), tuple(index.notes), index.stuff
        self.ids = tuple(record.id for record in records)

    @property
    def labels(self) -> list[int]:
        """The class of each sample of a classification set, read from no image."""
        return [int(record.target) for record in self.records]

    @property
    def object_labels(self) -> list[list[int]]:
        """The labels, from 1, of the objects of each sample of a detection set, read from no image."""
        return [list(record.target.labels) for record in self.records]

    @property
    def pair_ids(self) -> list[int] | None:
        """Which samples show the same items, read from no image; None where the data do not tell."""
        found = [record.target.values.get("pair_id") for record in self.records if isinstance(record.target, Objects)]
        if len(found) != len(self.records) or not any(found):
            return None
        return [values[0] if values else -1 - k for k, values in enumerate(found)]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        image = read_image(record.image)
        target = record.target
        if isinstance(target, Path):
            target = read_mask(target)
        elif isinstance(target, Objects):
            target = box_target(target, image_size(image), self.masks, self.landmarks)
        elif isinstance(target, Segments):
            target = segment_target(target)
        return Sample(image, target, record.id)


def box_target(objects: Objects, size: tuple[int, int], masks: bool, landmarks: int = 0) -> dict[str, Any]:
    """The target of one image: boxes cut to the image, labels, area and crowd, and masks, ``landmarks`` key points and
    whole numbers of each object where the data have them."""
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
    if landmarks:
        points = torch.zeros(len(objects.labels), landmarks, 3)
        for row, (first, values) in enumerate(objects.landmarks):
            own = torch.tensor(values, dtype=torch.float32).view(-1, 3)
            points[row, first : first + len(own)] = own * (own[:, 2:] > 0)  # what is not marked stands at zero
        target["keypoints"] = points
    return target | {key: torch.tensor(values, dtype=torch.int64) for key, values in objects.values.items()}


def segment_target(segments: Segments) -> dict[str, Any]:
    """The target of one image: boxes, labels, masks, area and crowd of the objects, and ``semantic``, the category of
    each pixel, 255 where there is no segment."""
    ids = read_ids(segments.picture)
    own, category = (torch.tensor(v, dtype=torch.int64) for v in (segments.ids, segments.categories))
    thing = category <= segments.things
    masks = ids == own[thing, None, None]  # (L, H, W)
    own, order = own.sort()
    place = torch.bucketize(ids, own).clamp(max=max(len(own) - 1, 0))
    semantic = torch.full_like(ids, IGNORED)
    if len(own):
        semantic = torch.where(own[place] == ids, category[order][place], IGNORED)
    return {
        "boxes": masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0]),
        "labels": category[thing],
        "area": masks.flatten(1).sum(1).float(),
        "iscrowd": torch.tensor(segments.crowd, dtype=torch.int64)[thing],
        "masks": masks.to(torch.uint8),
        "semantic": semantic,
    }


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
    keys = {_pair(record): _stratum(record) for record in free}  # what shows the same items stays together
    names = assign_splits(list(keys), list(keys.values()), seed=seed, splits=parts, shares=shares)
    split_of = dict(zip(keys, names, strict=True))
    place = {record.id: split_of[_pair(record)] for record in free}
    return [record for record in index.records if place.get(record.id, record.split) == split]


def _pair(record: Record) -> str:
    values = record.target.values.get("pair_id") if isinstance(record.target, Objects) else None
    return f"pair {values[0]}" if values else record.id


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
