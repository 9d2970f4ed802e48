"""Guided anchoring: the released heads on copied weights, slow float64 references, and the laws of its parts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.ops import box_iou

from torchive.methods.detection.guided_anchoring import (
    FeatureAdaption,
    GuidedAnchoring,
    GuidedProposals,
    GuidedRetinaNet,
    bounded_iou_loss,
)
from torchive.methods.detection.guided_anchoring.anchors import anchors_at, base_squares, guided_sides, turns_of
from torchive.methods.detection.guided_anchoring.assign import (
    assign,
    free_overlaps,
    level_of,
    location_targets,
    sampled_overlaps,
)
from torchive.methods.detection.guided_anchoring.guide import labels_of
from torchive.methods.detection.guided_anchoring.loss import angle_loss, location_loss
from torchive.methods.detection.guided_anchoring.one_stage import guided_dense_loss
from torchive.protocols import Level

REPOSITORY, RELEASE = "open-mmlab/mmdetection", "release 3.3.0"
SMALL = {
    "num_classes": 3,
    "backbone": "timm/test_efficientnet",
    "channels": 16,
    "hidden": 32,
    "anchor_scale": 4.0,
    "before_nms": (200, 100),
    "after_nms": (100, 50),
    "rois_per_image": 64,
}
#: The release's layers and the layers here.
PROPOSALS = {
    "rpn_conv": "conv",
    "conv_loc": "guide.location",
    "conv_shape": "guide.shape",
    "feature_adaption.conv_offset": "adaption.offset",
    "feature_adaption.conv_adaption": "adaption",
    "conv_cls": "objectness",
    "conv_reg": "deltas",
}
DENSE = {
    **{f"cls_convs.{k}.conv": f"head.classification_head.conv.{k}.0" for k in range(4)},
    **{f"reg_convs.{k}.conv": f"head.regression_head.conv.{k}.0" for k in range(4)},
    "conv_loc": "guide.location",
    "conv_shape": "guide.shape",
    "feature_adaption_cls.conv_offset": "class_adaption.offset",
    "feature_adaption_cls.conv_adaption": "class_adaption",
    "feature_adaption_reg.conv_offset": "box_adaption.offset",
    "feature_adaption_reg.conv_adaption": "box_adaption",
    "retina_cls": "head.classification_head.cls_logits",
    "retina_reg": "head.regression_head.bbox_reg",
}
GAINS = {"conv_offset": 1.2, "conv_loc": 9.0, "retina_cls": 0.1, "retina_reg": 0.05}
BOXES = [
    [[7.3, 9.1, 41.7, 33.2], [40.2, 38.4, 93.1, 91.6], [58.5, 2.2, 88.9, 27.6]],
    [[11.4, 21.7, 81.3, 47.2]],
]
LABELS = [[1, 3, 2], [2]]


def fill(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    """Numbers in (-scale, scale) that are the same everywhere, without a generator."""
    at = torch.arange(math.prod(shape), dtype=torch.double)
    return ((at * 12.9898 + 78.233 * (seed + 1)).sin() * 43758.5453).frac().mul(scale).view(shape)


def fill_network(net: nn.Module, names: dict[str, str], rare: float, shape: float) -> dict[str, nn.Parameter]:
    """Give a network the numbers that the released one had; its parameters by the released names."""
    own = dict(net.named_parameters())
    pairs = {f"{a}.{kind}": own.get(f"{b}.{kind}") for a, b in names.items() for kind in ("weight", "bias")}
    theirs = {name: value for name, value in sorted(pairs.items()) if value is not None}
    with torch.no_grad():
        for seed, (name, value) in enumerate(theirs.items()):
            if name.endswith("bias"):
                value.copy_(fill(value.shape, seed, 0.3) - (rare if "conv_loc" in name else 0))
            else:
                gain = {**GAINS, "conv_shape": shape}.get(name.split(".")[-2], 2.2)
                value.copy_(fill(value.shape, seed, gain / math.prod(value.shape[1:]) ** 0.5))
    return theirs


def pinned(channels: int, strides: tuple[int, ...]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """The maps and the objects of the released run."""
    maps = [fill((2, channels, -(-96 // s), -(-96 // s)), 100 + k).requires_grad_() for k, s in enumerate(strides)]
    targets = [{"boxes": torch.tensor(b), "labels": torch.tensor(v)} for b, v in zip(BOXES, LABELS, strict=True)]
    return maps, targets


def centre_terms(net: nn.Module, maps: list[Tensor], targets: list[dict[str, Tensor]], matches: Tensor) -> Tensor:
    """What the released shape loss adds for the distance of the centres, over the positions that count."""
    squares = net.guide._squares(maps)
    total = squares.new_zeros(())
    for target, row in zip(targets, matches, strict=True):
        box, square = target["boxes"][row[row >= 0]], squares[row >= 0]
        away = ((box[:, :2] + box[:, 2:]) / 2 - (square[:, :2] + square[:, 2:]) / 2).abs()
        side = box[:, 2:] - box[:, :2]
        miss = 1 - ((side - 2 * away) / (side + 2 * away + 1e-3)).clamp(min=0)
        total = total + F.smooth_l1_loss(miss, torch.zeros_like(miss), beta=0.2, reduction="sum")
    return total / (matches > -2).sum()


def released_gaps(form: str, stored: dict[str, Tensor]) -> dict[str, float]:
    """How far one of the released heads is from the one here; targets must be equal."""
    if form == "rpn":
        strides, channels, names, rare, shape = (4, 8, 16, 32, 64), 8, PROPOSALS, 7.0, 5.0
        net = GuidedProposals([Level(8, s) for s in strides], centre="corner")
        net.sampler = BalancedPositiveNegativeSampler(10**6, 0.5)
    else:
        strides, channels, names, rare, shape = (8, 16, 32, 64, 128), 4, DENSE, 3.6, 0.3
        net = GuidedRetinaNet(
            num_classes=3, backbone="timm/test_efficientnet", channels=4, offset_groups=2, centre="corner"
        )
    net.guide.sampler, net.guide.eps = BalancedPositiveNegativeSampler(10**6, 0.5), 1e-3
    theirs = fill_network(net, names, rare, shape)
    maps, targets = pinned(channels, strides)
    sizes = torch.tensor([[96.0, 96], [96, 96]])

    def run(**options) -> dict[str, Tensor]:
        return net(maps, **options) if form == "rpn" else net._raw(maps, **options)

    def losses(raw: dict[str, Tensor]) -> list[Tensor]:
        if form == "rpn":
            found = net.losses(raw, maps, targets, sizes)
            return [found[k] for k in ("loss_objectness", "loss_rpn_box_reg", "loss_shape", "loss_location")]
        found = {**guided_dense_loss(raw, targets), **net.guide.losses(raw, maps, targets)}
        return [found[k] for k in ("classification", "localisation", "loss_shape", "loss_location")]

    raw = run(everywhere=True)
    kinds = {"rpn": ("objectness", "rpn_deltas"), "retina": ("logits", "deltas")}[form]
    expected = dict(zip((*kinds, "shapes", "location"), ("cls", "reg", "shape", "loc"), strict=True))
    gaps = {
        "output": max(float((raw[a].flatten() - stored[b].flatten()).detach().abs().max()) for a, b in expected.items())
    }
    gaps["output"] = max(gaps["output"], float((raw["anchors"][:, ::7] - stored["anchors"]).abs().max()))

    squares, level, grids = net.guide._squares(maps), net.guide._levels(maps), [m.shape[2:] for m in maps]
    objects = [net.guide._objects(target, squares) for target in targets]
    for target, row in zip(targets, stored["location_targets"], strict=True):
        belongs = level_of(target["boxes"][:, 2:] - target["boxes"][:, :2], strides, net.guide.scale)
        got = location_targets(target["boxes"], belongs, grids, strides, centre="corner")
        assert torch.equal(got, row.long())
        assert {-1, 0, 1} == set(got.tolist())
    matches = torch.stack([net.guide._match(squares, level, *own) for own in objects])
    assert torch.equal(matches >= 0, stored["shape_positive"] == 1)
    assert torch.equal(matches[matches >= 0], stored["shape_object"].long()[matches >= 0])
    assert int((matches > -2).sum()) == int(stored["shape_count"])
    high, low = (0.7, 0.3) if form == "rpn" else (0.5, 0.0)
    for n, target in enumerate(targets):
        overlaps = box_iou(target["boxes"], raw["anchors"][n])
        learnt = labels_of(assign(overlaps, positive=high, negative=0.3 if form == "rpn" else 0.5, low=low))
        assert torch.equal(learnt == 1, stored["positive"][n] == 1)
        assert torch.equal(learnt >= 0, stored["weight"][n] == 1)

    found = losses(raw)
    theirs_losses = [value for name, value in stored.items() if name.startswith("loss.")]
    order = ("cls", "bbox", "shape", "loc")
    by_kind = {
        kind: value for kind in order for name, value in stored.items() if name.startswith("loss.") and kind in name
    }
    assert len(theirs_losses) == len(by_kind) == 4
    extra = centre_terms(net, maps, targets, matches)
    assert extra > 0.001
    both = list(zip(found, order, strict=True))
    gaps["losses"] = max(
        float((v + (extra if k == "shape" else 0) - by_kind[k]).detach().abs() / by_kind[k]) for v, k in both
    )
    label = stored["location_targets"]
    weight = torch.where(label == 1, 1.0, torch.where(label == 0, 0.1, 0.0))
    turned = F.binary_cross_entropy_with_logits(raw["location"], (label != 1).double(), reduction="none")
    score = raw["location"].sigmoid()
    focus = torch.where(label != 1, 0.25 * (1 - score) ** 2, 0.75 * score**2)
    as_released = (turned * focus * weight).sum() * 200 / label.numel()
    gaps["released_labels"] = float(((as_released - stored["turned"]) / stored["turned"]).detach().abs())
    sum(found).backward()
    grads = [(v.grad, stored[f"grad.{k}"]) for k, v in theirs.items()]
    grads += [((m.grad * fill(m.shape, 300 + k)).sum((2, 3)), stored[f"map.{k}"]) for k, m in enumerate(maps)]
    assert all(float(b.abs().max()) > 1e-6 for _, b in grads[: len(theirs)])
    gaps["gradient"] = max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in grads)
    torch.optim.SGD(net.parameters(), lr=0.02).step()
    with torch.no_grad():
        after = torch.stack(losses(run(everywhere=True)))
        after[2] += extra
        gaps["optimiser_step"] = float(((after - stored["after"]) / stored["after"]).abs().max())
        fill_network(net, names, rare, shape)
        masked = run(everywhere=False)
        assert 0.02 < masked["kept"].double().mean() < 0.8
        for n in range(2):
            if form == "rpn":
                boxes, scores = net.propose(masked, maps, sizes)
                got = torch.cat([boxes[n], scores[n, :, None], torch.zeros_like(scores[n, :, None])], 1)
            else:
                seen = net.decode({**masked, "sizes": sizes}, [(96, 96)] * 2)[n]
                got = torch.cat([seen.boxes, seen.scores[:, None], seen.labels[:, None] - 1.0], 1)
            wanted = stored[f"found.{n}"]
            assert len(wanted) >= 20
            gaps[f"boxes_{n}"] = float((got[: len(wanted)] - wanted).abs().max()) / 96
    return gaps


def test_matches_the_released_heads(record, parity, double) -> None:
    """Outputs, targets, losses, gradients of maps and all weights, the losses after a step, and the found boxes."""
    stored = parity("guided_anchoring")
    gaps: dict[str, float] = {}
    for form in ("rpn", "retina"):
        own = {name[len(form) + 1 :]: value for name, value in stored.items() if name.startswith(f"{form}.")}
        for name, gap in released_gaps(form, own).items():
            gaps[name] = max(gaps.get(name, 0.0), gap)
    assert max(gaps.values()) < 2e-7, gaps
    record(
        "guided_anchoring",
        "matched",
        repository=REPOSITORY,
        commit=RELEASE,
        largest_difference=max(gaps.values()),
        note="float64; GARPNHead and GARetinaHead on torchvision's deformable convolution, with the location labels "
        "turned around; losses and the step relative, gradients over the largest, boxes over the image's side",
        **gaps,
    )


def slow_overlap(a: list[float], b: list[float]) -> float:
    w, h = (max(min(a[k + 2], b[k + 2]) - max(a[k], b[k]), 0.0) for k in (0, 1))
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return w * h / (area[0] + area[1] - w * h)


def slow_locations(boxes: Tensor, grids: list[tuple[int, int]], strides: tuple[int, ...], scale: float) -> list[int]:
    """Which position is positive, ignored or negative, position by position, from the paper's regions."""
    found = []
    for k, ((height, width), stride) in enumerate(zip(grids, strides, strict=True)):
        for row in range(height):
            for column in range(width):
                label = 0
                for x1, y1, x2, y2 in boxes.tolist():
                    side = math.sqrt((x2 - x1) * (y2 - y1))
                    level = math.floor(math.log2(side) - math.log2(scale * strides[0]) + 0.5)
                    level = min(max(level, 0), len(strides) - 1)
                    for ratio, value, maps in ((0.5, -1, (level - 1, level, level + 1)), (0.2, 1, (level,))):
                        inside = k in maps
                        for low, high, cell, size in ((x1, x2, column, width), (y1, y2, row, height)):
                            middle, half = (low + high) / 2 / stride - 0.5, (high - low) / 2 / stride * ratio
                            first, last = (min(max(round(v), 0), size - 1) for v in (middle - half, middle + half))
                            inside = inside and first <= cell <= last
                        if inside and label != 1:
                            label = value
                found.append(label)
    return found


