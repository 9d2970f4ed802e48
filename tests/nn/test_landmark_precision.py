"""Landmark similarity by hand, average precision against faster-coco-eval, and parts of the data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from torchive.nn.average_precision import Compared, average_precision
from torchive.nn.landmark_precision import by_part, landmark_precision, landmark_similarity
from torchive.structures import Detections
from torchive.structures.landmarks import DEEPFASHION2, LandmarkSpace

SPACE = LandmarkSpace((2, 3), ("bag", "hat"), (0.1, 0.2, 0.05, 0.1, 0.15))


def test_the_space_of_deepfashion2() -> None:
    assert DEEPFASHION2.total == len(DEEPFASHION2.sigmas) == 294
    assert len(DEEPFASHION2.names) == len(DEEPFASHION2.counts) == 13
    assert DEEPFASHION2.span(8) == slice(168, 182)  # trousers are the 169th to the 182nd
    with pytest.raises(ValueError, match="expected 5 sigmas above zero, got 1"):
        LandmarkSpace((2, 3), (), (0.1,))
    with pytest.raises(ValueError, match="none negative and one above zero"):
        LandmarkSpace((0, 0))


def test_similarity_equals_its_formula(record) -> None:
    found = torch.tensor([[[10.0, 10.0], [24.0, 33.0], [0.0, 0.0]]], dtype=torch.float64)
    truth = torch.tensor([[[13.0, 14.0, 2.0], [20.0, 30.0, 1.0], [90.0, 90.0, 0.0]]], dtype=torch.float64)
    area, box = torch.tensor([400.0]), torch.tensor([[0.0, 0.0, 20.0, 20.0]])
    sigmas = torch.tensor([0.1, 0.2, 0.3])
    first = math.exp(-25 / (2 * 400 * 0.04))
    second = math.exp(-25 / (2 * 400 * 0.16))
    got = landmark_similarity(found, truth, area, box, sigmas)
    visible = landmark_similarity(found, truth, area, box, sigmas, visible_only=True)
    gap = max(abs(got.item() - (first + second) / 2), abs(visible.item() - first))
    assert gap < 1e-7
    nothing = truth * torch.tensor([1.0, 1.0, 0.0])
    far = torch.tensor([[[-50.0, 0.0], [45.0, 10.0], [10.0, 10.0]]])  # 30 and 5 outside of (-20, -20, 40, 40), inside
    expected = (math.exp(-900 / 32) + math.exp(-25 / 128) + 1) / 3
    assert landmark_similarity(far, nothing, area, box, sigmas).item() == pytest.approx(expected, abs=1e-6)


def scene(count: int) -> tuple[list[Detections], list[dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(0)
    found, targets = [], []
    for _ in range(count):
        corner = torch.rand(3, 2, generator=g) * 60
        boxes = torch.cat([corner, corner + 20 + torch.rand(3, 2, generator=g) * 40], 1)
        labels = torch.randint(1, 3, (3,), generator=g)
        inside = boxes[:, None, :2] + torch.rand(3, 5, 2, generator=g) * (boxes[:, 2:] - boxes[:, :2])[:, None]
        marked = torch.randint(0, 3, (3, 5, 1), generator=g).float()
        own = torch.tensor([[True, True, False, False, False], [False, False, True, True, True]])[labels - 1]
        points = torch.cat([inside, marked], 2) * own[..., None] * (marked > 0)
        noise = torch.randn(6, 5, 2, generator=g) * torch.tensor([1.0, 4.0, 9.0, 20.0, 2.0, 5.0])[:, None, None]
        right = torch.rand(6, generator=g) < 0.85
        label = torch.where(right, labels.repeat(2), 3 - labels.repeat(2))
        one = Detections(
            boxes.repeat(2, 1) + torch.randn(6, 4, generator=g) * 3,
            label,
            torch.rand(6, generator=g),
            keypoints=points[..., :2].repeat(2, 1, 1) + noise,
        )
        found.append(one)
        targets.append(
            {
                "boxes": boxes,
                "labels": labels,
                "keypoints": points,
                "scale": torch.randint(1, 4, (3,), generator=g),
            }
        )
    return found, targets


def coco(found: list[Detections], targets: list[dict[str, Tensor]], kind: str, *, visible: bool = False) -> np.ndarray:
    """faster-coco-eval's first three figures; every object has all landmarks, those of other classes not marked."""
    from faster_coco_eval import COCO, COCOeval_faster

    annotations, results = [], []
    for k, (one, target) in enumerate(zip(found, targets, strict=True)):
        for row, label in enumerate(target["labels"].tolist()):
            x1, y1, x2, y2 = target["boxes"][row].tolist()
            points = target["keypoints"][row].clone()
            points[points[:, 2] <= int(visible)] = 0
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": k,
                    "category_id": label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                    "keypoints": points.flatten().tolist(),
                    "num_keypoints": int((points[:, 2] > 0).sum()),
                }
            )
        for row, label in enumerate(one.labels.tolist()):
            x1, y1, x2, y2 = one.boxes[row].tolist()
            points = torch.cat([one.keypoints[row], torch.ones(5, 1)], 1)
            result = {"image_id": k, "category_id": label, "score": float(one.scores[row])}
            if kind == "bbox":
                result["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            else:
                result["keypoints"] = points.flatten().tolist()
            results.append(result)
    images = [{"id": k, "width": 200, "height": 200} for k in range(len(found))]
    names = [str(k) for k in range(5)]
    categories = [{"id": k, "name": str(k), "keypoints": names, "skeleton": []} for k in (1, 2)]
    truth = COCO({"images": images, "annotations": annotations, "categories": categories})
    sigmas = np.array(SPACE.sigmas)
    score = COCOeval_faster(truth, truth.loadRes(results), kind, print_function=lambda *_: None, kpt_oks_sigmas=sigmas)
    score.run()
    return np.array(score.stats[:3])


@pytest.mark.parametrize("visible", [True, False])
def test_landmarks_equal_faster_coco_eval(visible: bool) -> None:
    found, targets = scene(12)
    got = landmark_precision(found, targets, SPACE, visible_only=visible)
    expected = coco(found, targets, "keypoints", visible=visible)
    assert 0.1 < got["map"] < 0.9
    np.testing.assert_allclose(list(got.values()), expected, atol=1e-6)


def test_boxes_equal_faster_coco_eval() -> None:
    found, targets = scene(12)
    figures = by_part(found, targets, SPACE)
    expected = coco(found, targets, "bbox")
    np.testing.assert_allclose([figures[f"box/{name}"] for name in ("map", "map_50", "map_75")], expected, atol=1e-6)
    assert {"visible/map/scale/small", "marked/map_50/scale/large", "box/map_75/scale/moderate"} <= set(figures)
    assert not any("mask" in name or "occlusion" in name for name in figures)


def test_parts_leave_the_other_objects_out() -> None:
    """What has another value is neither missed nor is its detection false."""
    found, targets = scene(2)
    for one, target in zip(found, targets, strict=True):
        target["scale"] = torch.tensor([1, 2, 2])
        one.keypoints[:] = target["keypoints"][..., :2].repeat(2, 1, 1)
        one.labels[:] = target["labels"].repeat(2)
        one.scores[:] = torch.tensor([0.9, 0.8, 0.7, 0.3, 0.2, 0.1])
        target["keypoints"][..., 2] = (target["keypoints"][..., :2].sum(-1) > 0) * 2.0
    whole = landmark_precision(found, targets, SPACE)
    part = landmark_precision(found, targets, SPACE, part=("scale", 1))
    assert whole["map"] == pytest.approx(1)
    assert part["map"] == pytest.approx(1)
    found[0].keypoints[0] += 500  # the one of scale 1 in the first image: its second detection finds it, later
    assert landmark_precision(found, targets, SPACE, part=("scale", 2))["map"] <= 1
    assert landmark_precision(found, targets, SPACE, part=("scale", 1))["map"] < 1
    assert landmark_precision(found, targets, SPACE, part=("scale", 3)) == {"map": -1, "map_50": -1, "map_75": -1}


def test_masks_and_what_is_refused() -> None:
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    whole, half = (x < 4) & (y < 4), (x < 4) & (y < 2)
    target = {
        "boxes": torch.tensor([[0.0, 0, 4, 4]]),
        "labels": torch.tensor([1]),
        "masks": whole[None].to(torch.uint8),
    }
    one = Detections(target["boxes"], target["labels"], torch.ones(1), masks=half[None])
    figures = by_part([one], [target])
    assert figures["box/map"] == pytest.approx(1)
    assert figures["mask/map_50"] == pytest.approx(1)  # 0.5 is enough for the first of ten thresholds
    assert figures["mask/map"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="expected a LandmarkSpace with sigmas, got none"):
        landmark_precision([one], [target], LandmarkSpace((2,)))
    with pytest.raises(ValueError, match="expected detections of 1 images, got 0"):
        landmark_precision([], [target], SPACE)
    with pytest.raises(ValueError, match="expected detections with keypoints, got None"):
        landmark_precision([one], [{**target, "keypoints": torch.ones(1, 5, 3)}], SPACE)


def test_precision_by_hand() -> None:
    """Three detections, right, wrong and right, of two objects: precision 1 up to recall 0.5, then 2 / 3."""
    similarity = torch.tensor([[0.8, 0.0], [0.7, 0.1], [0.0, 0.6]])
    image = Compared(similarity, torch.tensor([0.9, 0.8, 0.7]), torch.tensor([False, False]))
    got = average_precision([image], thresholds=[0.5])
    assert got.item() == pytest.approx((51 + 50 * 2 / 3) / 101)
    ignored = Compared(similarity, image.scores, torch.tensor([True, False]))
    # the first takes the ignored object and does not count; the second is left without one
    assert average_precision([ignored], thresholds=[0.5]).item() == pytest.approx(0.5)
    assert average_precision([], thresholds=[0.5]).item() == -1
