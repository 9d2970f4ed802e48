"""Where networks add residual branches, and what an insertion at their ends does."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from torchive import convert
from torchive.engine.arms import load_recipe, pair_models
from torchive.engine.build import fill_recipe
from torchive.engine.conversion import ConversionError, Followed
from torchive.engine.residuals import trace_residuals


class Mixed(nn.Module):
    """Branches that end in a function and in a module, one beside a projection, and sums that are not residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner, self.scaled = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.raw, self.twin = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.block = Projected()
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.inner(x).relu()  # no module ends it
        x = x + (self.scaled(x) * self.scale).contiguous()
        x = self.raw(x) + self.twin(x)  # two ways of one length
        x = x + 1 + torch.ones_like(x)
        return self.block(x)


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1))
        self.side = nn.Conv2d(8, 16, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.side(x)
        y += self.body(x)
        return y


def test_ends_of_branches_in_a_network_by_hand() -> None:
    found = trace_residuals(Mixed(), torch.zeros(1, 3, 8, 8))
    assert found.ends == ["scaled", "block.body"]
    assert found.others == [("forward", "no module ends its residual branch")]


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("timm/resnet18", 8, "layer1.0.bn2"),
        ("timm/mobilenetv3_small_100", 6, "blocks.1.1.bn3"),  # blocks of another stride have no residual
        ("timm/convnext_atto", 12, "stages.0.blocks.0.mlp"),
        ("torchvision/mobilenet_v2", 10, "features.3.conv"),
    ],
)
def test_ends_of_branches_in_known_networks(name: str, count: int, first: str) -> None:
    library, _, model = name.partition("/")
    network = timm.create_model(model) if library == "timm" else torchvision.models.get_model(model, weights=None)
    found = trace_residuals(network)
    assert (len(found.ends), found.ends[0], found.others) == (count, first, [])


def test_sums_of_a_pyramid_are_no_residuals() -> None:
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).backbone
    assert all(name.startswith("body.layer") for name in trace_residuals(model).ends)


def test_places_are_chosen_by_pattern_and_errors_say_why() -> None:
    model = timm.create_model("resnet18")
    report = convert(model, "rezero", "layer4")
    assert [change.name for change in report.changes] == ["layer4.0.bn2", "layer4.1.bn2"]
    with pytest.raises(ConversionError, match="already followed by ReZero"):
        convert(model, "rezero", "layer4")
    with pytest.raises(ConversionError, match=r"no residual branch in 'conv1'; they are 'layer1.0.bn2'"):
        convert(model, "rezero", "conv1")
    with pytest.raises(ConversionError, match="Sequential has no residual branch"):
        convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)), "rezero")
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    with pytest.raises(ConversionError, match="replace TransformerEncoderLayer itself"):
        convert(layers, "rezero")


def test_what_a_part_changes_of_its_host_is_put_back_and_not_shared_between_arms() -> None:
    model = timm.create_model("resnet18", zero_init_last=True)
    report = convert(model, "rezero")
    assert isinstance(model.layer1[0].bn2, Followed)
    assert model.layer1[0].bn2.changed == ("weight",)
    assert (model.layer1[0].bn2.host.weight == 1).all()
    report.undo()
    assert (model.layer1[0].bn2.weight == 0).all()
    words = ["data.image_size=32", "model.init_args.network=timm/resnet10t"]
    recipe = load_recipe("solar", words)
    recipes = {"baseline": recipe, "method": recipe.override(["convert=[{method: rezero}]"])}

    class Samples:
        task = "classification"
        classes, channels = ("a", "b"), 1

    pairing = pair_models({arm: fill_recipe(r, Samples()) for arm, r in recipes.items()})  # type: ignore[arg-type]
    own = [name for name in pairing.initial["method"] if name.endswith("host.weight")]
    assert own
    assert all((pairing.initial["method"][name] == 1).all() for name in own)
