"""A long tail of classes, classes held out, sampling by class, rules of parts, restarts: what a recipe can ask for."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.engine.toys import ToySet, toy_recipe, toy_samples
from torch import Tensor, nn

from torchive.data import Loader
from torchive.data.drawing import epoch_order
from torchive.data.files import FileSamples
from torchive.data.readers.coco import read_coco
from torchive.engine import build
from torchive.engine.build import build_model, build_optimizer, fill_recipe, open_split
from torchive.engine.evaluate import evaluate
from torchive.engine.loop import Loop
from torchive.engine.processes import start_processes
from torchive.engine.recipe import RecipeError, ScheduleSpec, load_recipe, resolve_recipe
from torchive.engine.selection import (
    class_counts,
    class_order,
    counts_in_words,
    held_out_classes,
    long_tail,
    tail_counts,
    tail_order,
    without_held_out,
)
from torchive.engine.train import train
from torchive.engine.views import PartlyBoxed, Subset, object_labels_of
from torchive.structures import Sample
from torchive.transforms import build as build_transform


class Labelled:
    """Images that are their own index, in classes of given sizes; counts how often an image is read."""

    task, channels, licence, origin, left_out = "classification", 1, "CC0-1.0", "made by the test", ()

    def __init__(self, sizes: list[int], name: str = "labelled") -> None:
        self.name, self.classes = name, tuple(f"class {k}" for k in range(len(sizes)))
        self.labels = [k for k, size in enumerate(sizes) for _ in range(size)]
        self.ids, self.reads = tuple(f"{name}/{i}" for i in range(len(self.labels))), 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        self.reads += 1
        return Sample(torch.full((1, 8, 8), index, dtype=torch.uint8), self.labels[index], self.ids[index])


def test_the_tail_falls_by_one_factor_from_class_to_class() -> None:
    assert tail_counts([1000] * 5, 1) == [1000] * 5
    assert tail_counts([1000] * 5, 16) == [1000, 500, 250, 125, 62]
    counts = tail_counts([1000] * 10, 100)
    assert counts[0] / counts[-1] == 100
    for one, other in itertools.pairwise(counts):
        assert other / one == pytest.approx(100 ** (-1 / 9), abs=0.02)


def test_the_profile_holds_where_the_classes_are_not_equal() -> None:
    assert tail_counts([1000, 30, 500], 1) == [30, 30, 30]
    assert tail_counts([1000, 30, 500], 100) == [300, 30, 3]  # the small class decides how large the head may be
    assert tail_counts([7], 50) == [7]
    assert min(tail_counts([5, 5, 5], 1000)) == 1


def test_a_long_tail_is_a_function_of_seed_and_classes_and_nests() -> None:
    samples = Labelled([60] * 6)
    found = {ratio: long_tail(samples, ratio, seed=2) for ratio in (1, 10, 100)}
    assert class_counts(found[1]) == [60] * 6
    order = tail_order(samples.classes, 2)
    assert [class_counts(found[10])[k] for k in order] == tail_counts([60] * 6, 10)
    assert set(found[100].ids) < set(found[10].ids) < set(found[1].ids)
    assert long_tail(samples, 10, seed=2).ids == found[10].ids
    assert tail_order(samples.classes, 3) != order
    assert samples.reads == 0, "images were read to count classes"
    assert all(found[10][i].target == found[10].samples.labels[found[10].indices[i]] for i in (0, 5, 50))
    with pytest.raises(RecipeError, match="'class 1' has none"):
        long_tail(Labelled([3, 0, 3]), 10)
    with pytest.raises(RecipeError, match="this set is for detection"):
        long_tail(ToySet("detection"), 10)


def test_held_out_classes_are_never_trained_on() -> None:
    samples = Labelled([5] * 6)
    seen, unseen = (without_held_out(samples, 2, seed=1, train=t) for t in (True, False))
    chosen = held_out_classes(samples.classes, 2, 1)
    assert set(unseen.classes) == chosen
    assert set(seen.classes) == set(samples.classes) - chosen
    assert len(seen) == 20
    assert sorted(seen.ids + unseen.ids) == sorted(samples.ids)
    for part in (seen, unseen):
        for index in range(len(part)):
            one = part[index]
            whole = samples[samples.ids.index(one.id)]
            assert part.classes[one.target] == samples.classes[whole.target]
            assert torch.equal(one.image, whole.image)
    assert held_out_classes(samples.classes, ["class 5", "class 0"], 0) == {"class 0", "class 5"}
    for wrong, message in ((1, "1 would be held out"), (5, "5 would be held out"), (["dog"], "no class 'dog'")):
        with pytest.raises(RecipeError, match=message):
            held_out_classes(samples.classes, wrong, 0)


def test_recipes_select_the_training_split_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(_source: str, split: str, **_options: object) -> Labelled:
        return Labelled([40, 40, 40, 40], split)

    monkeypatch.setattr("torchive.data.open_data", opened)
    for ratio in (1, 10):
        recipe = load_recipe("solar", [f"data.imbalance={ratio}"])
        assert sorted(class_counts(open_split(recipe, "train")))[0] == 40 // ratio
        assert class_counts(open_split(recipe, "test")) == [40] * 4
    recipe = load_recipe("solar", ["data.held_out=2", "data.imbalance=4", "data.draw=5"])
    train_split, test_split = open_split(recipe, "train"), open_split(recipe, "test")
    assert sorted(class_counts(train_split)) == [10, 40]
    assert class_counts(test_split) == [40, 40]
    assert not set(train_split.classes) & set(test_split.classes)


def test_a_composed_set_draws_its_classes_along_the_tail() -> None:
    class Composed(Labelled):
        task = "detection"
        shares: tuple[float, ...] = ()

        def with_shares(self, shares: list[float]) -> Composed:
            other = Composed([5, 5, 5, 5], "train")
            other.shares = tuple(shares)
            return other

    samples = Composed([5, 5, 5, 5], "train")
    tail = long_tail(samples, 27)
    along = [tail.shares[k] for k in tail_order(samples.classes, 0)]
    assert along == pytest.approx([1, 1 / 3, 1 / 9, 1 / 27])
    assert long_tail(samples, 27, seed=3).shares != tail.shares
    half = long_tail(Subset(samples, [1, 4]), 27)
    assert (half.indices, half.samples.shares) == ([1, 4], tail.shares)
    photographs = Labelled([5, 5], "train")
    photographs.task = "detection"
    with pytest.raises(RecipeError, match="or images that are composed; this set is for detection"):
        long_tail(photographs, 10)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.imbalance=0.5"], "imbalance is out of range"),
        (["data.held_out=-1"], "held_out is out of range"),
        (["data.sampling=-1"], "sampling is out of range"),
        (["data.sampling=often"], "sampling"),
        (["schedule.restarts=[0.6, 0.2]"], "restarts is out of range"),
        (["data.imbalanced=3"], "did you mean 'data.imbalance'"),
    ],
)
def test_wrong_settings_are_named(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("solar", words)


def test_counts_reach_the_classes_that_take_them_and_images_are_read_for_nobody() -> None:
    samples = Labelled([9, 4, 2])
    fill_recipe(toy_recipe(), samples)
    loss = {"class_path": "tests.engine.test_selection.CountingLoss"}
    network = {"class_path": "tests.engine.toys.TinyNet"}
    model = {"class_path": "torchive.nn.Classifier", "init_args": {"network": network, "loss": loss}}
    filled = fill_recipe(resolve_recipe({**toy_recipe().to_dict(), "model": model}), samples)
    assert filled.model.init_args["loss"]["init_args"] == {"class_counts": [9, 4, 2]}
    assert samples.reads == 0
    assert build_model(filled).loss.class_counts == [9, 4, 2]  # type: ignore[union-attr]


class CountingLoss(nn.Module):
    """Cross-entropy that is told how many samples each class has, and has a parameter with rules of its own."""

    def __init__(self, *, class_counts: list[int]) -> None:
        super().__init__()
        self.class_counts = class_counts
        self.shift = nn.Parameter(torch.zeros(len(class_counts)))

    def parameter_rules(self) -> dict[str, dict[str, float]]:
        return {"shift": {"lr": 10.0, "weight_decay": 0.0}}

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(prediction + self.shift, target)


def test_parts_may_have_rules_for_their_own_parameters() -> None:
    model = nn.ModuleDict({"body": nn.Linear(3, 2), "loss": CountingLoss(class_counts=[1, 1])})
    recipe = toy_recipe(optimizer={"init_args": {"lr": 0.02, "weight_decay": 0.1}})
    plain = build_optimizer(recipe, model.parameters())
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in plain.param_groups] == [(0.02, 0.1, 3)]
    ruled = build_optimizer(recipe, model.parameters(), model)
    found = [(g["lr"], g["initial_lr"], g["weight_decay"], len(g["params"])) for g in ruled.param_groups]
    assert found == [(0.02, 0.02, 0.1, 2), (0.2, 0.2, 0.0, 1)]
    alone = build_optimizer(recipe, model["loss"].parameters(), model)
    assert len(alone.param_groups) == 1


def test_sampling_by_class_and_what_it_needs() -> None:
    samples = Labelled([80, 16, 4])
    plain = toy_recipe(train={"steps": 100})
    assert class_order(plain, samples) is None
    balanced = class_order(plain.override(["data.sampling=0"]), samples)
    assert balanced is not None
    drawn = torch.tensor([samples.labels[i] for epoch in range(30) for i in balanced(epoch)]).bincount()
    assert (drawn / drawn.sum() - 1 / 3).abs().max() < 0.02
    progressive = class_order(plain.override(["data.sampling=progressive"]), samples)
    assert progressive is not None
    few = [sum(samples.labels[i] == 2 for i in progressive(epoch)) for epoch in (0, 7)]
    assert few[0] < 10 < 15 < few[1]  # steps 1 to 12, and 84 to 96, of 100
    switch = class_order(plain, samples, lambda progress: 1.0 if progress < 0.5 else 0.0)
    assert switch is not None
    assert switch(0) == epoch_order(100, 0, 0)
    assert switch(7) != epoch_order(100, 0, 7)
    with pytest.raises(RecipeError, match="budget in steps"):
        class_order(plain.override(["train.seconds=5", "data.sampling=progressive"]), samples)
    with pytest.raises(RecipeError, match="this set is for detection"):
        class_order(plain.override(["data.sampling=0"]), ToySet("detection"))


def test_images_of_rare_classes_are_repeated() -> None:
    samples = Labelled([80, 16, 4])
    plain = toy_recipe(train={"steps": 100})
    order = class_order(plain.override(["data.repeat_threshold=0.36"]), samples)
    assert order is not None
    drawn = torch.tensor([samples.labels[i] for epoch in range(30) for i in order(epoch)]).bincount()
    expected = torch.tensor([80, 16 * 1.5, 4 * 3.0])  # sqrt(0.36 / 0.16), sqrt(0.36 / 0.04)
    assert (drawn / drawn.sum() - expected / expected.sum()).abs().max() < 0.01
    boxes = ToySet("detection")
    shown = [set(boxes[i].target["labels"].tolist()) for i in range(len(boxes))]
    share = {label: sum(label in one for one in shown) / len(shown) for label in set().union(*shown)}
    order = class_order(plain.override(["data.repeat_threshold=1"]), boxes)
    assert order is not None
    taken = torch.tensor([i for epoch in range(400) for i in order(epoch)]).bincount(minlength=len(boxes))
    factor = torch.tensor([max([1.0, *(share[label] ** -0.5 for label in one)]) for one in shown])
    assert (taken / taken.sum() - factor / factor.sum()).abs().max() < 0.01
    with pytest.raises(RecipeError, match=r"repeat_threshold: the order is given already"):
        class_order(plain.override(["data.repeat_threshold=0.5", "data.sampling=0"]), samples)
    with pytest.raises(RecipeError, match="need one class for each sample; this set is for segmentation"):
        class_order(plain.override(["data.repeat_threshold=0.5"]), ToySet("segmentation"))


def test_a_schedule_begins_again_at_its_restarts() -> None:
    plain, again = ScheduleSpec(warmup=0.1), ScheduleSpec(warmup=0.1, restarts=[0.75])
    for share in (0.0, 0.05, 0.4, 0.9):
        assert again.factor(0.75 * share) == pytest.approx(plain.factor(share))
        assert again.factor(0.75 + 0.25 * share) == pytest.approx(plain.factor(share))
    assert again.factor(1.0) == plain.factor(1.0) == 0


class Told(nn.Linear):
    """A part that notes the progress it is told."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.told = list[float]()

    def before_step(self, progress: float) -> None:
        self.told.append(progress)


