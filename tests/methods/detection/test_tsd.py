"""TSD: the released head on copied weights, a slow float64 reference, and the laws of its parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from torchive.methods.detection.tsd import TSD, TSDHead, progressive_constraint
from torchive.methods.detection.tsd.head import SiblingHead, move
from torchive.methods.detection.tsd.loss import shortfall
from torchive.methods.detection.tsd.pooling import pool_bins, pool_box
from torchive.nn.regions import WEIGHTS, Regions, region_loss, region_maps, sample_regions
from torchive.ops.boxes import decode_boxes, encode_boxes
from torchive.ops.roi import pool_regions

REPOSITORY, COMMIT = "Sense-X/TSD", "fb1fdd7f14f3c136f4b849914977fae1d8d49398"
STRIDES = (4, 8, 16, 32)
SMALL = {
    "num_classes": 3,
    "backbone": "timm/test_efficientnet",
    "channels": 16,
    "hidden": 32,
    "inter_channels": 16,
    "anchor_sizes": [[8.0], [16.0], [32.0], [64.0], [128.0]],
    "before_nms": (200, 100),
    "after_nms": (100, 50),
    "rois_per_image": 64,
}
#: The release's names, in the order of the seeds from which both sides were filled, and the names here.
NAMES = {
    "TSD_fc_cls": "head.class_score",
    "TSD_fc_reg": "head.box_delta",
    "TSD_pc_fcs.0": "head.class_branch.fc6",
    "TSD_pc_fcs.1": "head.class_branch.fc7",
    "TSD_pr_fcs.0": "head.box_branch.fc6",
    "TSD_pr_fcs.1": "head.box_branch.fc7",
    "delta_c.0": "head.shift_class.0",
    "delta_c.2": "head.shift_class.2",
    "delta_r.0": "head.shift_box.0",
    "delta_r.2": "head.shift_box.2",
    "fc_cls": "sibling.class_score",
    "fc_reg": "sibling.box_delta",
    "shared_fc.0": "head.shared.1",
    "shared_fcs.0": "sibling.branch.fc6",
    "shared_fcs.1": "sibling.branch.fc7",
}


def fill(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    """Numbers in (-scale, scale) that are the same everywhere, without a generator."""
    at = torch.arange(math.prod(shape), dtype=torch.double)
    return ((at * 12.9898 + 78.233 * (seed + 1)).sin() * 43758.5453).frac().mul(scale).view(shape)


class Heads(nn.Module):
    def __init__(self, channels: int, num_classes: int, hidden: int, **options) -> None:
        super().__init__()
        self.head = TSDHead(channels, num_classes, hidden=hidden, **options)
        self.sibling = SiblingHead(channels, num_classes, hidden=hidden)


def test_matches_the_released_head(record, parity, double) -> None:
    """Outputs of both heads, all six losses, gradients of features, maps and weights, and the outputs after a step."""
    stored = parity("tsd")
    heads = Heads(3, 4, 24, points="release")
    names = sorted(f"{theirs}.{kind}" for theirs in NAMES for kind in ("weight", "bias"))
    own = dict(heads.named_parameters())
    assert len(own) == len(names)
    theirs = {name: own[NAMES[name.rpartition(".")[0]] + "." + name.rpartition(".")[2]] for name in names}
    with torch.no_grad():
        for seed, (name, value) in enumerate(theirs.items()):
            value.copy_(fill(value.shape, seed, 0.3 if name.endswith("bias") else 1.5 / value.shape[1] ** 0.5))
    maps = [fill((2, 3, 256 // s, 320 // s), 100 + k).requires_grad_() for k, s in enumerate(STRIDES)]
    x = fill((16, 3, 7, 7), 200).requires_grad_()
    image, boxes = stored["rois"][:, 0].long(), stored["rois"][:, 1:]
    positive = torch.tensor([k % 8 < 5 for k in range(16)])
    labels, truth = torch.zeros(16, dtype=torch.int64), torch.zeros(16, 4)
    labels[positive], truth[positive] = stored["labels"], stored["truth"]
    regions = Regions(boxes, image, labels, torch.zeros_like(labels), truth)

    def run() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        logits, deltas, moved = heads.head(x, maps, STRIDES, boxes, image)
        plain, offsets = heads.sibling(x)
        losses = dict(zip(("cls", "bbox"), region_loss(plain, offsets, regions, beta=1.0), strict=True))
        pair = region_loss(logits, deltas, regions, boxes=moved, beta=1.0)
        losses |= dict(zip(("TSD_cls", "TSD_bbox"), pair, strict=True))
        constraint = progressive_constraint(logits, deltas, moved, plain, offsets, regions, margin=0.3)
        losses |= dict(zip(("pc_cls", "pc_loc"), constraint, strict=True))
        shifts = heads.head.shifts(x)
        found = {"logits": logits, "deltas": deltas, "sibling_logits": plain, "sibling_deltas": offsets}
        found |= {"shift_class": shifts[0].flatten(1) / 0.1, "shift_box": shifts[1] / 0.1}
        return found, losses

    found, losses = run()
    sum(losses.values()).backward()
    gaps = {"output": max(float((v - stored[f"y.{k}"]).detach().abs().max()) for k, v in found.items())}
    gaps["losses"] = max(float((v - stored[f"loss.loss_{k}"]).detach().abs()) for k, v in losses.items())
    assert len(losses) == 6
    assert min(float(v.detach()) for v in losses.values()) > 0.1
    grads = [float((x.grad - stored["grad.x"]).abs().max())]
    for k, m in enumerate(maps):
        assert m.grad.count_nonzero() > 20
        grads.append(float(((m.grad * fill(m.shape, 300 + k)).sum((2, 3)) - stored[f"grad.map{k}"]).abs().max()))
    for seed, (name, value) in enumerate(theirs.items()):
        got = value.grad
        if got.numel() >= 700 and got.ndim == 2:
            got = (got * fill(got.shape, 400 + seed)).sum(1)
        grads.append(float((got - stored[f"grad.{name}"]).abs().max()))
    gaps["gradient"] = max(grads)
    torch.optim.SGD(heads.parameters(), lr=0.05).step()
    found, losses = run()
    gaps["optimiser_step"] = max(
        float((found["logits"] - stored["after.logits"]).detach().abs().max()),
        float((found["deltas"] - stored["after.deltas"]).detach().abs().max()),
        float((sum(losses.values()) - stored["after.total"]).detach().abs()),
    )
    assert max(gaps.values()) < 1e-9, gaps
    record(
        "tsd",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=max(gaps.values()),
        note="float64; the release's head, targets and losses, its pooling kernel compiled for the CPU as it is",
        **gaps,
    )


def slow_constraint(own: tuple[Tensor, Tensor, Tensor], plain: tuple[Tensor, Tensor], regions: Regions, margin: float):
    """Equations 6 and 7, region by region, in plain Python."""

    def score(logits: list[float], label: int) -> float:
        top = max(logits)
        return math.exp(logits[label] - top) / sum(math.exp(v - top) for v in logits)

    def decoded(box: list[float], code: list[float]) -> list[float]:
        w, h = box[2] - box[0], box[3] - box[1]
        x, y = box[0] + w / 2 + code[0] / 10 * w, box[1] + h / 2 + code[1] / 10 * h
        w, h = w * math.exp(code[2] / 5), h * math.exp(code[3] / 5)
        return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]

    def iou(a: list[float], b: list[float]) -> float:
        w, h = (max(min(a[k + 2], b[k + 2]) - max(a[k], b[k]), 0) for k in (0, 1))
        return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)

    with_objects = {int(i) for i, label in zip(regions.image, regions.labels, strict=True) if label > 0}
    scores, places = [], []
    for k, label in enumerate(regions.labels.tolist()):
        if int(regions.image[k]) in with_objects:
            s = score(plain[0][k].tolist(), label)
            scores.append(max(s + min(margin, 1 - s) - score(own[0][k].tolist(), label), 0))
        if label > 0:
            part = slice(4 * label, 4 * label + 4)
            truth = regions.truth[k].tolist()
            first = iou(decoded(regions.boxes[k].tolist(), plain[1][k, part].tolist()), truth)
            second = iou(decoded(own[2][k].tolist(), own[1][k, part].tolist()), truth)
            places.append(max(first + min(margin, 1 - first) - second, 0))
    return sum(scores) / len(scores), sum(places) / len(places)


def some_regions(count: int = 24) -> Regions:
    """Of three images, of which the last has no object; a third of the others' regions are positive."""
    corner = torch.rand(count, 2) * 60
    boxes = torch.cat([corner, corner + 10 + torch.rand(count, 2) * 40], 1)
    image = torch.arange(count) * 3 // count
    labels = torch.where((torch.arange(count) % 3 == 0) & (image < 2), torch.randint(1, 4, (count,)), 0)
    truth = torch.where(labels[:, None] > 0, boxes + torch.randn(count, 4) * 3, 0)
    return Regions(boxes, image, labels, torch.zeros_like(labels), truth)


