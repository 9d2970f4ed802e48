"""BlazeFace: the released weights against the public port and the file's own runtime; 29 faces; laws of its parts."""

from __future__ import annotations

import io
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_iou

from torchive.data.archives import read
from torchive.data.packages import Package, obtain
from torchive.data.weights import read_weights
from torchive.engine.pretrained import pretrained_network
from torchive.methods.faces.blazeface import (
    BlazeBlock,
    BlazeFace,
    BlazeNet,
    DoubleBlazeBlock,
    detect_in_windows,
    from_tflite,
    jitter,
    read_tflite,
)
from torchive.methods.faces.blazeface import decode as decoding
from torchive.methods.faces.blazeface.decode import blend, fixed_faces, shapes_of
from torchive.methods.faces.blazeface.loss import EYES, face_sizes
from torchive.methods.losses.focal_loss import FocalLoss
from torchive.structures import Detections

NAME = "blazeface_short_range"
REPOSITORY, COMMIT = "hollance/BlazeFace-PyTorch", "852bfd8e3d44ed6775761105bdcead4ef389a538"
#: A group photograph of 1927 with a square around each of 29 faces, and one square too many, the first.
PHOTOGRAPH = Package(
    "apt",
    "visp-images-data",
    "3.5.0-1",
    "visp-images-data_3.5.0-1_all.deb",
    "8d78de2b5d0ff5536ae5c281b11a5011fd6e95cd717c2e0ebf38bacf57723a9d",
    74.6,
)
FOLDER = "usr/share/visp-images-data/ViSP-images/faces/"


@pytest.fixture(scope="module")
def faces() -> tuple[Tensor, Tensor]:
    """The photograph (3, 926, 1280) and its boxes (29, 4)."""
    picture, truth = FOLDER + "1280px-Solvay_conference_1927.png", FOLDER + "ground_truth_detection.txt"
    content = read(obtain(PHOTOGRAPH), (picture, truth))
    image = np.array(Image.open(io.BytesIO(content[picture])).convert("RGB"))
    lines = [line for line in content[truth].decode().splitlines() if not line.startswith("detection")]
    corners = torch.tensor([[float(v) for v in line.split()] for line in lines]).view(30, 4, 2).flip(2)  # x, y
    boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)[1:]
    return torch.from_numpy(image).permute(2, 0, 1) / 255, boxes


def crops(image: Tensor, boxes: Tensor, share: float = 3.0) -> list[Tensor]:
    """A square of ``share`` times its side around each face, at the network's size."""
    found = []
    for x0, y0, x1, y1 in boxes.tolist():
        side = int(share * max(x1 - x0, y1 - y0))
        left = min(max(int((x0 + x1 - side) / 2), 0), image.shape[2] - side)
        top = min(max(int((y0 + y1 - side) / 2), 0), image.shape[1] - side)
        part = image[:, top : top + side, left : left + side]
        found.append(F.interpolate(part[None], (128, 128), mode="bilinear", align_corners=False)[0])
    return found


def to_port(shapes: Tensor) -> Tensor:
    """The port's order of the box's sides, in shares of the image."""
    return torch.cat([shapes[:, [1, 0, 3, 2]], shapes[:, 4:]], 1) / 128


