"""From a string to a reader: which format, which files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torchive.data.faults import DataError
from torchive.data.images import is_image
from torchive.data.readers.coco import read_coco
from torchive.data.readers.deepfashion2 import read_deepfashion2
from torchive.data.readers.folder import read_folder
from torchive.data.readers.index import Index, Objects
from torchive.data.readers.masks import read_masks
from torchive.data.readers.panoptic import read_panoptic
from torchive.data.readers.table import read_table
from torchive.data.readers.voc import read_voc

_READERS: dict[str, tuple[int, Callable[..., Index]]] = {
    "folder": (1, read_folder),
    "csv": (1, read_table),
    "coco": (2, read_coco),
    "panoptic": (3, read_panoptic),
    "voc": (1, read_voc),
    "masks": (2, read_masks),
    "deepfashion2": (1, read_deepfashion2),
}
_USAGE = {
    "folder": "folder:PATH",
    "csv": "csv:FILE.csv",
    "coco": "coco:ANNOTATIONS.json,IMAGES/",
    "panoptic": "panoptic:ANNOTATIONS.json,IMAGES/,SEGMENTS/",
    "voc": "voc:PATH",
    "masks": "masks:IMAGES/,MASKS/",
    "deepfashion2": "deepfashion2:PATH",
}


@dataclass(frozen=True)
class Source:
    """A format and its paths, as text since they may hold ``{split}``."""

    kind: str
    paths: tuple[str, ...]

    @property
    def by_split(self) -> bool:
        """Whether each split has its own paths."""
        return any("{split}" in path for path in self.paths)

    def of(self, split: str) -> Source:
        """The source of one split."""
        return replace(self, paths=tuple(path.replace("{split}", split) for path in self.paths))


def parse_source(text: str) -> Source | None:
    """The source that a string names; None where it can only be a sample set's name.

    Raises:
        DataError: the format is unknown, a path is lacking, or a bare path is of no known format.
    """
    kind, colon, rest = text.partition(":")
    if colon and kind in _READERS:
        wanted = _READERS[kind][0]
        paths = tuple(part.strip() for part in rest.split(",")) if wanted > 1 else (rest,)
        if kind == "coco" and len(paths) == 1 and paths[0]:
            paths = (paths[0], str(_images_beside(Path(paths[0]))))
        if kind == "panoptic" and len(paths) < 3 and paths[0]:
            stem = Path(paths[0])  # as COCO lays them out: the pictures in a folder of the file's name
            paths = (paths[0], paths[1] if len(paths) > 1 else str(_images_beside(stem)), str(stem.with_suffix("")))
        if kind == "masks" and len(paths) == 1 and paths[0]:
            paths = (str(Path(paths[0]) / "images"), str(Path(paths[0]) / "masks"))
        if len(paths) != wanted or not all(paths):
            raise DataError(f"{text}: expected {_USAGE[kind]}")
        return Source(kind, paths)
    path = Path(text).expanduser()
    if path.exists():
        return _recognise(path)
    if any(mark in text for mark in ("/", "\\")) or path.suffix:
        raise DataError(f"{text}: no such file or folder")
    return None


def _recognise(path: Path) -> Source:
    if path.is_file():
        if path.suffix.lower() in (".csv", ".tsv"):
            return Source("csv", (str(path),))
        if path.suffix.lower() == ".json":
            return Source("coco", (str(path), str(_images_beside(path))))
        raise DataError(f"{path}: not a kind of data that is read; expected {', '.join(_USAGE.values())}")
    if (path / "images").is_dir() and (path / "masks").is_dir():
        return Source("masks", (str(path / "images"), str(path / "masks")))
    if any((part / "annos").is_dir() for part in (path, path / "train", path / "validation")):
        return Source("deepfashion2", (str(path),))
    if (path / "Annotations").is_dir() or any(path.glob("*.xml")):
        return Source("voc", (str(path),))
    if any(entry.is_dir() for entry in path.iterdir()):
        return Source("folder", (str(path),))
    if any(is_image(entry) for entry in path.iterdir()):
        raise DataError(f"{path}: holds images but no folder for each class, no annotations and no masks")
    raise DataError(f"{path}: not a kind of data that is read; expected {', '.join(_USAGE.values())}")


def _images_beside(annotations: Path) -> Path:
    beside = annotations.parent / "images"
    return beside if beside.is_dir() else annotations.parent


def read_index(source: Source, splits: tuple[str, ...]) -> Index:
    """The index of a source; where each split has its own paths, of all that exist together.

    These have masks where all splits have that hold an object; a note names each that keeps them from it.
    """
    reader = _READERS[source.kind][1]
    if not source.by_split:
        return _read(reader, [Path(path).expanduser() for path in source.paths])
    whole: Index | None = None
    parts: list[Index] = []
    for split in splits:
        paths = [Path(path).expanduser() for path in source.of(split).paths]
        if not all(path.exists() for path in paths):
            continue
        part = _read(reader, paths)
        parts.append(part)
        if whole is None:
            whole = Index(part.task, part.classes, channels=part.channels, stuff=part.stuff)
        own, others = ((*index.classes, *index.stuff) for index in (part, whole))
        if part.classes and own != others:
            raise DataError(f"{paths[0]}: its classes {own} are not those of the other splits {others}")
        whole.records += [replace(entry, id=f"{split}/{entry.id}", split=split) for entry in part.records]
        whole.faults += [replace(f, sample=f.sample and f"{split}/{f.sample}") for f in part.faults]
        whole.files += part.files
        whole.notes += part.notes
    if whole is None:
        raise DataError(f"{source.paths[0]}: exists for none of {', '.join(splits)}")
    masked = any(part.masks for part in parts)
    lacking = [part for part in parts if not part.masks and _objects(part)]
    whole.masks = masked and not lacking
    if masked:
        whole.notes += [
            f"{part.files[0]}: not all of its objects have a segmentation, so that the other splits count as boxes "
            "without masks, too"
            for part in lacking
        ]
    return whole


def _objects(index: Index) -> bool:
    """Whether there is any object, crowds apart, that could have a mask."""
    return any(isinstance(entry.target, Objects) and not all(entry.target.crowd) for entry in index.records)


def _read(reader: Callable[..., Index], paths: list[Path]) -> Index:
    try:
        return reader(*paths)
    except OSError as error:
        raise DataError(f"{error.filename or paths[0]}: cannot be read ({error.strerror})") from error
