"""How much a representation knows: nearest neighbours and a linear layer on frozen features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchive.data.samples import SampleSet
from torchive.engine.recipe import Recipe, RecipeError
from torchive.nn.probe import knn_accuracy
from torchive.nn.verification import verification


def represent(model: nn.Module, inputs: Tensor) -> Tensor:
    """Features (N, D) of images: of a list of maps the last one; of maps the mean over positions."""
    features = model(inputs)
    if isinstance(features, list | tuple):
        features = features[-1]
    return features.float().flatten(2).mean(2) if features.ndim > 2 else features.float()


def linear_probe(
    features: Tensor,
    labels: Tensor,
    train_features: Tensor,
    train_labels: Tensor,
    *,
    weight_decay: float = 1e-4,
    steps: int = 100,
) -> float:
    """Share of (N, D) features that a linear classifier, fitted on the training features by L-BFGS, classifies rightly.

    Features are standardised by the training features; the fit starts from zero, so nothing is drawn.
    """
    mean, deviation = train_features.mean(0), train_features.std(0, correction=0).clamp_min(1e-6)
    x, y = ((train_features - mean) / deviation).double(), train_labels
    classes = int(torch.cat([labels, train_labels]).max()) + 1
    with torch.enable_grad():
        weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
        bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(nn.functional.linear(x, weight, bias), y)
            loss = loss + 0.5 * weight_decay * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    logits = nn.functional.linear(((features - mean) / deviation).double(), weight.detach(), bias.detach())
    return float((logits.argmax(1) == labels).double().mean())


def probe(
    model: nn.Module, samples: SampleSet, reference: SampleSet | None, recipe: Recipe, *, rank: int = 0, world: int = 1
) -> dict[str, float]:
    """``knn_accuracy`` and ``linear_accuracy`` of samples against labelled reference samples; none without labels.

    Raises:
        RecipeError: no reference is given.
    """
    if reference is None:
        raise RecipeError("a representation is scored against reference samples, got none")
    if samples.task != "classification":
        return {}
    train_features, train_labels = _features(model, reference, recipe, rank, world)
    features, labels = _features(model, samples, recipe, rank, world)
    return {
        "knn_accuracy": knn_accuracy(features, labels, train_features, train_labels),
        "linear_accuracy": linear_probe(features, labels, train_features, train_labels),
    }


def verify(model: nn.Module, samples: SampleSet, recipe: Recipe, *, rank: int = 0, world: int = 1) -> dict[str, float]:
    """The figures of ``torchive.nn.verification`` on the features of samples; none without labels."""
    if samples.task != "classification":
        return {}
    return verification(*_features(model, samples, recipe, rank, world))


def _features(model: nn.Module, samples: SampleSet, recipe: Recipe, rank: int, world: int) -> tuple[Tensor, Tensor]:
    from torchive.engine.evaluate import batches_of, gathered, on_device_of

    rows: list[tuple[int, Any, Any]] = []
    place = rank
    for batch in batches_of(samples, recipe, rank=rank, world=world):
        batch = on_device_of(model, batch, channels_last=recipe.train.channels_last)
        for feature, label in zip(represent(model, batch.inputs).cpu(), batch.targets.tolist(), strict=True):
            rows.append((place, feature, label))
            place += world
    rows = gathered(rows, world)
    return torch.stack([feature for _, feature, _ in rows]), torch.tensor([label for _, _, label in rows])
