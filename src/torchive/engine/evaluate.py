"""Scoring a model on samples: the same figures from one process or several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchive.data.drawing import kept_generators
from torchive.data.samples import SampleSet
from torchive.engine.metrics import metrics_of, record_of
from torchive.engine.recipe import REPRESENTING, Recipe, RecipeError
from torchive.engine.search_figures import search_figures
from torchive.engine.views import space_of, stuff_of
from torchive.nn.passes import eval_mode
from torchive.structures import Batch, Prediction


@dataclass(frozen=True)
class Evaluation:
    """Metrics, and per sample its id, prediction (in pixels of the transformed image) and target."""

    metrics: dict[str, float]
    ids: tuple[str, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    targets: tuple[Any, ...] = ()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module's mode and the generators are as before."""
    with eval_mode(model), torch.no_grad(), kept_generators():
        yield


def evaluate(
    model: nn.Module,
    samples: SampleSet,
    recipe: Recipe,
    *,
    reference: SampleSet | None = None,
    rank: int = 0,
    world: int = 1,
) -> dict[str, float]:
    """All metrics of the recipe's task on a sample set; modes, weights and generators stay as they are.

    Args:
        model: a system; where the task is selfsupervised or embedding, anything that gives features.
        reference: labelled samples whose representations the others are compared to; selfsupervised only.
        rank, world: with several processes each takes its part, and all get the same result.

    Raises:
        RecipeError: the model cannot be scored on this task.
    """
    return score(model, samples, recipe, reference=reference, rank=rank, world=world, predictions=False).metrics


def score(
    model: nn.Module,
    samples: SampleSet,
    recipe: Recipe,
    *,
    reference: SampleSet | None = None,
    rank: int = 0,
    world: int = 1,
    predictions: bool = True,
) -> Evaluation:
    """As ``evaluate``, with the prediction of every sample."""
    if recipe.task in REPRESENTING:
        from torchive.engine.probe import probe, verify

        with evaluating(model):
            if recipe.task == "embedding":
                return Evaluation(verify(model, samples, recipe, rank=rank, world=world))
            return Evaluation(probe(model, samples, reference, recipe, rank=rank, world=world))
    if not hasattr(model, "predict"):
        raise RecipeError(f"{type(model).__name__} has no predict, so it cannot be scored on {recipe.task}")
    rows: list[tuple[int, Any, Any]] = []
    with evaluating(model):
        place = rank
        for batch in batches_of(samples, recipe, rank=rank, world=world):
            batch = on_device_of(model, batch, channels_last=recipe.train.channels_last)
            for found, target in zip(model.predict(batch.inputs), batch.targets, strict=True):  # type: ignore[operator]
                record = record_of(recipe.task, found, target, len(samples.classes))
                rows.append((place, record, (on_cpu(found), on_cpu(target)) if predictions else None))
                place += world
        rows = gathered(rows, world)
        records = [record for _, record, _ in rows]
        metrics = metrics_of(recipe.task, records, samples.classes, stuff_of(samples), space_of(samples))
        if recipe.task == "detection":
            metrics |= search_figures(model, records)
    if not predictions:
        return Evaluation(metrics)
    kept = [pair for _, _, pair in rows]
    return Evaluation(metrics, tuple(samples.ids), tuple(p for p, _ in kept), tuple(t for _, t in kept))


def batches_of(samples: SampleSet, recipe: Recipe, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """This process's part of a set in the set's own order, transformed as for prediction."""
    from torchive.data import Loader
    from torchive.transforms import build

    if rank >= len(samples):
        return
    task = "classification" if recipe.task in REPRESENTING else recipe.task
    transform = build(task, image_size=recipe.data.image_size, train=False, channels=recipe.data.channels)
    loader = Loader(
        samples, transform, batch_size=recipe.data.batch_size, seed=0, shuffle=False, rank=rank, world=world, memory=0
    )
    yield from loader.epoch(0)


def on_device_of(model: nn.Module, batch: Batch, *, channels_last: bool) -> Batch:
    """The batch where the model's parameters are."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    return batch.to(device, channels_last=channels_last)


def on_cpu(value: Any) -> Any:
    """A prediction or target with its tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{key: on_cpu(getattr(value, key)) for key in value.__dataclass_fields__})
    return value


def gathered(rows: list[Any], world: int) -> list[Any]:
    """The rows of all processes in the order of the samples."""
    if world == 1:
        return rows
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, rows)
    return sorted((row for part in parts for row in part), key=lambda row: row[0])


def evaluate_run(run: Path, data: str | None = None, split: str = "test") -> dict[str, float]:
    """The metrics of a trained run on a split of its own data, or of other data.

    Under ``torchrun`` the samples are shared between the processes.

    Raises:
        CheckpointError, DataError, RecipeError: the run or the data cannot be used.
    """
    return score_run(run, data, split, predictions=False).metrics


def score_run(
    run: Path,
    data: str | None = None,
    split: str = "test",
    *,
    samples: SampleSet | None = None,
    reference: SampleSet | None = None,
    predictions: bool = True,
) -> Evaluation:
    """As ``evaluate_run``, with the prediction of every sample; ``samples`` may be given instead of ``data``."""
    from torchive.engine.build import open_split
    from torchive.engine.processes import placed, start_processes
    from torchive.engine.resolve import source_override
    from torchive.engine.run import open_run

    loaded = open_run(run)
    recipe = loaded.recipe if data is None else loaded.recipe.override([source_override(data)])
    samples = open_split(recipe, split) if samples is None else samples
    stuff = stuff_of(samples) if loaded.stuff else ()  # a set that knows of none can be scored on its objects
    given, known = (*samples.classes, *stuff), (*loaded.classes, *(loaded.stuff if stuff else ()))
    if recipe.task not in REPRESENTING and given != known:
        raise RecipeError(
            f"{samples.name} has the classes {', '.join(given)}; the run was trained on {', '.join(known)}"
        )
    if recipe.task == "selfsupervised" and reference is None:
        reference = open_split(recipe, "train")
    accelerator = start_processes(recipe)
    model = placed(loaded.model, accelerator.device, channels_last=recipe.train.channels_last)
    rank, world = accelerator.process_index, accelerator.num_processes
    return score(model, samples, recipe, reference=reference, rank=rank, world=world, predictions=predictions)
