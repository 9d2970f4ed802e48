"""EHSOD: what learns from which images, slow references, the reduction to Cascade R-CNN, and the ranking."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchive.methods.detection.ehsod import EHSOD
from torchive.methods.detection.ehsod.cam import box_loss, heat_map, image_loss, ranking
from torchive.methods.detection.ehsod.multiple_instances import (
    ImageHead,
    best_boxes,
    image_score_loss,
    image_scores,
    softmax_within,
)
from torchive.ops.images import scale_targets

SMALL = {
    "num_classes": 3,
    "backbone": "timm/test_efficientnet",
    "channels": 16,
    "hidden": 24,
    "anchor_sizes": [[8.0], [16.0], [32.0], [64.0], [128.0]],
    "before_nms": (100, 60),
    "after_nms": (60, 30),
    "rois_per_image": 32,
}


def scene(kinds: str) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images of 64 pixels, "f" with boxes, "w" with the labels of their image alone, "e" with boxes but no object."""
    targets = []
    for kind in kinds:
        boxes = torch.tensor([[4.0, 6, 30, 40], [20, 20, 60, 58]])
        labels = torch.tensor([1, 3])
        shown = torch.tensor([1.0, 0, 1])
        if kind == "e":
            boxes, labels, shown = boxes[:0], labels[:0], shown * 0
        if kind == "w":
            boxes, labels = boxes[:0], labels[:0]
        targets.append(
            {"boxes": boxes, "labels": labels, "has_boxes": torch.tensor(kind != "w"), "image_labels": shown}
        )
    return torch.rand(len(kinds), 3, 64, 64), targets


@pytest.mark.parametrize("kinds", ["ww", "ff", "fw", "ee", "e", "wfe"])
@pytest.mark.parametrize("mine", [False, True])
def test_every_mixture_has_a_finite_loss_that_reaches_the_trunk(kinds: str, mine: bool) -> None:
    torch.manual_seed(1)
    net = EHSOD(**SMALL, mine=mine)
    losses = net.losses(*scene(kinds))
    assert all(bool(value.isfinite()) for value in losses.values())
    sum(losses.values()).backward()
    trunk = [p.grad for p in net.backbone.parameters() if p.grad is not None]
    assert all(bool(grad.isfinite().all()) for grad in trunk)
    assert max(float(grad.abs().max()) for grad in trunk) > 0


def test_images_without_boxes_teach_no_box_and_no_class_of_a_box() -> None:
    net = EHSOD(**SMALL)
    sum(net.losses(*scene("ww")).values()).backward()
    own = {"predictor": net.boxes.stages, "rpn": net.rpn.head}
    for name, part in own.items():
        for key, parameter in part.named_parameters():
            if name == "rpn" or "box_predictor" in key:
                assert parameter.grad is None or not parameter.grad.any(), key
    for part in (net.cam, net.image_heads, net.backbone):
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in part.parameters())


def test_without_its_additions_it_is_cascade_rcnn() -> None:
    net = EHSOD(**SMALL, cam_weight=0.0, image_weight=0.0, rank_by="none")
    images, targets = scene("ff")
    torch.manual_seed(5)
    got = net.losses(images, targets)
    torch.manual_seed(5)
    x, sizes = net._batch(images)
    scaled = scale_targets(targets, sizes, [(64, 64)] * 2)
    maps = net.backbone(x)
    raw = net.rpn(maps)
    expected = net.rpn.losses(raw, maps, scaled, sizes)
    proposals = net.rpn.training_proposals(raw, maps, sizes)
    expected |= net.boxes.losses(partial(net._pool, maps), proposals, scaled, sizes)
    assert len(expected) == 8
    for name, value in expected.items():
        torch.testing.assert_close(got.pop(name), value, rtol=0, atol=0)
    assert all(float(value.detach()) == 0 for value in got.values())


