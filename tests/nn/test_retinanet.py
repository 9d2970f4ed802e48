"""RetinaNet: torchvision's on copied weights, a slow float64 reference, empty and crowded images, the contract."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from tests.nn.torchvisions import Named
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator

import torchive.testing
from torchive.nn.retinanet import RetinaNet, dense_loss
from torchive.ops.matching import match_anchors

SMALL = {"backbone": "timm/test_efficientnet", "channels": 8, "num_classes": 3}


def pair() -> tuple[RetinaNet, TorchvisionRetinaNet]:
    """Ours with torchvision's loss and normaliser, and torchvision's over the same backbone and weights."""
    sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
    ours = RetinaNet(**{**SMALL, "channels": 16}, localisation_loss=nn.L1Loss(reduction="none"), normaliser="image")
    for p in ours.head.parameters():
        nn.init.normal_(p, std=0.05)
    theirs = TorchvisionRetinaNet(
        Named(ours.backbone, 16),
        3,
        min_size=256,
        max_size=1000,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        detections_per_img=100,
    )
    theirs.head.load_state_dict(ours.head.state_dict())
    return ours, theirs


def test_equals_torchvision_on_copied_weights() -> None:
    """Losses, gradients and detections; theirs counts labels from 0."""
    ours, theirs = pair()
    ours.eval(), theirs.backbone.eval()
    images = [torch.rand(3, 256, 384), torch.rand(3, 256, 256)]
    targets = [
        {"boxes": torch.tensor([[20.0, 30, 200, 220], [150, 10, 300, 90]]), "labels": torch.tensor([1, 3])},
        {"boxes": torch.tensor([[101.0, 97, 133, 158]]), "labels": torch.tensor([2])},
    ]
    got = ours.losses(images, targets)
    theirs.train()
    theirs.backbone.eval()
    expected = theirs(images, [{**t, "labels": t["labels"] - 1} for t in targets])
    torch.testing.assert_close(got["classification"], expected["classification"], rtol=1e-5, atol=0)
    torch.testing.assert_close(got["localisation"], expected["bbox_regression"], rtol=1e-5, atol=0)
    sum(got.values()).backward()
    mine = [p.grad.clone() for p in ours.head.parameters()]
    theirs.zero_grad()
    sum(expected.values()).backward()
    for a, b in zip(mine, theirs.head.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-3, atol=1e-4 * float(b.grad.abs().max()))
    with torch.no_grad():
        for found, wanted in zip(ours.predict(images), theirs.eval()(images), strict=True):
            assert len(found) == 100
            torch.testing.assert_close(found.boxes, wanted["boxes"], rtol=1e-4, atol=1e-2)
            torch.testing.assert_close(found.scores, wanted["scores"], rtol=1e-4, atol=1e-5)
            assert torch.equal(found.labels, wanted["labels"] + 1)


def slow_loss(raw: dict[str, Tensor], boxes: list[list], labels: list[list]) -> tuple[float, float]:
    """The paper's rules anchor by anchor: overlaps, the best of each box, focal loss, smooth L1, one normaliser."""

    def overlap(a: list[float], b: list[float]) -> float:
        w, h = (max(min(a[k + 2], b[k + 2]) - max(a[k], b[k]), 0) for k in (0, 1))
        area = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
        return w * h / (sum(area) - w * h)

    score = place = 0.0
    positives = 0
    for n, (own, names) in enumerate(zip(boxes, labels, strict=True)):
        table = [[overlap(a, b) for b in own] for a in raw["anchors"].tolist()]
        best = [max(row[g] for row in table) for g in range(len(own))]
        for row, a, z, d in zip(
            table, raw["anchors"].tolist(), raw["logits"][n].tolist(), raw["deltas"][n].tolist(), strict=True
        ):
            value = max(row, default=0.0)
            match = row.index(value) if row else -1
            good = value >= 0.5 or any(row[g] == best[g] for g in range(len(own)))
            if not good and value >= 0.4:
                continue
            for k, x in enumerate(z):
                p = 1 / (1 + math.exp(-x))
                if good and names[match] == k + 1:
                    score -= 0.25 * (1 - p) ** 2 * math.log(p)
                else:
                    score -= 0.75 * p**2 * math.log(1 - p)
            if good:
                positives += 1
                b = own[match]
                aw, ah, bw, bh = a[2] - a[0], a[3] - a[1], b[2] - b[0], b[3] - b[1]
                code = [(b[0] + bw / 2 - a[0] - aw / 2) / aw, (b[1] + bh / 2 - a[1] - ah / 2) / ah]
                code += [math.log(bw / aw), math.log(bh / ah)]
                for x in (abs(u - v) for u, v in zip(d, code, strict=True)):
                    place += x * x / 0.22 if x < 0.11 else x - 0.055
    return score / max(positives, 1), place / max(positives, 1)


