"""Export to ONNX, at two sizes, and int8, on networks that are tiny and on the converted ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from torchive import convert
from torchive.engine.export import GAP, ExportError, OnnxModel, export_model
from torchive.nn import Classifier


def network(num_classes: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def accuracy(inputs: Tensor, labels: Tensor):  # type: ignore[no-untyped-def]
    def score(model: nn.Module) -> dict[str, float]:
        found = torch.tensor([p.label for p in model.predict(inputs)])  # type: ignore[operator]
        return {"accuracy": float((found == labels).float().mean())}

    return score


def test_a_classifier_keeps_its_outputs_and_its_score(tmp_path: Path) -> None:
    model = Classifier(network()).train()
    inputs = torch.rand(16, 1, 24, 20)
    labels = torch.tensor([p.label for p in model.eval().predict(inputs)])
    model.train()
    report = export_model(model, tmp_path, inputs, calibration=inputs.split(8), score=accuracy(inputs, labels))
    assert report.onnx.gap < GAP
    assert list(report.onnx.gaps) == ["16x1x24x20", "15x1x36x30"]
    assert report.torch_score == report.onnx.score == {"accuracy": 1.0}
    assert report.int8 is not None
    assert 0 < report.int8.gap < 0.2
    assert report.int8.score["accuracy"] > 0.6
    assert model.training
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export.json", "model.int8.onnx", "model.onnx"]
    assert json.loads((tmp_path / "export.json").read_text())["onnx"]["score"] == {"accuracy": 1.0}


@pytest.mark.slow
def test_a_converted_network_exports(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=3).eval()
    convert(model, "dynamic_relu", variant="C")
    assert export_model(model, tmp_path, torch.rand(3, 3, 64, 96)).onnx.gap < GAP


class Windows(nn.Module):
    """A part like Swin's: its file is made for one size."""

    one_size_in_files = True

    def forward(self, x: Tensor) -> Tensor:
        return x.unfold(3, 4, 4).mean(-1)


def test_a_part_may_keep_the_size_of_its_file(tmp_path: Path) -> None:
    model, inputs = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Windows()), torch.rand(4, 3, 16, 12)
    report = export_model(model, tmp_path, inputs)
    assert report.onnx.gap < GAP
    assert list(report.onnx.gaps) == ["4x3x16x12", "3x3x16x12"]
    file = OnnxModel(tmp_path / "model.onnx")
    assert torch.equal(file(inputs, None)[0], file(inputs, condition=None)[0]), "what is None is left out"
    (taken,) = file.session.get_inputs()
    assert taken.shape[1:] == [3, 16, 12]
    assert isinstance(taken.shape[0], str), "the batch stays free"


class Branches(nn.Module):
    """Its forward depends on the values: it cannot be exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if float(x.sum()) > 0 else x


class FixedSize(nn.Module):
    """Its forward knows one size only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 3 * 8 * 8)


def test_what_cannot_be_exported_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Branches does not export"):
        export_model(Branches(), tmp_path, torch.rand(2, 3, 8, 8))
    with pytest.raises((ExportError, RuntimeError)):
        export_model(FixedSize(), tmp_path, torch.rand(3, 3, 8, 8))
    assert not list(tmp_path.glob(".*"))


def test_bad_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"at least 2 samples.*\(1, 3, 8, 8\)"):
        export_model(network(), tmp_path, torch.rand(1, 3, 8, 8))
    with pytest.raises(ExportError, match="calibrate on, got none"):
        export_model(network(), tmp_path, torch.rand(2, 1, 8, 8), calibration=[])
