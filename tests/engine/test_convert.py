"""``convert`` on networks of timm, torchvision and written by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from torchive import DynamicReLU, convert
from torchive.engine.conversion import ConversionError


class HandWritten(nn.Module):
    """One ReLU module called with two channel counts, and ReLU as two functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 16, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        x = self.relu(self.second(x))
        x = torch.relu(F.relu(x - 1))
        return self.head(x.mean((2, 3)))

    def greet(self) -> str:
        return "still here"


class Tail(nn.Module):
    """An inserted part that adds a learnable offset, zero at the start."""

    def __init__(self, channels: int, channel_dim: int = 1) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.offset = nn.Parameter(torch.zeros(channels))

    @classmethod
    def from_channels(cls, channels: int, *, channel_dim: int = 1) -> Tail:
        return cls(channels, channel_dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.offset if self.channel_dim == -1 else self.offset.view(-1, *[1] * (x.ndim - 2)))


def zero_hyper(model: nn.Module) -> None:
    """Make every dynamic ReLU exactly ReLU."""
    for module in model.modules():
        if isinstance(module, DynamicReLU):
            for parameter in module.hyper[2].parameters():  # type: ignore[union-attr]
                nn.init.zeros_(parameter)


NETWORKS = {
    "timm resnet10t": (lambda: timm.create_model("resnet10t"), (1, 3, 64, 64)),
    "timm mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_050"), (1, 3, 64, 64)),
    "torchvision resnet50": (lambda: torchvision.models.resnet50(), (1, 3, 64, 64)),
    "torchvision video": (lambda: torchvision.models.video.r3d_18(), (1, 3, 4, 32, 32)),
    "by hand": (HandWritten, (1, 3, 16, 16)),
    "sequence": (
        lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 6, 3)),
        (1, 2, 16),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_zeroed_conversion_computes_the_same_and_undo_restores(name: str) -> None:
    make, shape = NETWORKS[name]
    model = make().eval()
    x = torch.randn(shape)
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    expected = model(x)
    report = convert(model, "dynamic_relu")
    zero_hyper(model)
    converted = [m for m in model.modules() if isinstance(m, DynamicReLU)]
    assert len(converted) == len(report.changes) == len({id(m) for m in converted}) > 0
    assert report.parameters[1] == sum(p.numel() for p in model.parameters()) > report.parameters[0]
    torch.testing.assert_close(model(x), expected)
    report.undo()
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(model(x), expected)


def test_each_call_of_a_shared_activation_gets_its_own_weights() -> None:
    model = HandWritten()
    report = convert(model, "dynamic_relu")
    assert [c.channels for c in report.changes] == [8, 16, 16, 16]
    assert isinstance(model, HandWritten)
    assert model.greet() == "still here"
    bottleneck = torchvision.models.resnet50().layer1[0]
    report = convert(bottleneck, "dynamic_relu", example=torch.zeros(1, 64, 8, 8))
    assert sorted(c.channels for c in report.changes) == [64, 64, 256]


def test_split_networks_copy_pickle_export_and_train() -> None:
    model = HandWritten()
    convert(model, "dynamic_relu")
    x = torch.randn(2, 3, 16, 16)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_detectors_backbone_and_a_segmenter_convert_with_one_call() -> None:
    detector = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    report = convert(detector, "dynamic_relu", where="backbone")
    assert report.changes
    assert all(c.name.startswith("backbone.") for c in report.changes)
    segmenter = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    assert convert(segmenter, "dynamic_relu").changes


def test_squeeze_gates_and_vectors_are_left_alone_and_said() -> None:
    report = convert(timm.create_model("mobilenetv3_small_050"), "dynamic_relu")
    assert any("gate" in reason for _, reason in report.left_alone)
    report = convert(torchvision.models.vgg11(num_classes=2), "dynamic_relu")
    assert [name for name, _ in report.left_alone] == ["classifier.1", "classifier.4"]


