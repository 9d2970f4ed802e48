"""Two methods apart and together: one baseline for all, and the difference of the sum."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from torchive.engine import train as train_module
from torchive.engine.arms import ComparisonError
from torchive.engine.compare import compare
from torchive.engine.together import Together, merged, parse_together
from torchive.report import render_report

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
    for name, brightness in (("dark", 70), ("light", 110)):
        (folder / name).mkdir()
        for index in range(40):
            pixels = generator.normal(brightness, 70, (18, 20, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    path = tmp_path_factory.mktemp("recipes") / "toy.yaml"
    path.write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def begun() -> list[str]:
    return []


@pytest.fixture(scope="module")
def found(recipe: str, begun: list[str], tmp_path_factory: pytest.TempPathFactory) -> Together:
    real: Callable[..., Any] = train_module.train

    def train(given: Any, out: Path, **options: Any) -> Any:
        begun.append(f"{out.parents[1].name}/{out.name}")
        return real(given, out, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "train", train)
        out = tmp_path_factory.mktemp("together") / "t"
        result = compare("dynamic_relu+mabn", recipe=recipe, seeds=3, progress=False, out=out)
    assert isinstance(result, Together)
    return result


def test_the_baseline_is_trained_once(found: Together, begun: list[str]) -> None:
    assert sorted(name.partition("-")[0] for name in begun if name.endswith("baseline")) == [
        f"first/seed{seed}" for seed in range(3)
    ]
    assert sum(name.endswith("method") for name in begun) == 9
    kept = [[r["test"] for r in c.record["runs"] if r["arm"] == "baseline"] for c in found.comparisons.values()]
    assert kept[0] == kept[1] == kept[2]


def test_a_taken_baseline_is_what_training_it_would_give(found: Together, recipe: str, tmp_path: Path) -> None:
    apart = compare("mabn", recipe=recipe, seeds=3, progress=False, out=tmp_path / "m")
    taken = found.comparisons["second"]
    for side in ("baseline", "method"):
        assert getattr(apart.summary.deciding, side) == getattr(taken.summary.deciding, side)
    starts = [[pair["start"]["baseline"] for pair in c.record["pairs"]] for c in (apart, taken)]
    assert starts[0] == starts[1]


def test_the_interaction_is_both_minus_the_sum_in_each_seed(found: Together) -> None:
    first, second, both = (found.comparisons[side].summary.deciding for side in ("first", "second", "both"))
    columns = zip(first.differences, second.differences, both.differences, strict=True)
    values = np.array([ab - a - b for a, b, ab in columns])
    found_interaction = found.summary.interaction
    assert found_interaction is not None
    assert found_interaction.mean == pytest.approx(values.mean(), abs=1e-12)
    if np.ptp(values) > 0:
        half = 4.302652729749464 * values.std(ddof=1) / np.sqrt(3)  # Student's t, two degrees of freedom, 97.5 %
        assert found_interaction.half_width == pytest.approx(half, rel=1e-6)


def test_both_networks_have_both_parts(found: Together) -> None:
    plan = found.comparisons["both"].record["plan"]
    assert [entry["method"] for entry in plan["arms"]["method"]["recipe"]["convert"]] == ["dynamic_relu", "mabn"]
    assert plan["method"] == "dynamic_relu+mabn"
    assert not plan["arms"]["baseline"]["recipe"]["convert"]


def test_the_report_and_the_table_say_it(found: Together) -> None:
    page = render_report(found.folder).read_text(encoding="utf-8")
    assert "Do the gains add?" in page
    assert found.summary.sentence.partition("[")[0] in page
    assert "both minus the sum" in str(found)
    assert found.report.is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"record": True}, "record each of two apart"),
        ({"dial": "train.steps=2,3"}, "at one value"),
        ({"baseline": []}, "from their cards"),
    ],
)
def test_what_cannot_be_joined_is_refused(options: dict[str, Any], message: str, recipe: str) -> None:
    with pytest.raises(ComparisonError, match=message):
        compare("gcnet+mabn", recipe=recipe, seeds=3, progress=False, **options)


@pytest.mark.parametrize("text", ["gcnet+", "gcnet+mabn+dynamic_relu", "+"])
def test_two_names_are_needed(text: str) -> None:
    with pytest.raises(ComparisonError, match="two methods together are written like"):
        parse_together(text)


def test_the_same_method_twice_is_refused() -> None:
    with pytest.raises(ComparisonError, match="different ones"):
        parse_together("gcnet+gcnet")


def test_changes_are_merged_or_refused() -> None:
    names = ("gcnet", "mabn")
    one = {"convert": [{"method": "gcnet"}], "train": {"steps": 3}}
    two = {"convert": [{"method": "mabn"}], "train": {"micro_batch": 2}}
    assert merged(one, two, names=names) == {
        "convert": [{"method": "gcnet"}, {"method": "mabn"}],
        "train": {"steps": 3, "micro_batch": 2},
    }
    with pytest.raises(ComparisonError, match=r"train\.steps is 3 for one and 4 for the other"):
        merged(one, {"train": {"steps": 4}}, names=names)
