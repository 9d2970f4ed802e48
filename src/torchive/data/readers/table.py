"""CSV files: ``file,label[,split]``, or boxes as ``file,xmin,ymin,xmax,ymax,label[,split]``, one box a line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from torchive.data.faults import DataError
from torchive.data.readers.index import SPLIT_NAMES, Index, Objects, Record, class_list, read_text, sorted_names

_NAMES = {
    "file": ("file", "image", "path", "filename", "file_name", "image_path", "filepath"),
    "label": ("label", "class", "category", "target", "class_name"),
    "split": ("split", "subset", "set", "fold"),
    "xmin": ("xmin", "x1", "left"),
    "ymin": ("ymin", "y1", "top"),
    "xmax": ("xmax", "x2", "right"),
    "ymax": ("ymax", "y2", "bottom"),
}
_SIDES = ("xmin", "ymin", "xmax", "ymax")

Row = tuple[int, dict[str, str]]


def read_table(file: Path) -> Index:
    """Without a header the columns are file, label. Paths are relative to the CSV file. Classes are the labels in
    order, or the lines of ``STEM.classes.txt`` or ``classes.txt`` beside it. In a table of boxes, a line with empty
    sides is an
    image without objects."""
    index = Index("classification", files=[file])
    rows = list(_rows(file, index))
    if not rows and not index.faults:
        raise DataError(f"{file}: has no rows")
    boxes = bool(rows) and all(side in rows[0][1] for side in _SIDES)
    index.task = "detection" if boxes else "classification"
    named, place = class_list(file.with_suffix(".classes.txt"), file.with_name("classes.txt"))
    if place:
        index.files.append(place)
    labels = [row["label"] for _, row in rows if row["label"] and not (boxes and not row["xmin"])]
    index.classes = named or sorted_names(labels)
    splits = {name: _split(line, row, index, file) for line, row in rows if (name := row["file"])}
    if boxes:
        _boxes(rows, splits, index, file)
    else:
        _labels(rows, splits, index, file)
    return index


def _rows(file: Path, index: Index) -> Iterator[Row]:
    text = read_text(file)
    reader = csv.reader(io.StringIO(text), dialect="excel", delimiter=_delimiter(text))
    header: list[str] | None = None
    line = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            index.fault(file, line, "broken", f"{error}")
            return
        start, line = line, reader.line_num + 1
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            continue
        if header is None:
            header = _header(cells)
            if header:
                continue
            header = ["file", "label"]
        if len(cells) != len(header) or not cells[header.index("file")]:
            index.fault(file, start, "broken", f"expected {len(header)} values ({', '.join(header)}), got {len(cells)}")
            continue
        yield start, dict(zip(header, cells, strict=True))


def _header(cells: list[str]) -> list[str] | None:
    known = {alias: name for name, aliases in _NAMES.items() for alias in aliases}
    names = [known.get(cell.lower(), cell.lower()) for cell in cells]
    return names if "file" in names and "label" in names else None


def _delimiter(text: str) -> str:
    first = text.split("\n", 1)[0]
    return max(",;\t", key=first.count)


def _split(line: int, row: dict[str, str], index: Index, file: Path) -> str | None:
    given = row.get("split", "")
    if not given:
        return None
    if given.lower() not in SPLIT_NAMES:
        index.fault(file, line, "broken", f"split must be train, val or test, got {given!r}", row["file"])
    return SPLIT_NAMES.get(given.lower())


def _labels(rows: list[Row], splits: dict[str, str | None], index: Index, file: Path) -> None:
    number = {name: label for label, name in enumerate(index.classes)}
    seen: set[str] = set()
    for line, row in rows:
        name, label = row["file"], number.get(row["label"])
        if label is None:
            index.fault(file, line, "label", f"{row['label']!r} is not in the class list", name)
        index.add(Record(name, file.parent / name, label, splits[name], str(file), line), seen)


def _boxes(rows: list[Row], splits: dict[str, str | None], index: Index, file: Path) -> None:
    number = {name: label + 1 for label, name in enumerate(index.classes)}
    found: dict[str, tuple[int, list[tuple[tuple[float, float, float, float], int, int]]]] = {}
    for line, row in rows:
        name = row["file"]
        objects = found.setdefault(name, (line, []))[1]
        if not any(row[side] for side in _SIDES):
            continue
        try:
            x0, y0, x1, y1 = (float(row[side]) for side in _SIDES)
        except ValueError:
            index.fault(file, line, "broken", "a side of the box is not a number", name)
            continue
        if row["label"] not in number:
            index.fault(file, line, "label", f"{row['label']!r} is not in the class list", name)
            continue
        objects.append(((x0, y0, x1, y1), number[row["label"]], line))
    seen: set[str] = set()
    for name, (line, objects) in found.items():
        target = Objects(
            boxes=tuple(box for box, _, _ in objects),
            labels=tuple(label for _, label, _ in objects),
            crowd=(False,) * len(objects),
            shapes=(None,) * len(objects),
            lines=tuple(line for _, _, line in objects),
            names=("box",) * len(objects),
        )
        index.add(Record(name, file.parent / name, target, splits[name], str(file), line), seen)
