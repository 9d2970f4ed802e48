"""What a sceptic would try on a comparison, with a network that trains in seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from torchive.catalogue import list_methods
from torchive.catalogue.verdict import verdict_rows
from torchive.engine import arms as arms_module
from torchive.engine import compare as compare_module
from torchive.engine.arms import ComparisonError, make_arms, pair_models, with_budget
from torchive.engine.build import build_model, fill_recipe, open_split
from torchive.engine.compare import compare, curves_of
from torchive.engine.comparison import Comparison, _place_of
from torchive.engine.cost import measure_costs
from torchive.engine.dial import parse_dial
from torchive.engine.recipe import RecipeError, load_recipe
from torchive.engine.recording import record_comparison
from torchive.structures import Batch

RECIPE = """
task: classification
model:
  class_path: torchive.nn.Classifier
  init_args: {{network: {{class_path: tiny_network.Tiny}}}}
data: {{source: "folder:{folder}", image_size: 16, batch_size: 8}}
optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 0.01}}}}
train: {{steps: 6, evaluate_every: 3, checkpoint_every: 2, log_every: 1}}
metric: accuracy
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name, brightness in (("dark", 70), ("light", 120)):
        (folder / name).mkdir()
        for index in range(40):
            pixels = generator.normal(brightness, 60, (18, 20, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    path = tmp_path_factory.mktemp("recipes") / "toy.yaml"
    path.write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def run(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Comparison]:
    def start(out: Path | None = None, **options: Any) -> Comparison:
        folder = out or tmp_path_factory.mktemp("comparison") / "c"
        options = {"seeds": 3, "progress": False, "recipe": recipe, **options}
        return compare("dynamic_relu", out=folder, **options)

    return start


@pytest.fixture(scope="module")
def finished(run: Callable[..., Comparison]) -> Comparison:
    return run()


def values(comparison: Comparison) -> dict[tuple[int, str], Any]:
    """All that must be the same when a comparison is repeated: metrics and curves, not times."""
    return {(r["seed"], r["arm"]): (r["steps"], r["curves"], r["test"]) for r in comparison.record["runs"]}


def test_the_record_holds_every_run_and_the_report_is_there(finished: Comparison) -> None:
    assert len(finished.record["runs"]) == 6
    assert finished.record["pairs"][0]["new"]["baseline"] == {"tensors": 0, "values": 0}
    assert finished.record["pairs"][0]["new"]["method"]["tensors"] > 0
    assert finished.report.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert finished.summary.sentence in str(finished).replace("\n", " ")
    assert set(finished.record["costs"]["arms"]) == {"baseline", "method"}
    assert json.loads((finished.folder / "comparison.json").read_text(encoding="utf-8")) == finished.record


def test_two_runs_of_one_comparison_give_the_same_records(finished: Comparison, run: Callable[..., Comparison]) -> None:
    again = run()
    assert values(again) == values(finished)
    assert again.record["pairs"] == finished.record["pairs"]
    assert again.record["examples"] == finished.record["examples"]


def test_an_arm_against_itself_gives_exactly_zero_in_every_seed(run: Callable[..., Comparison]) -> None:
    changes = ["convert=[{method: dynamic_relu}]"]
    comparison = run(baseline=changes, method_overrides=changes)
    for metric in comparison.summary.metrics:
        assert metric.differences == (0.0, 0.0, 0.0)
    assert comparison.verdict == "identical"
    runs = values(comparison)
    assert all(runs[seed, "baseline"] == runs[seed, "method"] for seed in range(3))


def test_swapping_the_arms_mirrors_every_difference(finished: Comparison, run: Callable[..., Comparison]) -> None:
    swapped = run(baseline={"convert": [{"method": "dynamic_relu"}]}, method_overrides=[])
    for one, other in zip(finished.summary.metrics, swapped.summary.metrics, strict=True):
        assert one.baseline == other.method
        assert one.method == other.baseline


def test_workers_change_nothing(finished: Comparison, run: Callable[..., Comparison]) -> None:
    assert values(run(overrides=["data.workers=1"])) == values(finished)


def stop_in(monkeypatch: pytest.MonkeyPatch, place: int, steps: int) -> list[str]:
    """Make the run with this number, from 0, stop as by Ctrl-C after some steps; returns the list of begun runs."""
    from torchive.engine import train as train_module

    real, begun = train_module.train, []

    def train(recipe: Any, out: Path, **options: Any) -> Any:
        begun.append(out.name)
        return real(recipe, out, **options, stop_after=steps if len(begun) == place + 1 else None)

    monkeypatch.setattr(train_module, "train", train)
    return begun


@pytest.mark.parametrize(
    ("place", "steps"), [pytest.param(0, 1, marks=pytest.mark.slow), (3, 3), pytest.param(5, 5, marks=pytest.mark.slow)]
)
def test_a_stopped_comparison_continues_and_ends_the_same(
    finished: Comparison,
    run: Callable[..., Comparison],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: int,
    steps: int,
) -> None:
    with monkeypatch.context() as patch:
        stop_in(patch, place, steps)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "c")
    begun = stop_in(monkeypatch, -9, 0)
    comparison = run(tmp_path / "c")
    assert len(begun) == 6 - place  # what was finished is not trained again
    assert values(comparison) == values(finished)
    assert comparison.record["pairs"] == finished.record["pairs"]


def test_a_finished_comparison_trains_nothing_more(
    finished: Comparison, run: Callable[..., Comparison], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = stop_in(monkeypatch, -9, 0)
    assert run(finished.folder).record == finished.record
    assert begun == []


def test_the_rule_is_written_before_anything_is_trained(
    run: Callable[..., Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def train(*_: Any, **__: Any) -> Any:
        seen.update(json.loads((tmp_path / "c" / "plan.json").read_text(encoding="utf-8")))
        raise KeyboardInterrupt

    monkeypatch.setattr("torchive.engine.train.train", train)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "c", margin=0.02)
    assert seen["rule"]["metric"] == "accuracy"
    assert "wholly above 0.02" in seen["rule"]["text"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seeds": 4}, "seeds"),
        ({"margin": 0.1}, "rule"),
        ({"budget": "7 steps"}, "steps"),
        ({"overrides": ["optimizer.lr=0.1"]}, "lr"),
    ],
)
def test_other_settings_under_one_folder_are_refused(
    finished: Comparison, run: Callable[..., Comparison], change: dict[str, Any], named: str
) -> None:
    before = (finished.folder / "comparison.json").read_bytes()
    with pytest.raises(ComparisonError, match=named):
        run(finished.folder, **change)
    assert (finished.folder / "comparison.json").read_bytes() == before


def test_damaged_records_are_named(finished: Comparison, run: Callable[..., Comparison], tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes((finished.folder / "plan.json").read_bytes())
    (tmp_path / "comparison.json").write_text('{"schema": 1, "runs": [', encoding="utf-8")
    with pytest.raises(ComparisonError, match=r"comparison\.json"):
        run(tmp_path)


def test_the_test_split_is_scored_after_training_and_never_during(
    run: Callable[..., Comparison], monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    from torchive.engine import evaluate, train

    test_ids = tuple(open_split(load_recipe(recipe), "test").ids)
    real, scored = evaluate.score, []

    def score(model: Any, samples: Any, *arguments: Any, **options: Any) -> Any:
        scored.append(tuple(samples.ids) == test_ids)
        return real(model, samples, *arguments, **options)

    monkeypatch.setattr(evaluate, "score", score)
    monkeypatch.setattr(train, "evaluate", lambda *a, **o: score(*a, **o, predictions=False).metrics)
    run()
    assert scored == [False, False, True] * 6 + [True, True]  # two validations and a test for each run; the pictures


def arms(recipe: str, first: Any, second: Any) -> dict[str, Any]:
    made = make_arms("dynamic_relu", recipe=recipe, baseline=first, method_overrides=second)
    samples = open_split(made[0].recipe, "train")
    return {arm.name: fill_recipe(arm.recipe, samples) for arm in made}


def test_inserted_parts_leave_the_rest_shared(recipe: str) -> None:
    recipes = arms(recipe, [], {"convert": [{"method": "gcnet", "where": "network.body"}]})
    pairing = pair_models(recipes)
    assert pairing.shared["tensors"] == len(pairing.initial["baseline"])
    assert pairing.new["baseline"]["tensors"] == 0
    ours, theirs = pairing.initial["method"], pairing.initial["baseline"]
    assert torch.equal(ours["network.body.host.0.weight"], theirs["network.body.0.weight"])


def test_other_classes_start_equal_where_name_and_shape_agree(recipe: str) -> None:
    wide = {"model": {"init_args": {"network": {"init_args": {"wide": True}}}}}
    other = {"model": {"init_args": {"network": {"class_path": "tiny_network.Other"}}}}
    for changes, new in ((wide, {"network.body.0.weight", "network.head.weight"}), (other, {"network.scale.weight"})):
        recipes = arms(recipe, [], changes)
        pairing = pair_models(recipes)
        first, second = pairing.initial["baseline"], pairing.initial["method"]
        equal = {name for name in second if name in first and torch.equal(first[name], second[name])}
        assert "network.stem.0.weight" in equal
        assert not new & equal
        assert pairing.shared["tensors"] + pairing.new["method"]["tensors"] == len(second)


def test_a_shared_tensor_that_differs_is_found(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = iter(["a", "b"])
    monkeypatch.setattr(arms_module, "_hash", lambda *_: next(hashes))
    with pytest.raises(ComparisonError, match="do not start equal"):
        pair_models(arms(recipe, [], []))


def test_seeds_give_other_starting_values(recipe: str) -> None:
    recipes = arms(recipe, [], [])
    first, second = (pair_models({k: r.with_seed(s) for k, r in recipes.items()}).shared["sha256"] for s in (0, 1))
    assert first != second


@pytest.mark.parametrize(
    ("budget", "steps", "seconds"),
    [("400 steps", 400, None), ("400", 400, None), ("60s", 6, 60.0), ("2 min", 6, 120.0), ("0.5h", 6, 1800.0)],
)
def test_budgets(recipe: str, budget: str, steps: int, seconds: float | None) -> None:
    train = with_budget(load_recipe(recipe), budget).train
    assert (train.steps, train.seconds) == (steps, seconds)


@pytest.mark.parametrize("budget", ["", "soon", "-3 steps", "1.5 steps", "3 parsecs", "0 s"])
def test_budgets_that_cannot_be_read(recipe: str, budget: str) -> None:
    with pytest.raises(ComparisonError, match="got"):
        with_budget(load_recipe(recipe), budget)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seeds": 2}, "at least 3"),
        ({"seeds": [0, 0, 1]}, "different seeds"),
        ({"dial": "train.micro_batch=2"}, "two different values"),
        ({"margin": -1.0}, "at least 0"),
        ({"method_overrides": ["train.steps=9"]}, "must agree in train.steps"),
        ({"method_overrides": ["train.stepz=9"]}, r"did you mean '(train\.)?steps'"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    run: Callable[..., Comparison], wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises((ComparisonError, RecipeError, ValueError), match=message):
        run(**wrong)


def test_a_planned_method_is_refused(recipe: str) -> None:
    with pytest.raises(ComparisonError, match="planned"):
        compare(next(iter(list_methods(state="planned"))), recipe=recipe, progress=False)


def test_a_card_may_name_a_further_recipe() -> None:
    """The loss of the long tail enters a classifier, and on the detector's recipe its second stage."""
    for recipe in ("detection/scenes_long_tail", "scenes_long_tail"):
        baseline, method = make_arms("eql", recipe=recipe)
        assert baseline.title == "the same Faster R-CNN with binary cross-entropy"
        assert "region_loss" not in baseline.recipe.model.init_args
        assert "loss" not in method.recipe.model.init_args
        assert method.recipe.model.init_args["region_loss"]["class_path"].endswith("SigmoidRegionLoss")
    plain = make_arms("eql")[1].recipe
    assert plain.task == "classification"
    assert plain.model.init_args["loss"]["init_args"] == {"variant": "softmax"}


def test_a_dial_compares_at_each_value(run: Callable[..., Comparison], tmp_path: Path) -> None:
    swept: Any = run(tmp_path / "d", dial="train.micro_batch=4,8", budget="3 steps")
    assert list(swept.comparisons) == ["4", "8"]
    assert "as micro_batch changes" in str(swept)
    page = swept.report.read_text(encoding="utf-8")
    assert "train.micro_batch=4/report.html" in page
    whole = swept.comparisons["8"].record["runs"][0]["curves"]["loss"]
    assert whole[0] != swept.comparisons["4"].record["runs"][0]["curves"]["loss"][0]
    assert parse_dial("a.b = 1, 2") == ("a.b", ["1", "2"])


def test_a_dial_of_the_method_alone_trains_the_baseline_once(
    run: Callable[..., Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that only the method's arm has, over a number of its own."""
    import torchive.engine.train as training

    trained: list[str] = []
    train = training.train
    monkeypatch.setattr(
        training, "train", lambda named, *rest, **more: trained.append(named.name) or train(named, *rest, **more)
    )
    loss = {"class_path": "torchive.methods.losses.focal_loss.FocalLoss", "init_args": {"variant": "softmax"}}
    swept: Any = run(
        tmp_path / "d",
        dial="method:model.init_args.loss.init_args.gamma=0.5,4",
        baseline=[],
        method_overrides={"model": {"init_args": {"loss": loss}}},
    )
    assert sum(name.startswith("baseline") for name in trained) == 3
    assert sum(name.startswith("method") for name in trained) == 6
    assert "as gamma changes" in str(swept)
    records = [comparison.record for comparison in swept.comparisons.values()]
    arms = [record["plan"]["arms"] for record in records]
    assert arms[0]["baseline"] == arms[1]["baseline"]
    assert [a["method"]["recipe"]["model"]["init_args"]["loss"]["init_args"]["gamma"] for a in arms] == [0.5, 4]
    runs = [{r["seed"]: r["test"] for r in record["runs"] if r["arm"] == "baseline"} for record in records]
    assert runs[0] == runs[1]
    assert records[1]["plan"]["setting"] == "method:model.init_args.loss.init_args.gamma=4"


def test_a_result_enters_the_evidence_and_the_verdict_follows(finished: Comparison, tmp_path: Path) -> None:
    entry = record_comparison(finished, folder=tmp_path)
    metric = finished.summary.deciding
    assert entry["method"] == pytest.approx(list(metric.method), rel=1e-5)
    stored = json.loads((tmp_path / "dynamic_relu.json").read_text(encoding="utf-8"))["measured"][0]
    assert stored["difference"]["p"] == pytest.approx(metric.estimate.p, rel=1e-5)  # type: ignore[union-attr]
    assert stored["scale"]["budget"] == "6 steps"
    assert stored["export"].get("gap", 1.0) < 1e-4
    row = next(r for r in verdict_rows(folder=tmp_path) if r["name"] == "dynamic_relu")
    assert row["scale"].endswith("3 seeds")


def test_times_stay_out_of_the_curves() -> None:
    history = [
        {"kind": "train", "step": 1, "loss": 0.5, "seconds": 3.1, "samples_per_second": 9.0, "lr": 0.1},
        {"kind": "val", "step": 1, "accuracy": 0.5, "recall/dark": 0.4},
    ]
    assert curves_of(history) == {"loss": [[1, 0.5]], "val/accuracy": [[1, 0.5]]}


def test_costs_are_those_of_the_network(recipe: str) -> None:
    recipes = arms(recipe, [], [])
    models = {arm: build_model(r) for arm, r in recipes.items()}
    batch = Batch(torch.randn(8, 3, 16, 16), torch.tensor([0, 1] * 4), tuple("abcdefgh"))
    found = measure_costs(models, recipes, batch, batch, seconds=0.01)["arms"]
    stem, body, head = 2 * 64 * 4 * 27, 2 * 16 * 6 * 36, 2 * 6 * 2
    assert found["baseline"]["operations"] == stem + body + head
    assert found["baseline"]["parameters"] == sum(p.numel() for p in models["baseline"].parameters())
    for key in ("parameters", "operations", "memory_predict_mb", "memory_train_mb"):
        assert found["baseline"][key] == pytest.approx(found["method"][key], rel=0.01)
    weights = 4 * found["baseline"]["parameters"] / 2**20
    first_map = 4 * 8 * 4 * 64 / 2**20
    assert (
        found["baseline"]["memory_train_mb"] > 3 * weights + 2 * first_map
    )  # weights, AdamW's two, maps kept for gradients
    assert found["baseline"]["memory_train_mb"] > found["baseline"]["memory_predict_mb"]
    assert 0 < found["baseline"]["latency_1_ms"]["median"] <= found["baseline"]["latency_1_ms"]["p95"]


def test_the_command_repeats_the_comparison(finished: Comparison, recipe: str) -> None:
    assert finished.record["plan"]["command"] == f"torchive compare dynamic_relu --recipe {recipe} --seeds 3"
    words = compare_module._command("x", None, None, [4, 5, 6], None, None, (), None, None, 0.0)
    assert words == "torchive.engine.compare.compare('x', seeds=[4, 5, 6])"


def test_several_processes_are_refused(run: Callable[..., Comparison], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ComparisonError, match="one process"):
        run()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("coco:/d/cells/annotations.json,/d/cells/images/", "cells"),
        ("coco:cells/annotations/train.json,cells/images", "cells"),
        ("coco:cells.json,images/", "cells"),
        ("folder:my_images/", "my_images"),
        ("csv:a/labels.csv", "labels.csv"),
        ("/d/x/", "x"),
    ],
)
def test_a_source_of_files_is_called_by_its_folder(source: str, name: str) -> None:
    assert _place_of(source) == name
