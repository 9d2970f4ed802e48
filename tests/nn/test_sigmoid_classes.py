"""A second stage of sigmoids: its loss by loops, its start, and torchvision's stage with it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from torchive.methods.detection.faster_rcnn import FasterRCNN
from torchive.methods.losses.focal_loss import FocalLoss
from torchive.nn.exchanged_heads import SigmoidRoIHeads, exchange_region_loss
from torchive.nn.regions import Regions, region_codes, region_loss
from torchive.nn.sigmoid_classes import SigmoidPredictor, SigmoidRegionLoss
from torchive.ops.boxes import decode_boxes

SMALL = {"backbone": "timm/test_efficientnet", "channels": 8, "hidden": 16, "num_classes": 3}
TARGETS = [
    {"boxes": torch.tensor([[8.0, 9, 60, 50], [40, 30, 90, 88]]), "labels": torch.tensor([1, 3])},
    {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
]


def torchvision_model(classes: int = 4) -> TorchvisionFasterRCNN:
    anchors = AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((0.5, 1.0, 2.0),) * 5)
    body = resnet_fpn_backbone(backbone_name="resnet18", weights=None, returned_layers=[1, 2, 3, 4])
    return TorchvisionFasterRCNN(body, classes, rpn_anchor_generator=anchors, min_size=96, max_size=128)


def test_the_loss_equals_loops(double) -> None:
    logits, deltas, codes = torch.randn(30, 4), torch.randn(30, 16), torch.randn(30, 4)
    labels = torch.randint(0, 4, (30,))
    score = place = 0.0
    for row, d, k, t in zip(logits.tolist(), deltas.tolist(), labels.tolist(), codes.tolist(), strict=True):
        for j in (1, 2, 3):
            p = 1 / (1 + math.exp(-row[j]))
            score -= math.log(p if j == k else 1 - p)
        if k:
            for x in (abs(u - v) for u, v in zip(d[4 * k : 4 * k + 4], t, strict=True)):
                place += x * x * 4.5 if x < 1 / 9 else x - 1 / 18
    found = SigmoidRegionLoss()(logits, deltas, labels, codes)
    assert [float(v) * 30 for v in found] == pytest.approx([score, place], rel=1e-12)


def test_boxes_cost_what_the_published_loss_says(double) -> None:
    corner = torch.rand(20, 2) * 50
    boxes = torch.cat([corner, corner + 5 + 30 * torch.rand(20, 2)], 1)
    labels = torch.arange(20) % 4
    truth = torch.where(labels[:, None] > 0, boxes + torch.randn(20, 4), 0)
    regions = Regions(boxes, torch.zeros(20, dtype=torch.int64), labels, labels, truth)
    logits, deltas = torch.randn(20, 4), torch.randn(20, 16)
    codes = region_codes(regions)
    assert (codes[labels == 0] == 0).all()
    back = decode_boxes(codes, boxes, (10.0, 10.0, 5.0, 5.0))
    assert torch.allclose(back[labels > 0], truth[labels > 0])
    plain, own = region_loss(logits, deltas, regions), SigmoidRegionLoss()(logits, deltas, labels, codes)
    assert torch.allclose(plain[1], own[1])
    assert not torch.allclose(plain[0], own[0])


def test_every_class_starts_at_the_prior() -> None:
    logits, deltas = SigmoidPredictor(64, 5)(torch.randn(7, 64, 1, 1))
    assert (logits[:, 0] == 0).all()
    assert (logits[:, 1:].sigmoid() - 0.001).abs().max() < 5e-4
    assert deltas.shape == (7, 24)
    assert deltas.abs().max() < 0.1
    with pytest.raises(ValueError, match="reduction none, got 'mean'"):
        SigmoidRegionLoss(nn.BCEWithLogitsLoss())


def test_in_the_faster_rcnn_of_this_package() -> None:
    net = FasterRCNN(**SMALL, classification="sigmoid", prior=0.3)
    images = [torch.rand(3, 96, 96), torch.rand(3, 64, 80)]
    losses = net.losses(images, TARGETS)
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    start = -math.log(0.7) * 3  # almost all regions are background
    assert float(losses["loss_classifier"].detach()) == pytest.approx(start, rel=0.2)
    with torch.no_grad():
        raw = net.eval()(images)
        found = net.predict(images, score_threshold=0.0)
    best = raw["class_logits"][0, :, 1:].sigmoid().masked_fill(raw["proposal_scores"][0, :, None] < 0, -1).max()
    assert found[0].scores.max() == pytest.approx(float(best))
    assert set(found[0].labels.tolist()) <= {1, 2, 3}
    focal = FasterRCNN(**SMALL, classification="sigmoid", region_loss=SigmoidRegionLoss(FocalLoss(reduction="none")))
    assert float(focal.losses(images, TARGETS)["loss_classifier"].detach()) < 0.05
    with pytest.raises(ValueError, match="classification must be softmax or sigmoid, got 'tanh'"):
        FasterRCNN(**SMALL, classification="tanh")


def test_in_torchvisions_stage() -> None:
    """Predictions are those of its own code with sigmoids in the softmax's place; its losses are exchanged."""
    model = torchvision_model()
    exchange_region_loss(model.roi_heads, SigmoidRegionLoss(), SigmoidRoIHeads)
    model.roi_heads.box_predictor = SigmoidPredictor(1024, 3, prior=0.2)
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.5)
    images = [torch.rand(3, 96, 96), torch.rand(3, 80, 90)]
    losses = model.train()(images, [dict(t) for t in TARGETS])
    sum(losses.values()).backward()
    assert model.roi_heads.box_predictor.cls_score.weight.grad.abs().max() > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    stage = copy.deepcopy(model.roi_heads).eval()
    stage.score_thresh, stage.detections_per_img = 0.3, 40
    logits, deltas = torch.randn(50, 4), torch.randn(50, 16) * 0.1
    corner = torch.rand(50, 2) * 60
    proposals = [torch.cat([corner, corner + 10 + 20 * torch.rand(50, 2)], 1)]
    boxes, scores, labels = stage.postprocess_detections(logits, deltas, proposals, [(80, 90)])
    # a softmax over (0, log p / (1 - p)) is a sigmoid: torchvision's own code, class by class
    wanted = []
    for k in (1, 2, 3):
        pair = torch.stack([torch.zeros(50), logits[:, k]], 1)
        own = torch.cat([deltas[:, :4], deltas[:, 4 * k : 4 * k + 4]], 1)
        plain = super(SigmoidRoIHeads, stage).postprocess_detections(pair, own, proposals, [(80, 90)])
        wanted += [(float(s), k, *b.tolist()) for b, s in zip(plain[0][0], plain[1][0], strict=True)]
    wanted.sort(reverse=True)
    got = [(float(s), int(n), *b.tolist()) for b, s, n in zip(boxes[0], scores[0], labels[0], strict=True)]
    assert len(got) == 40
    for a, b in zip(got, wanted, strict=False):
        assert a == pytest.approx(b, abs=1e-4)

    with pytest.raises(TypeError, match="expected torchvision's RoIHeads, got Identity"):
        exchange_region_loss(nn.Identity(), SigmoidRegionLoss())