@pytest.mark.data
def test_matches_the_port_and_the_files_own_runtime(parity, record) -> None:
    """Raw outputs, gradients, one optimiser step, decoding and blending of the released weights."""
    stored, net = parity("blazeface"), from_tflite(read_weights(NAME))
    raw = net(stored["x"].float() / 255)
    worst = {}
    for name in ("deltas", "logits"):
        value = raw[name][0].detach()
        scale = value.abs().max()
        worst[name] = float((value - stored[name]).abs().max() / scale)
        theirs, own = stored[f"tflite.{name}"], value[::2] if name == "deltas" else value
        worst[f"runtime_{name}"] = float((own - theirs).abs().max() / scale)
    optimiser = torch.optim.SGD(net.parameters(), lr=1e-5, momentum=0.9, weight_decay=1e-3)
    (raw["deltas"].square().mean() + raw["logits"].square().mean()).backward()
    parts = {
        "stem": net.backbone.stem[0].weight,
        "depthwise": net.backbone.blocks[5].body[0][0].weight,
        "score": net.classifiers[1].weight,
    }
    for name, weight in parts.items():
        theirs = stored[f"gradient.{name}"]
        worst[f"gradient_{name}"] = float((weight.grad - theirs).abs().max() / theirs.abs().max())
    before = parts["stem"].detach().clone()
    optimiser.step()
    moved = stored["step.stem"] - before
    assert moved.abs().max() > 1e-4
    worst["optimiser_step"] = float((parts["stem"].detach() - stored["step.stem"]).abs().max())

    shapes = shapes_of(raw["deltas"][0].detach(), raw["anchors"])
    scores = (4 * torch.sin(torch.arange(896.0) * 1.7)).sigmoid()
    order = torch.nonzero(scores >= 0.75)[:, 0]
    order = order[scores[order].argsort(descending=True)]
    found, score, _ = blend(shapes[order], scores[order], torch.zeros(len(order)), blending="mean")
    theirs = stored["decode.found"]
    assert len(found) == len(theirs) == 51
    worst["decoded"] = float((torch.cat([to_port(found), score[:, None]], 1) - theirs).abs().max())
    given = stored["blend.given"][stored["blend.given"][:, 16].argsort(descending=True)]
    found, score, _ = blend(given[:, :16], given[:, 16], torch.zeros(len(given)), blending="mean")
    worst["blended"] = float((torch.cat([found, score[:, None]], 1) - stored["blend.found"]).abs().max())
    assert max(worst.values()) < 5e-6, worst
    record(
        "blazeface",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=max(worst.values()),
        note="float32, outputs and gradients relative; runtime: the file run by ai-edge-litert 2.3.0",
        **worst,
    )


@pytest.mark.data
def test_finds_the_29_faces_of_a_photograph(faces: tuple[Tensor, Tensor]) -> None:
    """In windows of 160 pixels, above the port's threshold: each face once, and nothing else."""
    image, boxes = faces
    net = pretrained_network(NAME)
    with torch.no_grad():
        found = detect_in_windows(partial(net.predict, score_threshold=0.75), image, 160, step=64)
    overlap = box_iou(boxes, found.boxes)
    assert len(found) == 29
    assert overlap.amax(1).min() > 0.5
    assert overlap.argmax(1).unique().numel() == 29
    points = found.keypoints
    inside = (points > found.boxes[:, None, :2] - 8) & (points < found.boxes[:, None, 2:] + 8)
    assert inside[:, :4].all()  # eyes, nose and mouth
    assert (points[:, :2, 1].mean(1) < points[:, 2, 1]).all()  # the nose is below the eyes
    assert (points[:, 2, 1] < points[:, 3, 1]).all()  # and the mouth below the nose
    eyes = (points[:, 0] - points[:, 1]).norm(dim=1)
    share = eyes / (found.boxes[:, 2:] - found.boxes[:, :2]).prod(1).sqrt()
    assert float(share.mean()) == pytest.approx(EYES, abs=0.02)


@pytest.mark.data
def test_blending_trembles_less_than_suppression(faces: tuple[Tensor, Tensor]) -> None:
    net, images = pretrained_network(NAME), crops(*faces)
    with torch.no_grad():
        blended, suppressed = (
            jitter(partial(net.predict, score_threshold=0.5, blending=blending), images) for blending in ("top", "none")
        )
    assert blended < 0.9 * suppressed, (blended, suppressed)  # 0.0210 and 0.0261 of a face's side


