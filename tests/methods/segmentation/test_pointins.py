"""PointINS: a slow float64 reference of its head, the laws of its parts, and both detectors that it may stand on."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.catalogue import get_card
from torchive.engine.export import OnnxModel, write_onnx
from torchive.methods.segmentation.pointins import InstanceAwareHead, PointINS
from torchive.nn.dice import mask_dice
from torchive.ops.masks import crop_masks, paste_masks

SMALL = {
    "backbone": "timm/test_efficientnet",
    "num_classes": 3,
    "channels": 16,
    "depth": 1,
    "size": 4,
    "template_channels": 4,
    "aware_channels": 3,
    "hidden": 8,
}
DETECTORS = ({"detector": "fcos"}, {"detector": "retinanet", "anchor_sizes": [[s] for s in (16, 24, 32, 48, 64)]})
TWO_ANCHORS = {"detector": "retinanet", "anchor_sizes": [[s, s + 6] for s in (16, 24, 32, 48, 64)]}


def slow_mask(head: InstanceAwareHead, feature: list[float], box: list[float]) -> list[list[float]]:
    """One object's logits, number by number: template, generated weights, convolution, predictor."""
    k, c, out, s = head.size, head.template_channels, head.aware_channels, head.kernel_size

    def linear(layer: nn.Linear, x: list[float]) -> list[float]:
        rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in rows]

    def convolve(x: list, weight: list, bias: list, side: int) -> list:
        reach = side // 2
        return [
            [
                [
                    bias[o]
                    + sum(
                        weight[o][i][dy + reach][dx + reach] * x[i][y + dy][z + dx]
                        for i in range(len(x))
                        for dy in range(-reach, reach + 1)
                        for dx in range(-reach, reach + 1)
                        if 0 <= y + dy < len(x[i]) and 0 <= z + dx < len(x[i])
                    )
                    for z in range(len(x[0]))
                ]
                for y in range(len(x[0]))
            ]
            for o in range(len(weight))
        ]

    def relu(x: list) -> list:
        return [[[max(v, 0.0) for v in row] for row in plane] for plane in x]

    flat = linear(head.template, feature)
    template = [[[flat[(i * k + y) * k + z] for z in range(k)] for y in range(k)] for i in range(c)]
    hidden = [max(v, 0.0) for v in linear(head.generator[0], feature + box)]
    numbers = linear(head.generator[2], hidden)
    weight = [
        [[[numbers[((o * c + i) * s + y) * s + z] for z in range(s)] for y in range(s)] for i in range(c)]
        for o in range(out)
    ]
    aware = relu(convolve(template, weight, numbers[out * c * s * s :], s))
    first, last = head.predictor[0], head.predictor[3]
    x = relu(convolve(aware, first.weight.tolist(), first.bias.tolist(), 3))

    def upsampled(plane: list, y: int, z: int) -> float:
        total = 0.0
        near = [min(max((v + 0.5) / 2 - 0.5, 0.0), k - 1.0) for v in (y, z)]
        for j in range(k):
            for i in range(k):
                total += max(1 - abs(near[0] - j), 0) * max(1 - abs(near[1] - i), 0) * plane[j][i]
        return total

    weights, bias = last.weight.flatten().tolist(), last.bias.item()
    return [
        [bias + sum(w * upsampled(p, y, z) for w, p in zip(weights, x, strict=True)) for z in range(2 * k)]
        for y in range(2 * k)
    ]


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_head_equals_a_loop_over_objects(double, record, kernel_size: int) -> None:
    record("pointins", "matched", impossible="the paper promised code, and none was published or found")
    head = InstanceAwareHead(
        6, size=3, template_channels=4, aware_channels=5, hidden=7, width=3, kernel_size=kernel_size
    )
    for parameter in head.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    features, boxes = torch.randn(4, 6), torch.rand(4, 4) * 4
    found = head(features, boxes)
    expected = torch.tensor([slow_mask(head, f, b) for f, b in zip(features.tolist(), boxes.tolist(), strict=True)])
    gap = (found - expected).abs().max().item()
    assert gap < 1e-12
    if kernel_size == 3:
        record("pointins", "referenced", largest_difference=gap, dtype="float64", what="masks of four objects")


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_equal_weights_are_an_ordinary_convolution(double, kernel_size: int) -> None:
    head = InstanceAwareHead(6, size=5, template_channels=4, aware_channels=3, kernel_size=kernel_size, depth=2)
    nn.init.zeros_(head.generator[2].weight)
    head.generator[2].bias.data.normal_()
    x, numbers = torch.randn(7, 4, 5, 5), head.weights(torch.randn(7, 6), torch.rand(7, 4))
    assert torch.equal(numbers[0], numbers[6])
    first, second, b1, b2 = head.generator[2].bias.split([12 * kernel_size**2, 9 * kernel_size**2, 3, 3])
    y = F.conv2d(x, first.view(3, 4, kernel_size, kernel_size), b1, padding=kernel_size // 2).relu()
    y = F.conv2d(y, second.view(3, 3, kernel_size, kernel_size), b2, padding=kernel_size // 2).relu()
    assert torch.allclose(head.aware(x, numbers), y, atol=1e-12)
    static = InstanceAwareHead(
        6, size=5, template_channels=4, aware_channels=3, kernel_size=kernel_size, variant="static"
    )
    assert torch.equal(static.weights(torch.randn(7, 6), torch.rand(7, 4)), static.filters.expand(7, -1))


def test_gradient_reaches_template_and_weights_apart() -> None:
    head = InstanceAwareHead(6, size=3, template_channels=4, aware_channels=5)
    features, boxes = torch.randn(4, 6), torch.rand(4, 4)
    x, numbers = head.template(features).view(4, 4, 3, 3), head.weights(features, boxes)
    head.aware(x.detach(), numbers).sum().backward()
    assert head.template.weight.grad is None
    assert all(p.grad.abs().sum() > 0 for p in head.generator.parameters())
    head.zero_grad()
    head.aware(head.template(features).view(4, 4, 3, 3), head.weights(features, boxes).detach()).sum().backward()
    assert head.template.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in head.generator.parameters())


def test_the_model_has_as_many_of_an_objects_own_convolutions_as_asked() -> None:
    head = PointINS(**SMALL, aware_depth=3).mask_head
    assert len(head.weight_sizes) == 3
    with pytest.raises(ValueError, match="expected kernel_size 1 or 3 and size, channels and depth >= 1"):
        PointINS(**SMALL, aware_depth=0)


def test_weights_see_what_they_are_given() -> None:
    features, boxes = torch.randn(2, 6), torch.rand(2, 4)
    for cues, sees in (("both", (True, True)), ("feature", (True, False)), ("box", (False, True))):
        head = InstanceAwareHead(6, size=3, cues=cues)
        base = head.weights(features, boxes)
        moved = (head.weights(features + 1, boxes), head.weights(features, boxes + 1))
        assert tuple(not torch.equal(m, base) for m in moved) == sees
    template = InstanceAwareHead(6, size=3, variant="template")
    assert not hasattr(template, "generator")
    assert template(features, boxes).shape == InstanceAwareHead(6, size=3, variant="direct")(features, boxes).shape


@pytest.mark.parametrize("options", DETECTORS)
def test_masks_of_the_survivors_alone_equal_those_of_all(options: dict, monkeypatch) -> None:
    torch.manual_seed(3)
    net = PointINS(**SMALL, **options).eval()
    asked: list[Tensor] = []
    plain = net.masks
    monkeypatch.setattr(net, "masks", lambda raw, image, rows: asked.append(rows) or plain(raw, image, rows))
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        raw = net(image)
        found = net.decode(raw, [(64, 96)], score_threshold=0.0, max_detections=7)[0]
        every = torch.arange(raw["logits"].shape[1])
        dense = plain(raw, 0, every).sigmoid()
        boxes = net.detector.boxes(raw)[0]
    assert len(found) == 7
    assert [len(rows) for rows in asked] == [7]
    for mask, row in zip(found.masks, asked[0].tolist(), strict=True):
        assert torch.equal(mask, paste_masks(dense[row : row + 1], boxes[row : row + 1], (64, 96))[0])


def test_a_full_mask_fills_its_box() -> None:
    boxes = torch.tensor([[3.0, 5, 40, 31], [0.0, 0, 60, 50], [10.0, 10, 11, 11], [-20.0, 8, 12, 24]])
    pasted = paste_masks(torch.ones(4, 28, 28), boxes, (50, 60))
    assert pasted.sum((1, 2)).tolist() == [37 * 26, 50 * 60, 1, 12 * 16]


@pytest.mark.parametrize(
    ("reference", "mask_loss", "options"),
    [
        *((reference, loss, DETECTORS[0]) for reference in ("truth", "predicted") for loss in ("bce", "dice")),
        *((reference, "bce", TWO_ANCHORS) for reference in ("truth", "predicted")),
    ],
)
def test_mask_loss_equals_a_loop(reference: str, mask_loss: str, options: dict, objects) -> None:
    torch.manual_seed(4)
    net = PointINS(**SMALL, **options, reference=reference, mask_loss=mask_loss, masks_per_image=10_000)
    fcos = options["detector"] == "fcos"
    per_cell, cue = (1, "distances") if fcos else (6, "deltas")  # two sizes in three shapes
    with torch.no_grad():
        for layer in (net.mask_head.template, net.mask_head.predictor[3]):
            layer.weight.mul_(30)  # masks that differ from cell to cell
        if fcos:
            net.detector.head.distances.bias.fill_(1.0)
    targets = [objects(5, (64, 96), 10, 40), objects(0, (64, 96), 1, 1), objects(3, (64, 96), 10, 40)]
    images = torch.rand(3, 3, 64, 96)
    found = net.losses(images, targets)["mask"].item()
    raw = net(images)
    match, boxes = net.detector.match(raw, targets), net.detector.boxes(raw)
    each = []
    for k, row in torch.nonzero(match >= 0).tolist():
        object_ = match[k, row].view(1)
        box = targets[k]["boxes"][object_] if reference == "truth" else boxes[k, row][None].detach()
        truth = crop_masks(targets[k]["masks"], object_, box, 8)
        logits = net.mask_head(raw["features"][k, row // per_cell][None], raw[cue][k, row][None])
        bce = -(truth * F.logsigmoid(logits) + (1 - truth) * F.logsigmoid(-logits)).mean()
        each.append(float(bce if mask_loss == "bce" else mask_dice(logits.sigmoid(), truth)))
    assert len(each) > 8
    assert found == pytest.approx(math.fsum(each) / len(each), rel=1e-5)


@pytest.mark.parametrize("options", DETECTORS)
@pytest.mark.parametrize("reference", ["truth", "predicted"])
def test_masks_do_not_move_the_boxes(reference: str, options: dict, objects) -> None:
    """The mask's loss leaves the detector without a gradient, whatever its boxes are used for."""
    net = PointINS(**SMALL, **options, reference=reference)
    if reference == "predicted" and options["detector"] == "fcos":
        net.detector.head.distances.bias.data.fill_(1.0)
    net.losses(torch.rand(1, 3, 64, 96), [objects(5, (64, 96), 10, 40)])["mask"].backward()
    assert all(p.grad is None or not p.grad.any() for p in net.detector.parameters())
    assert all(p.grad.any() for p in net.mask_head.generator.parameters())


@pytest.mark.parametrize(("options", "threshold"), [(DETECTORS[0], 0.6), (DETECTORS[1], 0.5)])
def test_overlaps_are_suppressed_as_the_detector_does(options: dict, threshold: float) -> None:
    torch.manual_seed(3)
    net, image = PointINS(**SMALL, **options).eval(), torch.rand(1, 3, 64, 96)
    assert net.thresholds == {"nms_threshold": threshold}
    if options["detector"] == "fcos":
        net.detector.head.distances.bias.data.fill_(1.7)  # neighbours overlap by 0.55
    with torch.no_grad():
        raw = net(image)
        usual = net.predict(image, score_threshold=0.0, max_detections=1000)[0]
        counts = {}
        for given in (0.5, 0.6, None):
            counts[given] = len(
                net.decode(raw, [(64, 96)], score_threshold=0.0, max_detections=1000, nms_threshold=given)[0]
            )
    assert counts[0.5] != counts[0.6]
    assert counts[threshold] == counts[None] == len(usual)


def test_as_many_masks_as_allowed(monkeypatch, objects) -> None:
    net = PointINS(**SMALL, masks_per_image=6)
    asked: list[Tensor] = []
    plain = net.masks
    monkeypatch.setattr(net, "masks", lambda raw, image, rows: asked.append(image) or plain(raw, image, rows))
    net.losses(torch.rand(2, 3, 64, 96), [objects(9, (64, 96), 20, 40), objects(1, (64, 96), 30, 40)])
    assert asked[0].bincount(minlength=2)[0] == 6
    assert 1 <= asked[0].bincount(minlength=2)[1] <= 6


@pytest.mark.parametrize("options", DETECTORS)
@pytest.mark.parametrize(("count", "most"), [(0, 1.0), (1000, 1.0), (1000, 40.0)])
def test_empty_and_crowded_images(count: int, most: float, options: dict, objects) -> None:
    """No object, objects of a pixel or less, a thousand of them; images of two sizes."""
    net = PointINS(**SMALL, **options)
    crowd, none = objects(count, (64, 96), 0.5, most), objects(0, (96, 64), 1, 1)
    losses = net.losses([torch.rand(3, 64, 96), torch.rand(3, 96, 64)], [crowd, none])
    assert all(v.isfinite() for v in losses.values())
    assert losses["mask"].item() > 0 if most > 1 else count > 0 or losses["mask"].item() == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    found = net.eval().predict([torch.rand(3, 64, 96), torch.rand(3, 50, 33)], score_threshold=0.0)
    assert [tuple(d.masks.shape[1:]) for d in found] == [(64, 96), (50, 33)]


def test_the_comparison_has_equal_parameters() -> None:
    """Static weights with more channels in the template: within two in a hundred of the dynamic ones."""
    wider = get_card("pointins").comparison["baseline"]["model"]["init_args"]
    counts = [
        sum(p.numel() for p in InstanceAwareHead(64, hidden=64, **options).parameters()) for options in ({}, wider)
    ]
    assert abs(counts[1] / counts[0] - 1) < 0.02
    assert counts[1] > counts[0]


@pytest.mark.slow
def test_dynamic_against_static_and_direct(discs, score_after) -> None:
    """Overlapping equal discs on maps of stride 4: every form learns masks; the card has the figures."""
    scores = {}
    for name, options in (
        ("dynamic", {}),
        ("static", {"variant": "static", "template_channels": 18}),
        ("direct", {"variant": "direct"}),
        ("dynamic, predicted box", {"reference": "predicted"}),
        ("retinanet", {"detector": "retinanet", "anchor_sizes": [[s] for s in (14, 20, 28, 40, 56, 80)]}),
    ):
        torch.manual_seed(1)
        net = PointINS(
            backbone="timm/test_efficientnet",
            num_classes=1,
            channels=32,
            depth=2,
            hidden=32,
            finest=4,
            masks_per_image=30,
            **options,
        )
        scores[name] = score_after(net, discs(16, 0), discs(8, 1), steps=240, rate=3e-3)
    found = {name: (round(s["mask_map"], 3), round(s["map"], 3)) for name, s in scores.items()}
    assert all(value[0] > 0.4 for value in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("options", DETECTORS)
def test_exported_outputs_give_the_same_boxes_and_masks(options: dict, tmp_path) -> None:
    torch.manual_seed(2)
    net = PointINS(**SMALL, **options, prior=0.4).eval()
    structure = write_onnx(net, torch.rand(2, 3, 128, 160), tmp_path / "p.onnx")
    file = OnnxModel(tmp_path / "p.onnx", structure)
    for size in ((128, 160), (96, 128)):
        x = torch.rand(2, 3, *size)
        with torch.no_grad():
            wanted = net.decode(net(x), [size] * 2)
            found = net.decode(file(x), [size] * 2)
        for one, other in zip(found, wanted, strict=True):
            assert len(one) == len(other) > 0
            assert (one.boxes - other.boxes).abs().max() < 1e-3
            assert (one.masks != other.masks).float().mean() < 1e-4


def test_what_is_refused(objects) -> None:
    for options, words in (
        ({"num_classes": 0}, "expected num_classes >= 1, depth >= 0 and masks_per_image >= 1, got 0, 1 and 100"),
        ({"detector": "ssd"}, "expected detector fcos or retinanet and reference truth or predicted, got 'ssd'"),
        ({"mask_loss": "l2"}, "mask_loss must be bce or dice, got 'l2'"),
        ({"variant": "wild"}, "expected variant dynamic, static, template or direct and cues both, feature or box"),
        ({"kernel_size": 5}, "expected kernel_size 1 or 3 and size, channels and depth >= 1, got 5, 4, 4, 3 and 1"),
        ({"detector": "retinanet", "anchor_sizes": [[8]]}, "anchor_sizes must have 5 lists of one length"),
    ):
        with pytest.raises(ValueError, match=words):
            PointINS(**{**SMALL, **options})
    target = objects(2, (64, 64), 20, 40)
    with pytest.raises(ValueError, match="target 0: expected masks beside the boxes, got boxes, labels"):
        PointINS(**SMALL).losses([torch.rand(3, 64, 64)], [{k: v for k, v in target.items() if k != "masks"}])
