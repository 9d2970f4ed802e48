"""Export of a trained run on a user's own files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from torchive.engine import export_run as module
from torchive.engine.detector_file import DetectorWithDecoding
from torchive.engine.export_run import export_run, exported_latency
from torchive.engine.recipe import resolve_recipe
from torchive.engine.train import train

SIZES = [(64, 64), (48, 64), (64, 80), (56, 56)]


@pytest.fixture
def annotations(tmp_path: Path) -> str:
    """A COCO file of bright squares in images of four sizes, a file for each split."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val", "test"):
        (tmp_path / split).mkdir()
        images, boxes = [], []
        for k in range(8):
            height, width = SIZES[k % 4]
            pixels = torch.randint(0, 60, (height, width, 3), generator=generator, dtype=torch.uint8)
            y, x = 4 + k, 30 - 2 * k
            pixels[y : y + 20, x : x + 20] += 150
            Image.fromarray(pixels.numpy()).save(tmp_path / split / f"{k}.png")
            images.append({"id": k, "file_name": f"{k}.png", "width": width, "height": height})
            boxes.append({"id": k, "image_id": k, "category_id": 1, "bbox": [x, y, 20, 20], "area": 400, "iscrowd": 0})
        content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "square"}]}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    return f"coco:{tmp_path}/{{split}}.json,{tmp_path}/{{split}}/"


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [None, 64])
def test_a_detector_of_images_that_differ_in_size(annotations: str, image_size: int | None, tmp_path: Path) -> None:
    """The file scores what the model scores, image by image; both files are run at two sizes."""
    recipe = resolve_recipe(
        {
            "name": "squares",
            "task": "detection",
            "model": {
                "class_path": "torchive.nn.retinanet.RetinaNet",
                "init_args": {
                    "backbone": "timm/test_efficientnet",
                    "channels": 16,
                    "anchor_sizes": [[20], [40], [80], [160], [320]],  # the squares' own, so that there are finds
                    "aspect_ratios": [1.0],
                    "prior": 0.3,
                },
            },
            "data": {"source": annotations, "image_size": image_size, "batch_size": 4, "augment": []},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            "train": {"steps": 2, "evaluate_every": 2},
        }
    )
    train(recipe, tmp_path / "run")
    report = export_run(tmp_path / "run", samples=3)
    # scores of a network that has learnt nothing are nearly one number, and rounding orders them
    assert report.onnx.score == pytest.approx(report.torch_score, abs=0.02)
    assert report.torch_score["mar_100"] > 0
    assert report.detector is not None
    assert max(report.onnx.gap, report.detector.gap) < 1e-3
    assert len(report.detector.gaps) == 2


class Plain(torch.nn.Module):
    def predict(self, inputs: torch.Tensor) -> list[str]:
        return []  # only its signature is read


class Decoding(Plain):
    decodes_batches_of: int | None = None
    decoded = scored_boxes = None


@pytest.mark.parametrize(
    ("model", "baseline", "together"),
    [(Decoding, Decoding, True), (Decoding, Plain, False), (Plain, Plain, False)],
)
def test_files_whose_times_are_compared_decode_where_both_can(
    model: type, baseline: type, together: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arms, written = {"baseline": baseline(), "method": model()}, []
    monkeypatch.setattr(module, "open_run", lambda path: SimpleNamespace(model=arms[path.name], recipe=None))
    monkeypatch.setattr(module, "_stack", lambda *_: torch.zeros(16, 1))
    monkeypatch.setattr(module, "write_onnx", lambda net, *_: written.append(net))
    monkeypatch.setattr(module, "OnnxModel", lambda path: lambda images: images)
    monkeypatch.setattr(module, "in_turn", lambda calls, *_: {arm: {"median": 1.0} for arm in calls})
    latency, decoded = exported_latency({arm: tmp_path / arm for arm in arms})
    assert decoded is together
    assert all(isinstance(net, DetectorWithDecoding) is together for net in written)
    assert latency["method"] == {"latency_1": 1.0, "latency_16": 1.0}
