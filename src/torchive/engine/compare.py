"""Does a method help, and what does it cost? Baseline and method under one budget, with paired seeds.

The plan, with the rule that names the winner, is written before anything is trained. Every run has a folder of its own;
the raw records stand in ``comparison.json``; the report is made from them alone. What was stopped continues.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchive.engine.arms import (
    ARMS,
    Arm,
    ComparisonError,
    Overrides,
    make_arms,
    pair_models,
    require_same_task,
    with_budget,
)
from torchive.engine.build import build_model, fill_recipe, open_split
from torchive.engine.comparison import Comparison, Narrator, Store, data_record, environment_record, plan_of
from torchive.engine.metrics import METRICS
from torchive.engine.recipe import REPRESENTING, Recipe
from torchive.report.statistics import LEAST_PAIRS, Rule

SPLITS = ("train", "val", "test")


def compare(
    method: str,
    *,
    recipe: str | None = None,
    data: str | None = None,
    seeds: int | Sequence[int] | None = 5,
    budget: str | None = None,
    dial: str | None = None,
    overrides: Sequence[str] = (),
    baseline: str | Overrides | None = None,
    method_overrides: Overrides | None = None,
    margin: float = 0.0,
    out: Path | str | None = None,
    resume: bool = True,
    progress: bool = True,
    record: bool = False,
) -> Any:
    """Train baseline and method with paired seeds, and say whether the method helps.

    Args:
        method: a built method; its card names recipe and arms. Two, as "gcnet+dynamic_relu", are compared apart and
            together.
        recipe: another recipe than the card's, by name or file.
        data: the source for both arms, as ``open_data`` takes it.
        seeds: how many, from 0, or which; at least three. None is five.
        budget: of each run: "400 steps", "60 s", "2 min"; the recipe's by default.
        dial: a setting to sweep, such as "train.micro_batch=2,4,8"; each value is a comparison of its own. After
            "method:" it is changed in the method's arm alone, as in "method:model.init_args.loss.init_args.gamma=1,2".
        overrides: ``key=value`` words for both arms.
        baseline, method_overrides: what makes each arm out of the recipe, instead of the card's (see ``make_arms``).
        margin: the smallest difference of interest, in the metric's unit.
        out: folder; by default ``runs/compare-METHOD-HASH`` with a hash of the settings.
        resume: False trains everything again.
        progress: a line for each finished run, and a bar on a terminal.
        record: add the result to the method's evidence.

    Returns:
        A ``Comparison``, with ``dial`` a ``Sweep``, of two methods a ``Together``; printing it shows a table and the
        report's path.

    Raises:
        ComparisonError, RecipeError, DataError, KeyError: one clear line each.
        KeyboardInterrupt: Ctrl-C; the same command continues.
    """
    chosen = _seeds(seeds)
    words = _command(method, recipe, data, chosen, budget, dial, overrides, baseline, method_overrides, margin)
    if "+" in method:
        _require(not record, "the evidence holds single methods; record each of two apart")
        _require(dial is None, "a dial turns for one method; compare two methods together at one value")
        _require(baseline is None and method_overrides is None, "two methods together take their arms from their cards")
        from torchive.engine.together import compare_together

        return compare_together(
            method,
            command=words,
            recipe=recipe,
            data=data,
            seeds=chosen,
            budget=budget,
            overrides=overrides,
            margin=margin,
            out=None if out is None else Path(out),
            resume=resume,
            progress=progress,
        )
    arms = make_arms(
        method, recipe=recipe, data=data, overrides=overrides, baseline=baseline, method_overrides=method_overrides
    )
    arms = _budgeted(arms, budget)
    if dial is not None:
        from torchive.engine.dial import sweep

        return sweep(
            method,
            arms,
            dial,
            words,
            seeds=chosen,
            margin=margin,
            out=None if out is None else Path(out),
            resume=resume,
            progress=progress,
            record=record,
        )
    return run_comparison(
        method,
        arms,
        chosen,
        command=words,
        margin=margin,
        out=None if out is None else Path(out),
        resume=resume,
        progress=progress,
        record=record,
    )


def run_comparison(
    method: str,
    arms: tuple[Arm, Arm],
    seeds: Sequence[int],
    *,
    command: str,
    margin: float = 0.0,
    out: Path | None = None,
    resume: bool = True,
    progress: bool = True,
    record: bool = False,
    setting: str = "",
    known: Comparison | None = None,
) -> Comparison:
    """One comparison of two arms; see ``compare``. ``setting`` names the dial's value; a baseline run that starts and
    trains as one of ``known`` did is taken from there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ComparisonError("a comparison runs in one process; start it without torchrun")
    require_same_task(arms)
    samples = {split: open_split(arms[0].recipe, split) for split in SPLITS}
    if not len(samples["test"]):
        raise ComparisonError(f"{samples['train'].name} has no test samples; a comparison needs some")
    recipes = {arm.name: fill_recipe(arm.recipe, samples["train"]) for arm in arms}
    rule = _rule(recipes["baseline"], margin, len(seeds))
    plan = plan_of(method, arms, recipes, rule, seeds, samples, command=command, setting=setting)
    store = Store.open(out, plan, resume=resume)
    store.start(data_record(recipes["baseline"], samples), environment_record(samples, recipes["baseline"]))
    narrator = Narrator(store.folder, plan, total=2 * len(seeds), shown=progress)
    for seed in seeds:
        _run_pair(store, recipes, samples, seed, resume=resume, narrator=narrator, known=known)
    if "examples" not in store.record:
        store.put("examples", _examples(store, recipes, samples, seeds[0]))
    if "costs" not in store.record:
        narrator.say("measuring what both arms cost")
        store.put("costs", _costs(recipes, samples, seeds[0]))
    store.finish()
    comparison = Comparison(store.folder, store.record)
    comparison.write_report()
    if record:
        from torchive.engine.recording import record_comparison

        record_comparison(comparison)
    return comparison


