"""From YAML and overrides to a checked recipe. jsonargparse checks every type against the real signatures."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import cache, lru_cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from torchive.engine.recipe import (
    TASKS,
    ClassSpec,
    ConvertSpec,
    DataSpec,
    Recipe,
    RecipeError,
    ScheduleSpec,
    TrainSpec,
)

RECIPES = Path(__file__).parents[1] / "recipes"
_SECTIONS = {"data": DataSpec, "schedule": ScheduleSpec, "train": TrainSpec}
_SPECS = ("model", "optimizer")
#: Arguments that the data fill in where a class takes them, and the keys under which a nested class takes them too.
FILLED = ("num_classes", "class_counts", "stuff_classes", "semantic_classes", "background", "in_channels")
_NETWORKS = ("network", "backbone", "encoder", "model", "student", "teacher")


def recipe_names() -> list[str]:
    """The recipes that come with the package, as ``task/name``."""
    return sorted(p.relative_to(RECIPES).with_suffix("").as_posix() for p in RECIPES.glob("*/*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, ``task/name``, ``name``, or a method that exactly one recipe trains."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise RecipeError(f"{name}: no such file")
        return Path(name)
    known = recipe_names()
    by_stem = {full.partition("/")[2]: full for full in known}
    full = (
        name if name in known else by_stem.get(name) or by_stem.get(name.replace("-", "_")) or _of_method(name, known)
    )
    if full is None:
        from torchive.catalogue import list_methods

        close = get_close_matches(name, [*list_methods(state="built"), *by_stem, *known], n=3, cutoff=0.5)
        if Path(name).exists():
            raise RecipeError(
                f"{name} is no recipe; name one first ({', '.join(by_stem)}) and give the data with --data"
            )
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
        raise RecipeError(f"no recipe is called {name!r}; {hint}")
    return RECIPES / f"{full}.yaml"


def _of_method(name: str, known: Sequence[str]) -> str | None:
    """The recipe whose model is this method, that of its comparison before any other.

    Raises:
        RecipeError: a built method that no recipe trains alone.
    """
    from torchive.catalogue import get_card

    try:
        card = get_card(name)
    except KeyError:
        return None
    own = card.comparison.get("recipe")
    for full in sorted(known, key=lambda full: full != own):
        model = read_yaml(RECIPES / f"{full}.yaml").get("model", {})
        if model.get("class_path") == card.class_path.replace(":", "."):
            return full
    if own:
        raise RecipeError(
            f"{card.name} is no model that is trained alone; `torchive compare {card.name}` trains {own} with it"
        )
    return None


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, got {type(values).__name__}")
    return values


def parse_yaml(text: str) -> Any:
    """YAML with ``1e-3`` as a number; nothing but plain values."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ValueError(f"broken YAML: {error}") from error
    except RecursionError as error:
        raise ValueError("broken YAML: nested too deeply") from error


@lru_cache(maxsize=1)
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few lines of them grow to gigabytes
                raise yaml.YAMLError(f"aliases (*{self.peek_event().anchor}) are not read; write the value out")
            return super().compose_node(parent, index)

    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789."))
    return Loader


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy with ``a.b.c=value`` words applied; the keys are checked later, with all others."""
    result = copy.deepcopy(dict(values))
    for word in overrides:
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise RecipeError(f"an override is written key=value, got {word!r}")
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise RecipeError(f"{path}: {' '.join(str(error).split())}") from error
        *parents, last = path.split(".")
        place: Any = result
        for depth, key in enumerate(parents):
            place = _inside(place, path)
            if depth == 0 and key in _SPECS and isinstance(place.get(key), str):
                place[key] = {"class_path": place[key]}
            place = place.setdefault(key, {})
            following = [*parents, last][depth + 1]
            if key in _SPECS and depth == 0 and following not in ("class_path", "init_args"):
                place = _inside(place, path).setdefault("init_args", {})
        place = _inside(place, path)
        if last == "class_path" and "init_args" in place:
            taken = _parameters(import_class(str(value)))
            place["init_args"] = {k: v for k, v in place["init_args"].items() if k in taken}
        place[last] = value
    return result


def source_override(source: str) -> str:
    """The word that sets ``data.source``, whatever characters a path holds."""
    return f"data.source={json.dumps(source, ensure_ascii=False)}"


def _inside(place: Any, path: str) -> dict[str, Any]:
    if not isinstance(place, dict):
        raise RecipeError(f"{path}: there are no keys under this value")
    return place


def resolve_recipe(given: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Check plain values and make them a recipe. Raises RecipeError."""
    values = copy.deepcopy(dict(given))
    _check_keys(values, [f.name for f in fields(Recipe)], where, "")
    for key in ("task", "model"):
        if key not in values:
            raise RecipeError(f"{where}: the key {key!r} is missing")
    if values["task"] not in TASKS:
        raise RecipeError(f"{where}: task must be one of {', '.join(TASKS)}, got {values['task']!r}")
    for key, cls in _SECTIONS.items():
        values[key] = values.get(key) or {}
        if not isinstance(values[key], dict):
            raise RecipeError(f"{where}: {key} must hold keys, got {values[key]!r}")
        _check_keys(values[key], [f.name for f in fields(cls)], where, f"{key}.")
    values["convert"] = values.get("convert") or []
    for entry in values["convert"] if isinstance(values["convert"], list) else ():
        _check_keys(entry, [f.name for f in fields(ConvertSpec)], where, "convert: ")
    for key in _SPECS:
        if key in values:
            values[key] = _named(values[key], f"{where}: {key}")
    parsed = _typed(values, where)
    recipe = Recipe(
        task=parsed["task"],
        model=ClassSpec(**_given(parsed["model"], values["model"])),
        data=DataSpec(**parsed["data"]),
        convert=[ConvertSpec(**entry) for entry in parsed["convert"]],
        schedule=ScheduleSpec(**parsed["schedule"]),
        train=TrainSpec(**parsed["train"]),
        metric=parsed["metric"],
        name=parsed["name"],
        **(
            {"optimizer": ClassSpec(**_given(parsed["optimizer"], values["optimizer"]))}
            if "optimizer" in values
            else {}
        ),
    )
    _check_numbers(recipe, where)
    _check_metric(recipe, where)
    return recipe