def test_losses_equal_slow_references(record) -> None:
    """In float64, entry by entry: both losses of the maps, the shares of the proposals, and the loss of an image."""
    cams = [torch.randn(2, 3, 4, 5, dtype=torch.double), torch.randn(2, 3, 2, 3, dtype=torch.double)]
    present = torch.tensor([[1.0, 0, 1], [0, 1, 0]], dtype=torch.double)
    gaps = []
    total = 0.0
    for n in range(2):
        score = [sum(float(cam[n, c].sum()) / cam[n, c].numel() for cam in cams) / 2 for c in range(3)]
        norm = math.log(sum(math.exp(s) for s in score))
        total -= sum(float(present[n, c]) * (score[c] - norm) for c in range(3)) / float(present[n].sum()) / 2
    gaps.append(abs(float(image_loss(cams, present)) - total))

    targets = [
        {"boxes": torch.tensor([[1.0, 2, 9, 11], [6, 0, 20, 7]], dtype=torch.double), "labels": torch.tensor([2, 3])},
        {"boxes": torch.zeros(0, 4, dtype=torch.double), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    levels = []
    for cam, stride in zip(cams, (4, 8), strict=True):
        entries = []
        for n, target in enumerate(targets):
            for c in range(3):
                for i in range(cam.shape[2]):
                    for j in range(cam.shape[3]):
                        y, x = (i + 0.5) * stride, (j + 0.5) * stride
                        truth = any(
                            label - 1 == c and x0 <= x < x1 and y0 <= y < y1
                            for (x0, y0, x1, y1), label in zip(
                                target["boxes"].tolist(), target["labels"].tolist(), strict=True
                            )
                        )
                        p = 1 / (1 + math.exp(-float(cam[n, c, i, j])))
                        entries.append(-math.log(p if truth else 1 - p))
        levels.append(sum(entries) / len(entries))
    gaps.append(abs(float(box_loss(cams, targets, (4, 8))) - sum(levels) / 2))

    head = ImageHead(6, 3).double()
    features, image = torch.randn(7, 6, dtype=torch.double), torch.tensor([0, 1, 0, 1, 1, 0, 1])
    shares = head(features, image, 2)
    which, where = head.classify(features).detach(), head.detect(features).detach()
    shares = shares.detach()
    for r in range(7):
        for c in range(3):
            same = [q for q in range(7) if image[q] == image[r]]
            one = math.exp(which[r, c]) / sum(math.exp(which[r, k]) for k in range(3))
            other = math.exp(where[r, c]) / sum(math.exp(where[q, c]) for q in same)
            gaps.append(abs(float(shares[r, c]) - one * other))
    scores = image_scores(shares, image, 2)
    expected = F.binary_cross_entropy(scores.float().clamp(1e-6, 1 - 1e-6), present.float())
    assert abs(float(image_score_loss(scores, present)) - float(expected)) < 1e-6
    assert max(gaps) < 1e-12
    record("ehsod", "referenced", largest_difference=max(gaps), dtype="float64", what="the maps' losses and the shares")
    record("ehsod", "matched", impossible="the paper promised a release, none was found, and no port of it")


def test_algebra_of_the_shares() -> None:
    head = ImageHead(6, 4)
    features, image = torch.randn(9, 6), torch.tensor([0] * 4 + [1] * 5)
    where = softmax_within(head.detect(features), image, 2)
    torch.testing.assert_close(image_scores(where, image, 2), torch.ones(2, 4))
    torch.testing.assert_close(head.classify(features).softmax(1).sum(1), torch.ones(9))
    scores = image_scores(head(features, image, 2), image, 2)
    assert scores.min() >= 0
    assert scores.max() <= 1
    one = head(features[:1], image[:1], 1)
    torch.testing.assert_close(one, head.classify(features[:1]).softmax(1))
    shares = torch.tensor([[0.1, 0.7, 0.0], [0.3, 0.2, 0.0], [0.0, 0.0, 0.9]])
    boxes = torch.arange(12.0).view(3, 4)
    found = best_boxes(shares, boxes, torch.tensor([0, 0, 1]), torch.tensor([[1, 1, 0], [0, 0, 1], [1, 0, 0.0]]))
    assert [t["labels"].tolist() for t in found] == [[1, 2], [3], []]
    assert [t["boxes"][:, 0].tolist() for t in found] == [[4, 0], [8], []]


def test_ranking_by_class_activation() -> None:
    objectness = torch.randn(2, 2 * (12 + 2)) * 8
    cams = [torch.full((2, 3, 3, 4), -1.0), torch.full((2, 3, 1, 2), -1.0)]
    for rule in ("product", "sum"):
        ranked = ranking(objectness, cams, 2, rule)
        assert torch.equal(ranked.argsort(1), objectness.argsort(1)), f"{rule}: a constant changes no order"
    cams[0][0, 1, 2, 3] = 5.0  # the last cell of the first level
    product = ranking(objectness, cams, 2, "product")
    lifted = torch.nonzero((product - ranking(objectness, [c * 0 - 1.0 for c in cams], 2)).abs() > 1e-4)
    assert lifted.tolist() == [[0, 22], [0, 23]]
    p, q = objectness.double().sigmoid(), torch.full_like(objectness, -1.0, dtype=torch.double).sigmoid()
    q[0, 22:24] = torch.tensor(5.0, dtype=torch.double).sigmoid()
    torch.testing.assert_close(product.double().sigmoid(), p * q, rtol=1e-4, atol=1e-9)
    assert ranking(torch.tensor([[400.0, -400]]), [torch.full((1, 1, 1, 2), 400.0)], 1).isfinite().all()


def test_heat_maps_shrink_to_the_middle() -> None:
    target = {"boxes": torch.tensor([[0.0, 0, 32, 32]]), "labels": torch.tensor([2])}
    whole, middle = (heat_map(target, (4, 6), 8, 2, ratio) for ratio in (1.0, 0.5))
    assert whole[0].sum() == 0
    assert whole[1, :, :4].all()
    assert whole[1].sum() == 16
    assert middle[1].nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be >= 1"),
        ({"rank_by": "max"}, "rank_by product, sum or none"),
        ({"centre_ratio": 0}, "centre_ratio above 0"),
        ({"stages": 4}, "stages must lie in 1 to 3"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EHSOD(**{**SMALL, **options})
    images, targets = scene("f")
    targets[0]["image_labels"] = torch.ones(5)
    with pytest.raises(ValueError, match="image_labels must have the shape"):
        EHSOD(**SMALL).losses(images, targets)