def slow_blend(shapes: list, scores: list, groups: list, threshold: float) -> list:
    """The published procedure, one box after the other."""

    def iou(a: list, b: list) -> float:
        w, h = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
        inter = max(w, 0) * max(h, 0)
        return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)

    left, found = sorted(range(len(scores)), key=lambda k: -scores[k]), []
    while left:
        best = left[0]
        near = [k for k in left if groups[k] == groups[best] and iou(shapes[best], shapes[k]) > threshold]
        total = sum(scores[k] for k in near)
        mean = [sum(scores[k] * shapes[k][j] for k in near) / total for j in range(len(shapes[best]))]
        found.append((mean, scores[best], total / len(near), best))
        left = [k for k in left if k not in near]
    return found


def slow_losses(raw: dict[str, Tensor], boxes: list, points: list, labels: list) -> dict[str, float]:
    """Matching, hard negatives and smooth L1, anchor by anchor, for images of the network's size."""
    anchors = raw["anchors"].tolist()

    def iou(a: list, b: list) -> float:
        w, h = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
        inter = max(w, 0) * max(h, 0)
        return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)

    def smooth(v: float) -> float:
        return v * v / 2 if abs(v) < 1 else abs(v) - 0.5

    total, positives = {"classification": 0.0, "localisation": 0.0, "keypoints": 0.0}, 0
    for n in range(len(boxes)):
        owner = [-1] * len(anchors)
        for a, anchor in enumerate(anchors):
            overlaps = [iou(anchor, box) for box in boxes[n]]
            if max(overlaps) > 0.5:
                owner[a] = overlaps.index(max(overlaps))
        pairs = sorted(((iou(anchors[a], b), -a, -o) for a in range(len(anchors)) for o, b in enumerate(boxes[n])))
        taken_a, taken_o = set(), set()
        for value, a, o in reversed(pairs):
            if value > 0 and -a not in taken_a and -o not in taken_o:
                taken_a.add(-a), taken_o.add(-o)
                owner[-a] = -o
        costs, count = [], 0
        for a, o in enumerate(owner):
            z = raw["logits"][n, a].tolist()
            truth = [float(o >= 0 and labels[n][o] == k + 1) for k in range(len(z))]
            cost = sum(max(v, 0) - v * t + math.log1p(math.exp(-abs(v))) for v, t in zip(z, truth, strict=True))
            if o < 0:
                costs.append(cost)
                continue
            count += 1
            total["classification"] += cost
            (ax0, ay0, ax1, ay1), (x0, y0, x1, y1) = anchors[a], boxes[n][o]
            cx, cy = (ax0 + ax1) / 2, (ay0 + ay1) / 2
            eyes = points[n][o][:2]
            size = EYES * math.sqrt((x1 - x0) * (y1 - y0))
            if all(p[2] > 0 for p in eyes):
                size = max(math.dist(eyes[0][:2], eyes[1][:2]), 0.1 * math.sqrt((x1 - x0) * (y1 - y0)))
            size = max(size, 1)
            code = [(x0 + x1) / 2 - cx, (y0 + y1) / 2 - cy, x1 - x0, y1 - y0]
            row = raw["deltas"][n, a].tolist()
            total["localisation"] += sum(smooth((v - c) / size) for v, c in zip(row[:4], code, strict=True))
            for k, (px, py, given) in enumerate(points[n][o]):
                if given > 0:
                    u, v = row[4 + 2 * k : 6 + 2 * k]
                    total["keypoints"] += smooth((u - px + cx) / size) + smooth((v - py + cy) / size)
        total["classification"] += sum(sorted(costs, reverse=True)[: 3 * count])
        positives += count
    return {key: value / positives for key, value in total.items()}


def faces_at(count: int, keypoints: int = 6) -> dict[str, Tensor]:
    """Boxes of 20 to 60 pixels in an image of 64, points in them, some not given."""
    corner, side = torch.rand(count, 2) * 30, 12 + torch.rand(count, 1) * 20
    boxes = torch.cat([corner, corner + side], 1)
    points = corner[:, None] + torch.rand(count, keypoints, 2) * side[:, None]
    given = (torch.rand(count, keypoints, 1) > 0.2).to(points)
    return {
        "boxes": boxes,
        "labels": torch.randint(1, 3, (count,)),
        "keypoints": torch.cat([points, given], 2),
    }