class Staged(nn.Module):
    """A procedure that notes the progress it is told."""

    def __init__(self, *, num_classes: int = 2) -> None:
        super().__init__()
        self.layer, self.told = Told(256, num_classes), list[float]()

    def before_step(self, progress: float) -> None:
        self.told.append(progress)

    def sampling(self, progress: float) -> float:
        return 1.0 if progress < 0.5 else 0.0

    def losses(self, batch) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
        return {"loss": nn.functional.cross_entropy(self.layer(batch.inputs.flatten(1)), batch.targets)}

    def deployable(self) -> nn.Module:
        return self.layer


def test_a_procedure_hears_its_progress_and_rules_the_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = toy_recipe(train={"steps": 4, "evaluate_every": 0})
    model = Staged()
    from torchive.data import Loader
    from torchive.transforms import build as transform

    samples = toy_samples("classification")["train"]
    loader = Loader(
        samples, transform("classification", image_size=16, train=False), batch_size=8, seed=0, shuffle=True
    )
    for _ in Loop(recipe, model, loader, start_processes(recipe), tmp_path).steps():
        pass
    assert model.told == model.layer.told == [0, 0.25, 0.5, 0.75]
    asked = []
    monkeypatch.setattr("torchive.engine.train.class_order", lambda *given: asked.append(given[2]))
    staged = {"class_path": "tests.engine.test_selection.Staged"}
    wanted = resolve_recipe({**recipe.to_dict(), "task": "selfsupervised", "model": staged})
    train(wanted, tmp_path / "run", samples=toy_samples("classification"), progress=False, stop_after=1)
    assert asked[0](0.2) == 1
    assert asked[0](0.7) == 0


