"""SSD: loss against a slow float64 reference, whole model against torchvision's, and the laws of its parts."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_iou

from torchive.methods.detection.ssd import SSD
from torchive.nn.multibox import multibox_loss
from torchive.ops.boxes import encode_boxes

SMALL = {"backbone": "timm/resnet18", "image_size": 64}


def slow_loss(
    logits: Tensor, deltas: Tensor, anchors: Tensor, matches: Tensor, boxes: Tensor, labels: Tensor, mode: str
):
    """Equations 1 to 3, default box by default box."""
    count = int((matches >= 0).sum())
    if count == 0:
        return 0.0, 0.0
    conf = loc = 0.0
    for n in range(len(logits)):
        costs = []
        positives = 0
        for a in range(len(anchors)):
            g = int(matches[n, a])
            z = logits[n, a].tolist()
            if mode == "softmax":
                label = 0 if g < 0 else int(labels[g])
                top = max(z)
                cost = top + math.log(sum(math.exp(v - top) for v in z)) - z[label]
            else:
                truth = [float(g >= 0 and int(labels[g]) == k + 1) for k in range(len(z))]
                cost = sum(math.log1p(math.exp(v)) - t * v for v, t in zip(z, truth, strict=True))
            if g < 0:
                costs.append(cost)
                continue
            positives += 1
            conf += cost
            code = encode_boxes(boxes[g], anchors[a], (10.0, 10.0, 5.0, 5.0))
            for x in (deltas[n, a] - code).tolist():
                loc += 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5
        conf += sum(sorted(costs, reverse=True)[: 3 * positives])
    return conf / count, loc / count


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_loss_equals_slow_reference(mode: str, record) -> None:
    outputs = 4 if mode == "softmax" else 3
    logits = torch.randn(3, 30, outputs, dtype=torch.double) * 2
    deltas = torch.randn(3, 30, 4, dtype=torch.double) * 3
    corner = torch.rand(36, 2, dtype=torch.double)
    both = torch.cat([corner, corner + 0.1 + torch.rand(36, 2, dtype=torch.double)], 1)
    anchors, boxes, labels = both[:30], both[30:], torch.tensor([1, 2, 3, 3, 2, 1])
    matches = torch.full((3, 30), -1)
    matches[0, [2, 5, 9]] = torch.tensor([0, 1, 1])
    matches[1, torch.arange(20)] = torch.arange(20) % 4 + 2  # more positives than a third: all negatives are kept
    got = multibox_loss(logits, deltas, anchors, matches, boxes, labels, mode=mode)
    conf, loc = slow_loss(logits, deltas, anchors, matches, boxes, labels, mode)
    gap = max(abs(float(got["classification"]) - conf), abs(float(got["localisation"]) - loc))
    assert gap < 1e-10
    if mode == "softmax":
        record("ssd", "referenced", largest_difference=gap, dtype="float64", what="loss with matching and mining")


@pytest.mark.parametrize("mining", [3.0, None])
def test_no_positive_gives_a_zero_loss_with_a_gradient(mining: float | None) -> None:
    net = SSD(num_classes=3, mining_ratio=mining, **SMALL)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = net.losses(torch.randn(2, 3, 64, 64), [empty, empty])
    assert all(float(v.detach()) == 0 for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in net.parameters())


def test_equals_torchvision_on_copied_weights(record) -> None:
    """Losses, their gradients, and detections of the whole SSD300 over VGG-16."""
    theirs = torchvision.models.detection.ssd300_vgg16(
        weights=None, weights_backbone=None, num_classes=4, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    ours = SSD(num_classes=3, default_box_set="torchvision")
    ours.load_state_dict(theirs.state_dict())
    images = [torch.randn(3, 240, 320), torch.randn(3, 300, 300)]
    targets = [
        {"boxes": torch.tensor([[20.0, 30, 200, 220], [150, 10, 300, 90]]), "labels": torch.tensor([1, 3])},
        {"boxes": torch.tensor([[101.0, 97, 133, 158]]), "labels": torch.tensor([2])},
    ]
    expected = theirs.train()(images, [dict(t) for t in targets])
    got = ours.losses(images, targets)
    pairs = {"classification": "classification", "localisation": "bbox_regression"}
    gaps = [float((got[a] - expected[b]).detach().abs() / expected[b].detach().abs()) for a, b in pairs.items()]
    sum(expected.values()).backward()
    sum(got.values()).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = float(q.grad.abs().max()) + 1e-12
        gap = float((p.grad - q.grad).abs().max()) / scale
        assert gap < 1e-3, (name, gap)
    with torch.no_grad():
        for found, wanted in zip(ours.eval().predict(images), theirs.eval()(images), strict=True):
            torch.testing.assert_close(found.boxes, wanted["boxes"], rtol=1e-4, atol=1e-2)
            torch.testing.assert_close(found.scores, wanted["scores"], rtol=1e-4, atol=1e-5)
            assert torch.equal(found.labels, wanted["labels"])
            gaps.append(float((found.boxes - wanted["boxes"]).abs().max()) / 300)
    assert max(gaps) < 1e-4, gaps
    record(
        "ssd",
        "matched",
        repository="pytorch/vision",
        commit=f"release {torchvision.__version__.split('+')[0]}",
        largest_difference=max(gaps),
        dtype="float32",
        what="relative: losses, gradients and detections of SSD300-VGG16",
    )


def test_torchvision_counts_positives_twice_where_negatives_run_out() -> None:
    """Why the loss is written here: with 3 positives of 5 boxes theirs adds the positives' loss once more."""
    theirs = torchvision.models.detection.ssd.SSD.compute_loss
    anchors = torch.tensor([[0.0, 0, 1, 1]]).repeat(5, 1)
    matches, boxes, labels = torch.tensor([[0, 0, 0, -1, -1]]), anchors[:1], torch.tensor([1])
    logits, deltas = torch.randn(1, 5, 3), torch.zeros(1, 5, 4)
    ours = multibox_loss(logits, deltas, anchors, matches, boxes, labels)["classification"]
    head = {"bbox_regression": deltas, "cls_logits": logits}
    stub = torch.nn.Module()
    stub.box_coder = torchvision.models.detection._utils.BoxCoder((10.0, 10.0, 5.0, 5.0))
    stub.neg_to_pos_ratio = 3.0
    other = theirs(stub, [{"boxes": boxes, "labels": labels}], head, [anchors], [matches[0]])["classification"]
    conf = -logits.log_softmax(-1)[0]
    every = conf[:3, 1].sum() + conf[3:, 0].sum()
    torch.testing.assert_close(ours, every / 3)
    torch.testing.assert_close(other, (every + conf[:3, 1].sum()) / 3)