def test_constraint_equals_slow_reference(record, double) -> None:
    regions, gaps = some_regions(), []
    for margin in (0.2, 0.3):
        own = (torch.randn(24, 4), torch.randn(24, 16), regions.boxes + torch.randn(24, 1) * 2)
        plain = (torch.randn(24, 4) * 2, torch.randn(24, 16))
        got = progressive_constraint(*own, *plain, regions, margin=margin)
        expected = slow_constraint(own, plain, regions, margin)
        assert min(expected) > 0.05
        gaps += [abs(float(a) - b) for a, b in zip(got, expected, strict=True)]
    assert max(gaps) < 1e-12
    record("tsd", "referenced", largest_difference=max(gaps), dtype="float64", what="equations 6 and 7")


def test_constraint_vanishes_beyond_the_margin_and_is_bounded(double) -> None:
    sibling, own = torch.rand(200), torch.rand(200)
    got = shortfall(own, sibling, 0.2)
    enough = own >= sibling + torch.minimum(torch.tensor(0.2), 1 - sibling)
    assert enough.any()
    assert (got[enough] == 0).all()
    assert (got[~enough] > 0).all()
    assert (got <= 0.2 + sibling).all()
    assert (got <= 1).all()
    regions = some_regions()
    logits = torch.full((24, 4), -20.0).scatter(1, regions.labels[:, None], 20.0)
    perfect = encode_boxes(regions.truth, regions.boxes, WEIGHTS).nan_to_num().repeat(1, 4)
    zero = progressive_constraint(logits, perfect, regions.boxes, torch.randn(24, 4), perfect * 1.3, regions)
    assert float(zero[0]) < 1e-12
    assert float(zero[1]) < 1e-12


