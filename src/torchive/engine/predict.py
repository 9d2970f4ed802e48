"""Predictions on the user's images: a picture with the result drawn, and a JSON file beside each.

``NAME.json`` holds ``source``, ``width``, ``height``, ``task``, ``classes`` and, by task,

- classification: ``label`` (index), ``class``, ``score``, ``scores`` (class to score);
- detection: ``objects``, each with ``box`` (x0, y0, x1, y1 in pixels of the source), ``label`` (from 1), ``class``,
  ``score``, and ``mask`` where the model gives one (``size`` and ``counts``: run lengths down the columns, the first
  of zeros, as in COCO) and ``keypoints`` (a list of x, y) where the model gives them;
- segmentation: ``shares`` (class to share of the pixels) and ``mask``, a PNG beside it that holds the class indices.

``predictions.json`` lists all of them, and the images that could not be read.
"""

from __future__ import annotations

import glob
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchive.data.faults import DataError
from torchive.engine.checkpoint import write_atomically
from torchive.engine.evaluate import evaluating, on_cpu, on_device_of
from torchive.engine.pictures import save_picture
from torchive.engine.processes import placed
from torchive.engine.recipe import RecipeError
from torchive.engine.run import LoadedRun, open_run
from torchive.structures import Classification, Detections, Prediction, Sample, Segmentation

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
    for group in _groups(_found(sources, out, result, progress), result, progress):
        for path, stem, image, prediction in _predicted(loaded, group, result, progress):
            values = _written(loaded, path, stem, image, prediction, out, threshold)
            entries.append(values)
            result.append(out / values["picture"])
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


def predict_images(loaded: LoadedRun, images: Sequence[Tensor]) -> list[Prediction]:
    """Predictions of uint8 images (C, H, W) of any sizes, in pixels of these images."""
    from torchive.data import collate
    from torchive.transforms import build

    recipe = loaded.recipe
    transform = build(recipe.task, image_size=recipe.data.image_size, train=False, channels=loaded.channels)
    ready = [transform(Sample(image, None, str(i))) for i, image in enumerate(images)]
    if recipe.task == "detection":  # a list of images of any sizes
        ready = [replace(sample, target={}) for sample in ready]
    same = {tuple(sample.image.shape) for sample in ready}
    groups = [ready] if len(same) == 1 or recipe.task == "detection" else [[sample] for sample in ready]
    found: list[Prediction] = []
    for group in groups:
        batch = on_device_of(loaded.model, collate(group), channels_last=recipe.train.channels_last)
        found += [on_cpu(one) for one in loaded.model.predict(batch.inputs)]  # type: ignore[operator]
    shapes = [sample.image.shape[-2:] for sample in ready]
    return [_to_source(p, s, i.shape[-2:]) for p, s, i in zip(found, shapes, images, strict=True)]


def _to_source(found: Prediction, size: Sequence[int], source: Sequence[int]) -> Prediction:
    """A prediction in pixels of the transformed image as one in pixels of the source."""
    height, width = source
    if tuple(size) == (height, width) or isinstance(found, Classification):
        return found
    if isinstance(found, Segmentation):
        if found.scores is None:
            labels = F.interpolate(found.labels[None, None].float(), size=(height, width), mode="nearest")
            return Segmentation(labels[0, 0].long())
        scores = F.interpolate(found.scores[None], size=(height, width), mode="bilinear", align_corners=False)[0]
        return Segmentation(scores.argmax(0), scores)
    factor = found.boxes.new_tensor([width / size[1], height / size[0]]).repeat(2)
    limit = found.boxes.new_tensor([width, height]).repeat(2)
    masks = found.masks
    if masks is not None:
        masks = F.interpolate(masks[:, None].float(), size=(height, width), mode="bilinear")[:, 0] >= 0.5
    boxes = (found.boxes * factor).clamp_min(0).minimum(limit)
    points = None if found.keypoints is None else found.keypoints * factor[:2]
    return Detections(boxes, found.labels, found.scores, masks, points)


def _found(sources: Sequence[str], out: Path, result: Predicted, progress: bool) -> Iterator[tuple[Path, Path]]:
    """Each image's file and the name that its results get, without suffix."""
    from torchive.data.images import is_image

    taken: set[Path] = set()
    for source in sources:
        path = Path(source)
        if path.is_dir():
            files = sorted(
                p for p in path.rglob("*") if p.is_file() and is_image(p) and out.absolute() not in p.absolute().parents
            )
            named = [(file, file.relative_to(path).with_suffix("")) for file in files]
        elif path.exists() or not glob.has_magic(str(source)):
            named = [(path, Path(path.stem))]
        else:
            matches = [Path(match) for match in sorted(glob.glob(str(source), recursive=True))]
            named = [(match, Path(match.stem)) for match in matches if match.is_file()]
        if not named:
            _fail(f"{source}: no images found", result, progress)
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
    save_picture(draw_prediction(image, found, loaded.classes, threshold=threshold), picture)
    values = {"source": str(path), "width": image.shape[2], "height": image.shape[1], "task": loaded.recipe.task}
    values |= {"classes": list(loaded.classes), "picture": picture.relative_to(out).as_posix()}
    values |= _values(found, loaded.classes)
    if isinstance(found, Segmentation):
        mask = target.with_name(f"{target.name}.mask.png")
        write_atomically(mask, _index_png(found.labels))
        values["mask"] = mask.relative_to(out).as_posix()
    beside = target.with_name(f"{target.name}.json")
    write_atomically(beside, json.dumps(values, indent=1, ensure_ascii=False).encode())
    return values


def _values(found: Prediction, classes: Sequence[str]) -> dict[str, Any]:
    if isinstance(found, Classification):
        scores = {name: round(float(s), 6) for name, s in zip(classes, found.scores, strict=False)}
        return {
            "label": found.label,
            "class": classes[found.label],
            "score": scores[classes[found.label]],
            "scores": scores,
        }
    if isinstance(found, Segmentation):
        counts = found.labels.flatten().bincount(minlength=len(classes)).double() / found.labels.numel()
        return {"shares": {name: round(float(counts[i]), 6) for i, name in enumerate(classes)}}
    objects = []
    rows = zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
    for index, (box, label, score) in enumerate(rows):
        entry = {"box": [round(side, 2) for side in box], "label": label, "class": classes[label - 1]}
        entry["score"] = round(score, 6)
        if found.masks is not None:
            entry["mask"] = run_lengths(found.masks[index])
        if found.keypoints is not None:
            entry["keypoints"] = [[round(side, 2) for side in point] for point in found.keypoints[index].tolist()]
        objects.append(entry)
    return {"objects": objects}


def run_lengths(mask: Tensor) -> dict[str, list[int]]:
    """A mask (H, W) as run lengths down the columns, the first of zeros: COCO's uncompressed form."""
    line = mask.bool().T.flatten()
    change = (line[1:] != line[:-1]).nonzero().flatten() + 1
    ends = torch.cat([change.new_zeros(1), change, change.new_tensor([line.numel()])])
    counts = ends.diff().tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if len(line) and bool(line[0]) else counts}


def _index_png(labels: Tensor) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(labels.to(torch.uint8).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def _fail(line: str, result: Predicted, progress: bool) -> None:
    result.errors.append(line)
    _say(f"torchive: {line}", progress)


def _say(line: str, progress: bool) -> None:
    if progress:
        sys.stderr.write(f"{line}\n")
