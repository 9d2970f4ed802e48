"""Pascal VOC: an XML file for each image, with boxes that count pixels from 1 and include both ends."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml import ElementTree
from defusedxml.common import DefusedXmlException

from torchive.data.faults import DataError
from torchive.data.images import SUFFIXES, is_image
from torchive.data.readers.index import SPLIT_NAMES, Index, Objects, Record, class_list, read_text, sorted_names

_SIDES = ("xmin", "ymin", "xmax", "ymax")


def read_voc(root: Path) -> Index:
    """``root`` holds Annotations, JPEGImages and perhaps ImageSets/Main, or XML files beside the images. Objects marked
    difficult become crowds, which a score ignores. A DTD or an entity in a file is a fault: none is expanded."""
    folder = root / "Annotations" if (root / "Annotations").is_dir() else root
    files = sorted(folder.glob("*.xml")) if folder.is_dir() else []
    if not files:
        raise DataError(f"{folder}: has no XML files")
    images = root / "JPEGImages" if (root / "JPEGImages").is_dir() else folder
    index = Index("detection", files=list(files))
    parsed = [(file, tree) for file in files if (tree := _parse(file, index)) is not None]
    named, place = class_list(root / "classes.txt")
    if place:
        index.files.append(place)
    labels = [name for _, tree in parsed for entry in tree[0].iter("object") if (name := entry.findtext("name"))]
    index.classes = named or sorted_names(labels)
    number = {name: label + 1 for label, name in enumerate(index.classes)}
    splits = _splits(root, index)
    seen: set[str] = set()
    for file, (root_element, lines) in parsed:
        target = _objects(file, root_element, lines, number, index)
        index.add(
            Record(file.stem, _image(file, root_element, images), target, splits.get(file.stem), str(file), 1), seen
        )
    annotated = {file.stem for file in files}
    if not splits:
        for picture in sorted(path for path in images.iterdir() if is_image(path) and path.stem not in annotated):
            index.fault(picture, None, "missing", "no annotation for this image")
    for stem in sorted(set(splits) - annotated):
        index.fault(folder / f"{stem}.xml", None, "missing", f"ImageSets names {stem}, which has no annotation", stem)
    return index


def _parse(file: Path, index: Index) -> tuple[Element, list[int]] | None:
    try:
        text = read_text(file)
        tree = ElementTree.fromstring(text, forbid_dtd=True)
    except ParseError as error:
        index.fault(file, error.position[0], "broken", f"not valid XML: {error}", file.stem)
    except DefusedXmlException:
        index.fault(file, 1, "broken", "a DTD or an entity is not allowed", file.stem)
    except (DataError, ValueError) as error:
        index.fault(file, 1, "broken", f"{error}", file.stem)
    else:
        return tree, [text.count("\n", 0, match.start()) + 1 for match in re.finditer(r"<object[\s>]", text)]
    return None


def _objects(file: Path, tree: Element, lines: list[int], number: dict[str, int], index: Index) -> Objects:
    rows: list[tuple[Any, ...]] = []
    for position, entry in enumerate(tree.iter("object")):
        line = lines[position] if position < len(lines) else None
        name = entry.findtext("name") or ""
        try:
            sides = [float(entry.findtext(f"bndbox/{side}") or "") for side in _SIDES]
        except ValueError:
            index.fault(file, line, "broken", "an object's bndbox lacks a side or holds no number", file.stem)
            continue
        if name not in number:
            index.fault(file, line, "label", f"{name!r} is not in the class list", file.stem)
            continue
        box = (sides[0] - 1, sides[1] - 1, sides[2], sides[3])
        rows.append((box, number[name], entry.findtext("difficult") == "1", None, line, name))
    boxes, labels, crowd, shapes, places, names = list(zip(*rows, strict=True)) or [()] * 6
    size: tuple[int, int] | None = None
    try:
        size = int(tree.findtext("size/height") or ""), int(tree.findtext("size/width") or "")
    except ValueError:
        size = None
    return Objects(boxes, labels, crowd, shapes, places, names, size if size and all(size) else None)


def _image(file: Path, tree: Element, images: Path) -> Path:
    stated = images / Path(tree.findtext("filename") or f"{file.stem}.jpg").name
    if stated.is_file():
        return stated
    return next((path for suffix in SUFFIXES if (path := images / f"{file.stem}{suffix}").is_file()), stated)


def _splits(root: Path, index: Index) -> dict[str, str]:
    result: dict[str, str] = {}
    for name in ("train", "val", "test"):
        listing = root / "ImageSets" / "Main" / f"{name}.txt"
        if not listing.is_file():
            continue
        index.files.append(listing)
        for line, text in enumerate(read_text(listing).splitlines(), 1):
            if not text.strip():
                continue
            stem = text.split()[0]
            if result.setdefault(stem, SPLIT_NAMES[name]) != name:
                index.fault(listing, line, "duplicate", f"{stem} is in the split {result[stem]} too", stem)
    return result
