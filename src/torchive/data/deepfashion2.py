"""DeepFashion2 in other forms: as COCO's annotations, and as the pairs of a user's and a shop's item."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from torchive.data.faults import DataError
from torchive.data.readers.deepfashion2 import LEVELS, SOURCES, read_deepfashion2
from torchive.data.readers.index import Objects, Record
from torchive.structures.landmarks import DEEPFASHION2


def coco_annotations(root: Path | str, split: str | None = None) -> dict[str, Any]:
    """COCO's annotations of a folder of DeepFashion2, ready for ``json.dump``, as the release's converter gives them.

    Boxes become x, y, width, height, ``area`` is theirs, and ``keypoints`` holds x, y, v of all 294 landmarks, zeros
    outside the item's own category. An image's id is its number. Beside the release's ``pair_id`` and ``style`` stand
    ``source``, ``scale``, ``occlusion``, ``zoom_in`` and ``viewpoint``.

    Args:
        root: as of the source ``deepfashion2:ROOT``.
        split: train, val or test, where the folder has splits; all together if None.

    Raises:
        DataError: a fault of the annotations, the first one, an image whose header cannot be read, or two images of one
            number.
    """
    index = read_deepfashion2(Path(root))
    if index.faults:
        raise DataError(str(index.faults[0]))
    names = {value: name for name, value in SOURCES.items()}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    numbers: set[int] = set()
    for record in (record for record in index.records if split in (None, record.split)):
        number = _number(record, numbers)
        height, width = _size(record.image)
        images.append({"id": number, "file_name": record.image.name, "width": width, "height": height})
        for row in range(len(record.target.labels)):
            entry = _annotation(record.target, row)
            values = {key: record.target.values[key][row] for key in ("pair_id", "style", *LEVELS)}
            source = names[record.target.values["source"][row]]
            identity = {"id": len(annotations) + 1, "image_id": number}
            annotations.append({**identity, **entry, **values, "source": source})
    channels = [str(k + 1) for k in range(DEEPFASHION2.total)]
    categories = [
        {"id": k, "name": name, "supercategory": "clothes", "keypoints": channels, "skeleton": []}
        for k, name in enumerate(DEEPFASHION2.names, 1)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def item_pairs(records: Sequence[Record]) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
    """The same items: image id and row of a user's, image id and row of a shop's; style 0 pairs with nothing."""
    shown: dict[tuple[int, int], list[tuple[str, int]]] = {}
    asked: list[tuple[tuple[int, int], tuple[str, int]]] = []
    for record in records:
        values = record.target.values
        rows = zip(values["pair_id"], values["style"], values["source"], strict=True)
        for row, (pair, style, source) in enumerate(rows):
            if style > 0 and source == SOURCES["shop"]:
                shown.setdefault((pair, style), []).append((record.id, row))
            elif style > 0:
                asked.append(((pair, style), (record.id, row)))
    for key, user in asked:
        yield from ((user, shop) for shop in shown.get(key, ()))


def _number(record: Record, seen: set[int]) -> int:
    stem = record.image.stem
    if not stem.isdecimal() or int(stem) in seen:
        raise DataError(f"{record.image}: expected a number of its own as the name; of several splits name one")
    seen.add(int(stem))
    return int(stem)


def _size(path: Path) -> tuple[int, int]:
    """Height and width from the file's header, as the image stands when its EXIF orientation is followed."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            turned = picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: {error}") from error
    return (width, height) if turned else (height, width)


def _annotation(objects: Objects, row: int) -> dict[str, Any]:
    x1, y1, x2, y2 = objects.boxes[row]
    first, values = objects.landmarks[row]
    points = [0.0] * (3 * DEEPFASHION2.total)
    points[3 * first : 3 * first + len(values)] = values
    return {
        "category_id": objects.labels[row],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": 0,
        "num_keypoints": sum(seen > 0 for seen in values[2::3]),
        "keypoints": points,
        "segmentation": objects.shapes[row] or [],
    }
