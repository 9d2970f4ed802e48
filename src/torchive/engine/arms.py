"""The two arms of a comparison: their recipes, and starting values that are equal wherever both have a tensor."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchive.catalogue import get_card
from torchive.catalogue.card import Card
from torchive.engine.build import build_model
from torchive.engine.conversion import Followed
from torchive.engine.recipe import Recipe, RecipeError, load_recipe, resolve_recipe
from torchive.engine.resolve import apply_overrides, source_override

ARMS = ("baseline", "method")
#: The recipe of a part whose card names none.
DEFAULT_RECIPE = "classification/solar"

Overrides = Mapping[str, Any] | Sequence[str]


class ComparisonError(ValueError):
    """A comparison that cannot be made as asked: one clear line."""


@dataclass(frozen=True)
class Arm:
    """One side: "baseline" or "method", its title for people, and its recipe."""

    name: str
    title: str
    recipe: Recipe


@dataclass(frozen=True)
class Pairing:
    """Starting values of a pair.

    Attributes:
        initial: arm -> all its tensors by name.
        shared: tensors and values that both arms have, and the hash that was found equal in both.
        new: arm -> tensors and values that only it has.
        start: arm -> hash of all that it starts from.
    """

    initial: dict[str, dict[str, Tensor]]
    shared: dict[str, Any]
    new: dict[str, dict[str, int]]
    start: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Counts and hashes, without the tensors."""
        return {"shared": self.shared, "new": self.new, "start": self.start}


def make_arms(
    method: str,
    *,
    recipe: str | None = None,
    data: str | None = None,
    overrides: Sequence[str] = (),
    baseline: str | Overrides | None = None,
    method_overrides: Overrides | None = None,
) -> tuple[Arm, Arm]:
    """Baseline and method of a card's comparison, as recipes.

    Args:
        method: a built method's name or alias.
        recipe: name or file; the card's by default, else ``classification/solar`` for a block.
        data: source for both arms.
        overrides: ``key=value`` words for both arms.
        baseline: what makes the baseline of the recipe: ``key=value`` words, nested values, or another method's name
            (its own arm is then the baseline).
        method_overrides: the same for the method's arm.

    Raises:
        KeyError, ValueError: the method is unknown or not built. RecipeError: a recipe cannot be used.
        ComparisonError: there is nothing to tell the arms apart by.
    """
    card = get_card(method)
    if card.state != "built":
        raise ComparisonError(f"{card.name} is planned, not built, so it cannot be compared")
    plan = comparison_plan(card, recipe)
    own: Overrides = card_changes(card, recipe) if method_overrides is None else method_overrides
    name = recipe or plan.get("recipe") or (DEFAULT_RECIPE if card.contract == "block" else None)
    if name is None:
        raise ComparisonError(f"the card of {card.name} names no recipe; say which, with recipe= or --recipe")
    words = [source_override(data or plan["data"])] if data or plan.get("data") else []
    shared = load_recipe(str(name), [*words, *overrides])
    changes: Overrides
    if isinstance(baseline, str):
        other = get_card(baseline)
        changes, title = card_changes(other), short_title(other)
    else:
        changes = plan.get("baseline", {}) if baseline is None else baseline
        title = str(plan.get("against", "")) if baseline is None else ""
    first, second = with_changes(shared, changes), with_changes(shared, own)
    return Arm("baseline", title or _title(first, second), first), Arm("method", short_title(card), second)


def comparison_plan(card: Card, recipe: str | None = None) -> dict[str, Any]:
    """The card's comparison, or the one that it has under ``recipes`` for this recipe."""
    further: dict[str, dict[str, Any]] = card.comparison.get("recipes", {})
    fitting = [plan for name, plan in further.items() if recipe and f"/{name}".endswith(f"/{recipe}")]
    return fitting[0] if fitting else card.comparison