def _run_pair(
    store: Store,
    recipes: dict[str, Recipe],
    samples: dict[str, Any],
    seed: int,
    *,
    resume: bool,
    narrator: Narrator,
    known: Comparison | None,
) -> None:
    """Train and test both arms from one start; runs that are in the records are not repeated."""
    from torchive.engine.evaluate import score_run
    from torchive.engine.train import train

    missing = [arm for arm in ARMS if not store.has_run(seed, arm)]
    if not missing:
        return
    seeded = {arm: recipe.with_seed(seed) for arm, recipe in recipes.items()}
    pairing = pair_models(seeded)
    store.add_pair(seed, pairing.as_dict())
    if known and "baseline" in missing and store.take_baseline(known, seed):
        missing.remove("baseline")
        narrator.taken()
    for arm in missing:
        named = replace(seeded[arm], name=f"{arm}, seed {seed}")
        folder = store.run_folder(seed, arm)
        fitted = {split: samples[split] for split in ("train", "val")}
        result = train(
            named, folder, resume=resume, progress=narrator.on_terminal, samples=fitted, initial=pairing.initial[arm]
        )
        if result.interrupted:
            narrator.say("stopped; the same command continues")
            raise KeyboardInterrupt
        tested = score_run(folder, samples=samples["test"], reference=samples["train"], predictions=False).metrics
        store.add_run(
            {
                "seed": seed,
                "arm": arm,
                "folder": store.relative(folder),
                "steps": result.steps,
                "seconds": result.seconds,
                "curves": curves_of(result.history),
                "test": tested,
            }
        )
        store.tidy(folder)
        narrator.finished(seed, arm, tested[store.plan["rule"]["metric"]], result.seconds)


