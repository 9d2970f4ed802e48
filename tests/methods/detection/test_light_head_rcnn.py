"""Light-Head R-CNN: a slow float64 reference of the mined loss, the large separable convolution, pooling, costs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import ps_roi_align

from torchive.methods.detection.light_head_rcnn import LargeSeparableConv, LightHeadRCNN
from torchive.nn.region_proposals import rpn_loss
from torchive.nn.regions import Regions, region_loss
from torchive.nn.thin_regions import HardestAnchors, ThinRegionStage, VotedRegionStage, hard_region_loss
from torchive.protocols import Level

SMALL = {
    "num_classes": 3,
    "backbone": "timm/test_efficientnet",
    "channels": 2,
    "hidden": 32,
    "inter_channels": 8,
    "kernel_size": 5,
    "width": 16,
    "anchor_sizes": [16.0, 32.0, 64.0],
    "before_nms": (200, 100),
    "after_nms": (100, 50),
    "rois_per_image": 32,
}


def some_regions(count: int = 30) -> Regions:
    corner = torch.rand(count, 2) * 60
    boxes = torch.cat([corner, corner + 10 + torch.rand(count, 2) * 40], 1)
    labels = torch.where(torch.arange(count) % 3 == 0, torch.randint(1, 4, (count,)), 0)
    truth = torch.where(labels[:, None] > 0, boxes + torch.randn(count, 4) * 3, 0)
    return Regions(boxes, torch.arange(count) % 2, labels, torch.zeros_like(labels), truth)


def slow_loss(logits: Tensor, deltas: Tensor, regions: Regions, count: int) -> tuple[float, float]:
    """Cost of each region in plain Python; the dearest ones are summed."""
    costs = []
    for k, label in enumerate(regions.labels.tolist()):
        row = logits[k].tolist()
        top = max(row)
        score = math.log(sum(math.exp(v - top) for v in row)) + top - row[label]
        place = 0.0
        if label:
            (x0, y0, x1, y1), (a0, b0, a1, b1) = regions.boxes[k].tolist(), regions.truth[k].tolist()
            w, h, v, g = x1 - x0, y1 - y0, a1 - a0, b1 - b0
            code = [10 * ((a0 + a1) - (x0 + x1)) / 2 / w, 10 * ((b0 + b1) - (y0 + y1)) / 2 / h]
            code += [5 * math.log(v / w), 5 * math.log(g / h)]
            first = 4 * label if deltas.shape[1] > 4 else 0
            for got, wanted in zip(deltas[k, first : first + 4].tolist(), code, strict=True):
                d = abs(got - wanted)
                place += d * d / 2 if d < 1 else d - 0.5
        costs.append((score + place, score, place))
    costs.sort(reverse=True)
    hardest = costs[:count]
    return sum(c[1] for c in hardest) / len(hardest), sum(c[2] for c in hardest) / len(hardest)


@pytest.mark.parametrize("per_class", [True, False])
def test_mined_loss_equals_slow_reference(per_class: bool, record, double) -> None:
    regions = some_regions()
    logits, deltas = torch.randn(30, 4) * 2, torch.randn(30, 16 if per_class else 4)
    gaps = []
    for count in (5, 12, 30, 100):
        got = hard_region_loss(logits, deltas, regions, count=count)
        gaps += [abs(float(a) - b) for a, b in zip(got, slow_loss(logits, deltas, regions, count), strict=True)]
    everything = region_loss(logits, deltas, regions, beta=1.0)
    gaps += [
        abs(float(a - b)) for a, b in zip(hard_region_loss(logits, deltas, regions, count=30), everything, strict=True)
    ]
    assert max(gaps) < 1e-12
    if not per_class:
        record(
            "light_head_rcnn", "referenced", largest_difference=max(gaps), dtype="float64", what="mined loss of regions"
        )


def test_authors_code_does_not_run(record) -> None:
    """Only the reason is recorded."""
    record(
        "light_head_rcnn",
        "matched",
        impossible="the release is TensorFlow 1.5 with contrib layers and CUDA operators without a CPU kernel; the "
        "position-sensitive pooling is checked against torchvision's operator instead",
    )


def test_only_the_mined_regions_get_a_gradient(double) -> None:
    regions = some_regions()
    logits, deltas = torch.randn(30, 4, requires_grad=True), torch.randn(30, 4, requires_grad=True)
    sum(hard_region_loss(logits, deltas, regions, count=7)).backward()
    assert int((logits.grad.abs().sum(1) > 0).sum()) == 7
    nothing = Regions(*(v[:0] for v in (regions.boxes, regions.image, regions.labels, regions.matched, regions.truth)))
    empty = hard_region_loss(logits[:0], deltas[:0], nothing)
    assert [float(v.detach()) for v in empty] == [0, 0]


def test_hardest_anchors() -> None:
    """All 256 places are filled: drawn positives up to the half, then the negatives of highest objectness."""
    labels = [torch.cat([torch.ones(p), torch.zeros(600), -torch.ones(50)]) for p in (10, 300)]
    objectness = torch.randn(2, 950)
    scores = [objectness[0, :660], objectness[1]]
    for label, score, expected in zip(labels, scores, (10, 128), strict=True):
        positive, negative = HardestAnchors(score[None])([label])
        assert int(positive[0].sum()) == expected
        assert int(negative[0].sum()) == 256 - expected
        assert (label[positive[0]] == 1).all()
        assert (label[negative[0]] == 0).all()
        left = (label == 0) & ~negative[0]
        assert score[negative[0]].min() >= score[left].max()
    none = HardestAnchors(torch.randn(1, 5))([torch.full((5,), -1.0)])
    losses = rpn_loss(
        torch.randn(1, 5),
        torch.randn(1, 5, 4),
        [torch.full((5,), -1.0)],
        [torch.zeros(5, 4)],
        lambda _: none,
        normalisation="sampled",
    )
    assert all(float(v) == 0 for v in losses.values())


def test_separable_convolution_equals_the_large_one_of_its_products(double) -> None:
    """Each path is one convolution of 15 x 15 whose windows are sums of products; both are summed."""
    layer = LargeSeparableConv(3, 4, inter_channels=2, kernel_size=15)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    for path in (layer.column_first, layer.row_first):
        nn.init.zeros_(path[0].bias)
    x = torch.randn(2, 3, 20, 24)
    full = torch.zeros(4, 3, 15, 15)
    column, row = (conv.weight for conv in layer.column_first)
    full += torch.einsum("mcy,omx->ocyx", column[..., 0], row[:, :, 0])
    row, column = (conv.weight for conv in layer.row_first)
    full += torch.einsum("mcx,omy->ocyx", row[:, :, 0], column[..., 0])
    bias = layer.column_first[1].bias + layer.row_first[1].bias
    torch.testing.assert_close(layer(x), F.conv2d(x, full, bias, padding=7))


def test_pooling_is_torchvisions_and_the_thin_map_has_490_channels(double) -> None:
    stage = ThinRegionStage(10, 3, hidden=16)
    assert stage.in_channels == 490
    x, boxes = torch.randn(2, 490, 12, 14), torch.tensor([[5.0, 9, 160, 120], [30, 3, 90, 170], [-8, 2, 40, 200]])
    image = torch.tensor([0, 1, 1])
    pooled = ps_roi_align(x, torch.cat([image[:, None].double(), boxes], 1), 7, 1 / 16, 2)
    hidden = stage.layer(pooled.flatten(1)).relu()
    logits, deltas = stage(x, 16, boxes, image)
    torch.testing.assert_close(logits, stage.class_score(hidden))
    torch.testing.assert_close(deltas, stage.box_delta(hidden))
    assert deltas.shape == (3, 4)


@pytest.mark.parametrize("per_class", [True, False])
def test_voted_scores_are_means_of_the_bins(per_class: bool, double) -> None:
    """Maps of one value each: a region's score is the mean of its class's 49 values, wherever the region lies."""
    stage = VotedRegionStage(2, per_class=per_class)
    outputs = 3 + (12 if per_class else 4)
    assert stage.in_channels == 49 * outputs
    values = torch.randn(outputs, 7, 7)
    boxes = torch.tensor([[40.0, 30, 160, 120], [80, 33, 130, 150]])
    logits, deltas = stage(values.view(1, -1, 1, 1).expand(1, -1, 12, 14), 16, boxes, torch.zeros(2).long())
    wanted = values.mean((1, 2)).expand(2, -1)
    torch.testing.assert_close(torch.cat([logits, deltas], 1), wanted)
    assert (logits.shape, deltas.shape) == ((2, 3), (2, outputs - 3))
    x, image = torch.randn(2, 49 * outputs, 12, 14), torch.tensor([1, 0])
    pooled = ps_roi_align(x, torch.cat([image[:, None].double(), boxes], 1), 7, 1 / 16, 2)
    torch.testing.assert_close(torch.cat(stage(x, 16, boxes, image), 1), pooled.mean((2, 3)))


def test_operations_of_the_heads(capsys) -> None:
    """Millions of multiplications for 1000 regions of a map of 50 x 67 cells with 2048 channels.

    A region of the thin head costs a ninetieth; the thin map itself costs as much as some 600 regions of the heavy one.
    """
    found = {}
    with torch.device("meta"):
        for name, options in {"thin": {}, "small": {"inter_channels": 64}, "heavy": {"head": "heavy"}}.items():
            net = LightHeadRCNN(**options).eval()
            with FlopCounterMode(display=False) as count, torch.no_grad():
                thin = net.thin(torch.zeros(1, 2048, 50, 67))
                before = count.get_total_flops()
                if name == "heavy":
                    net.second.box_predictor(net.second.box_head(torch.zeros(1000, 2048, 7, 7)))
                else:
                    hidden = net.second.layer(torch.zeros(1000, 490))
                    for layer in (net.second.box_delta, net.second.class_score):
                        layer(hidden)
            assert thin.shape[1] == (2048 if name == "heavy" else 490)
            found[name] = [round(v / 2e6) for v in (before, count.get_total_flops() - before)]
    with capsys.disabled():
        print(f"\nmillions of multiplications, of the map and of 1000 regions: {found}")
    assert found["thin"][1] == found["small"][1] == round((490 * 2048 + 2048 * (81 + 4)) / 1e3)
    assert found["thin"][1] < found["heavy"][1] / 40
    assert sum(found["small"]) < sum(found["heavy"]) / 5
    assert 0.5 < sum(found["thin"]) / sum(found["heavy"]) < 0.7


class FineOnly(nn.Module):
    levels = (Level(4, 8),)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


def one_image() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    boxes = torch.tensor([[5.0, 5, 40, 45], [30, 20, 60, 60]])
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return [torch.rand(3, 64, 64), torch.rand(3, 50, 90)], [{"boxes": boxes, "labels": torch.tensor([2, 3])}, empty]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head": "plain"},
        {"head": "heavy"},
        {"head": "voted"},
        {"per_class": True},
        {"head": "voted", "per_class": True},
        {"image_size": 96},
        {"backbone": "torchvision/resnet18"},
    ],
)
def test_contract(options: dict) -> None:
    net = LightHeadRCNN(**{**SMALL, **options})
    images, targets = one_image()
    losses = net.losses(images, targets)
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    sum(losses.values()).backward()
    second = [*net.thin.parameters(), *net.second.parameters()]
    assert len(second) >= 4
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in second)
    net.eval()
    assert {k: v.shape for k, v in net(images).items()} == {k: v.shape for k, v in net.train()(images).items()}
    for found, image in zip(net.eval().predict(images, score_threshold=0.0), images, strict=True):
        assert len(found) > 0
        assert (found.scores.diff() <= 0).all()
        assert found.boxes.min() >= 0
        assert found.boxes[:, 2].max() <= image.shape[2] + 1e-3
        assert found.boxes[:, 3].max() <= image.shape[1] + 1e-3


def test_both_stages_read_maps_of_stride_16() -> None:
    net = LightHeadRCNN(backbone="timm/resnet18", hidden=8, inter_channels=4)
    assert [net.backbone.levels[k].channels for k in (net.first, net.last)] == [256, 512]
    maps = net.backbone(torch.rand(1, 3, 64, 64))
    assert maps[net.first].shape[2:] == maps[net.last].shape[2:] == (4, 4)
    plain = LightHeadRCNN(**{**SMALL, "backbone": "torchvision/resnet18"})
    assert plain.first == plain.last


def test_two_layers_always_have_a_box_for_each_class() -> None:
    for per_class in (False, True):
        net = LightHeadRCNN(**{**SMALL, "head": "heavy", "per_class": per_class})
        classes = net.second.box_predictor.cls_score.out_features
        assert net.second.box_predictor.bbox_pred.out_features == 4 * classes


def test_a_thousand_objects_and_objects_of_one_pixel() -> None:
    net = LightHeadRCNN(**SMALL)
    corner = torch.rand(1000, 2) * 60
    many = {"boxes": torch.cat([corner, corner + 0.5 + torch.rand(1000, 2) * 4], 1), "labels": torch.ones(1000).long()}
    pixel = {"boxes": torch.tensor([[10.0, 10, 11, 11]]), "labels": torch.tensor([1])}
    losses = net.losses([torch.rand(3, 64, 64), torch.rand(3, 50, 70)], [many, pixel])
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_paper_defaults() -> None:
    with torch.device("meta"):
        net = LightHeadRCNN()
    assert net.rpn.head.body[0].out_channels == 512
    assert net.rpn.head.body[0].in_channels == 1024
    assert net.rpn.cell0.shape == (15, 4)
    assert (net.rpn.before_nms, net.rpn.after_nms) == ((12000, 6000), (2000, 1000))
    assert net.thin[0].column_first[0].weight.shape == (256, 2048, 15, 1)
    assert net.thin[0].column_first[1].weight.shape == (490, 256, 1, 15)
    assert net.second.layer.in_features == 490
    assert net.second.layer.out_features == 2048
    assert net.rois_per_image == 256


def test_bad_arguments_name_the_value() -> None:
    for options, text in (
        ({"head": "r-fcn"}, "r-fcn"),
        ({"kernel_size": 14}, "got 14"),
        ({"channels": 0}, "3, 0 and 32"),
        ({"backbone": FineOnly()}, r"stride 16, its strides are \[8\]"),
    ):
        with pytest.raises(ValueError, match=text):
            LightHeadRCNN(**{**SMALL, **options})
