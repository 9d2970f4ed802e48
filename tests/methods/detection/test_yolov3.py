"""YOLOv3: the released C code's outputs, gradients and step; a slow float64 reference; the laws of its parts."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from torchive.data import open_data
from torchive.methods.detection.yolov3 import Darknet53, TinyDarknet, YOLOv3, read_darknet, write_darknet
from torchive.methods.detection.yolov3.decode import boxes_of
from torchive.methods.detection.yolov3.loss import assign, code_loss, owners, yolo_loss
from torchive.methods.losses.focal_loss import FocalLoss
from torchive.ops.anchors import centred_anchors, kmeans_anchors, shape_iou
from torchive.ops.boxes import decode_cells, encode_cells
from torchive.ops.images import fit_boxes, letterbox
from torchive.transforms import build

REPOSITORY, COMMIT = "pjreddie/darknet", "f6afaabcdf85f77e7aff2ec55c020c0e297c77f9"
SMALL = {"backbone": "timm/test_efficientnet", "num_classes": 3, "image_size": 64, "widths": (8, 8, 8)}


def numbers(network: nn.Module) -> int:
    """How many numbers a weight file of Darknet holds for a network."""
    stored = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    return sum(p.numel() for p in network.parameters()) + sum(2 * m.num_features for m in stored)


class Heads(nn.Module):
    """A stem and a convolution for each of three strides: what the stored gradients of the loss were taken with."""

    strides = (2, 4, 8)
    shapes = (((4, 5), (6, 12), (13, 9)), ((10, 20), (22, 16), (20, 40)), ((24, 12), (16, 22), (23, 23)))

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        outputs = 3 * (5 + num_classes)
        self.heads = nn.ModuleList(nn.Conv2d(6, outputs, 3, stride=s, padding=1) for s in self.strides[::-1])

    def forward(self, x: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
        maps = [head(self.stem(x)) for head in self.heads][::-1]
        rows = [m.unflatten(1, (3, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps]
        return torch.cat(rows, 1), [(m.shape[2], m.shape[3]) for m in maps]


def raw_of(flat: Tensor, grids: list[tuple[int, int]]) -> dict[str, Tensor]:
    shapes = [torch.tensor(s, dtype=flat.dtype) for s in Heads.shapes]
    steps = [
        torch.full((3 * h * w,), float(s), dtype=flat.dtype) for s, (h, w) in zip(Heads.strides, grids, strict=True)
    ]
    return {
        "deltas": flat[..., :4],
        "objectness": flat[..., 4],
        "logits": flat[..., 5:],
        "anchors": centred_anchors(grids, Heads.strides, shapes),
        "strides": torch.cat(steps),
    }


def cost(flat: Tensor, grids: list[tuple[int, int]], boxes: Tensor, labels: Tensor, **options) -> dict[str, Tensor]:
    """The loss of raw outputs (N, A, 5 + K) for boxes (N, L, 4) in a frame of 24 pixels."""
    raw = raw_of(flat, grids)
    shapes = [torch.tensor(s, dtype=flat.dtype) for s in Heads.shapes]
    own = [owners(box, shapes, grids, Heads.strides) for box in boxes]
    predicted = boxes_of(raw["deltas"].detach(), raw["anchors"], raw["strides"])
    matches = [assign(p, b, o) for p, b, o in zip(predicted, boxes, own, strict=True)]
    return yolo_loss(raw, matches, list(boxes), list(labels), own, (24, 24), **options)


def activated(flat: Tensor) -> Tensor:
    return torch.cat([flat[..., :2].sigmoid(), flat[..., 2:4], flat[..., 4:].sigmoid()], -1)


def test_matches_the_released_code(record, parity, tmp_path) -> None:
    """A whole network read from a file of Darknet's; the gradients it writes for a batch with a collision; its step."""
    stored = parity("yolov3")
    anchors = (((4, 5), (6, 12), (13, 9)), ((10, 20), (22, 16), (20, 40)), ((40, 30), (30, 60), (64, 64)))
    net = YOLOv3(
        num_classes=3, backbone=Darknet53(channels=2, units=(1, 2, 1)), anchors=anchors, widths=(2, 3, 4)
    ).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0  # the release adds 1e-6 to the deviation, not to the variance
    (tmp_path / "whole").write_bytes(stored["whole.file"].numpy().tobytes())
    read_darknet(net, tmp_path / "whole")
    raw = net(stored["whole.x"])
    flat = torch.cat([raw["deltas"], raw["objectness"][..., None], raw["logits"]], -1)
    worst = {"output": (activated(flat) - stored["whole.out"]).abs().max().item()}

    heads = Heads(3)
    before = [v for k, v in stored.items() if k.startswith("loss.before.")]
    names = sorted(k for k in stored if k.startswith("loss.before."))
    assert len(before) == 8
    for name in names:
        place = name.removeprefix("loss.before.").split(".")
        layer = heads.stem if place[0] == "0" else heads.heads[int(place[1])]
        getattr(layer, place[-1]).data.copy_(stored[name])
    flat, grids = heads(stored["loss.x"])
    flat.retain_grad()
    weights = [p for n, p in heads.named_parameters() if n.endswith("weight")]
    biases = [p for n, p in heads.named_parameters() if n.endswith("bias")]
    groups = [{"params": weights, "weight_decay": 5e-4}, {"params": biases}]
    optimiser = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    sum(cost(flat, grids, stored["loss.boxes"], stored["loss.labels"]).values()).backward()
    optimiser.step()
    assert stored["loss.delta"].count_nonzero() > 500
    worst["gradient"] = (len(flat) * flat.grad + stored["loss.delta"]).abs().max().item()
    after = Heads(3)
    (tmp_path / "after").write_bytes(stored["loss.after"].numpy().tobytes())
    read_darknet(after, tmp_path / "after")
    pairs = zip(heads.parameters(), after.parameters(), strict=True)
    worst["optimiser_step"] = max((a - b).abs().max().item() for a, b in pairs)
    assert max(worst.values()) < 2e-6
    record(
        "yolov3",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=max(worst.values()),
        note="float32; the release is compiled and run in float32",
        **worst,
    )


