"""Images and PNG masks of one stem: a class index for each pixel, 255 where it is ignored."""

from __future__ import annotations

from pathlib import Path

from torchive.data.faults import DataError
from torchive.data.images import ImageFault, is_image, read_mask
from torchive.data.readers.index import SPLIT_NAMES, Index, Record, class_list

IGNORED = 255


def read_masks(images: Path, masks: Path) -> Index:
    """Classes are the lines of ``classes.txt`` beside or in the masks' folder; without it they are numbered from 0 to
    the
    highest index of any mask. Folders train, val and test below both are the splits."""
    index = Index("segmentation")
    for folder in (images, masks):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
    pictures, labels = _files(images), _files(masks)
    named, place = class_list(masks.parent / "classes.txt", masks / "classes.txt")
    if place:
        index.files.append(place)
    seen: set[str] = set()
    for key, picture in pictures.items():
        first = key.split("/")[0].lower() if "/" in key else ""
        name = picture.relative_to(images).as_posix()
        mask = labels.get(key)
        if mask is None:
            index.fault(masks / f"{key}.png", None, "missing", f"no mask for {name}", name)
        else:
            index.add(Record(name, picture, mask, SPLIT_NAMES.get(first), str(mask)), seen)
    for key in labels.keys() - pictures.keys():
        index.fault(labels[key], None, "missing", "no image for this mask")
    index.classes = named or _numbered(index)
    return index


def _files(folder: Path) -> dict[str, Path]:
    files = sorted(entry for entry in folder.rglob("*") if entry.is_file() and is_image(entry))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def _numbered(index: Index) -> tuple[str, ...]:
    highest = -1
    for record in index.records:
        try:
            values = read_mask(record.target).unique()
        except ImageFault:
            continue  # the check reports it
        highest = max([highest, *values[values != IGNORED].tolist()])
    if index.records and highest < 1:
        message = f"the masks hold no class but 0 (and {IGNORED}, which is ignored); number the classes from 0"
        index.fault(index.records[0].file, None, "label", message)
    return tuple(str(number) for number in range(max(highest + 1, 1)))