def test_default_boxes_and_sources_of_the_paper() -> None:
    with torch.device("meta"):
        net = SSD(num_classes=20)
    assert net.backbone.channels == (512, 1024, 512, 256, 256, 256)
    assert [len(getattr(net, f"shapes{k}")) for k in range(6)] == [4, 6, 6, 6, 4, 4]
    net = SSD(num_classes=20).eval()
    with torch.no_grad():
        maps = net.backbone(torch.randn(1, 3, 300, 300))
        assert [tuple(m.shape[2:]) for m in maps] == [(38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)]
        norm = maps[0].norm(dim=1)
    torch.testing.assert_close(norm, torch.full_like(norm, 20.0))
    assert bool((net.backbone.scale_weight == 20).all())
    fc6 = net.backbone.extra[0][-1][1]
    assert (fc6.dilation, fc6.out_channels, fc6.kernel_size) == ((6, 6), 1024, (3, 3))
    with pytest.raises(ValueError, match="300"):
        net(torch.zeros(1, 3, 200, 200))


def test_ssd512_has_the_paper_s_maps() -> None:
    net = SSD(num_classes=20, image_size=512).eval()
    with torch.no_grad():
        maps = net.backbone(torch.randn(1, 3, 512, 512))
    assert [m.shape[2] for m in maps] == [64, 32, 16, 8, 4, 2, 1]
    counts = [len(getattr(net, f"shapes{k}")) for k in range(7)]
    assert sum(m.shape[2] * m.shape[3] * b for m, b in zip(maps, counts, strict=True)) == 24564


@pytest.mark.parametrize("backbone", ["timm/resnet18", "torchvision/resnet18"])
def test_other_channels_and_sizes(backbone: str) -> None:
    net = SSD(num_classes=1, backbone=backbone, image_size=100, in_channels=1).eval()
    raw = net([torch.randn(1, 80, 90)])
    cells = [13, 7, 4, 2, 1]
    assert len(raw["anchors"]) == sum(c * c * len(getattr(net, f"shapes{k}")) for k, c in enumerate(cells))


def test_lite_is_depthwise_but_for_the_backbone() -> None:
    """3x3 convolutions behind the backbone have one channel for a group, less than a quarter of the work."""
    work = {}
    for lite in (False, True):
        net = SSD(num_classes=3, backbone="timm/resnet18", image_size=128, lite=lite).eval()
        behind = [*net.backbone.extra.modules(), *net.head.modules()]
        wide = [m for m in behind if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert len(wide) >= len(net.backbone.extra) + 2 * len(net.sources)
        assert all((m.groups == m.in_channels) == lite for m in wide)
        with FlopCounterMode(display=False) as count, torch.no_grad():
            raw = net(torch.rand(1, 3, 128, 128))
            work[lite] = count.get_total_flops()
            net.backbone.body(torch.rand(1, 3, 128, 128))
            backbone = count.get_total_flops() - work[lite]
        work[lite] -= backbone
        assert raw["logits"].shape[1] == raw["anchors"].shape[0]
    assert work[True] < work[False] / 4


def test_single_source_keeps_the_shapes_of_all() -> None:
    with torch.device("meta"):
        net = SSD(num_classes=20, sources=(1,))
    assert len(net.shapes1) == 30
    with pytest.raises(ValueError, match="0 to 5"):
        SSD(num_classes=20, sources=(6,))


@pytest.mark.parametrize("options", [{}, {"classification": "sigmoid"}, {"lite": True}, {"sources": (1,)}])
def test_contract(options: dict) -> None:
    net = SSD(num_classes=2, **SMALL, **options)
    images = [torch.randn(3, 50, 70), torch.randn(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[5.0, 5, 40, 45]]), "labels": torch.tensor([2])}] * 2
    raw = net(images)
    anchors = len(raw["anchors"])
    assert raw["logits"].shape == (2, anchors, 2 if "classification" in options else 3)
    assert raw["deltas"].shape == (2, anchors, 4)
    sum(net.losses(images, targets).values()).backward()
    found = net.eval().predict(images, score_threshold=0.0, max_detections=7)
    for detections, image in zip(found, images, strict=True):
        assert len(detections) == 7
        assert (detections.scores.diff() <= 0).all()
        assert detections.boxes.min() >= 0
        assert detections.boxes[:, 2].max() <= image.shape[2]
        assert set(detections.labels.tolist()) <= {1, 2}


