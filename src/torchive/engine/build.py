"""From a recipe to data, a model and an optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from torchive.data.drawing import kept_generators, key_seed, seed_generators
from torchive.data.samples import SampleSet
from torchive.engine.convert import convert
from torchive.engine.recipe import ClassSpec, Recipe, RecipeError
from torchive.engine.resolve import filled, import_class
from torchive.engine.views import Subset, as_task


def open_split(recipe: Recipe, split: str) -> SampleSet:
    """The samples of one split in the form that the recipe's task needs.

    ``data.fraction`` keeps a share of the training split that depends on the sample ids alone.

    Raises:
        DataError: the data cannot be used. RecipeError: they are of another task.
    """
    from torchive.data import open_data

    samples = as_task(open_data(recipe.data.source, split, skip_faulty=recipe.data.skip_faulty), recipe.task)
    return Subset.by_fraction(samples, recipe.data.fraction) if split == "train" else samples


def fill_recipe(recipe: Recipe, samples: SampleSet) -> Recipe:
    """The recipe with the number of classes and channels of the data put in where its classes take them."""
    given = {"num_classes": len(samples.classes), "in_channels": recipe.data.channels or samples.channels}
    return replace(recipe, model=ClassSpec(**filled(asdict(recipe.model), given)))


def build_trainable(recipe: Recipe, samples: SampleSet) -> nn.Module:
    """The model of a recipe for these samples: built, converted, its values a function of the recipe's seed.

    Raises:
        RecipeError: the class refuses its arguments. ConversionError: a conversion does not fit.
    """
    return build_model(fill_recipe(recipe, samples))


def build_model(recipe: Recipe) -> nn.Module:
    """As ``build_trainable``, of a recipe that is filled already."""
    with kept_generators():
        seed_generators(key_seed("model", recipe.train.seed))
        model = _instance(asdict(recipe.model), "model")
        for entry in recipe.convert:
            convert(model, entry.method, entry.where, example=_example(recipe), **entry.options)
    return model


def _example(recipe: Recipe) -> torch.Tensor | None:
    """An input of the recipe's size where that is known, else None: the conversion then looks for one itself."""
    channels, size = recipe.model.init_args.get("in_channels"), recipe.data.image_size
    if recipe.task in ("detection", "selfsupervised") or channels is None or size is None:
        return None
    return torch.zeros(2, channels, size, size)


def build_optimizer(recipe: Recipe, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimiser over the parameters that need a gradient."""
    cls = import_class(recipe.optimizer.class_path)
    wanted = [p for p in parameters if p.requires_grad]
    try:
        optimizer = cls(wanted, **recipe.optimizer.init_args)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"optimizer: {cls.__name__}: {error}") from error
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", float(group["lr"]))
    return optimizer


def _instance(spec: Mapping[str, Any], place: str) -> Any:
    arguments = {
        key: _instance({"init_args": {}, **value}, f"{place}.{key}")
        if isinstance(value, dict) and "class_path" in value
        else value
        for key, value in spec["init_args"].items()
    }
    cls = import_class(spec["class_path"])
    if not issubclass(cls, nn.Module):  # a recipe may come with a stranger's checkpoint
        raise RecipeError(f"{place}: {spec['class_path']} is no torch.nn.Module")
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{place}: {cls.__name__}: {error}") from error
