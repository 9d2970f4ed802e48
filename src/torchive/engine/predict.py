"""Predictions on the user's images and videos: a picture with the result drawn, and a JSON file beside each.

``NAME.json`` holds ``source``, ``width``, ``height``, ``task``, ``classes`` and, by task,

- classification: ``label`` (index), ``class``, ``score``, ``scores`` (class to score);
- detection: ``objects``, each with ``box`` (x0, y0, x1, y1 in pixels of the source), ``label`` (from 1), ``class``,
  ``score``, and ``mask`` where the model gives one (``size`` and ``counts``: run lengths down the columns, the first
  of zeros, as in COCO) and ``keypoints`` (a list of x, y) where the model gives them; where it gives a panoptic map,
  ``segments`` (``id``, ``category``, ``class``, ``isthing``, ``score`` or ``area``) and ``panoptic``, a PNG of 16 bits
  beside it that holds the ids;
- segmentation: ``shares`` (class to share of the pixels) and ``mask``, a PNG beside it that holds the class indices.

A video gives a video, and one JSON file: ``frames``, each with its ``time`` in seconds and the values above.
``predictions.json`` lists all of them, and the files that could not be read.
"""

from __future__ import annotations

import glob
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchive.data.faults import DataError
from torchive.engine.checkpoint import write_atomically
from torchive.engine.evaluate import evaluating
from torchive.engine.pictures import save_picture
from torchive.engine.predictions import predict_images, values_of
from torchive.engine.processes import placed
from torchive.engine.recipe import RecipeError
from torchive.engine.run import LoadedRun, open_run
from torchive.engine.video import is_video, predict_video
from torchive.structures import Detections, Prediction, Segmentation

_GROUP = 16


class Predicted(list[Path]):
    """The pictures written; ``errors`` has a line for each source that gave none."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    @property
    def exit_status(self) -> int:
        """2 where a source could not be used, else 0."""
        return 2 if self.errors else 0


def predict(
    run: Path, sources: Sequence[str], out: Path, *, threshold: float = 0.3, progress: bool = True
) -> Predicted:
    """Predict on files, folders (with their subfolders) and globs, and draw the results.

    Videos need the extra ``torchive[video]``.

    Args:
        run: a run folder, or a checkpoint of one.
        out: the folder of the pictures and JSON files.
        threshold: objects below this score are not drawn; the JSON holds them all.
        progress: write a line for each picture and fault to stderr.

    Raises:
        CheckpointError: the run cannot be used. RecipeError: its model predicts nothing that can be drawn.
    """
    loaded = open_run(Path(run))
    if not hasattr(loaded.model, "predict"):
        raise RecipeError(f"{run}: a {type(loaded.model).__name__} gives representations, there is nothing to draw")
    device = torch.device("cuda" if torch.cuda.is_available() and not loaded.recipe.train.cpu else "cpu")
    placed(loaded.model, device, channels_last=loaded.recipe.train.channels_last)
    out = Path(out)
    _begin(out, str(run))
    result, entries = Predicted(), []
    files = list(_found(sources, out, result, progress))
    for group in _groups((one for one in files if not is_video(one[0])), result, progress):
        for path, stem, image, prediction in _predicted(loaded, group, result, progress):
            values = _written(loaded, path, stem, image, prediction, out, threshold)
            entries.append(values)
            result.append(out / values["picture"])
            _say(f"{path} -> {result[-1]}", progress)
    for path, stem in files:
        if is_video(path):
            try:
                entries.append(predict_video(loaded, path, stem, out, threshold=threshold))
            except DataError as error:
                _fail(str(error), result, progress)
                continue
            result.append(out / entries[-1]["picture"])
            _say(f"{path} -> {result[-1]}", progress)
    index = {"run": str(run), "predictions": entries, "errors": result.errors}
    write_atomically(out / "predictions.json", json.dumps(index, indent=1, ensure_ascii=False).encode())
    return result


def _begin(out: Path, run: str) -> None:
    """The folder of the results. One that holds other files is refused: pictures bear the names of their sources, and
    would replace them."""
    listing = out / "predictions.json"
    if out.is_dir() and not listing.exists() and any(out.iterdir()):
        raise RecipeError(f"{out}: holds files that no prediction wrote; choose an empty or new folder (--out)")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(listing, json.dumps({"run": run, "predictions": [], "errors": []}).encode())


def _predicted(
    loaded: LoadedRun, group: list[tuple[Path, Path, Tensor]], result: Predicted, progress: bool
) -> Iterator[tuple[Path, Path, Tensor, Prediction]]:
    """The group with its predictions; an image that the model refuses is reported and left out."""
    try:
        with evaluating(loaded.model):
            found = predict_images(loaded, [image for _, _, image in group])
    except ValueError as error:
        if len(group) == 1:
            _fail(f"{group[0][0]}: {error}", result, progress)
            return
        for one in group:
            yield from _predicted(loaded, [one], result, progress)
        return
    for (path, stem, image), prediction in zip(group, found, strict=True):
        yield path, stem, image, prediction


def _found(sources: Sequence[str], out: Path, result: Predicted, progress: bool) -> Iterator[tuple[Path, Path]]:
    """Each image's file and the name that its results get, without suffix."""
    from torchive.data.images import is_image

    taken: set[Path] = set()
    for source in sources:
        path = Path(source)
        if path.is_dir():
            own = out.absolute()
            files = sorted(p for p in path.rglob("*") if p.is_file() and own not in p.absolute().parents)
            files = [p for p in files if is_image(p) or is_video(p)]
            named = [(file, file.relative_to(path).with_suffix("")) for file in files]
        elif path.exists() or not glob.has_magic(str(source)):
            named = [(path, Path(path.stem))]
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(source), recursive=True))]
            named = [(match, Path(match.stem)) for match in matches if match.is_file()]
        if not named:
            _fail(f"{source}: no images or videos found", result, progress)
        for file, stem in named:
            number, unique = 1, stem
            while unique in taken:
                number += 1
                unique = stem.with_name(f"{stem.name}-{number}")
            taken.add(unique)
            yield file, unique