def test_a_centre_outside_the_image_has_a_bounded_loss() -> None:
    """With a place above 1 for a target, cross-entropy falls without end as the logit grows."""
    net = Heads(3)
    flat, grids = net(torch.rand(1, 3, 24, 24))
    flat = flat.detach().clone()
    flat[..., :2] = 50.0
    for box in ([20.0, 16.0, 40.0, 30.0], [-100.0, -100, 100, 100]):  # a centre at x = 30 of 24; four times the frame
        boxes = torch.tensor([[box]])
        losses = cost(flat, grids, boxes, torch.tensor([[1]]))
        assert all(v >= 0 for v in losses.values()), losses
        assert losses["localisation"] < 1e3
    raw = torch.tensor([[50.0, -50.0, 0.0, 0.0]])  # at the right border, and above the cell: as sure as can be
    anchor, stride = torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([8.0])
    assert float(code_loss(raw, torch.tensor([[6.0, -9, 14, -1]]), anchor, stride, "logistic")) < 1e-6


def slow_loss(flat: Tensor, grids: list[tuple[int, int]], boxes: list, labels: list) -> dict[str, float]:
    """The published rules, prediction by prediction, in plain Python."""

    def sigmoid(v: float) -> float:
        return 1 / (1 + math.exp(-v))

    def bce(v: float, t: float) -> float:
        return max(v, 0) - v * t + math.log1p(math.exp(-abs(v)))

    def iou(a: list[float], b: list[float]) -> float:
        w, h = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
        inter = max(w, 0) * max(h, 0)
        return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)

    total = {"localisation": 0.0, "objectness": 0.0, "classification": 0.0}
    every = [shape for level in Heads.shapes for shape in level]
    for rows, image_boxes, image_labels in zip(flat.tolist(), boxes, labels, strict=True):
        owned: dict[tuple[int, int, int, int], list[int]] = {}
        for number, (x0, y0, x1, y1) in enumerate(image_boxes):
            w, h = x1 - x0, y1 - y0
            best = max(range(9), key=lambda k: iou([0, 0, w, h], [0, 0, *every[k]]))
            stride = Heads.strides[best // 3]
            cell = (best // 3, int((y0 + y1) / 2 / stride), int((x0 + x1) / 2 / stride), best % 3)
            owned.setdefault(cell, []).append(number)
        place = 0
        for level, (height, width) in enumerate(grids):
            stride = Heads.strides[level]
            for j in range(height):
                for i in range(width):
                    for b in range(3):
                        tx, ty, tw, th, objectness, *classes = rows[place]
                        place += 1
                        pw, ph = Heads.shapes[level][b]
                        cx, cy = (i + sigmoid(tx)) * stride, (j + sigmoid(ty)) * stride
                        w, h = pw * math.exp(tw), ph * math.exp(th)
                        mine = owned.get((level, j, i, b), [])
                        if not mine:
                            box = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
                            if all(iou(box, other) <= 0.5 for other in image_boxes):
                                total["objectness"] += bce(objectness, 0)
                            continue
                        total["objectness"] += bce(objectness, 1)
                        x0, y0, x1, y1 = image_boxes[mine[-1]]
                        scale = 2 - (x1 - x0) * (y1 - y0) / 24**2
                        xy = bce(tx, (x0 + x1) / 2 / stride - i) + bce(ty, (y0 + y1) / 2 / stride - j)
                        wh = (tw - math.log((x1 - x0) / pw)) ** 2 + (th - math.log((y1 - y0) / ph)) ** 2
                        total["localisation"] += scale * (xy + wh / 2)
                        wanted = {image_labels[n] - 1 for n in mine}
                        total["classification"] += sum(bce(v, float(k in wanted)) for k, v in enumerate(classes))
    return {key: value / len(flat) for key, value in total.items()}


def test_loss_equals_slow_reference(double, record) -> None:
    grids = [(12, 12), (6, 6), (3, 3)]
    flat = torch.randn(2, 567, 8)
    flat[..., 2:4] *= 0.3
    centre, size = 24 * torch.rand(2, 11, 2), 3 + 20 * torch.rand(2, 11, 2)
    boxes = torch.cat([centre - size / 2, centre + size / 2], -1)
    boxes[:, 4], labels = boxes[:, 9] + 0.01, torch.randint(1, 4, (2, 11))
    found = cost(flat, grids, boxes, labels)
    expected = slow_loss(flat, grids, boxes.tolist(), labels.tolist())
    gap = max(abs(float(found[key]) / value - 1) for key, value in expected.items())
    assert gap < 1e-12
    record("yolov3", "referenced", largest_difference=gap, dtype="float64", what="assignment and loss, relative")


def test_as_many_numbers_as_the_released_files() -> None:
    """yolov3.weights has 248,007,048 bytes, darknet53.conv.74 162,482,580, yolov3-tiny.weights 35,434,956."""
    with torch.device("meta"):
        assert numbers(YOLOv3()) == (248007048 - 20) // 4
        assert numbers(Darknet53()) == (162482580 - 20) // 4
        assert numbers(YOLOv3(backbone="tiny")) == (35434956 - 20) // 4


def test_darknet_53_has_the_layers_of_the_paper() -> None:
    """Table 1: a stem of 32, then stages of 1, 2, 8, 8 and 4 pairs of 1x1 and 3x3; 52 convolutions and a classifier."""
    with torch.device("meta"):
        found = [m for m in Darknet53().modules() if isinstance(m, nn.Conv2d)]
    wanted = [(3, 32, 3, 1)]
    for width, pairs in zip((64, 128, 256, 512, 1024), (1, 2, 8, 8, 4), strict=True):
        wanted += [(width // 2, width, 3, 2)] + [(width, width // 2, 1, 1), (width // 2, width, 3, 1)] * pairs
    assert [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]) for m in found] == wanted
    assert len(found) == 52


def test_files_round_trip(tmp_path) -> None:
    options = {"anchors": (((9, 9),), ((20, 20),)), "widths": (4, 4)}
    one, two, three = (YOLOv3(backbone=TinyDarknet(channels=2), **options) for _ in range(3))
    write_darknet(one, tmp_path / "w", seen=70_000_000_000)
    assert (tmp_path / "w").stat().st_size == 20 + 4 * numbers(one)
    assert read_darknet(two, tmp_path / "w") == 70_000_000_000
    kept = {k: v for k, v in two.state_dict().items() if "num_batches" not in k}
    assert all(torch.equal(v, one.state_dict()[k]) for k, v in kept.items())
    with pytest.raises(ValueError, match=r"w: expected \d+ numbers for TinyDarknet, got \d+$"):
        read_darknet(one.backbone, tmp_path / "w")
    write_darknet(one.backbone, tmp_path / "b")
    read_darknet(three, tmp_path / "b", partial=True)
    assert torch.equal(three.backbone.layers[6][0].weight, one.backbone.layers[6][0].weight)
    assert not torch.equal(three.neck.scales[0].out.weight, one.neck.scales[0].out.weight)


def test_codes_and_frames_come_back(double) -> None:
    anchors = centred_anchors([(3, 5)], [8], [torch.tensor([[4.0, 9.0], [11.0, 3.0]])])
    strides = torch.full((30,), 8.0)
    corner = torch.rand(30, 2) * 20
    boxes = torch.cat([corner, corner + 1 + torch.rand(30, 2) * 9], 1)
    code = encode_cells(boxes, anchors, strides)
    assert torch.allclose(decode_cells(code[:, :2], code[:, 2:], anchors, strides), boxes)
    assert torch.allclose(encode_cells(anchors, anchors, strides), torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(30, 4))
    for image in ((40, 100), (100, 40), (64, 64), (31, 7)):
        moved = fit_boxes(boxes, image, (64, 64))
        assert torch.allclose(fit_boxes(moved, image, (64, 64), back=True), boxes)
        picture = torch.zeros(1, *image)
        picture[:, image[0] // 4 : image[0] // 2, image[1] // 4 : image[1] // 2] = 1
        framed = letterbox([picture], (64, 64))[0, 0]
        assert framed.shape == (64, 64)
        inside = torch.nonzero((framed - 0.5).abs() > 0.25)  # bright or dark: the picture, not its frame
        whole = fit_boxes(torch.tensor([[0.0, 0.0, image[1], image[0]]]), image, (64, 64))[0]
        assert inside.amin(0).flip(0).tolist() == whole[:2].tolist()
        assert (inside.amax(0).flip(0) + 1).tolist() == whole[2:].tolist()


def test_every_object_owns_the_best_shape_at_its_centre() -> None:
    shapes = [torch.tensor(s, dtype=torch.float32) for s in Heads.shapes]
    grids = [(12, 12), (6, 6), (3, 3)]
    anchors = centred_anchors(grids, Heads.strides, shapes)
    own = owners(anchors, shapes, grids, Heads.strides)
    assert torch.equal(own, torch.arange(len(anchors)))  # a box like an anchor owns it, alone
    twice = torch.cat([anchors[100:101], anchors[100:101] + 0.1])
    match = assign(anchors, twice, owners(twice, shapes, grids, Heads.strides))
    assert match[100] == 1  # the later one has it
    assert (match >= 0).sum() == 1
    accepted = assign(anchors, twice, owners(twice, shapes, grids, Heads.strides), accept=0.7)
    overlap = torch.nonzero(accepted >= 0)[:, 0]
    assert len(overlap) > 1
    assert 100 in overlap


@pytest.mark.data
def test_few_objects_want_one_prediction() -> None:
    """Collisions on real boxes at the published size and anchors; with one shape and stride, as before YOLO had more,
    objects that share a cell lose each other."""
    published = YOLOv3(backbone="timm/test_efficientnet", num_classes=1)
    shapes, strides, side = published.shapes, published.strides, 416
    lost, shared, total = {}, {}, {}
    for name in ("nuclei-instances", "trees"):
        samples = open_data(name, "train")
        transform = build("detection", image_size=side, train=False)
        boxes = [transform(samples[i]).target["boxes"] for i in range(len(samples))]
        own = [owners(box, shapes, [(side // s, side // s) for s in strides], strides) for box in boxes]
        cells = [owners(box, [shapes[-1][:1]], [(side // 32,) * 2], [32]) for box in boxes]
        lost[name] = sum(len(one) - len(one.unique()) for one in own)
        shared[name] = sum(len(one) - len(one.unique()) for one in cells)
        total[name] = sum(map(len, boxes))
    assert total == {"nuclei-instances": 225, "trees": 533}
    assert lost == {"nuclei-instances": 0, "trees": 0}
    assert shared["trees"] >= 12


@pytest.mark.parametrize("coding", ["logistic", "linear", "rcnn"])
def test_each_coding_learns_and_decodes(coding: str, scenes) -> None:
    generator = torch.Generator().manual_seed(0)
    images, targets = scenes(8, 64, generator)
    anchors = [[list(shape)] for shape in ((10, 10), (16, 16), (22, 22))]
    net = YOLOv3(**{**SMALL, "num_classes": 1}, anchors=anchors, coding=coding, prior=0.05)
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    first = last = 0.0
    for step in range(60):
        losses = net.losses(images, targets)
        total = sum(losses.values())
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        first, last = (total.item() if step == 0 else first), total.item()
    assert last < first / 2
    found = net.eval().predict(images)
    assert all(d.boxes.shape == (len(d), 4) and (d.scores.diff() <= 0).all() for d in found)


def test_focal_objectness_and_sizes_of_training() -> None:
    net = YOLOv3(**SMALL, loss=FocalLoss(gamma=2.0, alpha=0.5, reduction="none"), train_sizes=(32, 64, 96))
    seen = set()
    net.backbone.register_forward_hook(lambda _m, args, _o: seen.add(args[0].shape[-1]))
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 30.0]]), "labels": torch.tensor([2])}
    torch.manual_seed(0)
    for _ in range(12):
        losses = net.losses([torch.rand(3, 50, 70)] * 2, [target] * 2)
    assert seen == {32, 64, 96}
    plain = YOLOv3(**SMALL)
    plain.load_state_dict(net.state_dict())
    net.eval(), plain.eval()
    a, b = net.losses([torch.rand(3, 50, 70)], [target]), plain.losses([torch.rand(3, 50, 70)], [target])
    assert a["objectness"].item() < b["objectness"].item() / 2
    assert losses.keys() == a.keys()


@pytest.mark.parametrize("count", [0, 1000])
def test_empty_and_crowded_images(count: int) -> None:
    net = YOLOv3(**SMALL)
    corner = torch.rand(count, 2) * 60
    size = torch.rand(count, 2) * 3 + 0.5  # down to less than a pixel
    crowd = {"boxes": torch.cat([corner, corner + size], 1), "labels": torch.randint(1, 4, (count,))}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = net.losses([torch.rand(3, 64, 64), torch.rand(3, 64, 48)], [crowd, none])
    assert all(v.isfinite() for v in losses.values())
    assert (losses["localisation"].item() == 0) == (count == 0)
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


def test_kmeans_of_shapes() -> None:
    alike = torch.tensor([[3.0, 5.0]]).repeat(20, 1)
    centres, costs = kmeans_anchors(alike, 1)
    assert torch.equal(centres, alike[:1])
    assert costs[-1] == pytest.approx(0, abs=1e-12)
    groups = torch.tensor([[4.0, 4.0], [30.0, 10.0], [12.0, 50.0]])
    shapes = groups.repeat(40, 1) * (1 + 0.1 * torch.randn(120, 2)).clamp(min=0.5)
    centres, costs = kmeans_anchors(shapes, 3)
    assert all(b <= a for a, b in pairwise(costs))
    assert (1 - shape_iou(shapes.double(), centres.double()).amax(1)).mean() == pytest.approx(costs[-1], abs=1e-6)
    assert shape_iou(centres, groups).amax(0).min() > 0.8
    with pytest.raises(ValueError, match="expected 1 to 20 centres and sides above zero, got k=21"):
        kmeans_anchors(alike, 21)


def test_what_is_refused() -> None:
    for options, words in (
        ({"coding": "polar"}, "coding must be logistic, linear or rcnn, got 'polar'"),
        ({"num_classes": 0}, "num_classes and image_size must be >= 1, got 0 and 64"),
        ({"widths": (8, 8)}, "expected 3 widths, one for each map"),
        ({"train_sizes": ()}, "train_sizes must be sides >= 1"),
        ({"anchors": [[[4, 4]]] * 9}, "anchors are given for 9 maps, the backbone has"),
        ({"loss": nn.BCEWithLogitsLoss()}, "loss must have the reduction none, got 'mean'"),
    ):
        with pytest.raises(ValueError, match=words):
            YOLOv3(**{**SMALL, **options})
