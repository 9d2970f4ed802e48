"""The pictures of a run folder: what was trained on, and what the model says of validation samples."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchive.data.samples import SampleSet
from torchive.engine.checkpoint import write_atomically
from torchive.engine.recipe import Recipe
from torchive.structures import Batch, Prediction, Sample


def save_picture(image: Tensor, path: Path) -> None:
    """Write a uint8 image (3, H, W) as PNG or JPEG, by the suffix, atomically."""
    from torchive.report.draw import to_picture

    buffer = io.BytesIO()
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG"
    # a photograph as PNG takes a quarter of the time at level 1, and hardly more room
    to_picture(image).save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {"compress_level": 1}))
    write_atomically(path, buffer.getvalue())


def batch_sheet(batch: Batch, recipe: Recipe, classes: Sequence[str], limit: int = 12) -> Tensor:
    """The first samples of a training batch as they reach the network, with their targets; of views, each view."""
    from torchive.report.draw import draw_target, grid
    from torchive.transforms import denormalise

    cells = []
    for index in range(min(limit, len(batch))):
        image = denormalise(batch.inputs[index], recipe.task)
        views = list(image) if image.ndim == 4 else [image]
        target = None if batch.targets is None or len(views) > 1 else batch.targets[index]
        cells += [draw_target(view, target, classes, smallest=192) for view in views]
    return grid(cells, columns=4)


def prediction_sheet(
    samples: Sequence[Sample], predictions: Sequence[Prediction], recipe: Recipe, classes: Sequence[str]
) -> Tensor:
    """Transformed samples with predictions and targets."""
    from torchive.report.draw import draw_prediction, grid
    from torchive.transforms import denormalise

    cells = []
    for sample, found in zip(samples, predictions, strict=True):
        image = denormalise(sample.image, recipe.task)
        cells.append(draw_prediction(image, found, classes, target=sample.target, smallest=192))
    return grid(cells, columns=4)


def spread(samples: SampleSet, limit: int = 12) -> list[int]:
    """Indices over the whole set, evenly."""
    count = min(limit, len(samples))
    return [i * len(samples) // count for i in range(count)]


def predicted_samples(
    model: nn.Module, samples: SampleSet, indices: Sequence[int], recipe: Recipe
) -> tuple[list[Sample], list[Any]]:
    """Some samples as they reach the network, and what it predicts of them."""
    from torchive.data import collate
    from torchive.engine.evaluate import evaluating, on_cpu, on_device_of
    from torchive.transforms import build

    data = recipe.data
    transform = build(recipe.task, image_size=data.image_size, train=False, channels=data.channels)
    chosen = [transform(samples[i]) for i in indices]
    with evaluating(model):
        batch = on_device_of(model, collate(chosen), channels_last=recipe.train.channels_last)
        return chosen, [on_cpu(found) for found in model.predict(batch.inputs)]  # type: ignore[operator]
