"""FCOS's shared parts against torchvision's on copied weights, against loops in float64, and their laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.fcos import FCOSHead as TorchvisionHead
from torchvision.ops import generalized_box_iou

from torchive.nn.fcos import FCOSHead, fcos_detections, fcos_loss, interest_of, lay_points, match_points
from torchive.ops.points import (
    assign_points,
    boxes_of,
    centerness_of,
    centres_of_mass,
    distance_giou,
    distances_of,
    grid_points,
)

STRIDES = (8, 16, 32, 64, 128)


class _Maps(torch.nn.Module):
    out_channels = 256


def _boxes(count: int, size: float, generator: torch.Generator) -> Tensor:
    centre, side = size * torch.rand(count, 2, generator=generator), 4 * 60 ** torch.rand(count, 2, generator=generator)
    return torch.cat([(centre - side / 2).clamp(0, size - 1), (centre + side / 2).clamp(1, size)], 1).round() + 0.25


def test_equals_torchvisions(scenes_of_maps: tuple[FCOS, list[Tensor], list[dict[str, Tensor]]]) -> None:
    """Head, assignment, loss and detections, with its points on the corners of the cells."""
    theirs, maps, targets = scenes_of_maps
    ours = FCOSHead(256, 4, levels=5)
    pairs = (
        (theirs.head.classification_head.conv, ours.class_tower),
        (theirs.head.classification_head.cls_logits, ours.logits),
        (theirs.head.regression_head.conv, ours.box_tower),
        (theirs.head.regression_head.bbox_reg, ours.distances),
        (theirs.head.regression_head.bbox_ctrness, ours.centerness),
    )
    for old, new in pairs:
        new.load_state_dict(old.state_dict())
    with torch.no_grad():
        expected = theirs.head(maps)
        raw, towers = ours(maps)
    for key, name in (("logits", "cls_logits"), ("distances", "bbox_regression")):
        assert torch.allclose(raw[key], expected[name], atol=1e-5)
    assert torch.allclose(raw["centerness"], expected["bbox_ctrness"][..., 0], atol=1e-5)
    assert [t.shape for t in towers] == [m.shape for m in maps]

    raw = {"logits": expected["cls_logits"], "distances": expected["bbox_regression"]}
    raw["centerness"] = expected["bbox_ctrness"][..., 0]
    raw |= lay_points(maps, STRIDES)
    raw["points"] = raw["points"] - raw["strides"][:, None] / 2  # torchvision's
    images = torch.zeros(2, 3, 256, 256)
    shapes = type("Images", (), {"tensors": images, "image_sizes": [(256, 256)] * 2})
    anchors = theirs.anchor_generator(shapes, maps)
    counts = [m.shape[2] * m.shape[3] for m in maps]
    wanted = theirs.compute_loss(
        [{"boxes": t["boxes"], "labels": t["labels"] - 1} for t in targets], expected, anchors, counts
    )
    boxes = [t["boxes"] for t in targets]
    match = match_points(raw, interest_of(STRIDES), boxes)
    assert int((match >= 0).sum()) > 40
    found = fcos_loss(raw, match, torch.cat(boxes), torch.cat([t["labels"] for t in targets]), weighted=False)
    names = {"classification": "classification", "localisation": "bbox_regression", "centerness": "bbox_ctrness"}
    for key, name in names.items():
        assert float(found[key]) == pytest.approx(float(wanted[name]), rel=1e-5)

    split = {key: list(value.split(counts, 1)) for key, value in expected.items()}
    theirs.score_thresh, theirs.topk_candidates = 0.4, 50
    for one, other in zip(
        theirs.postprocess_detections(split, [list(a.split(counts)) for a in anchors], [(200, 256)] * 2),
        fcos_detections(raw, [(200, 256)] * 2, score_threshold=0.16, candidates=50),
        strict=True,
    ):
        real = (one["boxes"][:, 2:] - one["boxes"][:, :2]).amin(1) >= 1e-2  # it keeps those without area
        assert len(other[1]) > 10
        assert torch.allclose(other[0].boxes[: real.sum()], one["boxes"][real], atol=1e-3)
        assert torch.equal(other[0].labels[: real.sum()] - 1, one["labels"][real])
        assert torch.allclose(other[0].scores[: real.sum()], one["scores"][real], atol=1e-6)


@pytest.fixture
def scenes_of_maps() -> tuple[FCOS, list[Tensor], list[dict[str, Tensor]]]:
    """torchvision's detector with scores that vary, maps of a 256-pixel image, and 30 boxes in each of two."""
    g = torch.Generator().manual_seed(1)
    theirs = FCOS(_Maps(), 4, anchor_generator=AnchorGenerator(tuple((s,) for s in STRIDES), ((1.0,),) * 5))
    assert isinstance(theirs.head, TorchvisionHead)
    with torch.no_grad():
        for parameter in theirs.head.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=g))
        theirs.head.classification_head.cls_logits.bias.zero_()
        theirs.head.regression_head.bbox_reg.bias.fill_(2.0)
    maps = [torch.randn(2, 256, 256 // s, 256 // s, generator=g) for s in STRIDES]
    targets = [{"boxes": _boxes(30, 256, g), "labels": torch.randint(1, 5, (30,), generator=g)} for _ in range(2)]
    return theirs, maps, targets


def _slow_match(
    points: list, strides: list, sizes: list, boxes: list, radius: float | None, centres: list | None
) -> list[int]:
    """The rules of section 3.2 and of centre sampling, pair by pair."""
    found = []
    for (x, y), stride, (low, high) in zip(points, strides, sizes, strict=True):
        best, smallest = -1, math.inf
        for k, (x0, y0, x1, y1) in enumerate(boxes):
            sides = [x - x0, y - y0, x1 - x, y1 - y]
            cx, cy = ((x0 + x1) / 2, (y0 + y1) / 2) if centres is None else centres[k]
            near = radius is None or (abs(x - cx) < radius * stride and abs(y - cy) < radius * stride)
            if min(sides) > 0 and low <= max(sides) <= high and near and (x1 - x0) * (y1 - y0) < smallest:
                best, smallest = k, (x1 - x0) * (y1 - y0)
        found.append(best)
    return found


@pytest.mark.parametrize("radius", [1.5, None])
@pytest.mark.parametrize("moved", [False, True])
def test_assignment_and_loss_equal_loops(radius: float | None, moved: bool) -> None:
    g = torch.Generator().manual_seed(2)
    maps = [torch.zeros(1, 1, -(-96 // s), -(-128 // s), dtype=torch.float64) for s in STRIDES]
    raw = lay_points(maps, STRIDES)
    count, classes = len(raw["points"]), 3
    interest = interest_of(STRIDES, (16, 32, 64, 96))
    boxes = [_boxes(12, 96, g).double(), torch.zeros(0, 4, dtype=torch.float64), _boxes(5, 96, g).double()]
    centres = [(b[:, :2] + 2 * b[:, 2:]) / 3 for b in boxes] if moved else None
    labels = torch.randint(1, classes + 1, (17,), generator=g)
    raw |= {
        "logits": torch.randn(3, count, classes, generator=g, dtype=torch.float64),
        "distances": torch.rand(3, count, 4, generator=g, dtype=torch.float64) * 3,
        "centerness": torch.randn(3, count, generator=g, dtype=torch.float64),
    }
    match = match_points(raw, interest, boxes, radius=radius, centres=centres)
    start = 0
    total = {"classification": 0.0, "localisation": 0.0, "centerness": 0.0}
    mass = positives = 0.0
    every = torch.cat(boxes).tolist()
    for k, box in enumerate(boxes):
        own = _slow_match(
            raw["points"].tolist(),
            raw["strides"].tolist(),
            interest.double()[raw["levels"]].tolist(),
            box.tolist(),
            radius,
            centres[k].tolist() if centres else None,
        )
        assert match[k].tolist() == [r + start if r >= 0 else -1 for r in own]
        start += len(box)
        for place, row in enumerate(match[k].tolist()):
            for c in range(classes):
                p = 1 / (1 + math.exp(-float(raw["logits"][k, place, c])))
                hit = row >= 0 and int(labels[row]) == c + 1
                total["classification"] -= 0.25 * (1 - p) ** 2 * math.log(p) if hit else 0.75 * p**2 * math.log(1 - p)
            if row < 0:
                continue
            (x, y), stride = raw["points"][place].tolist(), float(raw["strides"][place])
            x0, y0, x1, y1 = every[row]
            left, top, right, bottom = x - x0, y - y0, x1 - x, y1 - y
            central = math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
            d = (raw["distances"][k, place] * stride).tolist()
            guess = torch.tensor([[x - d[0], y - d[1], x + d[2], y + d[3]]], dtype=torch.float64)
            giou = float(generalized_box_iou(guess, torch.tensor([every[row]], dtype=torch.float64)))
            q = 1 / (1 + math.exp(-float(raw["centerness"][k, place])))
            total["localisation"] += (1 - giou) * central
            total["centerness"] -= central * math.log(q) + (1 - central) * math.log(1 - q)
            mass, positives = mass + central, positives + 1
    assert positives > 20
    total = {
        "classification": total["classification"] / positives,
        "localisation": total["localisation"] / mass,
        "centerness": total["centerness"] / positives,
    }
    found = fcos_loss(raw, match, torch.cat(boxes), labels)
    assert {key: float(v) for key, v in found.items()} == pytest.approx(total, rel=1e-7)  # torchvision's GIoU adds 1e-7


def test_points_distances_and_overlap() -> None:
    points = grid_points((3, 4), 8, torch.zeros(()))
    assert points[0].tolist() == [4, 4]
    assert points[-1].tolist() == [28, 20]
    boxes = torch.tensor([[2.0, 1, 30, 21]]).expand(12, 4)
    sides = distances_of(boxes, points)
    assert torch.equal(boxes_of(sides, points), boxes)
    assert centerness_of(torch.tensor([[3.0, 5, 3, 5], [1.0, 2, 4, 2]])).tolist() == [1, 0.5]
    same, generalised = distance_giou(sides, sides)
    assert torch.equal(same, torch.ones(12))
    assert torch.equal(generalised, torch.ones(12))
    nothing = distance_giou(torch.zeros(1, 4), torch.ones(1, 4))
    assert [float(v) for v in nothing] == [0, 0]
    masks = torch.zeros(2, 6, 8, dtype=torch.uint8)
    masks[0, 2:4, 1:6] = 1
    assert centres_of_mass(masks, torch.tensor([[0.0, 0, 8, 6], [1.0, 1, 3, 5]])).tolist() == [[3, 2.5], [2, 3]]


def test_centres_of_mass_are_the_mean_of_all_pixels() -> None:
    """Pixels anywhere, outside the boxes, too, of any value and type."""
    g = torch.Generator().manual_seed(0)
    shapes = torch.rand(7, 30, 41, generator=g) < torch.tensor([0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 1.0]).view(-1, 1, 1)
    boxes = torch.rand(7, 4, generator=g) * 9
    expected = (boxes[:, :2] + boxes[:, 2:]) / 2
    for k, shape in enumerate(shapes):
        y, x = torch.nonzero(shape, as_tuple=True)
        if len(x):
            expected[k] = torch.stack([x.double().mean(), y.double().mean()])
    for masks in (shapes, shapes.to(torch.uint8) * 255, shapes * torch.linspace(0.1, 2, 41)):
        assert (centres_of_mass(masks, boxes) - expected).abs().max() < 1e-4
    assert centres_of_mass(shapes[:0], boxes[:0]).shape == (0, 2)


def test_many_boxes_are_assigned_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(3)
    raw = lay_points([torch.zeros(1, 1, -(-128 // s), -(-128 // s)) for s in STRIDES], STRIDES)
    sizes = interest_of(STRIDES)[raw["levels"]]
    boxes = _boxes(1000, 128, g)
    whole = assign_points(raw["points"], raw["strides"], sizes, boxes)
    monkeypatch.setattr("torchive.ops.points._PAIRS", 7000)
    assert torch.equal(assign_points(raw["points"], raw["strides"], sizes, boxes), whole)
    assert int((whole >= 0).sum()) > 100


def test_sizes_of_interest() -> None:
    assert interest_of(STRIDES).tolist() == [[0, 64], [64, 128], [128, 256], [256, 512], [512, math.inf]]
    with pytest.raises(ValueError, match="expected 4 growing sizes of interest, one fewer than maps, got"):
        interest_of(STRIDES, (64, 32, 128, 256))
    with pytest.raises(ValueError, match="expected maps whose strides grow from one to the next, got strides"):
        interest_of((16, 16, 32))