def test_loss_and_blending_equal_slow_references(double, record) -> None:
    net = BlazeFace(num_classes=2, image_size=64, norm=None).double()
    targets = [faces_at(3), faces_at(5)]
    images = torch.rand(2, 3, 64, 64)
    raw = net(images)
    raw["anchors"] = raw["anchors"].double()
    found = net.losses(images, targets)
    lists = ([t[key].tolist() for t in targets] for key in ("boxes", "keypoints", "labels"))
    expected = slow_losses(raw, *lists)
    gap = max(abs(float(found[key].detach()) / value - 1) for key, value in expected.items())
    centre = torch.rand(15, 2).repeat_interleave(6, 0) * 100 + 4 * torch.randn(90, 2)
    half = 6 + 6 * torch.rand(90, 2)
    shapes = torch.cat([centre - half, centre + half, 100 * torch.rand(90, 4)], 1)
    scores, groups = torch.rand(90).sort(descending=True).values + 0.01, torch.randint(0, 2, (90,))
    wanted = slow_blend(shapes.tolist(), scores.tolist(), groups.tolist(), 0.3)
    assert 15 < len(wanted) < 60
    for blending, column in (("top", 1), ("mean", 2)):
        mean, score, rows = blend(shapes, scores, groups, blending=blending)
        assert rows.tolist() == [row[3] for row in wanted]
        gap = max(gap, float((mean - torch.tensor([row[0] for row in wanted])).abs().max()) / 100)
        gap = max(gap, float((score - torch.tensor([row[column] for row in wanted])).abs().max()))
    assert gap < 1e-12
    record("blazeface", "referenced", largest_difference=gap, dtype="float64", what="matching, losses and blending")


def test_a_face_has_a_size() -> None:
    """Eyes that coincide, as of a profile, do not make its errors thousands."""
    boxes = torch.tensor([[10.0, 10, 50, 50]] * 4 + [[10, 10, 11, 12]] * 2)
    points = torch.zeros(6, 2, 3)
    points[:4, :, 2] = 1
    points[:, 0, :2] = 30
    points[:, 1, :2] = 30 + torch.tensor([0.001, 0, 3, 16, 0, 0])[:, None] * torch.tensor([1, 0])
    expected = [4, EYES * 40, 4, 16, 1, 1]
    torch.testing.assert_close(face_sizes(boxes, points), torch.tensor(expected))
    torch.testing.assert_close(face_sizes(boxes, points[:, :1]), torch.tensor([EYES * 40] * 4 + [1, 1]))
    points[:, :, 2] = 1
    assert face_sizes(boxes, points)[4:].tolist() == [1, 1]


def test_each_box_that_is_kept_has_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where suppression's rounding keeps two that overlap by more than the threshold."""
    monkeypatch.setattr(decoding, "keep_after_nms", lambda boxes, *_: torch.arange(len(boxes)) < 2)
    shapes = torch.tensor([[10.0, 10, 30, 30], [10, 10, 30, 31], [10, 12, 30, 30]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    for blending in ("top", "mean"):
        mean, score, rows = blend(shapes, scores, torch.zeros(3), blending=blending)
        assert rows.tolist() == [0, 1]
        torch.testing.assert_close(mean, torch.stack([(shapes[0] * 0.9 + shapes[2] * 0.7) / 1.6, shapes[1]]))
        assert score.isfinite().all()
    sides = shapes[:, 2:] - shapes[:, :2]
    deltas = torch.cat([(shapes[:, :2] + shapes[:, 2:]) / 2, sides], 1)
    raw = {"deltas": deltas[None], "logits": scores.logit()[None, :, None], "anchors": torch.zeros(3, 4)}
    torch.testing.assert_close(fixed_faces(raw, (64, 64))["boxes"][0, :2], mean)


def test_laws_of_blending() -> None:
    one = torch.tensor([[10.0, 10, 30, 30, 15, 16]])
    group = torch.zeros(4)
    mean, score, _ = blend(one, torch.tensor([0.7]), group[:1])
    assert torch.equal(mean, one)
    assert score.item() == pytest.approx(0.7)
    two = torch.cat([one, one + 2])
    mean, score, rows = blend(two, torch.tensor([0.5, 0.5]), group[:2])
    assert torch.allclose(mean, one + 1)
    assert rows.tolist() == [0]
    apart = torch.cat([two, two + 100])
    scores = torch.tensor([0.9, 0.4, 0.8, 0.3])
    order = scores.argsort(descending=True)
    mean, _, _ = blend(apart[order], scores[order], group)
    alone = [blend(apart[k : k + 2], scores[k : k + 2], group[:2])[0] for k in (0, 2)]
    assert torch.allclose(mean, torch.cat(alone))  # groups know nothing of each other
    mean, _, _ = blend(two, torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]))
    assert torch.equal(mean, two)  # another class
    empty, score, rows = blend(one[:0], scores[:0], group[:0])
    assert len(empty) == len(score) == len(rows) == 0


