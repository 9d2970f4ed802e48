"""COCO's panoptic annotations: of each image a picture of segment ids, and what each segment is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchive.data.readers.coco import categories_of, content_of, images_of
from torchive.data.readers.index import Index, Record, Segments
from torchive.data.readers.masks import IGNORED


def read_panoptic(annotations: Path, images: Path, segments: Path) -> Index:
    """Classes are the things in the order of their ids, labelled from 1; stuff comes after them, numbered on.

    A pixel that belongs to no segment, id 0, is void.

    Args:
        annotations: JSON with ``segments_info`` for each image.
        images: folder of the images.
        segments: folder of the pictures of ids, red + 256 green + 65,536 blue.
    """
    index = Index("detection", files=[annotations], masks=True)
    content = content_of(annotations, index)
    if content is None:
        return index
    categories = categories_of(content, annotations, index)
    for entry in categories:
        if entry.get("isthing") not in (0, 1):
            index.fault(annotations, None, "broken", f"category {entry['id']} lacks isthing, 0 or 1")
    things, stuff = ([c for c in categories if bool(c.get("isthing")) is kind] for kind in (True, False))
    index.classes, index.stuff = (tuple(entry["name"] for entry in part) for part in (things, stuff))
    if len(categories) >= IGNORED:
        index.fault(annotations, None, "broken", f"{len(categories)} categories; at most {IGNORED - 1} are read")
    number = {entry["id"]: k for k, entry in enumerate([*things, *stuff], 1)}
    entries = images_of(content, annotations, index)
    found: dict[Any, Segments] = {}
    for position, entry in enumerate(content["annotations"]):
        name = f"annotations[{position}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), int | str):
            index.fault(annotations, None, "broken", f"{name} lacks image_id")
        elif entry["image_id"] not in entries:
            index.fault(annotations, None, "broken", f"{name}: image_id {entry['image_id']} is not among the images")
        elif entry["image_id"] in found:
            index.fault(annotations, None, "duplicate", f"{name}: image {entry['image_id']} has another annotation")
        else:
            sample = entries[entry["image_id"]]["file_name"]
            one = _segments(entry, name, segments, number, annotations, index, sample)
            if one is not None:
                found[entry["image_id"]] = one
    seen: set[str] = set()
    for key, entry in entries.items():
        name = entry["file_name"]
        if key in found:
            index.add(Record(name, images / name, found[key], None, str(annotations)), seen)
        else:
            index.fault(annotations, None, "missing", f"no annotation that can be read for the image {name}", name)
    return index


def _segments(
    entry: dict[str, Any],
    name: str,
    folder: Path,
    number: dict[int, int],
    file: Path,
    index: Index,
    sample: str,
) -> Segments | None:
    """The segments of one annotation without those that have a fault; None where it has none to read."""
    listed, picture = entry.get("segments_info"), entry.get("file_name")
    if not isinstance(listed, list) or not isinstance(picture, str):
        index.fault(file, None, "broken", f"{name} lacks file_name or segments_info", sample)
        return None
    ids, categories, crowd = [], [], []
    for place, segment in enumerate(listed):
        where = f"{name}, segment {place}"
        own = segment.get("id") if isinstance(segment, dict) else None
        if not isinstance(own, int) or not 0 < own < 2**24:
            index.fault(file, None, "broken", f"{where}: id must be a whole number from 1 to 2^24 - 1", sample)
        elif own in ids:
            index.fault(file, None, "duplicate", f"{where}: another segment has the id {own}", sample)
        elif segment.get("category_id") not in number:
            message = f"{where}: category_id {segment.get('category_id')} is not among the categories"
            index.fault(file, None, "label", message, sample)
        elif segment.get("iscrowd", 0) not in (0, 1):
            index.fault(file, None, "broken", f"{where}: iscrowd must be 0 or 1, got {segment['iscrowd']!r}", sample)
        else:
            ids.append(own)
            categories.append(number[segment["category_id"]])
            crowd.append(bool(segment.get("iscrowd", 0)))
    return Segments(folder / picture, tuple(ids), tuple(categories), tuple(crowd), len(index.classes))