def some_boxes(count: int, size: float = 128.0, *, seed: int = 0, stretch: float = 1.0) -> Tensor:
    """Boxes (L, 4) inside an image; ``stretch`` is the spread of log2 of width over height."""
    g = torch.Generator().manual_seed(seed)
    side = 10 + torch.rand(count, generator=g) * 50
    ratio = 2 ** ((torch.rand(count, generator=g) * 2 - 1) * stretch)
    sides = torch.stack([side * ratio.sqrt(), side / ratio.sqrt()], 1).clamp(max=size - 1)
    corner = torch.rand(count, 2, generator=g) * (size - sides)
    return torch.cat([corner, corner + sides], 1)


GRIDS, STRIDES = [(32, 32), (16, 16), (8, 8)], (4, 8, 16)


def relative(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squares, strides, places and sides as ``sampled_overlaps`` takes them."""
    squares = base_squares(GRIDS, STRIDES, boxes)
    strides = torch.cat([torch.full((h * w,), float(s)) for (h, w), s in zip(GRIDS, STRIDES, strict=True)])
    places = (squares[:, :2] + squares[:, 2:]) / 2 - ((boxes[:, :2] + boxes[:, 2:]) / 2)[:, None]
    return squares, strides, places, boxes[:, 2:] - boxes[:, :2]


def test_targets_and_losses_equal_slow_references(record, double) -> None:
    boxes = some_boxes(9, stretch=1.5)
    level = level_of(boxes[:, 2:] - boxes[:, :2], STRIDES)
    assert len(set(level.tolist())) == 2
    got = location_targets(boxes, level, GRIDS, STRIDES)
    assert got.tolist() == slow_locations(boxes, GRIDS, STRIDES, 8.0)

    squares, strides, places, sides = relative(boxes)
    overlaps = sampled_overlaps(places, strides, sides)
    gaps = []
    for n in range(0, len(squares), 53):
        x, y = ((squares[n, :2] + squares[n, 2:]) / 2).tolist()
        for m, box in enumerate(boxes.tolist()):
            best = 0.0
            for size in (1, 2 ** (1 / 3), 2 ** (2 / 3)):
                for ratio in (0.5, 1.0, 2.0):
                    w, h = (8 * float(strides[n]) * size * ratio**p / 2 for p in (-0.5, 0.5))
                    best = max(best, slow_overlap([x - w, y - h, x + w, y + h], box))
            gaps.append(abs(best - float(overlaps[m, n])))
    tops = overlaps.amax(1).tolist()
    for high, negative, low in ((0.7, 0.3, 0.3), (0.5, 0.4, 0.4), (0.5, 0.5, 0.0)):
        rows = []
        for n in range(overlaps.shape[1]):
            column = overlaps[:, n].tolist()
            best = max(column)
            row = column.index(best) if best >= high else (-1 if best < negative else -2)
            for m, value in enumerate(column):
                if value == tops[m] and value >= low and value > 0:
                    row = m
            rows.append(row)
        assert assign(overlaps, positive=high, negative=negative, low=low).tolist() == rows

    logits, total = torch.randn(2, 50), 0.0
    labels = torch.randint(-1, 2, (2, 50))
    for x, label in zip(logits.flatten().tolist(), labels.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        if label == 1:
            total -= 0.25 * (1 - p) ** 2 * math.log(p)
        elif label == 0:
            total -= 0.1 * 0.75 * p**2 * math.log(1 - p)
    gaps.append(abs(float(location_loss(logits, labels)) - total / (100 / 200)))
    own, truth = torch.rand(20, 2) * 30 + 1, torch.rand(20, 2) * 30 + 1
    for (a, b), (c, d), each in zip(own.tolist(), truth.tolist(), bounded_iou_loss(own, truth).tolist(), strict=True):
        for x, y, value in ((a, c, each[0]), (b, d, each[1])):
            miss = 1 - min(x / y, y / x)
            gaps.append(abs(value - (miss**2 / 0.4 if miss < 0.2 else miss - 0.1)))
    angle, wanted = torch.rand(20) * 6, torch.rand(20) * 6
    doubled = torch.stack([(2 * angle).cos(), (2 * angle).sin()], 1) * torch.rand(20, 1)
    for n, value in enumerate(angle_loss(doubled, wanted, truth).tolist()):
        w, h = truth[n].tolist()
        gaps.append(abs(value - (1 - math.cos(2 * float(angle[n] - wanted[n]))) * abs(w - h) / (w + h)))
    assert max(gaps) < 1e-12
    record(
        "guided_anchoring",
        "referenced",
        largest_difference=max(gaps),
        dtype="float64",
        what="location regions, vIoU by nine samples, assignment, and the losses of locations, shapes and angles",
    )


def test_sampled_overlap_is_a_lower_bound_of_the_exact_maximum(double) -> None:
    """And the exact maximum is that of a brute force over sides."""
    boxes = some_boxes(60, stretch=3.0)
    _, strides, places, sides = relative(boxes)
    exact, sampled = free_overlaps(places, sides), sampled_overlaps(places, strides, sides)
    assert (sampled <= exact + 1e-12).all()
    trial = 2.0 ** torch.linspace(0, 8, 161)
    grid = torch.cartesian_prod(trial, trial)
    for m, n in [(k % 60, (k * 97) % places.shape[1]) for k in range(60)]:
        half, place = sides[m] / 2, places[m, n]
        inter = torch.minimum(place + grid / 2, half) - torch.maximum(place - grid / 2, -half)
        inter = inter.clamp(min=0).prod(1)
        brute = float((inter / (grid.prod(1) + sides[m].prod() - inter)).max())
        assert brute <= float(exact[m, n]) + 1e-12
        assert brute >= float(exact[m, n]) * 0.93
    level = level_of(sides, STRIDES)
    own = torch.cat([torch.full((h * w,), k) for k, (h, w) in enumerate(GRIDS)]) == level[:, None]
    middle = (places.abs() < 0.1 * sides[:, None]).all(-1) & own
    gap = (exact - sampled)[middle]
    assert len(gap) > 100
    assert 0.05 < float(gap.mean()) < 0.5


def test_zero_shapes_are_squares_of_eight_strides(double) -> None:
    like = torch.zeros(1)
    for centre, shift in (("middle", 0.5), ("corner", 0.0)):
        squares = base_squares(GRIDS, STRIDES, like, centre=centre)
        sides = guided_sides(squares, torch.zeros(2, len(squares), 2), 0.14)
        boxes = anchors_at(squares, sides)
        assert torch.equal(boxes, squares.expand(2, -1, -1))
        start = 0
        for (height, width), stride in zip(GRIDS, STRIDES, strict=True):
            part = boxes[0, start : start + height * width].view(height, width, 4)
            assert torch.equal(part[..., 2:] - part[..., :2], torch.full((height, width, 2), 8.0 * stride))
            assert (part[3, 5, :2] + part[3, 5, 2:]).tolist() == [2 * (5 + shift) * stride, 2 * (3 + shift) * stride]
            start += height * width
    sides = guided_sides(squares, torch.ones(1, len(squares), 2) / 0.14, 0.14)
    torch.testing.assert_close(sides, (squares[:, 2:] - squares[:, :2])[None] * math.e)


def test_locations_are_of_three_kinds_and_no_object_goes_without() -> None:
    boxes = torch.cat([some_boxes(12), torch.tensor([[124.0, 60, 128, 64], [0, 0, 128, 128], [127, 127, 128, 128]])])
    level = level_of(boxes[:, 2:] - boxes[:, :2], STRIDES)
    start = [0, 1024, 1280]
    for k, box in enumerate(boxes):
        got = location_targets(box[None], level[k : k + 1], GRIDS, STRIDES)
        parts = [got[a : a + h * w].view(h, w) for a, (h, w) in zip(start, GRIDS, strict=True)]
        positive = [int((part == 1).sum()) for part in parts]
        assert [count > 0 for count in positive] == [m == level[k] for m in range(3)]
        assert [bool((part == -1).any()) for part in parts][int(level[k]) - 1 if level[k] else 1]
        near = {int(level[k]) - 1, int(level[k]), int(level[k]) + 1}
        assert all(bool((part == 0).all()) for m, part in enumerate(parts) if m not in near)
    # the release has no position for an object at the right edge that is smaller than half a cell
    edge = boxes[-1:]
    assert (location_targets(edge, torch.tensor([2]), GRIDS, STRIDES) == 1).sum() == 1
    assert (location_targets(edge, torch.tensor([2]), GRIDS, STRIDES, centre="corner") == 1).sum() == 0
    assert location_targets(boxes[:0], level[:0], GRIDS, STRIDES).unique().tolist() == [0]


def test_adaption_without_offsets_is_an_ordinary_convolution(double) -> None:
    x, shapes = torch.randn(2, 8, 9, 7), torch.randn(2, 2, 9, 7)
    layer, plain = FeatureAdaption(8, 6), nn.Conv2d(8, 6, 3, padding=1, bias=False)
    nn.init.zeros_(layer.offset.weight)
    plain.weight.data = layer.weight.data
    expected = plain(x).relu()
    torch.testing.assert_close(layer(x, shapes), expected)
    without = FeatureAdaption(8, 6, adaption="none")
    without.weight.data = layer.weight.data
    torch.testing.assert_close(without(x, shapes), expected)
    flat = torch.stack([torch.ones(2, 9, 7), torch.zeros(2, 9, 7)], 1)
    torch.testing.assert_close(without(x, shapes, flat), expected)
    upright = flat.flip(1)  # 90 degrees: what a tap saw to its right it sees below
    turned = F.conv2d(x, layer.weight.rot90(1, (2, 3)).rot90(2, (2, 3)), padding=1).relu()
    torch.testing.assert_close(without(x, shapes, upright), turned)


@pytest.mark.parametrize("adaption", ["shape", "features", "none"])
@pytest.mark.parametrize("oriented", [False, True])
def test_adaption_at_chosen_positions_and_its_gradients(adaption: str, oriented: bool, double) -> None:
    layer = FeatureAdaption(4, 3, offset_groups=2, adaption=adaption)
    for value in layer.parameters():
        nn.init.normal_(value, std=0.3)
    x, shapes = torch.randn(2, 4, 6, 5, requires_grad=True), torch.randn(2, 2, 6, 5, requires_grad=True)
    turns = turns_of(torch.randn(2, 6, 5, 2)).permute(0, 3, 1, 2) if oriented else None
    place = torch.nonzero(torch.rand(2, 6, 5) > 0.6)
    dense, chosen = layer(x, shapes, turns), layer.at(x, shapes, place, turns)
    torch.testing.assert_close(chosen, dense[place[:, 0], :, place[:, 1], place[:, 2]])
    dense.sum().backward()
    assert shapes.grad is None
    assert x.grad.abs().sum() > 0
    assert all(value.grad.abs().sum() > 0 for value in layer.parameters())
    weights = torch.randn_like(chosen)
    assert torch.autograd.gradcheck(lambda v: (layer.at(v, shapes, place, turns) * weights).sum(), (x,))


def one_image() -> tuple[Tensor, list[dict[str, Tensor]]]:
    boxes = torch.tensor([[5.0, 5, 40, 45], [30, 20, 60, 60]])
    rotated = torch.tensor([[22.0, 25, 12, 40, 0.4], [45, 40, 30, 16, -0.7]])
    return torch.rand(1, 3, 64, 64), [{"boxes": boxes, "labels": torch.tensor([2, 3]), "rotated": rotated}]


def dense(net: nn.Module, images: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What an exported file computes: everywhere, then the mask."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        raw: dict[str, Tensor] = net(images)
    return raw


@pytest.mark.parametrize("options", [{}, {"oriented": True}, {"adaption": "features"}, {"adaption": "none"}, None])
def test_masked_and_dense_agree(options: dict | None, monkeypatch: pytest.MonkeyPatch, double) -> None:
    if options is None:
        net: nn.Module = GuidedRetinaNet(num_classes=3, backbone="timm/test_efficientnet", channels=16).eval()
    else:
        net = GuidedAnchoring(**{**SMALL, **options}).eval()
    images = [torch.rand(3, 64, 64), torch.rand(3, 50, 90)]
    guide = net.guide if options is None else net.rpn.guide
    with torch.no_grad():
        guide.location.weight.mul_(10)
        guide.shape.weight.mul_(30)
        raw = net(images)
        guide.location.bias += guide.location.bias - raw["location"].median()  # half of the positions stay
        masked, whole = net(images), dense(net, images, monkeypatch)
    assert 0.2 < float(masked["kept"].double().mean()) < 0.8
    assert set(masked) == set(whole)
    for name, value in masked.items():
        torch.testing.assert_close(value, whole[name], msg=name)
    scores = masked["logits" if options is None else "objectness"]
    assert (scores[~masked["kept"]] == -1000).all()
    assert (scores[masked["kept"]] > -1000).all()
    with torch.no_grad():
        nn.init.zeros_(guide.location.weight)
        guide.location.bias.fill_(-50)
        nothing = net.predict(images, score_threshold=0.0)
    assert [len(found) for found in nothing] == [0, 0]


def test_forms_and_their_losses() -> None:
    second = {"loss_classifier", "loss_box_reg"}
    plain = {"loss_objectness", "loss_rpn_box_reg"}
    guided = plain | {"loss_location", "loss_shape"}
    nine = [[16.0, 20, 25], [32, 40, 51], [64, 81, 102], [128, 161, 203], [256, 323, 406]]
    for options, expected, anchors in (
        ({}, guided | second, 1),
        ({"adaption": "features"}, guided | second, 1),
        ({"adaption": "none"}, guided | second, 1),
        ({"shape_matching": "continuous"}, guided | second, 1),
        ({"centre": "corner", "image_size": 96}, guided | second, 1),
        ({"oriented": True}, guided | second | {"loss_angle"}, 1),
        ({"stages": 1, "num_classes": 1}, guided, 1),
        ({"proposals": "fixed"}, plain | second, 3),
        ({"proposals": "fixed", "aspect_ratios": (1.0,)}, plain | second, 1),
        ({"proposals": "fixed", "anchor_sizes": nine}, plain | second, 9),
    ):
        net = GuidedAnchoring(**{**SMALL, **options})
        image, targets = one_image()
        if net.num_classes == 1:
            targets[0]["labels"] = torch.ones(2, dtype=torch.int64)
        losses = net.losses(image, targets)
        assert set(losses) == expected
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
        positions = sum((96 if net.image_size else 64) ** 2 // s**2 for s in (4, 8, 16, 32))
        assert net(image)["anchors"].shape[-2] == anchors * (positions + (4 if net.image_size else 1))
        found = net.eval().predict(image, score_threshold=0.0)[0]
        assert (found.scores.diff() <= 0).all()
    image, targets = one_image()
    del targets[0]["rotated"]
    with pytest.raises(ValueError, match="rotated"):
        GuidedAnchoring(**{**SMALL, "oriented": True}).losses(image, targets)


def test_gradients_stop_where_they_should() -> None:
    """Neither the adaption nor the boxes' targets pull at the shapes; the shape loss does."""
    net = GuidedAnchoring(**SMALL)
    nn.init.normal_(net.rpn.deltas.weight, std=0.1)
    for name, reached in (("loss_objectness", False), ("loss_rpn_box_reg", False), ("loss_shape", True)):
        net.zero_grad()
        net.losses(*one_image())[name].backward()
        grad = net.rpn.guide.shape.weight.grad
        assert (grad is not None and bool(grad.abs().sum() > 0)) == reached, name
        assert net.rpn.guide.location.weight.grad is None
    assert not net(one_image()[0])["anchors"].requires_grad


def test_an_exact_match_costs_nothing_and_worse_ones_more(double) -> None:
    truth = torch.rand(30, 2) * 40 + 4
    assert bounded_iou_loss(truth, truth).abs().max() == 0
    costs = [bounded_iou_loss(truth * factor, truth).sum() for factor in (1.0, 1.1, 1.4, 2.0, 8.0)]
    assert costs == sorted(costs)
    torch.testing.assert_close(bounded_iou_loss(truth * 3, truth), bounded_iou_loss(truth / 3, truth))
    sides = truth.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: bounded_iou_loss(v * 1.3, truth), (sides,))


