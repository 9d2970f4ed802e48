"""Reading every sample once and listing each fault with file and line.

The result is kept in the cache under the names, sizes and times of change of all files, so that training on unchanged
data starts at once. ``check_data(source, fresh=True)`` reads again.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import Tensor

from torchive.data.cache import cache_dir, write_atomic
from torchive.data.faults import CheckReport, DataError, Fault, printable
from torchive.data.fetching import load_sample_set, sample_set_info
from torchive.data.images import ImageFault, image_size, read_ids, read_image, read_mask
from torchive.data.readers import Index, Objects, Record, Segments, parse_source, read_index
from torchive.data.readers.coco import decode_shape
from torchive.data.readers.masks import IGNORED
from torchive.data.samples import SPLITS
from torchive.structures import Sample

_VERSION = 1
_EDGE = 1.0  # pixels that a box may reach outside: annotation tools round, and some count from 1


def check_data(source: str, *, fresh: bool = False) -> CheckReport:
    """Read every sample of a source, or of a sample set, once.

    Raises:
        DataError: the source does not exist or is of no known format.
    """
    place = parse_source(source)
    if place is None:
        return _check_sample_set(source)
    index = read_index(place, SPLITS)
    return CheckReport(
        source, index.task, index.classes, len(index.records), tuple(check_index(source, index, fresh=fresh))
    )


def check_index(source: str, index: Index, *, fresh: bool = False) -> list[Fault]:
    """All faults of an index: those found while reading it, and those of each sample's image, mask and boxes."""
    kept = cache_dir() / "checks" / f"{_key(source, index)}.json"
    if not fresh and kept.is_file():
        try:
            return [Fault(**fault) for fault in json.loads(kept.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            kept.unlink(missing_ok=True)
    faults = list(index.faults)
    # Pillow warns of what becomes a fault here. The filter is the process's: it is set around the threads, not in them.
    with warnings.catch_warnings(), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")
        for found in pool.map(lambda record: list(_check_record(record, index)), index.records):
            faults.extend(found)
    faults.extend(_empty_classes(source, index))
    with suppress(OSError, DataError):  # a cache that cannot be written costs time, not truth
        write_atomic(kept, json.dumps([asdict(fault) for fault in faults]).encode())
    return faults


def _key(source: str, index: Index) -> str:
    digest = hashlib.blake2b(f"{_VERSION} {printable(source)} {index.task} {index.classes!a}".encode(), digest_size=16)
    paths = {path.absolute() for path in index.files}
    for record in index.records:
        paths.add(record.image.absolute())
        if isinstance(record.target, Path):
            paths.add(record.target.absolute())
        elif isinstance(record.target, Segments):
            paths.add(record.target.picture.absolute())
    for path in sorted(paths):
        try:
            info = path.stat()
            state = f"{info.st_size} {info.st_mtime_ns} {info.st_ctime_ns}"
        except (OSError, ValueError):
            state = "missing"
        digest.update(f"{printable(str(path))} {state}\n".encode())
    for fault in index.faults:
        digest.update(f"{fault}\n".encode())
    return digest.hexdigest()


def _check_record(record: Record, index: Index) -> Iterator[Fault]:
    size: tuple[int, int] | None = None
    try:
        size = image_size(read_image(record.image))
    except ImageFault as fault:
        yield Fault(str(record.image), None, fault.kind, _cited(fault, record), record.id)
    if isinstance(record.target, Path):
        yield from _check_mask(record, record.target, size, len(index.classes))
    elif isinstance(record.target, Objects):
        yield from _check_objects(record, record.target, size)
    elif isinstance(record.target, Segments):
        yield from _check_segments(record, record.target, size)


def _cited(fault: ImageFault, record: Record) -> str:
    """The message, with the line that names the image where an annotation file does."""
    if record.file == str(record.image) or isinstance(record.target, Path):
        return fault.message
    line = "" if record.line is None else f":{record.line}"
    return f"{fault.message} (named in {record.file}{line})"


def _check_mask(record: Record, path: Path, size: tuple[int, int] | None, classes: int) -> Iterator[Fault]:
    try:
        mask = read_mask(path)
    except ImageFault as fault:
        yield Fault(str(path), None, fault.kind, fault.message, record.id)
        return
    if size is not None and image_size(mask) != size:
        message = f"the mask is {_by(image_size(mask))}, its image {_by(size)}"
        yield Fault(str(path), None, "mask-size", message, record.id)
    wrong = _outside_classes(mask, classes)
    if wrong:
        message = (
            f"holds {', '.join(map(str, wrong[:5]))}, but the classes are 0 to {classes - 1} ({IGNORED} is ignored)"
        )
        yield Fault(str(path), None, "label", message, record.id)


def _check_segments(record: Record, segments: Segments, size: tuple[int, int] | None) -> Iterator[Fault]:
    path = str(segments.picture)
    try:
        ids = read_ids(segments.picture)
    except ImageFault as fault:
        yield Fault(path, None, fault.kind, fault.message, record.id)
        return
    if size is not None and image_size(ids) != size:
        message = f"the picture of segments is {_by(image_size(ids))}, its image {_by(size)}"
        yield Fault(path, None, "mask-size", message, record.id)
    drawn, listed = set(ids.unique().tolist()) - {0}, set(segments.ids)
    if drawn - listed:
        some = ", ".join(map(str, sorted(drawn - listed)[:5]))
        yield Fault(path, None, "label", f"holds the ids {some}, which {record.file} does not list", record.id)
    for own in sorted(listed - drawn):
        yield Fault(record.file, record.line, "box-empty", f"segment {own} of {path} has no pixel", record.id)


def _outside_classes(mask: Tensor, classes: int) -> list[int]:
    values = mask.unique()
    return values[((values < 0) | (values >= classes)) & (values != IGNORED)].tolist()


def _by(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"


def _check_objects(record: Record, objects: Objects, size: tuple[int, int] | None) -> Iterator[Fault]:
    if size is not None and objects.size is not None and objects.size != size:
        message = f"{record.id} is {_by(size)}, the annotation says {_by(objects.size)}"
        yield Fault(record.file, record.line, "size", message, record.id)
        return
    rows = zip(objects.boxes, objects.lines, objects.names, objects.shapes, strict=True)
    for box, line, name, shape in rows:
        kind, reason = _box_fault(box, size)
        if kind:
            rounded = [round(side, 2) for side in box]
            yield Fault(record.file, line, kind, f"{name}: {reason}, got {rounded}", record.id)
        if shape is not None and size is not None:
            try:
                if not decode_shape(shape, size).any():
                    yield Fault(record.file, line, "box-empty", f"{name}: the mask has no pixel", record.id)
            except DataError as error:
                kind = "mask-size" if str(error).startswith("size") else "broken"
                yield Fault(record.file, line, kind, f"{name}: {error}", record.id)


def _box_fault(box: tuple[float, float, float, float], size: tuple[int, int] | None) -> tuple[str, str]:
    x0, y0, x1, y1 = box
    if not np.isfinite(box).all():
        return "broken", "a side of the box is not a finite number"
    if x1 <= x0 or y1 <= y0:
        return "box-empty", "the box has no area; expected xmin < xmax and ymin < ymax"
    if size is None:
        return "", ""
    height, width = size
    if x0 < -_EDGE or y0 < -_EDGE or x1 > width + _EDGE or y1 > height + _EDGE:
        return "box-outside", f"the box reaches outside the image of {_by(size)}"
    if min(x1, width) <= max(x0, 0) or min(y1, height) <= max(y0, 0):
        return "box-outside", f"the box lies outside the image of {_by(size)}"
    return "", ""


def _empty_classes(source: str, index: Index) -> Iterator[Fault]:
    """A class that no sample has, where a class list or a folder promises it. Masks are not counted: a rare class may
    well be absent."""
    if index.task == "segmentation":
        return
    counts: Counter[int] = Counter()
    for record in index.records:
        if isinstance(record.target, Objects | Segments):
            counts.update(label - 1 for label in record.target.labels)
        elif isinstance(record.target, int):
            counts[record.target] += 1
    where = index.files[-1] if index.files else Path(index.records[0].file).parent.parent if index.records else source
    for number, name in enumerate(index.classes):
        if not counts[number]:
            yield Fault(str(where), None, "empty-class", f"the class {name!r} has no sample")


def _check_sample_set(name: str) -> CheckReport:
    info = sample_set_info(name)
    faults: list[Fault] = []
    seen: Counter[str] = Counter()
    for split in SPLITS:
        samples = load_sample_set(name, split)
        seen.update(samples.ids)
        for position in range(len(samples)):
            faults.extend(_check_sample(name, samples[position], len(info.classes)))
    faults += [Fault(name, None, "duplicate", f"{n} samples have the id {i}", i) for i, n in seen.items() if n > 1]
    return CheckReport(name, info.task, info.classes, seen.total(), tuple(faults))


def _check_sample(name: str, sample: Sample, classes: int) -> Iterator[Fault]:
    size, target = image_size(sample.image), sample.target
    if isinstance(target, int) and not 0 <= target < classes:
        yield Fault(name, None, "label", f"{sample.id} has the label {target}", sample.id)
    elif isinstance(target, Tensor) and _outside_classes(target, classes):
        yield Fault(name, None, "label", f"{sample.id} holds indices that are no class", sample.id)
    elif isinstance(target, dict):
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            kind, reason = _box_fault(box, size)
            if kind or not 1 <= label <= classes:
                yield Fault(name, None, kind or "label", f"{sample.id}: {reason or f'label {label}'}", sample.id)