def test_no_gradient_reaches_the_sibling_through_the_constraint(double) -> None:
    regions = some_regions()
    own = [torch.randn(24, n, requires_grad=True) for n in (4, 16)]
    moved = (regions.boxes + 1).requires_grad_()
    plain = [torch.randn(24, n, requires_grad=True) for n in (4, 16)]
    sum(progressive_constraint(*own, moved, *plain, regions)).backward()
    assert all(v.grad is None for v in plain)
    assert all(v.grad.abs().sum() > 0 for v in (*own, moved))


def test_constraint_without_any_object_is_zero_with_gradients() -> None:
    regions = some_regions()
    nothing = Regions(
        regions.boxes, regions.image, torch.zeros_like(regions.labels), regions.matched, regions.truth * 0
    )
    own = [torch.randn(24, n, requires_grad=True) for n in (4, 16)]
    got = progressive_constraint(*own, regions.boxes, torch.randn(24, 4), torch.randn(24, 16), nothing)
    sum(got).backward()
    assert [float(v.detach()) for v in got] == [0, 0]
    assert all(torch.isfinite(v.grad).all() for v in own)


def levels(channels: int = 5) -> list[Tensor]:
    return [torch.randn(2, channels, 256 // s, 320 // s) for s in STRIDES]


def test_without_shifts_it_is_the_ordinary_head(double) -> None:
    """Pooled features are RoIAlign's, and boxes on copied weights those of the ordinary head."""
    maps, regions = levels(), some_regions()
    boxes, image = regions.boxes * 4, regions.image % 2
    for samples in (2, 4):
        expected = pool_regions(maps, STRIDES, boxes, image, sampling_ratio=samples)
        for part in (
            pool_bins(maps, STRIDES, boxes, image, torch.zeros(24, 2, 7, 7), samples=samples),
            pool_box(maps, STRIDES, boxes, image, torch.zeros(24, 2), samples=samples),
            pool_box(maps, STRIDES, boxes, image, torch.zeros(24, 2, requires_grad=True), samples=samples),
        ):
            torch.testing.assert_close(part, expected, rtol=0, atol=1e-10)
    heads = Heads(5, 3, 16, samples=2)
    for branch in (heads.head.class_branch, heads.head.box_branch):
        branch.load_state_dict(heads.sibling.branch.state_dict())
    heads.head.class_score.load_state_dict(heads.sibling.class_score.state_dict())
    heads.head.box_delta.load_state_dict(heads.sibling.box_delta.state_dict())
    for last in (heads.head.shift_class[2], heads.head.shift_box[2]):
        nn.init.zeros_(last.weight)
    pooled = pool_regions(maps, STRIDES, boxes, image)
    logits, deltas, moved = heads.head(pooled, maps, STRIDES, boxes, image)
    plain, offsets = heads.sibling(pooled)
    torch.testing.assert_close(logits, plain)
    weights = (10.0, 10.0, 5.0, 5.0)
    torch.testing.assert_close(
        decode_boxes(deltas.unflatten(1, (4, 4)), moved[:, None], weights),
        decode_boxes(offsets.unflatten(1, (4, 4)), boxes[:, None], weights),
    )


def test_ramp_moves_by_gamma_times_the_shift(double) -> None:
    ramp = torch.arange(64.0).expand(1, 1, 64, 64) * 0.7
    boxes, image = torch.tensor([[60.0, 50, 120, 90]]), torch.tensor([0])
    shift = 0.1 * torch.randn(1, 2, 7, 7)
    got = pool_bins([ramp], (4,), boxes, image, shift) - pool_bins([ramp], (4,), boxes, image, shift * 0)
    torch.testing.assert_close(got[:, 0], shift[:, 0] * 60 * 0.7 / 4)
    whole = pool_box([ramp], (4,), boxes, image, shift[:, :, 0, 0]) - pool_box(
        [ramp], (4,), boxes, image, torch.zeros(1, 2)
    )
    torch.testing.assert_close(whole, (shift[0, 0, 0, 0] * 60 * 0.7 / 4).expand(1, 1, 7, 7))


@pytest.mark.parametrize("points", ["centres", "release"])
def test_pooling_gradients(points: str, double) -> None:
    maps = [torch.randn(1, 2, 9, 11, requires_grad=True)]
    boxes, image = torch.tensor([[9.0, 11, 39, 31], [2, 3, 27, 24]]), torch.tensor([0, 0])
    shift = (torch.randn(2, 2, 3, 3) * 0.05).requires_grad_()
    options = {"size": 3, "samples": 2, "points": points}
    assert torch.autograd.gradcheck(lambda x, d: pool_bins([x], (4,), boxes, image, d, **options), (maps[0], shift))
    assert torch.autograd.gradcheck(
        lambda x, d: pool_box([x], (4,), boxes, image, d[:, :, 0, 0], **options), (maps[0], shift)
    )


def test_targets_relative_to_the_moved_box_decode_to_the_truth(double) -> None:
    regions = some_regions()
    positive = regions.labels > 0
    moved = move(regions.boxes, torch.randn(24, 2) * 0.1)[positive]
    truth = regions.truth[positive]
    torch.testing.assert_close(decode_boxes(encode_boxes(truth, moved, WEIGHTS), moved, WEIGHTS), truth)
    sides = moved[:, 2:] - moved[:, :2]
    torch.testing.assert_close(sides, (regions.boxes[:, 2:] - regions.boxes[:, :2])[positive])


def one_image() -> tuple[Tensor, list[dict[str, Tensor]]]:
    boxes = torch.tensor([[5.0, 5, 40, 45], [30, 20, 60, 60]])
    return torch.rand(1, 3, 64, 64), [{"boxes": boxes, "labels": torch.tensor([2, 3])}]


def test_gradients_reach_the_shifts_by_pooling_and_by_the_targets() -> None:
    net = TSD(**SMALL)
    for name, reached in (("loss_tsd_classifier", "shift_class"), ("loss_tsd_box_reg", "shift_box")):
        net.zero_grad()
        net.losses(*one_image())[name].backward()
        for part in ("shift_class", "shift_box"):
            grad = getattr(net.head, part)[0].weight.grad
            assert (grad is not None and bool(grad.abs().sum() > 0)) == (part == reached), (name, part)
        assert all(p.grad is None for p in net.sibling.parameters())


def shifted(seed: int = 0) -> TSD:
    """A detector whose box branch moves every box by a tenth to two tenths of its sides."""
    torch.manual_seed(seed)
    net = TSD(**SMALL)
    nn.init.zeros_(net.head.shift_box[2].weight)
    net.head.shift_box[2].bias.data = torch.tensor([1.0, -2.0])
    return net


def test_losses_are_put_together_as_in_equations_2_and_8() -> None:
    """TSD's box is learnt relative to the moved one, and it is TSD that the constraint measures at the sibling."""
    net, (images, targets) = shifted().eval(), one_image()
    torch.manual_seed(7)
    found = net.losses(images, targets)
    torch.manual_seed(7)
    x, sizes = net._batch(images)
    maps = net.backbone(x)
    raw = net.rpn(maps)
    expected = net.rpn.losses(raw, maps, targets, sizes)
    regions = sample_regions(net.rpn.training_proposals(raw, maps, sizes), targets, count=64)
    used, strides = region_maps(maps, net.strides)
    pooled = pool_regions(used, strides, regions.boxes, regions.image)
    plain, offsets = net.sibling(pooled)
    expected["loss_classifier"], expected["loss_box_reg"] = region_loss(plain, offsets, regions, beta=1.0)
    logits, deltas, moved = net.head(pooled, used, strides, regions.boxes, regions.image)
    sides = regions.boxes[:, 2:] - regions.boxes[:, :2]
    place = regions.boxes + (sides * torch.tensor([0.1, -0.2])).repeat(1, 2)
    torch.testing.assert_close(moved, place)
    expected["loss_tsd_classifier"], expected["loss_tsd_box_reg"] = region_loss(
        logits, deltas, regions, boxes=place, beta=1.0
    )
    expected["constraint_classifier"], expected["constraint_box"] = progressive_constraint(
        logits, deltas, place, plain, offsets, regions, margin=0.2
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    sum(value for name, value in found.items() if name.startswith("constraint_")).backward()
    assert all(parameter.grad is None for parameter in net.sibling.parameters())
    assert net.head.class_score.weight.grad.any()
    assert net.head.box_delta.weight.grad.any()


def test_predicted_boxes_are_relative_to_the_moved_ones() -> None:
    net, images = shifted().eval(), one_image()[0]
    with torch.no_grad():
        raw = net(images)
        (found,) = net.predict(images, score_threshold=-1.0, nms_threshold=1.0, max_detections=1000)
    boxes = decode_boxes(raw["box_deltas"][0].unflatten(1, (4, 4))[:, 1:], raw["moved"][0][:, None], WEIGHTS)
    boxes, scores = boxes.clamp(0, 64), raw["class_logits"][0].softmax(1)[:, 1:]
    there = (raw["proposal_scores"][0] >= 0)[:, None] & (boxes[..., 2:] > boxes[..., :2]).all(2)
    rows = torch.cat([boxes, scores[..., None]], 2)[there]
    own = torch.cat([found.boxes, found.scores[:, None]], 1)
    assert len(own) == len(rows) > 100
    gaps = torch.cdist(own, rows, compute_mode="donot_use_mm_for_euclid_dist")
    assert gaps.amin(1).max() < 1e-3
    assert gaps.amin(0).max() < 1e-3


def test_layers_start_as_the_papers() -> None:
    """Kaiming normal of slope one: a deviation of the inputs' number to the power of -1/2, and no bias."""
    layers = [
        layer for layer in TSDHead(8, 20, hidden=128, inter_channels=64).modules() if isinstance(layer, nn.Linear)
    ]
    assert len(layers) == 11
    for layer in layers:
        assert float(layer.weight.detach().std()) * layer.in_features**0.5 == pytest.approx(1, rel=0.2)
        assert not layer.bias.any()


def test_forms_and_their_losses() -> None:
    plain = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    own = {"loss_tsd_classifier", "loss_tsd_box_reg"}
    constraint = {"constraint_classifier", "constraint_box"}
    for options, expected in (
        ({}, plain | own | constraint),
        ({"margin": None}, plain | own),
        ({"points": "release"}, plain | own | constraint),
        ({"head": "sibling"}, plain),
        ({"head": "separate"}, plain),
        ({"image_size": 96}, plain | own | constraint),
    ):
        net = TSD(**{**SMALL, **options})
        losses = net.losses(*one_image())
        assert set(losses) == expected
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
        found = net.eval().predict(*one_image()[:1], score_threshold=0.0, soft_sigma=0.5)[0]
        assert len(found) == 100
        assert (found.scores.diff() <= 0).all()


def test_inference_leaves_the_ordinary_head_out() -> None:
    net = TSD(**SMALL).eval()
    x = torch.rand(2, 3, 64, 96)
    nn.init.zeros_(net.head.shift_box[2].weight)
    nn.init.ones_(net.head.shift_box[2].bias)
    with torch.no_grad():
        expected = net.predict(x, score_threshold=0.0)
        for value in net.sibling.parameters():
            value.fill_(float("nan"))
        for a, b in zip(net.predict(x, score_threshold=0.0), expected, strict=True):
            assert torch.equal(a.boxes, b.boxes)
            assert torch.equal(a.scores, b.scores)
        raw = net(x)
    boxes, moved = (raw[key][raw["proposal_scores"] >= 0] for key in ("proposals", "moved"))
    sides = boxes[:, 2:] - boxes[:, :2]
    torch.testing.assert_close(moved, boxes + 0.1 * sides.repeat(1, 2), rtol=0, atol=1e-4)


def test_a_thousand_objects_and_objects_of_one_pixel() -> None:
    net = TSD(**SMALL)
    corner = torch.rand(1000, 2) * 60
    many = {"boxes": torch.cat([corner, corner + 0.5 + torch.rand(1000, 2) * 4], 1), "labels": torch.ones(1000).long()}
    pixel = {"boxes": torch.tensor([[10.0, 10, 11, 11]]), "labels": torch.tensor([1])}
    losses = net.losses([torch.rand(3, 64, 64), torch.rand(3, 50, 70)], [many, pixel])
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_paper_defaults() -> None:
    with torch.device("meta"):
        net = TSD()
    assert net.head.shared[1].in_features == 256 * 49
    assert (net.head.gamma, net.head.samples, net.margin) == (0.1, 4, 0.2)
    assert net.head.shift_class[2].out_features == 98
    assert net.head.shift_box[2].out_features == 2
    assert net.head.class_branch.fc6.out_features == net.sibling.branch.fc6.out_features == 1024
    assert net.head.box_delta.out_features == 4 * 81


def test_bad_arguments_name_the_value() -> None:
    for options, text in (
        ({"head": "double"}, "double"),
        ({"points": "corners"}, "corners"),
        ({"margin": 2.0}, "got 2.0"),
        ({"samples": 0}, "80 and 0"),
    ):
        with pytest.raises(ValueError, match=text):
            TSD(**options)
