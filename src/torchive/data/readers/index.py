"""What a reader finds: one record per sample, the classes, and the faults that show without reading an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchive.data.faults import DataError, Fault

#: Folder names and column values that name a split.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Objects:
    """The objects of one image. ``boxes`` are xyxy; ``lines`` and ``names`` say where each stands; ``shapes`` are
    COCO's segmentations or None; ``landmarks`` are the first channel of each and x, y, v of its points; ``values`` are
    whole numbers by what they tell, one for each object."""

    boxes: tuple[tuple[float, float, float, float], ...] = ()
    labels: tuple[int, ...] = ()
    crowd: tuple[bool, ...] = ()
    shapes: tuple[Any, ...] = ()
    lines: tuple[int | None, ...] = ()
    names: tuple[str, ...] = ()
    size: tuple[int, int] | None = None  # (H, W) as the annotation states it
    landmarks: tuple[tuple[int, tuple[float, ...]], ...] = ()
    values: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Segments:
    """The segments of one image: a picture of their ids, and of each its id, its category, 1 to ``things`` for an
    object and above that for what else there is, and whether it is a crowd."""

    picture: Path
    ids: tuple[int, ...]
    categories: tuple[int, ...]
    crowd: tuple[bool, ...]
    things: int

    @property
    def labels(self) -> tuple[int, ...]:
        """Those of the objects, as ``Objects.labels``."""
        return tuple(category for category in self.categories if category <= self.things)


@dataclass(frozen=True)
class Record:
    """One sample: where its image is, its target as annotated (a label, ``Objects``, ``Segments`` or a mask's path),
    and where that stands."""

    id: str
    image: Path
    target: Any
    split: str | None
    file: str
    line: int | None = None


@dataclass
class Index:
    """Everything of one source.

    ``files`` are the annotation files read, ``channels`` the landmarks of all classes, ``stuff`` names what regions
    without objects are, ``notes`` what is no fault but should be known before a training.
    """

    task: str
    classes: tuple[str, ...] = ()
    records: list[Record] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    masks: bool = False
    channels: int = 0
    stuff: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def fault(self, file: Path | str, line: int | None, kind: str, message: str, sample: str | None = None) -> None:
        """Note a fault."""
        self.faults.append(Fault(str(file), line, kind, message, sample))

    def add(self, record: Record, seen: set[str]) -> None:
        """Add a record, or note a duplicate where its id is taken; the first one stays."""
        if record.id in seen:
            self.fault(record.file, record.line, "duplicate", f"a second sample has the id {record.id}", None)
            return
        seen.add(record.id)
        self.records.append(record)


def class_list(*places: Path) -> tuple[tuple[str, ...] | None, Path | None]:
    """The names of the first class list that exists, one a line, and its path; (None, None) where there is none."""
    for place in places:
        if place.is_file():
            names = tuple(line.strip() for line in read_text(place).splitlines() if line.strip())
            if len(set(names)) != len(names) or not names:
                raise DataError(f"{place}: the class list is empty or names a class twice")
            return names, place
    return None, None


def read_text(path: Path) -> str:
    """A text file in UTF-8. DataError where it is missing, unreadable or of another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def sorted_names(names: Sequence[str]) -> tuple[str, ...]:
    """Distinct names in order; numbers in the order of their value."""
    distinct = set(names)
    if all(name.isdecimal() for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (int(name), name)))
    return tuple(sorted(distinct))