def _check_keys(values: Any, known: Sequence[str], where: str, prefix: str) -> None:
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: {prefix.rstrip('.: ')} must hold keys, got {values!r}")
    for key in values:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = (
                f"did you mean {prefix.removesuffix('convert: ') + close[0]!r}?"
                if close
                else f"there are {', '.join(known)}"
            )
            raise RecipeError(f"{where}: unknown key {prefix + str(key)!r}; {hint}")


def _named(spec: Any, where: str) -> dict[str, Any]:
    """A class spec with the real class path, all keys of all levels checked against the signatures."""
    if isinstance(spec, str):
        spec = {"class_path": spec}
    _check_keys(spec, ("class_path", "init_args"), where, "")
    if not isinstance(spec.get("class_path"), str):
        raise RecipeError(f"{where}: class_path must name a class, got {spec.get('class_path')!r}")
    try:
        cls = import_class(spec["class_path"])
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    arguments = dict(spec.get("init_args") or {})
    taken = _parameters(cls)
    if "**" not in taken:
        _check_keys(arguments, taken, f"{where}.init_args", "")
    for key, value in arguments.items():
        if isinstance(value, dict) and "class_path" in value:
            arguments[key] = _named(value, f"{where}.init_args.{key}")
    return {"class_path": _path_of(spec["class_path"]), "init_args": arguments}


def _path_of(class_path: str) -> str:
    if "." not in class_path and ":" not in class_path:
        from torchive.catalogue import class_path_of

        class_path = class_path_of(class_path)
    return class_path.replace(":", ".")


def import_class(class_path: str) -> Any:
    """A class by ``package.module.Class``, ``package.module:Class`` or the name of a built method."""
    try:
        path = _path_of(class_path)
    except (KeyError, ValueError) as error:
        raise RecipeError(f"class_path {class_path!r}: {error.args[0]}") from error
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        names = [n for n in dir(import_module(module)) if n[:1].isupper()] if _importable(module) else []
        close = get_close_matches(name, names, n=1)
        hint = f"; did you mean {module}.{close[0]}?" if close else ""
        raise RecipeError(f"class_path {class_path!r} names nothing that can be imported{hint}") from error
    if not inspect.isclass(found):
        raise RecipeError(f"class_path {class_path!r} is no class but a {type(found).__name__}")
    return found


def _importable(module: str) -> bool:
    try:
        import_module(module)
    except (ImportError, ValueError):
        return False
    return True


def _parameters(cls: Any) -> list[str]:
    """Names of a constructor's keyword arguments; ``**`` where it takes any."""
    kinds = inspect.signature(cls.__init__).parameters
    names = [n for n, p in kinds.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and n != "self"]
    return [*names, *(["**"] if any(p.kind is p.VAR_KEYWORD for p in kinds.values()) else [])]


def filled(spec: Mapping[str, Any], given: Mapping[str, Any], key: str = "model") -> dict[str, Any]:
    """A class spec with ``FILLED`` put in where a class takes them and none stands there; a function is asked for its
    value only then.
    """
    cls, arguments = import_class(spec["class_path"]), dict(spec["init_args"])
    for name, value in arguments.items():
        if isinstance(value, dict) and "class_path" in value:
            arguments[name] = filled({"init_args": {}, **value}, given, name)
    taken = _parameters(cls)
    for name in FILLED if key in _NETWORKS else FILLED[:-1]:
        if name in taken and name in given and name not in arguments:
            arguments[name] = given[name]() if callable(given[name]) else given[name]
    return {"class_path": spec["class_path"], "init_args": arguments}


