"""Detectors with their decoding in one file: the boxes of ``predict``, suppressed by ONNX's own operator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchive
from torchive.engine.detector_file import DetectorWithDecoding, decodes
from torchive.engine.export import OnnxModel, _roomy, export_model, gap_to_torch, write_onnx
from torchive.methods.detection.guided_anchoring import GuidedRetinaNet
from torchive.methods.segmentation.condinst.upsampling import aligned_bilinear
from torchive.nn.retinanet import RetinaNet
from torchive.ops.anchors import grid_anchors
from torchive.ops.masks import paste_masks

SMALL: dict[str, Any] = {"backbone": "timm/mobilenetv3_small_050", "num_classes": 3}
#: Methods with what makes them small, and how their ``decode`` is asked for hard suppression.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ssd": ({"image_size": 128}, {}),
    "netnet": ({"image_size": 128}, {}),
    "yolov3": ({"image_size": 128}, {}),
    "condinst": ({"channels": 32}, {}),
    "pointins": ({"channels": 32}, {}),
    "faster_rcnn": ({"channels": 32, "hidden": 32}, {}),
    "light_head_rcnn": ({"hidden": 32}, {}),
    "thundernet": ({"hidden": 32}, {"soft_sigma": None}),
    "tsd": ({"channels": 32, "hidden": 32}, {}),
    "ehsod": ({"channels": 32, "hidden": 32}, {}),
    "guided_anchoring": ({"channels": 32, "hidden": 32}, {}),
    "htc": ({"channels": 32, "hidden": 32, "after_nms": (100, 100)}, {}),
    "panoptic_fpn": ({"channels": 32, "hidden": 32, "width": 32}, {}),
    "deepfashion2_match_rcnn": ({"channels": 32, "hidden": 32, "landmarks": (), "matching": None}, {}),
}


def spread(model: nn.Module) -> nn.Module:
    """Class scores that differ: random weights of detectors give all positions one score, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and any(word in name for word in ("cls", "logits", "class")):
            weight.data += torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5
    return model.eval()


def few(model: nn.Module, raw: dict[str, torch.Tensor], size: tuple[int, int]) -> float:
    """A threshold that lets 300 pairs of box and class of a batch through, midway to the next: none lies on it."""
    scores = model.scored_boxes(raw, size)[1].flatten()  # type: ignore[operator]
    found = float(scores.topk(301).values[-2:].mean())
    return found**2 if "centerness" in raw else found


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    options, hard = METHODS[name]
    return spread(torchive.create_model(name, **SMALL, **options)), hard


@pytest.mark.parametrize("name", list(METHODS))
def test_the_boxes_are_those_of_predict(name: str) -> None:
    model, hard = build(name)
    images = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        raw = model(images)
        if "labels" in raw:
            # in the midst of the scores that there are, and fewer than would come
            given = {"score_threshold": float(raw["scores"][raw["scores"] >= 0].median()), "max_detections": 20}
            wanted = model.predict(images, **given)  # type: ignore[operator]
            assert max(map(len, wanted)) < int((raw["scores"] >= 0).sum(1).max())
        else:  # as few candidates as a trained detector has
            given = {"score_threshold": few(model, raw, (128, 128))}
            wanted = model.decode(raw, [(128, 128)] * 2, **hard, **given)  # type: ignore[operator]
        got = DetectorWithDecoding(model, **given)(images)
    assert max(map(len, wanted)) > 3, "nothing to compare"
    for k, one in enumerate(wanted):
        there = got["scores"][k] >= 0
        assert int(there.sum()) == len(one)
        torch.testing.assert_close(got["scores"][k][there], one.scores, atol=1e-5, rtol=1e-4)
        # equal scores may come in either order
        apart = torch.cdist(one.boxes.double(), got["boxes"][k][there].double()) + 1e4 * (
            one.labels[:, None] != got["labels"][k][there]
        )
        assert len(one) == 0 or float(apart.min(1).values.max()) < 1e-3
        assert bool((got["labels"][k][~there] == 0).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", list(METHODS))
def test_a_file_gives_the_same_boxes_at_two_sizes(name: str, tmp_path: Path) -> None:
    import onnx

    model, _ = build(name)
    side = 256 if name in ("condinst", "pointins") else 128  # a map of one cell would stay one in the file
    images = torch.rand(2, 3, side, side)
    with torch.no_grad():
        raw = model(images)
        threshold = None if "labels" in raw else few(model, raw, (side, side))
    whole, path = DetectorWithDecoding(model, score_threshold=threshold).eval(), tmp_path / "detector.onnx"
    file = OnnxModel(path, write_onnx(whole, images, path))
    other = (3, 3, 128, 128) if name in ("ssd", "netnet") else (1, 3, side + 64, side + 32)
    for inputs in (images, torch.rand(other)):
        assert int((whole(inputs)["scores"] >= 0).sum()) > 3
        assert gap_to_torch(whole, file, inputs) < 1e-3  # pixels
    graph = onnx.load(str(path)).graph
    inside = {node.op_type for node in graph.node}
    assert "NonMaxSuppression" in inside
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}