def card_changes(card: Card, recipe: str | None = None) -> dict[str, Any]:
    """What a card adds to the recipe for its method; the recipe as it is where the card names a baseline only."""
    plan = comparison_plan(card, recipe)
    if "method" in plan:
        return dict(plan["method"])
    if card.contract == "block":
        return {"convert": [{"method": card.name}]}
    if card.contract == "loss":
        return {"model": {"init_args": {"loss": {"class_path": card.class_path.replace(":", ".")}}}}
    if "baseline" in plan:
        return {}
    other = f"; it is measured by `{plan['command']}`" if "command" in plan else ""
    raise ComparisonError(f"the card of {card.name} does not say what its arm of a comparison is{other}")


def short_title(card: Card) -> str:
    """The method's own name where its title, aliases or class hold it, else the title before its colon."""
    title = card.title.partition(":")[0].strip()
    named = (
        text
        for text in (title, *card.aliases, card.class_name)
        if _bare(text) == _bare(card.name) and text != text.lower()
    )
    return str(card.comparison.get("title") or next(named, title))


def _bare(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def _title(baseline: Recipe, method: Recipe) -> str:
    """What the baseline is, from what it does otherwise."""
    first, second = _leaves(baseline.to_dict()), _leaves(method.to_dict())
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    if not keys:
        return "itself"
    if "model.class_path" in keys:
        return baseline.model.class_path.rpartition(".")[2]
    if all(key.startswith(("convert", "model.init_args.loss")) for key in keys):
        return "the same network without it"
    return ", ".join(f"{key.rpartition('.')[2]} = {first[key]}" for key in keys if key in first) or "the plain recipe"


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        result.update(_leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return result


def with_changes(recipe: Recipe, changes: Overrides) -> Recipe:
    """A recipe with nested values laid over it, or ``key=value`` words applied; lists are replaced.

    Raises:
        RecipeError: an unknown key or a wrong value.
    """
    values = recipe.to_dict()
    if not isinstance(changes, Mapping):
        return resolve_recipe(apply_overrides(values, list(changes)), where=recipe.name)
    changed = {key: value for key, value in changes.items() if key != "model"}
    values = _laid_over(values, changed)
    model = changes.get("model") or {}
    words = []
    if isinstance(model, str):
        model = {"class_path": model}
    if "class_path" in model:  # arguments that the new class does not take fall away
        words.append(f"model.class_path={model['class_path']}")
    values = apply_overrides(values, words)
    values["model"] = _laid_over(values["model"], {k: v for k, v in model.items() if k != "class_path"})
    return resolve_recipe(values, where=recipe.name)


def _laid_over(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(dict(values))
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _laid_over(result[key], value) if both else copy.deepcopy(value)
    return result


def with_budget(recipe: Recipe, budget: str | None) -> Recipe:
    """A recipe with a budget such as "400 steps", "60 s" or "2 min"; evaluations and checkpoints move closer if needed.

    Raises:
        ComparisonError: the budget cannot be read.
    """
    if budget is None:
        return recipe
    text = budget.strip().lower().replace(" ", "")
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text[len(number) :]
    scale = {"s": 1, "sec": 1, "second": 1, "seconds": 1, "min": 60, "minute": 60, "minutes": 60, "h": 3600}
    try:
        amount = float(number)
        if amount <= 0 or (unit not in ("step", "steps", "") and unit not in scale):
            raise ValueError(unit)
    except ValueError:
        raise ComparisonError(f"a budget is written like '400 steps', '60 s' or '2 min', got {budget!r}") from None
    if unit in scale:
        return recipe.override([f"train.seconds={amount * scale[unit]}"])
    steps = int(amount)
    if steps != amount:
        raise ComparisonError(f"a number of steps is whole, got {budget!r}")
    train = recipe.train
    every = max(1, min(train.evaluate_every or steps, -(-steps // 5)))
    words = [
        f"train.steps={steps}",
        "train.seconds=null",
        f"train.evaluate_every={every if train.evaluate_every else 0}",
    ]
    return recipe.override([*words, f"train.checkpoint_every={max(1, min(train.checkpoint_every, steps))}"])


def budget_text(recipe: Recipe) -> str:
    """The budget of a recipe in words."""
    train = recipe.train
    return f"{train.steps} steps" if train.seconds is None else f"{train.seconds:g} s"


def pair_models(recipes: Mapping[str, Recipe]) -> Pairing:
    """Build both arms of a pair from filled recipes of one seed, and give them equal values where they share a tensor.

    Tensors are shared where name, shape and type agree; a part inserted behind a module does not change that module's
    names, and what it gave another start on purpose stays its own. The values come from the smaller arm, so that
    swapping the arms changes nothing. What only one arm has keeps the values that its class drew from the pair's seed.

    Raises:
        ComparisonError: shared tensors are not equal after all.
    """
    models = {arm: build_model(recipe) for arm, recipe in recipes.items()}
    states = {arm: _state(model) for arm, model in models.items()}
    source = min(states, key=lambda arm: (_values(states[arm]), json.dumps(recipes[arm].to_dict(), sort_keys=True)))
    other = next(arm for arm in states if arm != source)
    restarted = {name for model in models.values() for name in _changed(model)}
    alike = [name for name, value in states[source].items() if _alike(value, states[other].get(name))]
    common = [name for name in alike if name not in restarted]
    for name in common:
        states[other][name] = states[source][name]
    hashes = {arm: _hash(state, common) for arm, state in states.items()}
    if len(set(hashes.values())) != 1:
        raise ComparisonError(f"the arms do not start equal: {hashes}")
    known = set(common)
    shared = {
        "tensors": len(common),
        "values": sum(states[source][name].numel() for name in common),
        "sha256": hashes[source],
    }
    new = {}
    for arm, state in states.items():
        own = [value.numel() for name, value in state.items() if name not in known]
        new[arm] = {"tensors": len(own), "values": sum(own)}
    initial = {arm: _renamed(models[arm], state) for arm, state in states.items()}
    start = {arm: _hash(state, list(state)) for arm, state in states.items()}
    return Pairing(initial, shared, new, start)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under the names that they have without inserted parts."""
    names = _plain_names(model)
    return {names[name]: value.detach() for name, value in model.state_dict().items()}


def _renamed(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: state[plain].clone() for name, plain in _plain_names(model).items()}


def _plain_names(model: nn.Module) -> dict[str, str]:
    """Name in the state dict -> name without the ``host`` of modules that an inserted part follows."""
    hosts = [f"{name}.host." if name else "host." for name, m in model.named_modules() if isinstance(m, Followed)]
    hosts.sort(key=len, reverse=True)  # the inner ones first, so that the outer prefixes still fit
    names = {}
    for name in model.state_dict():
        plain = name
        for host in hosts:
            if plain.startswith(host):
                plain = host.removesuffix("host.") + plain.removeprefix(host)
        names[name] = plain
    return names


def _changed(model: nn.Module) -> list[str]:
    """Parameters that an inserted part gave another start, under the names that they have without it."""
    names = _plain_names(model)
    places = [(name, m) for name, m in model.named_modules() if isinstance(m, Followed)]
    return [names[f"{name}.host.{key}" if name else f"host.{key}"] for name, m in places for key in m.changed]


def _alike(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and one.dtype == other.dtype


def _values(state: Mapping[str, Tensor]) -> int:
    return sum(value.numel() for value in state.values())


def _hash(state: Mapping[str, Tensor], names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(state[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_same_task(arms: Sequence[Arm]) -> None:
    """Both arms must learn one task from one source at one size, or their figures cannot be paired.

    Raises:
        RecipeError: they do not.
    """
    first, second = (arm.recipe for arm in arms)
    for what, a, b in (
        ("task", first.task, second.task),
        ("data.source", first.data.source, second.data.source),
        ("data.batch_size", first.data.batch_size, second.data.batch_size),
        ("data.fraction", first.data.fraction, second.data.fraction),
        ("train.steps", first.train.steps, second.train.steps),
        ("train.seconds", first.train.seconds, second.train.seconds),
        ("metric", first.decides, second.decides),
    ):
        if a != b:
            raise RecipeError(f"the arms must agree in {what}: the baseline has {a!r}, the method {b!r}")