def test_embeddings_are_scored_by_verification() -> None:
    recipe = toy_recipe("embedding", "classification")
    samples = toy_samples("classification")["val"]
    model = build.build_trainable(recipe, samples)
    found = evaluate(model, samples, recipe)
    assert set(found) == {"verification_accuracy", "verification_auc", "true_accepts", "rank_1"}
    assert recipe.decides == "true_accepts"
    with pytest.raises(RecipeError, match="toy-detection is a set for detection; the recipe's task is embedding"):
        build.as_task(ToySet("detection"), "embedding")


def test_objects_are_counted_and_told_without_reading_an_image(tmp_path: Path) -> None:
    content = {
        "images": [{"id": k, "file_name": f"{k}.png", "width": 40, "height": 30} for k in range(12)],
        "annotations": [
            {"id": k, "image_id": k % 12, "category_id": 5 if k % 3 else 7, "bbox": [2, 3, 9, 8], "area": 72}
            for k in range(30)
        ],
        "categories": [{"id": 5, "name": "nut"}, {"id": 7, "name": "bolt"}, {"id": 9, "name": "screw"}],
    }
    for k in range(12):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{k}.png")
    (tmp_path / "a.json").write_text(json.dumps(content))
    recipe = load_recipe("trees_ssd", [f"data.source=coco:{tmp_path}/a.json,{tmp_path}"])
    samples = open_split(recipe, "train")
    for k in range(12):
        (tmp_path / f"{k}.png").unlink()
    counts = class_counts(samples)
    assert counts[2] == 0
    assert sum(counts) == sum(len(labels) for labels in object_labels_of(samples) or [])
    first, warning = counts_in_words(samples)
    assert f"{sum(counts)} objects: nut {counts[0]}, bolt {counts[1]}, screw 0" in first
    assert warning == "warning: screw: no object to train on"
    half = Subset(samples, range(0, len(samples), 2))
    assert sum(class_counts(half)) < sum(counts)
    assert counts_in_words(half, most=1)[0].endswith("and 2 more")


