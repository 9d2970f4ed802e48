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
from torchive.engine.recipe import REPRESENTING, ClassSpec, Recipe, RecipeError
from torchive.engine.resolve import filled, import_class
from torchive.engine.selection import class_counts, long_tail, without_held_out
from torchive.engine.views import PartlyBoxed, Subset, as_task, stuff_of


def open_split(recipe: Recipe, split: str) -> SampleSet:
    """The samples of one split in the form that the recipe's task needs.

    ``data.fraction`` keeps a share of the training split that depends on the sample ids alone; ``data.imbalance`` thins
    its classes out; ``data.held_out`` takes some away from it and leaves the other splits nothing but these.

    Raises:
        DataError: the data cannot be used. RecipeError: they are of another task.
    """
    from torchive.data import open_data

    samples = as_task(open_data(recipe.data.source, split, skip_faulty=recipe.data.skip_faulty), recipe.task)
    data = recipe.data
    if data.held_out:
        samples = without_held_out(samples, data.held_out, seed=data.draw, train=split == "train")
    if split == "train":
        samples = Subset.by_fraction(samples, data.fraction)
        if data.boxed < 1:
            if samples.task != "detection":
                raise RecipeError(f"data.boxed is for detection; {samples.name} is a set for {samples.task}")
            samples = PartlyBoxed(samples, data.boxed, draw=data.draw)
        if data.imbalance is not None:
            samples = long_tail(samples, data.imbalance, seed=data.draw)
    return samples


def fill_recipe(recipe: Recipe, samples: SampleSet) -> Recipe:
    """The recipe with the data's number of classes, of channels, and of samples in each class put in where its classes
    take them, and the number of kinds of stuff where the data have any.
    """
    given: dict[str, Any] = {
        "num_classes": len(samples.classes),
        "in_channels": recipe.data.channels or samples.channels,
        "class_counts": lambda: class_counts(samples),
    }
    stuff = stuff_of(samples)
    if stuff:
        given |= {"stuff_classes": len(stuff), "semantic_classes": 1 + len(samples.classes) + len(stuff)}
        given |= {"background": False}  # what belongs to no segment is not known
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
    if recipe.task in ("detection", *REPRESENTING) or channels is None or size is None:
        return None
    return torch.zeros(2, channels, size, size)


def build_optimizer(
    recipe: Recipe, parameters: Iterable[nn.Parameter], model: nn.Module | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimiser over the parameters that need a gradient.

    A part of ``model`` may have ``parameter_rules()``: names of its own parameters -> ``lr``, a multiple of the
    recipe's rate, and ``weight_decay``, instead of the recipe's. Such parameters are groups of their own.
    """
    cls = import_class(recipe.optimizer.class_path)
    rules = {} if model is None else _parameter_rules(model)
    wanted = [p for p in parameters if p.requires_grad]
    ruled = [p for p in wanted if id(p) in rules]
    groups: list[Any] = [{"params": [p for p in wanted if id(p) not in rules]}, *({"params": [p]} for p in ruled)]
    try:
        optimizer = cls([group for group in groups if group["params"]] or wanted, **recipe.optimizer.init_args)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"optimizer: {cls.__name__}: {error}") from error
    for group in optimizer.param_groups:
        rule = rules.get(id(group["params"][0]), {})
        group["lr"] = group["lr"] * rule.get("lr", 1.0)
        if "weight_decay" in rule and "weight_decay" in group:
            group["weight_decay"] = rule["weight_decay"]
        group.setdefault("initial_lr", float(group["lr"]))
    return optimizer


def _parameter_rules(model: nn.Module) -> dict[int, Mapping[str, float]]:
    """What the parts of a model say of the optimisation of their own parameters, by the parameter's id."""
    return {
        id(part.get_parameter(name)): rule
        for part in model.modules()
        if hasattr(part, "parameter_rules")
        for name, rule in part.parameter_rules().items()  # type: ignore[operator]
    }


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
