"""DeepFashion2: a JSON file for each image, with masks, landmarks of each category and which items pair with which."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torchive.data.faults import DataError
from torchive.data.readers.coco import is_number
from torchive.data.readers.index import SPLIT_NAMES, Index, Objects, Record, read_text
from torchive.structures.batch import SHOP, USER
from torchive.structures.landmarks import DEEPFASHION2

#: An image's source, as targets number it.
SOURCES = {"shop": SHOP, "user": USER}
#: What is known of each item as a number from 1 to 3.
LEVELS = ("scale", "occlusion", "zoom_in", "viewpoint")
_ITEM = re.compile(r"item\d+")
_KEYS = ("category_id", "style", "bounding_box", "landmarks", "segmentation", *LEVELS)


def read_deepfashion2(root: Path) -> Index:
    """``root`` holds ``annos`` and ``image``, or folders for the splits (train, validation) that do; a folder without
    ``annos``, as the test images', is left out. Classes are the 13 categories."""
    index = Index("detection", DEEPFASHION2.names, channels=DEEPFASHION2.total)
    seen: set[str] = set()
    whole = True
    for folder, split in split_folders(root):
        for file in sorted((folder / "annos").glob("*.json")):
            index.files.append(file)
            name = file.stem if split is None else f"{folder.name}/{file.stem}"
            objects = _objects(file, name, index)
            if objects is not None:
                whole = whole and all(shape is not None for shape in objects.shapes)
                index.add(Record(name, folder / "image" / f"{file.stem}.jpg", objects, split, str(file)), seen)
    index.masks = whole
    return index


def split_folders(root: Path) -> list[tuple[Path, str | None]]:
    """The folders that hold annotations, and the split of each; None where the data bring none.

    Raises:
        DataError: there are no annotations.
    """
    found: list[tuple[Path, str | None]] = []
    if any((root / "annos").glob("*.json")):
        found = [(root, None)]
    elif root.is_dir():
        folders = sorted(folder for folder in root.iterdir() if folder.name in SPLIT_NAMES)
        found = [(folder, SPLIT_NAMES[folder.name]) for folder in folders if any((folder / "annos").glob("*.json"))]
    if not found:
        raise DataError(f"{root}: expected annos/*.json and image/, or folders train and validation that hold them")
    return found


def _objects(file: Path, name: str, index: Index) -> Objects | None:
    """The items of one file; what is wrong with it or with one of them is noted."""

    def fault(kind: str, message: str) -> None:
        index.fault(file, None, kind, message, name)

    try:
        content = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        index.fault(file, error.lineno, "broken", f"not valid JSON: {error.msg}", name)
        return None
    except (RecursionError, ValueError) as error:
        fault("broken", f"not valid JSON: {str(error).split(';')[0]}")
        return None
    if not isinstance(content, dict):
        fault("broken", f"expected source, pair_id and items, got {type(content).__name__}")
        return None
    for key in content:
        if key not in ("source", "pair_id") and not _ITEM.fullmatch(key):
            fault("broken", f"unknown key {key!r}{_meant(key, ('source', 'pair_id', 'item1'))}")
    source, pair = content.get("source"), content.get("pair_id")
    if source not in SOURCES:
        fault("broken", f"source must be shop or user, got {source!r}{_meant(source, SOURCES)}")
        return None
    if not _is_whole(pair, 0):
        fault("broken", f"pair_id must be a whole number, got {pair!r}{_instead(content, 'pair_id')}")
        return None
    names = sorted((key for key in content if _ITEM.fullmatch(key)), key=lambda key: int(key[4:]))
    rows = []
    for key in names:
        wrong = list(_faults(content[key]))
        for kind, message in wrong:
            fault(kind, f"{key}: {message}")
        if not wrong:
            item = content[key]
            label = item["category_id"]
            rows.append(
                (
                    tuple(map(float, item["bounding_box"])),
                    label,
                    item["segmentation"] or None,
                    key,
                    (DEEPFASHION2.span(label).start, tuple(map(float, item["landmarks"]))),
                    (pair, item["style"], SOURCES[source], *(item[level] for level in LEVELS)),
                )
            )
    boxes, labels, shapes, kept, landmarks, values = list(zip(*rows, strict=True)) or [()] * 6
    columns = list(zip(*values, strict=True)) or [()] * (3 + len(LEVELS))
    return Objects(
        boxes,
        labels,
        (False,) * len(rows),
        shapes,
        (None,) * len(rows),
        kept,
        landmarks=landmarks,
        values=dict(zip(("pair_id", "style", "source", *LEVELS), columns, strict=True)),
    )


def _faults(item: Any) -> Iterator[tuple[str, str]]:
    """Kind and message of everything that is wrong with an item."""
    if not isinstance(item, dict):
        yield "broken", f"expected an item's annotations, got {repr(item)[:40]}"
        return
    lacking = [key for key in _KEYS if key not in item]
    if lacking:
        yield "broken", f"lacks {', '.join(lacking)}{_instead(item, lacking[0])}"
        return
    box = item["bounding_box"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        yield "broken", f"bounding_box must be four numbers x1, y1, x2, y2, got {repr(box)[:80]}"
    if not _is_whole(item["style"], 0):
        yield "broken", f"style must be a whole number, 0 for an item that pairs with none, got {item['style']!r}"
    for key in LEVELS:
        if not _is_whole(item[key], 1, 3):
            yield "broken", f"{key} must be 1, 2 or 3, got {item[key]!r}"
    label, called = item["category_id"], item.get("category_name")
    if not _is_whole(label, 1, len(DEEPFASHION2.names)):
        hint = f"; {called!r} is {DEEPFASHION2.names.index(called) + 1}" if called in DEEPFASHION2.names else ""
        yield "label", f"category_id must lie in 1 to {len(DEEPFASHION2.names)}, got {label!r}{hint}"
        return
    named = DEEPFASHION2.names[label - 1]
    if called is not None and called != named:
        yield "label", f"category_id {label} is {named!r}, category_name says {called!r}{_meant(called, (named,))}"
    points, count = item["landmarks"], DEEPFASHION2.counts[label - 1]
    if not isinstance(points, list) or not all(map(is_number, points)) or len(points) != 3 * count:
        size = len(points) if isinstance(points, list) else repr(points)[:40]
        fits = [n for n, k in zip(DEEPFASHION2.names, DEEPFASHION2.counts, strict=True) if size == 3 * k]
        hint = f"; {size} are those of {' or '.join(fits)}" if fits else ""
        yield "broken", f"landmarks of {named!r} must be {count} times x, y, v, {3 * count} numbers, got {size}{hint}"
    elif any(seen not in (0, 1, 2) for seen in points[2::3]):
        wrong = next(seen for seen in points[2::3] if seen not in (0, 1, 2))
        yield "broken", f"a landmark's v must be 0 (not marked), 1 (hidden) or 2 (visible), got {wrong!r}"


def _is_whole(value: Any, low: int, high: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= (value if high is None else high)


def _meant(word: Any, known: Any) -> str:
    close = get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close and close[0] != word else ""


def _instead(found: dict[str, Any], key: str) -> str:
    """A key that stands there in the place of one that is missed."""
    parts = {other: key for other in found if other not in _KEYS and isinstance(other, str)}
    aliases = {"bbox": "bounding_box", "category": "category_id", "keypoints": "landmarks", "zoom": "zoom_in"}
    close = [other for other in parts if aliases.get(other) == key] or get_close_matches(
        key, list(parts), n=1, cutoff=0.6
    )
    return f"; is it {close[0]!r}?" if close else ""