@pytest.mark.parametrize("variant", ["paper", "short_range"])
def test_896_anchors(variant: str) -> None:
    net = BlazeFace(backbone=variant)
    raw = net(torch.rand(2, 3, 128, 128))
    assert raw["deltas"].shape == (2, 896, 16)
    assert raw["logits"].shape == (2, 896, 1)
    grids = [(16, 2), (8, 6)]
    centres = [((i + 0.5) / g, (j + 0.5) / g) for g, b in grids for j in range(g) for i in range(g) for _ in range(b)]
    anchors = raw["anchors"] / 128
    torch.testing.assert_close((anchors[:, :2] + anchors[:, 2:]) / 2, torch.tensor(centres))
    boxes = shapes_of(raw["deltas"].detach(), raw["anchors"])[0, :, :4]
    start = (net.regressors[0].bias.view(-1, 16)[:, 2:4] > 0).all()
    assert start
    assert box_iou(boxes, raw["anchors"]).diagonal().mean() > 0.5  # a box starts near its anchor
    assert len(BlazeFace(backbone=variant, levels=4)(torch.rand(1, 3, 128, 128))["anchors"]) == 2 * (256 + 64 + 16 + 4)


def test_the_papers_and_the_released_network() -> None:
    for variant, widths in (("paper", [96, 96]), ("short_range", [88, 96])):
        net = BlazeNet(variant)
        maps = net(torch.rand(1, 3, 128, 128))
        assert [tuple(m.shape[1:]) for m in maps] == [(widths[0], 16, 16), (widths[1], 8, 8)]
        assert [tuple(m.shape[2:]) for m in net(torch.rand(1, 3, 101, 77))] == [(13, 10), (7, 5)]
        assert [level.stride for level in net.levels] == [8, 16]
    paper, released = BlazeNet("paper"), BlazeNet("short_range")
    assert sum(isinstance(b, DoubleBlazeBlock) for b in paper.blocks) == 6
    assert not any(isinstance(b, DoubleBlazeBlock) for b in released.blocks)
    assert {m.kernel_size for m in paper.blocks.modules() if isinstance(m, nn.Conv2d) and m.groups > 1} == {(5, 5)}
    assert {m.kernel_size for m in released.blocks.modules() if isinstance(m, nn.Conv2d) and m.groups > 1} == {(3, 3)}