def test_patterns() -> None:
    model = timm.create_model("resnet18")
    assert len(convert(model, "dynamic_relu", where="layer3.*").changes) == 4
    model = timm.create_model("resnet18")
    assert len(convert(model, "dynamic_relu", where=["layer1", "re:layer2\\.0\\.act1"]).changes) == 5


@pytest.mark.parametrize(
    ("network", "where", "axis"),
    [
        ("resnet18", "layer[34].*.bn2", 1),
        ("convnext_atto", "stages.*.blocks.*", 1),
        ("vit_tiny_patch16_224", "blocks.*", -1),
    ],
)
def test_insertion_keeps_the_function_and_loads_plain_weights(network: str, where: str, axis: int) -> None:
    model = timm.create_model(network, num_classes=5).eval()
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    size = 224 if "vit" in network else 64
    x = torch.randn(1, 3, size, size)
    expected = model(x)
    report = convert(model, Tail, where=where)
    assert report.changes
    assert {m.channel_dim for m in model.modules() if isinstance(m, Tail)} == {axis}
    assert torch.equal(model(x), expected)
    model.load_state_dict(plain)
    assert torch.equal(model(x), expected)
    report.undo()
    assert list(model.state_dict()) == list(plain)


def test_generators_modes_and_statistics_are_untouched() -> None:
    model = timm.create_model("resnet10t").train()
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    mean = model.bn1.running_mean.clone()
    state = torch.get_rng_state()
    report = convert(model, Tail, where="layer4")
    report.undo()
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model.bn1.running_mean, mean)


def test_a_network_of_one_size_is_tried_at_that_size() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32)
    assert len(convert(model, "rezero").changes) == 24
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_a_second_conversion_finds_nothing_left() -> None:
    model = timm.create_model("resnet10t")
    convert(model, "dynamic_relu")
    with pytest.raises(ConversionError, match="has none"):
        convert(model, "dynamic_relu")


def test_errors_name_what_is_there_and_leave_the_network_alone() -> None:
    model = timm.create_model("resnet18")
    before = [type(m) for m in model.modules()]
    with pytest.raises(ConversionError, match="no module with ReLU or ReLU6 matches 'layr3"):
        convert(model, "dynamic_relu", where="layr3.*")
    with pytest.raises(ConversionError, match="refuses ReLU"):
        convert(model, "dynamic_relu", pieces=0)
    with pytest.raises(ConversionError, match="VisionTransformer has none"):
        convert(timm.create_model("vit_tiny_patch16_224"), "dynamic_relu")
    with pytest.raises(ConversionError, match="pass example="):
        convert(nn.Sequential(nn.Bilinear(3, 4, 5), nn.ReLU()), "dynamic_relu")
    with pytest.raises(KeyError, match="did you mean dynamic_relu"):
        convert(model, "dynamic_rellu")
    assert [type(m) for m in model.modules()] == before


def test_only_convolutions_that_feed_a_norm_are_centred() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    report = convert(model, "mabn")
    assert [change.name for change in report.changes] == ["0", "1"]
    assert report.left_alone == [("3", "feeds no BatchNorm2d")]
    with pytest.raises(ConversionError, match="feeds no BatchNorm2d"):
        convert(timm.create_model("convnext_atto"), "mabn")


def test_another_type_can_be_replaced() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 1))
    report = convert(model, "dynamic_relu", replaces=nn.SiLU)
    assert [(c.name, c.old) for c in report.changes] == [("1", "SiLU")]
    with pytest.raises(ConversionError, match="has no from_module"):
        convert(model, "gcnet", replaces=nn.Conv2d)


def test_dtype_device_and_mode_follow_the_place() -> None:
    model = timm.create_model("resnet10t").double().eval()
    convert(model, "dynamic_relu")
    parts = [m for m in model.modules() if isinstance(m, DynamicReLU)]
    assert all(p.dtype is torch.float64 for m in parts for p in m.parameters())
    assert not any(m.training for m in parts)
