"""COCO's annotations of objects: boxes, polygons and run-length masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from torchive.data.faults import DataError
from torchive.data.readers.index import Index, Objects, Record, read_text


def read_coco(annotations: Path, images: Path) -> Index:
    """Classes are the categories in the order of their ids, labelled from 1. Samples have masks where every object of
    the file, crowds apart, has a segmentation."""
    index = Index("detection", files=[annotations])
    content = content_of(annotations, index)
    if content is None:
        return index
    if any(isinstance(entry, dict) and "segments_info" in entry for entry in content["annotations"]):
        raise DataError(f"{annotations}: holds panoptic segments; write panoptic:{annotations},IMAGES/,SEGMENTS/")
    categories = categories_of(content, annotations, index)
    index.classes = tuple(entry["name"] for entry in categories)
    number = {entry["id"]: label + 1 for label, entry in enumerate(categories)}
    entries = images_of(content, annotations, index)
    objects: dict[Any, list[tuple[Any, ...]]] = {key: [] for key in entries}
    ids: set[Any] = set()
    for position, entry in enumerate(content["annotations"]):
        found = _object(position, entry, entries, number, ids, annotations, index)
        if found:
            objects[found[0]].append(found[1:])
    whole = [entry for listed in objects.values() for entry in listed if not entry[2]]  # crowds apart
    lacking = [entry[4] for entry in whole if entry[3] is None]
    index.masks = bool(whole) and not lacking
    if 0 < len(lacking) < len(whole):
        index.notes.append(
            f"{annotations}: {len(lacking)} of {len(whole)} objects have no segmentation ({lacking[0]} first), so that "
            "the data count as boxes without masks"
        )
    seen: set[str] = set()
    for key, entry in entries.items():
        columns = list(zip(*objects[key], strict=True)) or [()] * 5
        boxes, labels, crowd, shapes, names = columns
        height, width = entry.get("height"), entry.get("width")
        size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
        target = Objects(boxes, labels, crowd, shapes, (None,) * len(boxes), names, size)
        name = entry["file_name"]
        index.add(Record(name, images / name, target, None, str(annotations)), seen)
    return index


def content_of(file: Path, index: Index) -> dict[str, Any] | None:
    """The parsed file, whose images, annotations and categories are lists, or None after noting its fault."""
    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        index.fault(file, error.lineno, "broken", f"not valid JSON: {error.msg}")
        return None
    except RecursionError:
        index.fault(file, None, "broken", "not valid JSON: nested too deeply")
        return None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        index.fault(file, None, "broken", f"not valid JSON: {str(error).split(';')[0]}")
        return None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            index.fault(file, None, "broken", f"not COCO annotations: {key} is not a list")
            return None
    return content


def categories_of(content: dict[str, Any], file: Path, index: Index) -> list[dict[str, Any]]:
    """The categories that have an id of their own and a name, by id; a fault where others do not."""
    named = {entry["id"]: entry for entry in content["categories"] if _named(entry)}
    if len(named) != len(content["categories"]):
        index.fault(file, None, "broken", "a category lacks id or name, or two have one id")
    return [named[key] for key in sorted(named)]


def images_of(content: dict[str, Any], file: Path, index: Index) -> dict[Any, dict[str, Any]]:
    """The images by id; a fault for each that lacks id or file name, or has the id of another."""
    found: dict[Any, dict[str, Any]] = {}
    for position, entry in enumerate(content["images"]):
        named = isinstance(entry, dict) and isinstance(entry.get("file_name"), str)
        if not named or not isinstance(entry.get("id"), int | str):
            index.fault(file, None, "broken", f"images[{position}] lacks id or file_name")
        elif entry["id"] in found:
            index.fault(file, None, "duplicate", f"images[{position}] has the id {entry['id']} of another image")
        else:
            found[entry["id"]] = entry
    return found


def _named(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("id"), int) and isinstance(entry.get("name"), str)


def _object(
    position: int,
    entry: Any,
    images: dict[Any, dict[str, Any]],
    number: dict[int, int],
    ids: set[Any],
    file: Path,
    index: Index,
) -> tuple[Any, ...] | None:
    """(image id, box, label, crowd, shape, name) of one annotation, or None after noting its fault."""
    name = f"annotations[{position}]"
    if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), int | str):
        index.fault(file, None, "broken", f"{name} lacks image_id")
        return None
    if "id" in entry:
        name = f"annotation {entry['id']}"
    if entry["image_id"] not in images:
        index.fault(file, None, "broken", f"{name}: image_id {entry['image_id']} is not among the images")
        return None
    sample = images[entry["image_id"]]["file_name"]
    if "id" in entry and str(entry["id"]) in ids:
        index.fault(file, None, "duplicate", f"{name}: another annotation has this id", sample)
        return None
    ids.add(str(entry.get("id", name)))
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        index.fault(file, None, "broken", f"{name}: bbox must be four numbers, got {repr(box)[:80]}", sample)
        return None
    category = entry.get("category_id")
    label = number.get(category) if isinstance(category, int) else None
    if label is None:
        message = f"{name}: category_id {category} is not among the categories"
        index.fault(file, None, "label", message, sample)
        return None
    crowd = entry.get("iscrowd", 0)
    if crowd not in (0, 1):  # a text "0" would count as true, and hide the object
        index.fault(file, None, "broken", f"{name}: iscrowd must be 0 or 1, got {crowd!r}", sample)
        return None
    x, y, width, height = map(float, box)
    return entry["image_id"], (x, y, x + width, y + height), label, bool(crowd), entry.get("segmentation") or None, name


def decode_shape(shape: Any, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """A segmentation as uint8 (H, W): polygons of at least three points, or runs as numbers or as COCO's text.

    Raises:
        DataError: its own size is another (the message then starts with "size"), or it is not a segmentation.
    """
    from faster_coco_eval.core import mask as runs

    height, width = size
    if isinstance(shape, dict):
        stated = shape.get("size")
        if stated != [height, width]:
            raise DataError(f"size of the mask is {stated}, the image has {[height, width]}")
        counts = shape.get("counts")
        try:
            coded = runs.frPyObjects(shape, height, width) if isinstance(counts, list) else shape
            return np.asarray(runs.decode(coded), np.uint8)
        except Exception as error:  # the decoder's C++ raises many types
            raise DataError(f"the mask's runs cannot be decoded ({str(error).splitlines()[0]})") from error
    polygons = shape if isinstance(shape, list) else []
    if not polygons or not all(_is_polygon(part) for part in polygons):
        raise DataError("a polygon needs at least three points of two finite numbers")
    reach = max(height, width)  # the decoder walks along each side, however long it is
    if not all(-reach <= value <= 2 * reach for part in polygons for value in part):
        raise DataError(f"a polygon reaches far outside the image of {width} x {height}")
    return np.asarray(runs.decode(runs.merge(runs.frPyObjects(polygons, height, width))), np.uint8)


def _is_polygon(part: Any) -> bool:
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
        return False
    return all(map(is_number, part))


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a picture may have: neither a truth value, nor infinite, nor absurd."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9