@pytest.mark.parametrize("block", [BlazeBlock, DoubleBlazeBlock])
@pytest.mark.parametrize("stride", [1, 2])
def test_zero_convolutions_leave_the_skip(block: type, stride: int) -> None:
    net = block(5, 9, stride=stride, norm=None)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    for size in ((8, 8), (7, 9)):
        x = torch.randn(2, 5, *size)
        skip = x if stride == 1 else F.max_pool2d(x, 2, ceil_mode=True)
        y = net(x)
        assert torch.equal(y[:, :5], skip.relu())
        assert (y[:, 5:] == 0).all()


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_depthwise_operations_against_pointwise(kernel_size: int) -> None:
    """k^2 C H W against C C' H W multiplications: 5 x 5 costs a quarter of a pointwise convolution to 96 channels."""
    block, size = BlazeBlock(96, 96, kernel_size=kernel_size, norm=None), 16
    counts = []
    for part in block.body:
        with FlopCounterMode(display=False) as counter:
            part(torch.rand(1, 96, size, size))
        counts.append(counter.get_total_flops() // 2)
    assert counts == [kernel_size**2 * 96 * size**2, 96 * 96 * size**2]
    assert counts[0] / counts[1] == pytest.approx(kernel_size**2 / 96)


def test_stride_two_pads_as_tensorflow() -> None:
    """An even side of n has k - 2 zeros, the larger half at its end."""
    for k, (start, end) in ((1, (0, 0)), (3, (0, 1)), (5, (1, 2)), (7, (2, 3))):
        block = BlazeBlock(3, 3, kernel_size=k, stride=2, norm=None)
        conv = block.body[0][0]
        x = torch.randn(1, 3, 12, 16)
        expected = F.conv2d(F.pad(x, (start, end, start, end)), conv.weight, conv.bias, stride=2, groups=3)
        torch.testing.assert_close(conv(x), expected)


def test_jitter_of_detectors_that_are_known() -> None:
    image = torch.zeros(3, 40, 40)
    image[:, 10:26, 12:28] = 1

    def exact(images: list[Tensor]) -> list[Detections]:
        found = []
        for one in images:
            rows, columns = (one[0].amax(axis).nonzero() for axis in (1, 0))
            box = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]).float()
            found.append(Detections(box, torch.ones(1), torch.ones(1), keypoints=box.view(1, 2, 2)))
        return found

    def stuck(images: list[Tensor]) -> list[Detections]:
        return exact([image] * len(images))

    def blind(images: list[Tensor]) -> list[Detections]:
        return [Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)) for _ in images]

    assert jitter(exact, [image], reach=2) == 0
    assert jitter(stuck, [image, image]) == pytest.approx(math.sqrt(2 * 2 / 3) / 16)  # mean of dx^2 + dy^2
    with pytest.raises(ValueError, match="no face was found"):
        jitter(blind, [image])


def test_windows_put_faces_where_they_are() -> None:
    image = torch.zeros(1, 90, 120)
    image[:, 50:60, 70:80] = 1

    def detect(windows: Tensor) -> list[Detections]:
        found = []
        for one in windows:
            rows, columns = (one[0].amax(axis).nonzero()[:, 0] for axis in (1, 0))
            whole = len(rows) == 10 and len(columns) == 10
            box = torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]).float() if whole else None
            box = torch.zeros(0, 4) if box is None else box
            count = len(box)
            found.append(Detections(box, torch.ones(count).long(), torch.ones(count), keypoints=box.view(-1, 2, 2)))
        return found

    def two(windows: Tensor) -> list[Detections]:
        """A good face beside a weak one that it is averaged with, and one in between."""
        boxes = torch.tensor([[1.0, 1, 9, 9], [1, 1, 9, 8], [20, 20, 30, 30]])
        scores = torch.tensor([0.9, 0.1, 0.6])
        return [Detections(boxes, torch.tensor([1, 1, 2]), scores, keypoints=boxes.view(3, 2, 2))] * len(windows)

    found = detect_in_windows(two, image[:, :40, :40], 40, blending="mean")
    torch.testing.assert_close(found.scores, torch.tensor([0.6, 0.5]))
    assert found.labels.tolist() == [2, 1]
    torch.testing.assert_close(found.boxes[0], torch.tensor([20.0, 20, 30, 30]))
    torch.testing.assert_close(found.keypoints[0].flatten(), found.boxes[0])
    found = detect_in_windows(detect, image, 40)
    torch.testing.assert_close(found.boxes, torch.tensor([[70.0, 50, 80, 60]]))
    torch.testing.assert_close(found.keypoints.flatten(), torch.tensor([70.0, 50, 80, 60]))
    assert len(detect_in_windows(detect, image[:, :30, :30], 40)) == 0
    with pytest.raises(ValueError, match="side and step >= 1, got 0"):
        detect_in_windows(detect, image, 0)