@pytest.mark.parametrize("build_one", [RetinaNet, GuidedRetinaNet])
def test_dense_detectors_of_the_house(build_one: Any) -> None:
    torch.manual_seed(0)
    model = spread(build_one(**SMALL, channels=32))
    images = torch.rand(1, 3, 128, 160)
    with torch.no_grad():
        threshold = few(model, model(images), (128, 160))
        wanted = model.predict(images, score_threshold=threshold)[0]  # type: ignore[operator]
        got = DetectorWithDecoding(model, score_threshold=threshold)(images)
    there = got["scores"][0] >= 0
    assert int(there.sum()) == len(wanted) > 3
    assert float(torch.cdist(wanted.boxes.double(), got["boxes"][0][there].double()).min(1).values.max()) < 1e-3


@pytest.mark.parametrize("name", ["condinst", "pointins"])
def test_masks_come_with_the_boxes(name: str) -> None:
    """Those of ``predict``, once they are drawn into the image."""
    model, _ = build(name)
    size, images = (128, 160), torch.rand(2, 3, 128, 160)
    with torch.no_grad():
        raw = model(images)
        threshold = few(model, raw, size)
        got = DetectorWithDecoding(model, score_threshold=threshold)(images)
        level = float(got["masks"][got["scores"] >= 0].median())  # random weights give scores near one number
        wanted = model.decode(raw, [size] * 2, score_threshold=threshold, mask_threshold=level)  # type: ignore[operator]
    for k, one in enumerate(wanted):
        there = got["scores"][k] >= 0
        assert int(there.sum()) == len(one) > 10
        apart = torch.cdist(one.boxes.double(), got["boxes"][k][there].double()) + 1e4 * (
            one.labels[:, None] != got["labels"][k][there]
        )
        row = apart.argmin(1)  # equal scores may come in either order
        masks = got["masks"][k][there][row]
        if name == "condinst":
            drawn = aligned_bilinear(masks[None], model.mask_stride)[0, :, : size[0], : size[1]] > level  # type: ignore[arg-type]
        else:
            drawn = paste_masks(masks, got["mask_boxes"][k][there][row], size, threshold=level)
        assert int(drawn.flatten(1).any(1).sum()) > 10, "nothing to compare"
        assert int((drawn != one.masks).sum()) <= 1e-3 * int(drawn.sum())


def test_proposals_alone_keep_what_their_predict_keeps() -> None:
    """Their thresholds are those of proposals, and not of objects."""
    torch.manual_seed(0)
    model = torchive.create_model("guided_anchoring", **{**SMALL, "num_classes": 1}, stages=1, channels=32).eval()
    model.rpn.objectness.weight.data.normal_(std=0.5)  # type: ignore[union-attr, operator]
    model.rpn.objectness.bias.data.fill_(-4.0)  # type: ignore[union-attr, operator]
    images = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        wanted = model.predict(images)  # type: ignore[operator]
        got = DetectorWithDecoding(model)(images)
    for k, one in enumerate(wanted):
        there = got["scores"][k] >= 0
        assert int(there.sum()) == len(one) > 20
        assert float(one.scores.min()) < 0.05, "a threshold of objects would keep as many"
        torch.testing.assert_close(got["scores"][k][there], one.scores)
        torch.testing.assert_close(got["boxes"][k][there], one.boxes, atol=1e-3, rtol=0)


