"""Recipes: names, types, overrides, and errors that say what was meant."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.engine.toys import ToySet, toy_recipe

from torchive.catalogue import card_names, get_card
from torchive.engine.build import build_model, build_trainable, fill_recipe
from torchive.engine.recipe import Recipe, RecipeError, load_recipe, resolve_recipe
from torchive.engine.resolve import recipe_names
from torchive.engine.views import MasksAsClasses, Subset, as_task, class_map


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_and_builds(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.task == name.partition("/")[0]
    assert resolve_recipe(recipe.to_dict()) == recipe
    assert recipe.decides
    known = "classification" if recipe.task == "selfsupervised" else recipe.task
    model = build_trainable(recipe, ToySet(known))
    assert hasattr(model, "losses")


def test_a_recipe_by_its_short_name_by_a_method_and_by_its_file(tmp_path: Path) -> None:
    assert load_recipe("solar") == load_recipe("classification/solar")
    assert load_recipe("ssd").name == "trees_ssd"
    assert load_recipe("attention_unet").name == "nuclei_attention_unet"
    assert load_recipe("Light Head RCNN").name == "nuclei_light_head"
    (tmp_path / "mine.yaml").write_text("task: classification\nmodel: {class_path: torchive.nn.Classifier}\n")
    assert load_recipe(str(tmp_path / "mine.yaml")).name == "mine"


@pytest.mark.parametrize(
    "name", [n for n in card_names() if get_card(n).kind == "detection" and get_card(n).state == "built"]
)
def test_a_detector_trains_by_its_name(name: str) -> None:
    assert load_recipe(name).model.class_path == get_card(name).class_path.replace(":", ".")


def test_a_part_by_its_name_is_told_where_it_is_trained() -> None:
    with pytest.raises(RecipeError, match="gcnet is no model that is trained alone; `torchive compare gcnet` trains"):
        load_recipe("gcnet")


def test_overrides_are_typed() -> None:
    words = ["train.steps=50", "model.init_args.network=timm/resnet34", "optimizer.lr=1e-2", "train.clip_norm=null"]
    recipe = load_recipe("solar", [*words, "convert=[{method: gcnet, where: '*.layer3', options: {reduction: 4}}]"])
    assert recipe.train.steps == 50
    assert recipe.model.init_args == {"network": "timm/resnet34"}
    assert recipe.optimizer.init_args["lr"] == 0.01
    assert recipe.train.clip_norm is None
    assert recipe.convert[0].options == {"reduction": 4}
    assert load_recipe("solar", ["optimizer.class_path=torch.optim.SGD"]).optimizer.class_path == "torch.optim.SGD"


ERRORS = [
    (["train.stps=3"], r"unknown key 'train\.stps'; did you mean 'train\.steps'\?"),
    (["trian.steps=3"], r"unknown key 'trian'; did you mean 'train'\?"),
    (["model.netwrk=a"], r"model\.init_args: unknown key 'netwrk'; did you mean 'network'\?"),
    (["model.class_path=torchive.nn.Clasifier"], r"did you mean torchive\.nn\.Classifier\?"),
    (["model.class_path=resnet_of_mine.Net"], r"names nothing that can be imported"),
    (["model.network={class_path: tests.engine.toys.TinyNet, init_args: {widht: 3}}"], r"did you mean 'width'\?"),
    (["model.network={class_path: tests.engine.toys.TinyNet, init_args: {width: a}}"], r"width.*int.*Got value: a"),
    (["train.steps=many"], r"train\.steps.*int.*many"),
    (["train.steps=0"], r"train\.steps is out of range, got 0"),
    (["train.precision=fp8"], r"precision.*bf16.*fp8"),
    (["optimizer.lr=fast"], r"lr.*float.*fast"),
    (["task=clasification"], r"task must be one of classification"),
    (["convert=[{method: a, wher: b}]"], r"did you mean 'where'\?"),
    (["data.source.name=3"], r"data\.source\.name: there are no keys under this value"),
    (["data"], r"key=value"),
    (["train={"], r"broken YAML"),
    (["model=torch.relu"], r"is no class"),
]


@pytest.mark.parametrize(("words", "message"), ERRORS, ids=lambda v: v[0] if isinstance(v, list) else "")
def test_mistakes_are_told_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("solar", words)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe() -> None:
    with pytest.raises(RecipeError, match=r"no recipe is called 'sollar'; did you mean .*solar"):
        load_recipe("sollar")
    with pytest.raises(RecipeError, match=r"nothing\.yaml: no such file"):
        load_recipe("nothing.yaml")


@pytest.mark.parametrize(
    "text", ["- a\n", "task: [\n", "", "!!python/object/apply:os.getcwd []\n", "task: classification\n"]
)
def test_a_broken_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"broken\.yaml") as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)


def test_classes_and_channels_come_from_the_data_where_a_class_takes_them() -> None:
    filled = fill_recipe(toy_recipe(), ToySet("classification"))
    assert filled.model.init_args["num_classes"] == 2
    assert filled.model.init_args["network"]["init_args"] == {"num_classes": 2, "in_channels": 1}
    given = toy_recipe().override(["model.network.init_args={num_classes: 5}"])
    assert fill_recipe(given, ToySet("classification")).model.init_args["network"]["init_args"]["num_classes"] == 5


def test_a_model_is_a_function_of_the_seed_and_a_conversion_changes_only_its_own_part() -> None:
    recipe = load_recipe("demo", ["model.num_classes=4", "model.in_channels=1"])
    state = torch.get_rng_state()
    one, two, other = build_model(recipe), build_model(recipe), build_model(recipe.with_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    first = one.state_dict()
    assert all(torch.equal(v, first[k]) for k, v in two.state_dict().items())
    assert not torch.equal(next(other.parameters()), next(one.parameters()))
    converted = build_model(recipe.override(["convert=[{method: dynamic_relu}]"])).state_dict()
    assert len(converted) > len(first)
    assert all(torch.equal(converted[k], v) for k, v in first.items()), "shared parameters start unequal"


def test_fields_that_change_the_weights_change_the_fingerprint() -> None:
    base = toy_recipe()
    for word in ("train.seed=1", "train.steps=13", "optimizer.lr=0.5", "data.batch_size=4", "data.fraction=0.5"):
        assert base.override([word]).fingerprint() != base.fingerprint(), word
    for word in ("train.log_every=1", "name=b", "data.workers=2"):
        assert base.override([word]).fingerprint() == base.fingerprint(), word


def test_masks_of_objects_become_classes_of_pixels() -> None:
    samples = ToySet("detection")
    seen = as_task(samples, "segmentation")
    assert isinstance(seen, MasksAsClasses)
    assert seen.classes == ("background", "square")
    assert torch.equal(seen[3].target, samples.masks[3].long())
    two = torch.zeros(2, 3, 3, dtype=torch.uint8)
    two[0, :2], two[1, 1:] = 1, 1
    target = {"masks": two, "labels": torch.tensor([4, 2])}
    assert class_map(target, (3, 3)).tolist() == [[4, 4, 4], [2, 2, 2], [2, 2, 2]]
    assert class_map({"masks": two[:0], "labels": target["labels"][:0]}, (3, 3)).sum() == 0
    with pytest.raises(RecipeError, match="toy-classification is a set for classification"):
        as_task(ToySet("classification"), "detection")


def test_a_smaller_fraction_is_a_part_of_a_larger_one() -> None:
    samples = ToySet("classification")
    half, tenth = (set(Subset.by_fraction(samples, f).ids) for f in (0.5, 0.1))
    assert len(half) == 24
    assert len(tenth) == 5
    assert tenth < half


def test_recipes_can_be_read_without_torch() -> None:
    program = "import sys, torchive.engine.recipe; sys.exit('torch' in sys.modules or 'jsonargparse' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_recipe_is_a_value() -> None:
    recipe = toy_recipe()
    assert isinstance(recipe, Recipe)
    with pytest.raises(AttributeError):
        recipe.task = "detection"  # type: ignore[misc]