@pytest.mark.parametrize("backbone", ["paper", "short_range", "timm/resnet18", "torchvision/mobilenet_v2"])
def test_learns_faces_and_points(backbone: str) -> None:
    net = BlazeFace(num_classes=2, backbone=backbone, image_size=64)
    target = faces_at(1)
    image = torch.rand(3, 64, 64) * 0.2
    x0, y0, x1, y1 = target["boxes"][0].int().tolist()
    image[:, y0:y1, x0:x1] += 0.8
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    history = []
    for _ in range(25):
        losses = net.losses([image, image], [target, target])
        total = sum(losses.values())
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        history.append(float(total.detach()))
    assert history[-1] < 0.3 * history[0], history


@pytest.mark.parametrize("count", [0, 1000])
def test_empty_and_crowded_images(count: int) -> None:
    net = BlazeFace(image_size=64, keypoints=0, loss=FocalLoss(gamma=2.0, alpha=0.25, reduction="none"))
    corner = torch.rand(count, 2) * 60
    size = torch.rand(count, 2) * 3 + 0.5  # down to less than a pixel
    crowd = {"boxes": torch.cat([corner, corner + size], 1), "labels": torch.ones(count, dtype=torch.int64)}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = net.losses([torch.rand(3, 64, 64), torch.rand(3, 64, 48)], [crowd, none])
    assert all(v.isfinite() for v in losses.values())
    assert (losses["localisation"].item() == 0) == (count == 0)
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    with torch.no_grad():
        found = net.eval().predict([torch.rand(3, 64, 64), torch.rand(3, 30, 48)], score_threshold=0.0)
    assert all(d.keypoints.shape == (len(d), 0, 2) for d in found)


def test_what_is_refused() -> None:
    for options, words in (
        ({"num_classes": 0}, "num_classes and image_size >= 1 and keypoints >= 0, got 0, 128 and 6"),
        ({"levels": 3}, "levels must be 2 or 4, got 3"),
        ({"anchor_sizes": [[4]]}, r"expected 2 lists of anchor_sizes above zero, got \[\[4\]\]"),
        ({"kernel_size": 4}, "expected an odd kernel_size and stride 1 or 2, got 4 and 1"),
        ({"loss": nn.BCEWithLogitsLoss()}, "loss must have the reduction none, got 'mean'"),
    ):
        with pytest.raises(ValueError, match=words):
            BlazeFace(**options)
    with pytest.raises(ValueError, match="at least as many channels out as in, got 9 and 5"):
        BlazeBlock(9, 5)
    with pytest.raises(ValueError, match="variant must be one of paper, short_range, got 'rear'"):
        BlazeNet("rear")
    net, image = BlazeFace(image_size=32), torch.rand(3, 32, 32)
    target = {"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([1]), "keypoints": torch.zeros(1, 5, 3)}
    with pytest.raises(ValueError, match=r"target 0: expected keypoints \(1, 6, 3\), got \(1, 5, 3\)"):
        net.losses([image], [target])
    with pytest.raises(ValueError, match="blending must be top, mean or none, got 'best'"):
        net.predict([image], blending="best")


@pytest.mark.data
def test_damaged_and_other_files_are_refused() -> None:
    content = read_weights(NAME)
    values = read_tflite(content)
    assert values["conv2d/Kernel"].shape == (24, 5, 5, 3)
    assert values["conv2d/Kernel"].dtype == torch.float32
    for broken in (content[:5000], content[:200_000]):
        with pytest.raises(ValueError, match="a damaged TensorFlow Lite file"):
            read_tflite(broken)
    with pytest.raises(ValueError, match=r"expected a TensorFlow Lite file \(TFL3\)"):
        from_tflite(b"PK\x03\x04 something else")
    with pytest.raises(ValueError, match="the file has no conv2d/Kernel; expected the short-range face detector"):
        from_tflite(content.replace(b"conv2d/Kernel", b"conv3d/Kernel"))