def test_faces_are_blended_as_in_predict(tmp_path: Path) -> None:
    """On raw outputs with many overlaps, here and in a file."""
    torch.manual_seed(0)
    model = torchive.create_model("blazeface").eval()
    side = int(model.image_size)  # type: ignore[arg-type]
    images = torch.rand(2, 3, side, side)
    with torch.no_grad():
        raw = model(images)
    crowded = {**raw, "logits": torch.randn_like(raw["logits"]), "deltas": 4 * torch.randn_like(raw["deltas"])}
    crowded["deltas"][..., 2:4] = 10 + 30 * torch.rand_like(crowded["deltas"][..., 2:4])
    got = model.decoded(crowded, (side, side), score_threshold=0.6)  # type: ignore[operator]
    wanted = model.decode(crowded, [(side, side)] * 2, score_threshold=0.6)  # type: ignore[operator]
    for k, one in enumerate(wanted):
        there = got["scores"][k] >= 0
        assert int(there.sum()) == len(one) > 10
        torch.testing.assert_close(got["scores"][k][there], one.scores)
        torch.testing.assert_close(got["boxes"][k][there], one.boxes, atol=1e-3, rtol=0)
        torch.testing.assert_close(got["keypoints"][k][there], one.keypoints, atol=1e-3, rtol=0)

    class Blending(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            given = {**raw, "deltas": x[..., :16], "logits": x[..., 16:]}
            found: dict[str, torch.Tensor] = model.decoded(given, (side, side), score_threshold=0.6)  # type: ignore[operator]
            return found

    path, inputs = tmp_path / "faces.onnx", torch.cat([crowded["deltas"], crowded["logits"]], 2)
    file = OnnxModel(path, write_onnx(Blending(), inputs, path, dynamic=(0,)))
    assert gap_to_torch(Blending(), file, inputs) < 1e-3
    assert gap_to_torch(Blending(), file, inputs[1:]) < 1e-3


def test_thresholds_can_be_given_and_others_are_refused(tmp_path: Path) -> None:
    model, _ = build("yolov3")
    images = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        kept = DetectorWithDecoding(model, max_detections=7, score_threshold=0.3)(images)
    assert kept["boxes"].shape == (2, 7, 4)
    assert bool(((kept["scores"] > 0.3) | (kept["scores"] == -1)).all())
    assert not decodes(nn.Conv2d(3, 3, 1))
    with pytest.raises(TypeError, match=r"Conv2d has no scored_boxes.*protocols.FileDetector"):
        DetectorWithDecoding(nn.Conv2d(3, 3, 1))


class Centred(nn.Module):
    """One box with a score of a half; its ``predict`` states what it is told."""

    def __init__(self, root: bool = False) -> None:
        super().__init__()
        if root:
            self.score_cut = lambda threshold: threshold**0.5

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"centerness": images}  # what raw outputs are called decides nothing

    def predict(self, inputs: torch.Tensor, *, max_detections: int = 10) -> list[Any]:
        return []  # only its signature is read

    def scored_boxes(self, raw: dict[str, torch.Tensor], size: Any) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(raw["centerness"])
        return torch.tensor([0.0, 0, 8, 8]).expand(count, 1, 1, 4), torch.full((count, 1, 1), 0.5)


def test_the_model_says_what_its_threshold_is_of() -> None:
    images = torch.rand(1, 3, 8, 8)
    for root, kept in ((False, 1), (True, 0)):
        found = DetectorWithDecoding(Centred(root), score_threshold=0.3, nms_threshold=0.5)(images)
        assert int((found["scores"] >= 0).sum()) == kept


def test_a_predict_without_thresholds_is_told_what_to_add() -> None:
    with pytest.raises(TypeError, match=r"Centred states no score_threshold and no nms_threshold.*FileDetector"):
        DetectorWithDecoding(Centred())
    model = Centred()
    model.thresholds = {"score_threshold": 0.1, "nms_threshold": 0.5}  # type: ignore[assignment]
    assert DetectorWithDecoding(model).options["max_detections"] == 10


def test_an_example_is_as_large_as_the_model_says() -> None:
    model = nn.Conv2d(3, 3, 1)
    assert _roomy(model, torch.rand(2, 3, 16, 40)).shape == (2, 3, 16, 40)
    model.least_side = 32  # type: ignore[assignment]
    assert _roomy(model, torch.rand(2, 3, 16, 40)).shape == (2, 3, 32, 40)


class Cells(nn.Module):
    """Two classes, and a box for each cell of 16 pixels: as much as a file of its own needs."""

    task = "detection"

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 16, stride=16)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"maps": 8 * self.conv(images)}

    def predict(
        self,
        inputs: torch.Tensor,
        *,
        score_threshold: float = 0.3,
        nms_threshold: float = 0.5,
        max_detections: int = 20,
    ) -> list[Any]:
        return []  # only its signature is read

    def scored_boxes(self, raw: dict[str, torch.Tensor], size: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out = raw["maps"].flatten(2).mT  # (N, P, 6)
        cells = grid_anchors(raw["maps"].shape[2:], 16, torch.tensor([[0.0, 0, 16, 16]]))
        return (cells + out[..., 2:])[:, :, None], out[..., :2].sigmoid()


@pytest.mark.parametrize("make", [Cells, pytest.param(lambda: build("yolov3")[0], marks=pytest.mark.slow, id="yolov3")])
def test_export_writes_both_files(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    report = export_model(make(), tmp_path, torch.rand(3, 3, 128, 128))
    assert report.detector is not None
    assert report.detector.gap < 1e-3
    assert "decoded" in str(report)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.detector.onnx", "export.json"}