def test_guided_proposals_stand_in_another_detector() -> None:
    from torchive.methods.detection.tsd import TSD

    net = TSD(num_classes=3, backbone="timm/test_efficientnet", channels=16, hidden=32, inter_channels=16)
    net.rpn = GuidedProposals(net.backbone.levels, anchor_scale=4.0, after_nms=(50, 20))
    losses = net.losses(*one_image())
    assert {"loss_location", "loss_shape", "loss_tsd_classifier"} <= set(losses)
    sum(losses.values()).backward()
    assert net.rpn.adaption.offset.weight.grad.abs().sum() > 0
    net.eval()
    assert all(torch.isfinite(v) for v in net.losses(*one_image()).values())
    assert net(one_image()[0])["proposals"].shape == (1, 20, 4)


@pytest.mark.parametrize("form", ["two_stage", "one_stage", "oriented", "continuous"])
def test_crowds_single_pixels_and_nothing(form: str) -> None:
    if form == "one_stage":
        net: nn.Module = GuidedRetinaNet(num_classes=3, backbone="timm/test_efficientnet", channels=16)
    else:
        extra = {"oriented": {"oriented": True}, "continuous": {"shape_matching": "continuous"}}.get(form, {})
        net = GuidedAnchoring(**{**SMALL, **extra})
    corner, sides = torch.rand(1000, 2) * 60, 0.5 + torch.rand(1000, 2) * 4
    angle = torch.rand(1000, 1) * 6
    many = {
        "boxes": torch.cat([corner, corner + sides], 1),
        "rotated": torch.cat([corner + sides / 2, sides, angle], 1),
    }
    pixel = {"boxes": torch.tensor([[10.0, 10, 11, 11]]), "rotated": torch.tensor([[10.5, 10.5, 1, 1, 0]])}
    none = {"boxes": torch.zeros(0, 4), "rotated": torch.zeros(0, 5)}
    images = [torch.rand(3, 64, 64), torch.rand(3, 50, 70), torch.rand(3, 40, 40)]
    for chosen in ([many, pixel, none], [none, none, none]):
        targets = [{**target, "labels": torch.ones(len(target["boxes"]), dtype=torch.int64)} for target in chosen]
        net.zero_grad()
        losses = net.losses(images, targets)
        sum(losses.values()).backward()
        assert all(torch.isfinite(v) for v in losses.values())
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    assert float(losses["loss_shape"].detach()) == 0