def _typed(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values with their types checked and missing ones filled, by jsonargparse."""
    from jsonargparse import ArgumentError

    trial = {**values, "model": filled(values["model"], {"num_classes": 2, "in_channels": 3, "class_counts": [1, 1]})}
    try:
        parsed: dict[str, Any] = _parser("optimizer" in values).parse_object(trial).as_dict()
    except ArgumentError as error:
        raise RecipeError(f"{where}: {_short(str(error))}") from error
    return parsed


@cache
def _parser(optimizer: bool) -> Any:
    """jsonargparse's parser of a recipe's keys, which takes longer to build than a recipe to parse."""
    from jsonargparse import ArgumentParser
    from torch import nn
    from torch.optim import Optimizer

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--name", type=str, default="run")
    parser.add_argument("--task", type=str)
    parser.add_argument("--metric", type=str | None, default=None)
    parser.add_argument("--convert", type=list[ConvertSpec], default=[])
    for key, cls in _SECTIONS.items():
        parser.add_argument(f"--{key}", type=cls, default=cls())
    parser.add_subclass_arguments(nn.Module, "model", required=True)
    parser.add_subclass_arguments(Optimizer, "optimizer", skip={"params"}, required=optimizer)
    return parser


def _short(message: str) -> str:
    """The lines of a message of jsonargparse that say what and where."""
    lines = [line.strip(" -") for line in message.splitlines()]
    noise = ("Does not validate", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value type:")
    kept = [
        line for line in lines if line and not line.startswith((*noise, "Expected a path", "Expected a dot import"))
    ]
    values = [line for line in kept if line.startswith("Given value:") and len(line) < 100]
    return "; ".join([line.rstrip(":") for line in kept if not line.startswith("Given value:")] + values[:1])


def _given(parsed: Any, given: Any) -> Any:
    """Of parsed values, those that the recipe itself names: defaults stay the class's own."""
    if isinstance(given, dict) and isinstance(parsed, Mapping):
        return {key: _given(parsed[key], value) if key in parsed else value for key, value in given.items()}
    return list(parsed) if isinstance(parsed, tuple) else parsed


def _check_metric(recipe: Recipe, where: str) -> None:
    """Metrics of one class ("recall/cat") are known only to the data."""
    from torchive.engine.metrics import METRICS

    known = [name for name, metric in METRICS.items() if metric.task == recipe.task]
    if recipe.metric is not None and "/" not in recipe.metric and recipe.metric not in known:
        close = get_close_matches(recipe.metric, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        raise RecipeError(f"{where}: {recipe.task} has no metric {recipe.metric!r}; {hint}")


def _check_numbers(recipe: Recipe, where: str) -> None:
    for name, value, good in _bounds(recipe):
        if not good:
            raise RecipeError(f"{where}: {name} is out of range, got {value}")


def _bounds(recipe: Recipe) -> Iterator[tuple[str, Any, bool]]:
    data, train, schedule = recipe.data, recipe.train, recipe.schedule
    yield "data.batch_size", data.batch_size, data.batch_size >= 1
    yield "data.image_size", data.image_size, data.image_size is None or data.image_size >= 1
    yield "data.workers", data.workers, data.workers >= 0
    yield "data.fraction", data.fraction, 0 < data.fraction <= 1
    yield "data.boxed", data.boxed, 0 < data.boxed <= 1
    yield "data.imbalance", data.imbalance, data.imbalance is None or data.imbalance >= 1
    yield "data.held_out", data.held_out, not isinstance(data.held_out, int) or data.held_out >= 0
    yield "data.sampling", data.sampling, isinstance(data.sampling, str) or data.sampling >= 0
    yield "data.repeat_threshold", data.repeat_threshold, 0 <= data.repeat_threshold <= 1
    yield "data.channels", data.channels, data.channels in (None, 1, 3)
    yield "train.steps", train.steps, train.steps >= 1
    yield "train.seconds", train.seconds, train.seconds is None or train.seconds > 0
    yield "train.micro_batch", train.micro_batch, train.micro_batch is None or train.micro_batch >= 1
    yield "train.clip_norm", train.clip_norm, train.clip_norm is None or train.clip_norm > 0
    yield "train.log_every", train.log_every, train.log_every >= 1
    yield "train.evaluate_every", train.evaluate_every, train.evaluate_every >= 0
    yield "train.checkpoint_every", train.checkpoint_every, train.checkpoint_every >= 0
    yield "schedule.warmup", schedule.warmup, 0 <= schedule.warmup < 1
    shares = [0.0, *schedule.restarts, 1.0]
    yield "schedule.restarts", schedule.restarts, all(a < b for a, b in pairwise(shares))