def test_loss_equals_slow_reference() -> None:
    corner = torch.rand(60, 2, dtype=torch.double) * 40
    anchors = torch.cat([corner, corner + 8 + 16 * torch.rand(60, 2, dtype=torch.double)], 1)
    raw = {
        "anchors": anchors,
        "logits": torch.randn(3, 60, 2, dtype=torch.double),
        "deltas": torch.randn(3, 60, 4, dtype=torch.double) * 0.5,
    }
    start = torch.rand(5, 2, dtype=torch.double) * 40
    boxes = torch.cat([start, start + 8 + 16 * torch.rand(5, 2, dtype=torch.double)], 1)
    targets = [
        {"boxes": boxes[:3], "labels": torch.tensor([1, 2, 1])},
        {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.int64)},
        {"boxes": boxes[3:], "labels": torch.tensor([2, 1])},
    ]
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    matches = torch.stack([match_anchors(anchors, t["boxes"], matcher) for t in targets])
    assert {-2, -1, 0, 1, 2} <= set(matches.flatten().tolist())
    found = dense_loss(raw, matches, targets)
    wanted = slow_loss(raw, [t["boxes"].tolist() for t in targets], [t["labels"].tolist() for t in targets])
    assert float(found["classification"]) == pytest.approx(wanted[0], rel=1e-12)
    assert float(found["localisation"]) == pytest.approx(wanted[1], rel=1e-12)
    own = {**raw, "anchors": anchors.expand(3, -1, -1)}  # each image's own anchors
    assert dense_loss(own, matches, targets) == found


def test_without_positives_the_negatives_alone_count() -> None:
    net = RetinaNet(**SMALL)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    for normaliser in ("batch", "image"):
        net.normaliser = normaliser
        losses = net.losses(torch.rand(2, 3, 64, 64), [empty, empty])
        assert float(losses["localisation"].detach()) == 0
        assert float(losses["classification"].detach()) > 0
        sum(losses.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("side", [1.0, 30.0])
def test_a_thousand_objects_and_objects_of_one_pixel(side: float) -> None:
    net = RetinaNet(**SMALL)
    corner = torch.rand(1000, 2) * 60
    crowd = {"boxes": torch.cat([corner, corner + side], 1), "labels": torch.randint(1, 4, (1000,))}
    losses = net.losses([torch.rand(3, 96, 64), torch.rand(3, 50, 90)], [crowd, crowd])
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_an_exchanged_loss_gets_what_it_asks_for() -> None:
    class Wants(nn.Module):
        reduction = "none"

        def __init__(self, takes_ious: bool) -> None:
            super().__init__()
            self.takes_ious, self.given = takes_ious, []

        def forward(self, prediction: Tensor, target: Tensor, ious: Tensor | None = None) -> Tensor:
            assert prediction.shape == target.shape
            self.given.append(ious)
            return (prediction - target).abs()

    target = {"boxes": torch.tensor([[4.0, 4, 40, 30]]), "labels": torch.tensor([2])}
    for takes in (True, False):
        losses = [Wants(takes), Wants(takes)]
        net = RetinaNet(**SMALL, classification_loss=losses[0], localisation_loss=losses[1])
        net.losses([torch.rand(3, 64, 64)], [target])
        assert all((loss.given[0] is not None) == takes for loss in losses)
        if takes:
            every, own = losses[0].given[0], losses[1].given[0]
            assert torch.equal(every[every > 0].sort().values, own[own > 0].sort().values)
            assert not own.requires_grad
    with pytest.raises(ValueError, match="reduction none, got 'mean'"):
        RetinaNet(**SMALL, localisation_loss=nn.L1Loss())
    with pytest.raises(ValueError, match="normaliser must be batch or image, got 'sample'"):
        RetinaNet(**SMALL, normaliser="sample")
    with pytest.raises(ValueError, match="anchor_sizes must have 5 lists"):
        RetinaNet(**SMALL, anchor_sizes=[[8], [16]])


CONTRACT = {
    "args": SMALL,
    "images": [[3, 64, 64], [3, 64, 80]],
    "target": {"kind": "boxes", "num_classes": 3, "masks": False},
    "export_inputs": [[1, 3, 64, 64]],
}


@pytest.mark.parametrize("name", ["batch_independence", "parameter_gradients", "empty_targets", "bfloat16"])
def test_contract_of_a_detector(name: str) -> None:
    torchive.testing.check(RetinaNet, kind="system", only=[name], **CONTRACT)


@pytest.mark.slow
def test_the_whole_contract_of_a_detector() -> None:
    torchive.testing.check(RetinaNet, kind="system", **CONTRACT)


def test_any_backbone_and_parameters_of_the_published_network() -> None:
    with torch.device("meta"):
        ours = RetinaNet(num_classes=91)
        theirs = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    count = [sum(p.numel() for p in m.parameters()) for m in (ours, theirs)]
    assert count == [34068119, 34068119]
    for name in ("torchvision/mobilenet_v3_small", "timm/mobilenetv3_small_100"):
        net = RetinaNet(backbone=name, channels=8, num_classes=2).eval()
        assert net.predict([torch.rand(3, 70, 90)])[0].boxes.shape[1] == 4