def bars(count: int, seed: int, size: int = 96) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Images with three bars each, lying or standing, one to eight times as long as wide; they may touch."""
    g = torch.Generator().manual_seed(seed)
    images, targets = torch.randn(count, 3, size, size, generator=g) * 0.2 + 0.4, []
    for image in images:
        area, ratio = 2 ** (7.5 + 2.5 * torch.rand(3, generator=g)), 2 ** (torch.rand(3, generator=g) * 3)
        sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1)
        sides = torch.where(torch.rand(3, 1, generator=g) < 0.5, sides, sides.flip(1)).round()
        corner = (torch.rand(3, 2, generator=g) * (size - sides)).round()
        boxes = torch.cat([corner, corner + sides], 1)
        for x1, y1, x2, y2 in boxes.int().tolist():
            image[:, y1:y2, x1:x2] = 0.6 + torch.rand(3, 1, 1, generator=g) * 0.5
        targets.append({"boxes": boxes, "labels": torch.ones(3, dtype=torch.int64)})
    return images, targets


@pytest.mark.slow
def test_thirty_guided_anchors_find_more_bars_than_all_squares() -> None:
    """Trained on elongated objects: the share of them that one of the 30 likeliest anchors overlaps by half."""
    images, targets = bars(240, 1)
    options = {**SMALL, "channels": 32, "num_classes": 1, "stages": 1, "offset_groups": 1}
    net = GuidedAnchoring(**options).train()
    optimiser = torch.optim.AdamW(net.parameters(), lr=6e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=400, pct_start=0.1)
    for _ in range(400):
        rows = torch.randint(0, 240, (4,)).tolist()
        losses = net.losses(images[rows], [targets[k] for k in rows])
        optimiser.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 35.0)
        optimiser.step()
        schedule.step()
    images, targets = bars(60, 2)
    with torch.no_grad():
        raw = net.eval()(images)
    squares = base_squares([(96 // s + (96 % s > 0),) * 2 for s in net.strides], net.strides, images, scale=4.0)
    best = raw["location"].topk(30, 1).indices[..., None].expand(-1, -1, 4)
    guided = raw["anchors"].gather(1, best)
    found = [
        torch.cat([box_iou(t["boxes"], own).amax(1) for t, own in zip(targets, rows, strict=True)])
        for rows in (guided, squares.expand(60, -1, -1))
    ]
    shares = [float((overlap >= 0.5).float().mean()) for overlap in found]
    assert shares[0] > shares[1] + 0.2, shares


def test_paper_defaults() -> None:
    with torch.device("meta"):
        net, one = GuidedAnchoring(), GuidedRetinaNet()
    assert net.strides == (4, 8, 16, 32, 64)
    assert one.strides == (8, 16, 32, 64, 128)
    assert (net.rpn.guide.scale, net.rpn.guide.std, one.guide.scale, one.guide.std) == (8.0, 0.14, 4.0, 1.0)
    assert net.rpn.adaption.offset.weight.shape == (4 * 18, 2, 1, 1)
    assert net.rpn.adaption.weight.shape == (256, 256, 3, 3)
    assert (net.rpn.threshold, net.rpn.after_nms, net.iou_threshold) == (0.01, (300, 300), 0.6)
    torch.manual_seed(0)
    guided = GuidedProposals([Level(256, 8)])
    torch.testing.assert_close(guided.guide.location.bias.sigmoid(), torch.tensor([0.01]))
    spreads = {
        "guide.location": 0.01,
        "guide.shape": 0.01,
        "objectness": 0.01,
        "adaption": 0.01,
        "adaption.offset": 0.1,
    }
    for name, spread in spreads.items():
        assert abs(float(guided.get_submodule(name).weight.detach().std()) / spread - 1) < 0.2, name


def test_bad_arguments_name_the_value() -> None:
    for cls, options, text in (
        (GuidedAnchoring, {"proposals": "learnt"}, "learnt"),
        (GuidedAnchoring, {"stages": 3}, "stages=3"),
        (GuidedAnchoring, {"stages": 1}, "got 80"),
        (GuidedAnchoring, {"adaption": "both"}, "both"),
        (GuidedAnchoring, {"shape_matching": "exact"}, "exact"),
        (GuidedAnchoring, {"centre": "left"}, "left"),
        (GuidedAnchoring, {"location_threshold": 1.0}, "got 1.0"),
        (GuidedAnchoring, {"anchor_scale": 0.0}, "got 0.0"),
        (GuidedAnchoring, {"offset_groups": 3}, "3 offset_groups"),
        (GuidedAnchoring, {"iou_threshold": 1.5}, "got 1.5"),
        (GuidedRetinaNet, {"num_classes": 0}, "got 0"),
        (GuidedRetinaNet, {"location_threshold": -1.0}, "got -1.0"),
    ):
        with pytest.raises(ValueError, match=text):
            cls(**{"backbone": "timm/test_efficientnet", "channels": 16, **options})
    with pytest.raises(ValueError, match="8, 16"):
        GuidedProposals([Level(8, 4), Level(16, 8)])