def recall(found, targets, iou: float = 0.5) -> float:
    hit = total = 0
    for detections, target in zip(found, targets, strict=True):
        total += len(target["boxes"])
        if len(detections):
            best = box_iou(target["boxes"], detections.boxes)
            best[target["labels"][:, None] != detections.labels] = 0
            hit += int((best.amax(1) > iou).sum())
    return hit / total


@pytest.mark.slow
def test_learns_bright_rectangles(scenes) -> None:
    net = SSD(num_classes=1, **SMALL)
    images, targets = scenes(16, 64, torch.Generator().manual_seed(0))
    x = torch.stack(images)
    options = {"score_threshold": 0.5}
    before = recall(net.eval().predict(x, **options), targets)
    optimiser = torch.optim.AdamW(net.parameters(), lr=5e-4)
    net.train()
    for _ in range(30):
        optimiser.zero_grad()
        sum(net.losses(x, targets).values()).backward()
        optimiser.step()
    with torch.no_grad():
        after = recall(net.eval().predict(x, **options), targets)
    assert after > max(before + 0.4, 0.6), (before, after)


def average_precision(found, targets, label: int) -> tuple[float, float]:
    """AP at IoU 0.5 of one class, and the share of (true, false) pairs of detections that are ranked wrongly."""
    rows, total = [], 0
    for detections, target in zip(found, targets, strict=True):
        truth = target["boxes"][target["labels"] == label]
        total += len(truth)
        mine = detections.labels == label
        taken: set[int] = set()
        for box, score in zip(detections.boxes[mine], detections.scores[mine].tolist(), strict=True):
            best = box_iou(box[None], truth)[0].max(0) if len(truth) else None
            hit = best is not None and float(best[0]) > 0.5 and int(best[1]) not in taken
            if hit:
                taken.add(int(best[1]))
            rows.append((score, hit))
    rows.sort(key=lambda r: -r[0])
    hits = torch.tensor([float(h) for _, h in rows])
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)
    wrong = float(((1 - hits).cumsum(0) * hits).sum()) / max(float(hits.sum() * (1 - hits).sum()), 1.0)
    return float((best * hits).sum()) / max(total, 1), wrong


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_softmax_against_sigmoids(scenes, capsys) -> None:
    """Mean AP and mis-ranking on synthetic shapes: softmax, K sigmoids, no mining, one source."""
    draw = torch.Generator().manual_seed(0)
    images, targets = scenes(192, 64, draw, classes=3)
    unseen, truth = scenes(96, 64, draw, classes=3)
    arms = {
        "softmax": {},
        "sigmoid": {"classification": "sigmoid"},
        "no mining": {"mining_ratio": None},
        "one source": {"sources": (1,)},
    }
    scores = {}
    for name, options in arms.items():
        rows = []
        for seed in range(2):
            torch.manual_seed(seed)
            net = SSD(num_classes=3, backbone="timm/resnet18", image_size=64, **options)
            optimiser = torch.optim.AdamW(net.parameters(), lr=5e-4)
            order = torch.Generator().manual_seed(seed)
            for _ in range(300):
                pick = torch.randint(0, len(images), (8,), generator=order).tolist()
                optimiser.zero_grad()
                sum(net.losses(torch.stack([images[i] for i in pick]), [targets[i] for i in pick]).values()).backward()
                optimiser.step()
            with torch.no_grad():
                found = net.eval().predict(torch.stack(unseen))
            per_class = [average_precision(found, truth, label) for label in (1, 2, 3)]
            rows.append([round(sum(column) / 3, 3) for column in zip(*per_class, strict=True)])
        scores[name] = rows
    with capsys.disabled():
        print("\n[mAP50, wrongly ranked share]:", scores)
    assert min(ap for ap, _ in scores["softmax"]) > 0.3
    assert min(ap for ap, _ in scores["sigmoid"]) > 0.3
