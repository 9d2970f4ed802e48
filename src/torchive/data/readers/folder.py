"""A folder of images for each class, with or without folders train, val and test above them."""

from __future__ import annotations

from pathlib import Path

from torchive.data.faults import DataError
from torchive.data.images import SUFFIXES, is_image
from torchive.data.readers.index import SPLIT_NAMES, Index, Record, class_list, sorted_names

_NOTES = (".txt", ".md", ".csv", ".json", ".xml", ".yaml", ".yml", ".db", ".ini")  # never meant as images


def read_folder(root: Path) -> Index:
    """Classes are the folders' names in order, or the lines of ``classes.txt``. Hidden files and notes are no samples;
    any other file that is not an image is a fault."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    index = Index("classification")
    tops = _folders(root)
    splits = {folder: SPLIT_NAMES[folder.name.lower()] for folder in tops if folder.name.lower() in SPLIT_NAMES}
    parents: list[tuple[Path, str | None]] = list(splits.items()) if splits else [(root, None)]
    if splits and len(splits) < len(tops):
        extra = next(folder for folder in tops if folder not in splits)
        index.fault(extra, None, "label", "a folder beside train, val and test belongs to no split")
    named, place = class_list(root / "classes.txt")
    found = [folder.name for parent, _ in parents for folder in _folders(parent)]
    index.classes = named or sorted_names(found)
    if place:
        index.files.append(place)
    if not index.classes:
        raise DataError(f"{root}: has no folder of images for each class")
    number = {name: label for label, name in enumerate(index.classes)}
    seen: set[str] = set()
    for parent, split in parents:
        for stray in sorted(entry for entry in parent.iterdir() if entry.is_file() and is_image(entry)):
            index.fault(stray, None, "label", "the image lies in no class's folder", _id(stray, root))
        for folder in _folders(parent):
            for file in sorted(entry for entry in folder.rglob("*") if not entry.is_dir() and _counts(entry, folder)):
                name = _id(file, root)
                if folder.name not in number:
                    index.fault(file, None, "label", f"{folder.name} is not in {place}", name)
                elif not is_image(file):
                    index.fault(file, None, "unreadable", f"not an image's suffix ({', '.join(SUFFIXES)})", name)
                else:
                    index.add(Record(name, file, number[folder.name], split, str(file)), seen)
    return index


def _folders(parent: Path) -> list[Path]:
    return sorted(entry for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _counts(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.suffix.lower() not in _NOTES


def _id(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix()
