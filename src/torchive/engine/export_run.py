"""Export of a trained run: test samples for the gap and the score, training samples to calibrate."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from torchive.engine.build import open_split
from torchive.engine.cost import in_turn
from torchive.engine.detector_file import DetectorWithDecoding, decodes, images_at_a_time
from torchive.engine.evaluate import batches_of, score
from torchive.engine.export import ExportReport, OnnxModel, export_model, write_onnx
from torchive.engine.recipe import Recipe
from torchive.engine.run import open_run


def export_run(
    run: Path, out: Path | None = None, *, int8: bool = False, samples: int = 16, calibration: int = 128
) -> ExportReport:
    """Write a run's model as ONNX, run it at two sizes on test samples, and score the file on the test split.

    Args:
        run: a run folder.
        out: where ``model.onnx`` and ``export.json`` go; ``RUN/export`` by default.
        int8: also a static int8 form, calibrated on ``calibration`` training samples.
        samples: test samples for the gap.

    Raises:
        CheckpointError, DataError: the run or its data cannot be read.
        ExportError: the export fails, or a file does not compute what the model computes.
    """
    loaded = open_run(Path(run))
    recipe = replace(loaded.recipe, train=replace(loaded.recipe.train, channels_last=False))
    test = open_split(recipe, "test")

    # images of a detector differ in size, and a file takes a batch of one size
    each = replace(recipe, data=replace(recipe.data, batch_size=1)) if recipe.task == "detection" else recipe

    def scored(model: nn.Module) -> dict[str, float]:
        metrics = score(model, test, each, predictions=False).metrics
        return {name: value for name, value in metrics.items() if "/" not in name}

    return export_model(
        loaded.model,
        Path(out) if out is not None else Path(run) / "export",
        _stack(recipe, "test", max(samples, 2)),
        calibration=_batches(recipe, calibration) if int8 else None,
        score=scored if hasattr(loaded.model, "predict") else None,
    )


def exported_latency(runs: Mapping[str, Path], *, seconds: float = 2.0) -> tuple[dict[str, dict[str, float]], bool]:
    """Median milliseconds of each run's exported file at batch 1 and 16, and whether the files decode; they take turns.

    Detectors have their decoding in the file, where all of the runs can and for batches of any size.

    Raises:
        CheckpointError, DataError, ExportError: a run cannot be read or exported.
    """
    opened = {arm: open_run(Path(run)) for arm, run in runs.items()}
    decoded = all(decodes(run.model) and images_at_a_time(run.model) is None for run in opened.values())
    files, images = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for arm, loaded in opened.items():
            images[arm] = _stack(loaded.recipe, "test", 16)
            path = Path(folder) / f"{arm}.onnx"
            write_onnx(DetectorWithDecoding(loaded.model).eval() if decoded else loaded.model, images[arm][:2], path)
            files[arm] = OnnxModel(path)
    found: dict[str, dict[str, float]] = {arm: {} for arm in runs}
    for count in (1, 16):
        calls = {arm: partial(files[arm], images[arm][:count]) for arm in runs}
        for arm, times in in_turn(calls, seconds, torch.device("cpu")).items():
            found[arm][f"latency_{count}"] = times["median"]
    return found, decoded


def _images(recipe: Recipe, split: str) -> Iterator[Tensor]:
    """Images of a split as prediction sees them, (1, C, H, W), all of one size: the recipe's, or the first one's."""
    side = recipe.data.image_size
    size = None if side is None else (side, side)
    for batch in batches_of(open_split(recipe, split), recipe):
        for image in batch.inputs:
            size = size or (image.shape[-2], image.shape[-1])
            yield image[None] if image.shape[-2:] == size else interpolate(image[None], size=size, mode="bilinear")


def _stack(recipe: Recipe, split: str, count: int) -> Tensor:
    images = [image for image, _ in zip(_images(recipe, split), range(count), strict=False)]
    return torch.cat(images).contiguous()


def _batches(recipe: Recipe, count: int, size: int = 16) -> Iterator[Tensor]:
    yield from _stack(recipe, "train", count).split(size)
