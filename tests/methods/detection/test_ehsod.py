"""EHSOD: what learns from which images, slow references, the reduction to Cascade R-CNN, and the ranking."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchive.methods.detection.ehsod import EHSOD
from torchive.methods.detection.ehsod.cam import box_loss, cells_inside, heat_map, image_loss, ranking
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
    whole = torch.tensor([[16.0, 20]] * 2)
    gaps.append(abs(float(image_loss(cams, present, (4, 8), whole)) - total))

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
    gaps.append(abs(float(box_loss(cams, targets, (4, 8), whole)) - sum(levels) / 2))

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
    cams = [torch.full((2, 3, 3, 4), -1.0), torch.full((2, 3, 1, 2), -1.0)]
    for seed in range(60):
        objectness = torch.randn(2, 2 * (12 + 2), generator=torch.Generator().manual_seed(seed)) * 8
        for rule in ("product", "sum", "none"):
            ranked = ranking(objectness, cams, 2, rule)
            assert torch.equal(ranked.argsort(1), objectness.argsort(1)), f"{rule}, {seed}: a constant changes no order"
    cams[0][0, 1, 2, 3] = 5.0  # the last cell of the first level
    product = ranking(objectness, cams, 2, "product")
    lifted = torch.nonzero((product - ranking(objectness, [c * 0 - 1.0 for c in cams], 2)).abs() > 1e-4)
    assert lifted.tolist() == [[0, 22], [0, 23]]
    p, q = objectness.double().sigmoid(), torch.full_like(objectness, -1.0, dtype=torch.double).sigmoid()
    q[0, 22:24] = torch.tensor(5.0, dtype=torch.double).sigmoid()
    torch.testing.assert_close(product.sigmoid(), p * q, rtol=1e-9, atol=0)
    total = ranking(objectness, cams, 2, "sum")
    torch.testing.assert_close(total.sigmoid(), (p + q) / 2, rtol=1e-9, atol=0)
    for rule in ("product", "sum"):
        for value in (900.0, -900.0):
            ends = ranking(torch.tensor([[900.0, -900]]), [torch.full((1, 1, 1, 2), value)], 1, rule)
            assert ends.isfinite().all(), (rule, value)


@pytest.mark.parametrize("level", [0, 1])
def test_the_strongest_cell_is_proposed_first(level: int) -> None:
    """All anchors alike but for one cell's class activation: its anchors lead, clipped to the image."""
    net = EHSOD(**SMALL).eval()
    for parameter in net.rpn.head.parameters():
        torch.nn.init.zeros_(parameter)
    row, column = 5, 2

    def lift(_module: object, _given: object, cams: list[Tensor]) -> list[Tensor]:
        cams = [torch.full_like(cam, -3.0) for cam in cams]
        cams[level][0, 1, row, column] = 4.0
        return cams

    net.cam.register_forward_hook(lift)
    with torch.no_grad():
        raw = net(torch.rand(1, 3, 64, 64))
    x, y = column * net.strides[level], row * net.strides[level]  # torchvision's anchors stand on corners
    first = raw["proposals"][0, 0]
    anchors = raw["anchors"][: 3 * (64 // net.strides[0]) ** 2]
    if level:
        anchors = raw["anchors"][len(anchors) : len(anchors) + 3 * (64 // net.strides[1]) ** 2]
    place = 3 * (row * (64 // net.strides[level]) + column)
    own = anchors[place : place + 3]
    torch.testing.assert_close((own[:, :2] + own[:, 2:]) / 2, torch.tensor([[x, y]] * 3).to(own), rtol=0, atol=1)
    assert (own.clamp(0, 64) - first).abs().amax(1).min() < 1e-4


def test_predictions_are_the_last_boxes_with_the_mean_of_the_stages() -> None:
    """Without the image-level heads: numbers that are none in them change nothing."""
    net = EHSOD(**SMALL).eval()
    images = torch.rand(2, 3, 64, 64)
    for t, stage in enumerate(net.boxes.stages):
        torch.nn.init.normal_(stage.box_predictor.bbox_pred.bias, std=1 + t)
        torch.nn.init.normal_(stage.box_predictor.cls_score.bias)
    for parameter in net.image_heads.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    with torch.no_grad():
        raw, maps = net(images), net.backbone(images)
        stages = net.boxes(partial(net._pool, maps), raw["proposals"], raw["sizes"])
        found = net.predict(images, score_threshold=-1.0, nms_threshold=1.0, max_detections=1000)
    mean = torch.stack([stages["stage_logits"][:, t] for t in range(3)]).sum(0) / 3
    last = stages["stage_boxes"][:, 2]
    assert (last - stages["stage_boxes"][:, 1]).abs().max() > 1
    for n, one in enumerate(found):
        there = (raw["proposal_scores"][n] >= 0) & ((last[n, :, 2:] - last[n, :, :2]) > 0).all(1)
        score = mean[n].softmax(1)[there, 1:]
        rows = torch.cat([last[n][there].repeat_interleave(3, 0), score.reshape(-1, 1)], 1)
        own = torch.cat([one.boxes, one.scores[:, None]], 1)
        assert len(own) == len(rows) > 30
        order = (rows[:, 4].argsort(descending=True), own[:, 4].argsort(descending=True))
        torch.testing.assert_close(own[order[1]][:, 4], rows[order[0]][:, 4])
        assert torch.cdist(own, rows, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max() < 1e-3


def test_a_mined_box_has_an_area() -> None:
    """A stage that moves every box out of the image leaves boxes without width, which are nobody's pseudo box."""
    net = EHSOD(**SMALL, mine=True)
    for stage in net.boxes.stages:
        torch.nn.init.zeros_(stage.box_predictor.bbox_pred.weight)
        stage.box_predictor.bbox_pred.bias.data = torch.tensor([3000.0, 0, 0, 0])
    losses = net.losses(*scene("ww"))
    assert all(bool(value.isfinite()) for value in losses.values()), losses
    boxes = torch.tensor([[0.0, 0, 0.5, 9], [64, 0, 64, 9], [2, 2, 3, 9]])
    shares, shown = torch.tensor([[0.6], [0.3], [0.1]]), torch.ones(1, 1)
    (found,) = best_boxes(shares, boxes, torch.zeros(3).long(), shown)
    assert found["boxes"].tolist() == [[2, 2, 3, 9]]
    (none,) = best_boxes(shares[:2], boxes[:2], torch.zeros(2).long(), shown)
    assert len(none["boxes"]) == len(none["labels"]) == 0


def test_the_padding_of_a_batch_says_nothing() -> None:
    """Cells outside an image count neither in its score nor in its heat map, and images count alike."""
    sizes = torch.tensor([[20.0, 33], [64, 64]])
    assert cells_inside((8, 8), 8, sizes).flatten(1).sum(1).tolist() == [3 * 5, 64]
    cams = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)]
    present = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    targets = [{"boxes": torch.tensor([[3.0, 2, 30, 19]]), "labels": torch.tensor([2])}] * 2
    alone = [[cams[0][:1, :, :3, :5], cams[1][:1, :, :2, :3]], [cam[1:] for cam in cams]]
    for kind in ("softmax", "sigmoid"):
        parts = [image_loss(alone[n], present[n : n + 1], (8, 16), sizes[n : n + 1], kind) for n in range(2)]
        torch.testing.assert_close(image_loss(cams, present, (8, 16), sizes, kind), sum(parts) / 2)
    parts = [box_loss(alone[n], targets[:1], (8, 16), sizes[n : n + 1]) for n in range(2)]
    torch.testing.assert_close(box_loss(cams, targets, (8, 16), sizes), sum(parts) / 2)

    net = EHSOD(**SMALL)
    found, two = [], torch.tensor([[64.0, 64], [32, 40]])
    for value in (-40.0, 40.0):

        def fill(_module: object, _given: object, cams: list[Tensor], value: float = value) -> list[Tensor]:
            classes = value * torch.arange(3.0)[:, None, None]
            inside = [cells_inside(c.shape[2:], k, two) for c, k in zip(cams, net.strides, strict=True)]
            return [torch.where(own, cam, classes) for own, cam in zip(inside, cams, strict=True)]

        handle = net.cam.register_forward_hook(fill)
        targets = scene("ff")[1]
        targets[1]["boxes"] = targets[1]["boxes"] / 2
        with torch.no_grad():
            torch.manual_seed(0)
            found.append(net.losses([torch.ones(3, 64, 64), torch.ones(3, 32, 40)], targets))
        handle.remove()
    for name in ("loss_cam_image", "loss_cam_box"):
        assert torch.equal(found[0][name], found[1][name]), name


def test_the_baseline_does_not_compute_what_it_does_not_use() -> None:
    def refuse(*_given: object) -> None:
        raise AssertionError("computed")

    images, targets = scene("fw")
    plain = {"cam_weight": 0.0, "image_weight": 0.0, "rank_by": "none"}
    net = EHSOD(**SMALL, **plain)
    net.cam.register_forward_hook(refuse)
    for head in net.image_heads:
        head.register_forward_hook(refuse)
    losses = net.losses(images, targets)
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg"} | {
        f"stage{t}.loss_{name}" for t in range(3) for name in ("classifier", "box_reg")
    }
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in net.parameters() if parameter.requires_grad)
    assert net.eval()(images).keys() == EHSOD(**SMALL).eval()(images).keys()
    for option in ({"cam_weight": 1.0}, {"image_weight": 1.0}, {"rank_by": "sum"}, {"mine": True}):
        other = EHSOD(**SMALL, **{**plain, **option})
        for part in (other.cam, *other.image_heads):
            part.register_forward_hook(refuse)
        with pytest.raises(AssertionError, match="computed"):
            other.losses(images, targets)


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
    images, targets = scene("fw")
    del targets[1]["image_labels"]
    with pytest.raises(ValueError, match=r"target 1 has neither boxes nor labels: expected image_labels \(3,\)"):
        EHSOD(**SMALL).losses(images, targets)
    images, targets = scene("f")
    targets[0]["image_labels"] = torch.ones(5)
    with pytest.raises(ValueError, match="image_labels must have the shape"):
        EHSOD(**SMALL).losses(images, targets)