def test_some_images_keep_their_boxes_and_the_others_say_what_they_show() -> None:
    recipe = load_recipe("trees_ssd", ["data.boxed=0.25"])
    whole, part = ToySet("detection"), PartlyBoxed(ToySet("detection"), 0.25)
    assert part.boxed == set(Subset.by_fraction(whole, 0.25).ids)
    assert recipe.data.boxed == 0.25
    assert PartlyBoxed(whole, 0.25, draw=1).boxed != part.boxed
    assert PartlyBoxed(whole, 0.5, draw=1).boxed > PartlyBoxed(whole, 0.25, draw=1).boxed
    for k in range(len(whole)):
        target, before = part[k].target, whole[k].target
        assert bool(target["has_boxes"]) == (whole.ids[k] in part.boxed)
        assert len(target["boxes"]) == len(target["labels"]) == len(before["boxes"]) * bool(target["has_boxes"])
        assert (target["image_labels"].nonzero()[:, 0] + 1).tolist() == before["labels"].unique().tolist()
    assert 0 < sum(class_counts(part)) < sum(class_counts(whole))
    batch = next(
        iter(
            Loader(
                part,
                build_transform("detection", image_size=32, train=True, augment="flip"),
                batch_size=8,
                seed=0,
                shuffle=True,
            ).epoch(0)
        )
    )
    assert {"has_boxes", "image_labels"} <= set(batch.targets[0])
    with pytest.raises(RecipeError, match="boxed"):
        load_recipe("trees_ssd", ["data.boxed=0"])
    with pytest.raises(RecipeError, match=r"data\.boxed is for detection"):
        open_split(load_recipe("solar", ["data.boxed=0.5"]), "train")


def test_objects_without_a_mask_among_others_are_told(tmp_path: Path) -> None:
    for lacking in (0, 1, 2):
        shapes = [{} if k < lacking else {"segmentation": [[2, 3, 11, 3, 11, 11]]} for k in range(2)]
        content = {
            "images": [{"id": 0, "file_name": "0.png", "width": 40, "height": 30}],
            "annotations": [
                {"id": 4 + k, "image_id": 0, "category_id": 1, "bbox": [2, 3, 9, 8], **shape}
                for k, shape in enumerate(shapes)
            ],
            "categories": [{"id": 1, "name": "nut"}],
        }
        (tmp_path / "a.json").write_text(json.dumps(content))
        index = read_coco(tmp_path / "a.json", tmp_path)
        assert index.masks == (lacking == 0)
        lines = counts_in_words(FileSamples("nuts", index, index.records, []))
        assert len(lines) == 1 + (lacking == 1)
        if lacking == 1:
            assert "1 of 2 objects have no segmentation (annotation 4 first)" in lines[1]