def curves_of(history: Sequence[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Training loss and validation metrics of a run's history, as [step, value] by name; times are left out."""
    curves: dict[str, list[list[float]]] = {}
    for line in history:
        names = ["loss"] if line["kind"] == "train" else [k for k in line if k not in ("kind", "step") and "/" not in k]
        for name in names:
            key = name if line["kind"] == "train" else f"{line['kind']}/{name}"
            curves.setdefault(key, []).append([line["step"], line[name]])
    return curves


def _examples(store: Store, recipes: dict[str, Recipe], samples: dict[str, Any], seed: int) -> dict[str, Any] | None:
    from torchive.engine.evaluate import score_run
    from torchive.engine.examples import side_by_side

    if recipes["baseline"].task in REPRESENTING:
        return None
    found = [score_run(store.run_folder(seed, arm), samples=samples["test"]) for arm in ARMS]
    return side_by_side(found[0], found[1], samples["test"], recipes["baseline"], seed=seed)


def _costs(recipes: dict[str, Recipe], samples: dict[str, Any], seed: int) -> dict[str, Any]:
    import torch

    from torchive.engine.cost import measure_costs
    from torchive.engine.evaluate import batches_of

    models = {arm: build_model(recipe.with_seed(seed)) for arm, recipe in recipes.items()}
    first = recipes["baseline"]
    train_batch = _train_batch(first, samples["train"], models["baseline"])
    plenty = replace(first, data=replace(first.data, batch_size=16))
    test_batch = next(iter(batches_of(samples["test"], plenty)))
    device = "cuda" if torch.cuda.is_available() and not first.train.cpu else "cpu"
    return measure_costs(models, recipes, train_batch, test_batch, device=device)


def _train_batch(recipe: Recipe, samples: Any, model: Any) -> Any:
    from torchive.data import Loader
    from torchive.transforms import build

    data = recipe.data
    augment: Any = data.augment
    if recipe.task == "selfsupervised" and augment == "default" and hasattr(model, "views"):
        augment = model.views(data.image_size)
    transform = build(recipe.task, image_size=data.image_size, train=True, channels=data.channels, augment=augment)
    loader = Loader(samples, transform, batch_size=data.batch_size, seed=0, shuffle=True, memory=0)
    return next(iter(loader.epoch(0)))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ComparisonError(message)


def _budgeted(arms: tuple[Arm, Arm], budget: str | None) -> tuple[Arm, Arm]:
    first, second = (replace(arm, recipe=with_budget(arm.recipe, budget)) for arm in arms)
    return first, second


def _rule(recipe: Recipe, margin: float, pairs: int) -> Rule:
    metric = recipe.decides
    higher = METRICS[metric].higher_is_better if metric in METRICS else True
    return Rule(metric, higher, margin, 0.95, pairs)


def _seeds(seeds: int | Sequence[int] | None) -> list[int]:
    chosen = list(range(5 if seeds is None else seeds)) if not isinstance(seeds, Sequence) else list(seeds)
    if len(chosen) < LEAST_PAIRS or len(set(chosen)) != len(chosen):
        raise ComparisonError(f"a comparison needs at least {LEAST_PAIRS} different seeds, got {seeds}")
    return chosen


def _command(
    method: str,
    recipe: str | None,
    data: str | None,
    seeds: list[int],
    budget: str | None,
    dial: str | None,
    overrides: Sequence[str],
    baseline: Any,
    method_overrides: Any,
    margin: float,
) -> str:
    """The shell command that repeats the comparison; a Python call where no command can."""
    if seeds == list(range(len(seeds))) and baseline is None and method_overrides is None and not margin:
        options = {"--recipe": recipe, "--data": data, "--seeds": str(len(seeds)), "--budget": budget, "--dial": dial}
        words = [word for key, value in options.items() if value is not None for word in (key, value)]
        return shlex.join(["torchive", "compare", method, *words, *overrides])
    values = {
        "recipe": recipe,
        "data": data,
        "seeds": seeds,
        "budget": budget,
        "dial": dial,
        "overrides": list(overrides) or None,
        "baseline": baseline,
        "method_overrides": method_overrides,
        "margin": margin or None,
    }
    given = ", ".join(f"{key}={value!r}" for key, value in values.items() if value is not None)
    return f"torchive.engine.compare.compare({method!r}, {given})"