def _groups(
    files: Iterator[tuple[Path, Path]], result: Predicted, progress: bool
) -> Iterator[list[tuple[Path, Path, Tensor]]]:
    """Readable images, a few at a time."""
    from torchive.data import read_image

    group: list[tuple[Path, Path, Tensor]] = []
    for path, stem in files:
        try:
            group.append((path, stem, read_image(path)))
        except DataError as error:
            _fail(str(error), result, progress)
        if len(group) == _GROUP:
            yield group
            group = []
    if group:
        yield group


def _written(
    loaded: LoadedRun, path: Path, stem: Path, image: Tensor, found: Prediction, out: Path, threshold: float
) -> dict[str, Any]:
    from torchive.report.draw import draw_prediction

    target = out / stem
    target.parent.mkdir(parents=True, exist_ok=True)
    picture = target.with_name(target.name + (".jpg" if path.suffix.lower() in (".jpg", ".jpeg") else ".png"))
    save_picture(draw_prediction(image, found, loaded.names, threshold=threshold), picture)
    values = {"source": str(path), "width": image.shape[2], "height": image.shape[1], "task": loaded.recipe.task}
    values |= {"classes": list(loaded.classes), "picture": picture.relative_to(out).as_posix()}
    values |= values_of(found, loaded.names)
    if isinstance(found, Segmentation):
        mask = target.with_name(f"{target.name}.mask.png")
        write_atomically(mask, _index_png(found.labels))
        values["mask"] = mask.relative_to(out).as_posix()
    if isinstance(found, Detections) and found.panoptic is not None:
        segments = target.with_name(f"{target.name}.panoptic.png")
        write_atomically(segments, _index_png(found.panoptic.ids, wide=True))
        values["panoptic"] = segments.relative_to(out).as_posix()
    beside = target.with_name(f"{target.name}.json")
    write_atomically(beside, json.dumps(values, indent=1, ensure_ascii=False).encode())
    return values


def _index_png(labels: Tensor, *, wide: bool = False) -> bytes:
    """A map of numbers up to 255, or up to 65,535."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(labels.to(torch.uint16 if wide else torch.uint8).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def _fail(line: str, result: Predicted, progress: bool) -> None:
    result.errors.append(line)
    _say(f"torchive: {line}", progress)


def _say(line: str, progress: bool) -> None:
    if progress:
        sys.stderr.write(f"{line}\n")
