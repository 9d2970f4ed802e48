"""Panoptic FPN: a public semantic head, torchvision's Mask R-CNN, and the laws of its parts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from tests.nn.torchvisions import LEVELS, assert_same, detect, mask_predictor, of_parts
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNN
from torchvision.ops import MultiScaleRoIAlign

from torchive.engine.export import OnnxModel, write_onnx
from torchive.methods.segmentation.panoptic_fpn import PanopticFPN, PyramidSemanticHead

REPOSITORY, COMMIT = "qubvel-org/segmentation_models.pytorch", "5006616357631a48c7c8e11977cf5abb00803590"
SIZES = [[8.0], [16.0], [32.0], [64.0], [128.0]]
SMALL = {
    "num_classes": 2,
    "backbone": "timm/test_efficientnet",
    "channels": 8,
    "hidden": 16,
    "width": 8,
    "anchor_sizes": SIZES,
    "before_nms": (200, 100),
    "after_nms": (100, 50),
    "rois_per_image": 64,
    "stuff_area": 64,
}


def own_name(name: str) -> str:
    """A parameter of their head by the name that it has here; theirs begins with the coarsest map."""
    if name.startswith("head."):
        return name.replace("head.", "logits.")
    level, _, number, _, layer, kind = name.split(".")
    return f"branches.{3 - int(level)}.{number}.{layer}.{kind}"


def test_matches_the_public_semantic_head(record, parity) -> None:
    """Output, loss, gradients and one step, added and concatenated."""
    stored = parity("panoptic_fpn")
    worst = {"output": 0.0}
    for combine in ("add", "concat"):
        part = {k.removeprefix(f"{combine}."): v for k, v in stored.items() if k.startswith(f"{combine}.")}
        head = PyramidSemanticHead(4, 3, width=32, combine=combine, align_corners=True)
        own = dict(head.named_parameters())
        before = {own_name(k.removeprefix("before.")): v for k, v in part.items() if k.startswith("before.")}
        if combine == "concat":  # their widest map comes last
            before["logits.weight"] = torch.cat(before["logits.weight"].chunk(4, 1)[::-1], 1)
        assert set(before) == set(own)
        for name, value in before.items():
            own[name].data.copy_(value)
        out = head([part[f"map{k}"] for k in range(4)])
        worst["output"] = max(worst["output"], (out - part["out"]).abs().max().item())
        if combine == "add":
            optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
            loss = F.cross_entropy(out, part["target"])
            loss.backward()
            worst["loss"] = abs(loss.item() - part["loss"].item())
            for kind, of in (("gradient", "grad."), ("optimiser_step", "after.")):
                found = {own_name(k.removeprefix(of)): v for k, v in part.items() if k.startswith(of)}
                assert len(found) > 15
                worst[kind] = max(
                    ((own[n].grad if of == "grad." else own[n]) - v).abs().max().item() for n, v in found.items()
                )
                optimiser.step() if of == "grad." else None
    assert max(worst.values()) < 1e-5, worst
    record(
        "panoptic_fpn",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=max(worst.values()),
        note="float32; the semantic head. The instance half equals torchvision's Mask R-CNN to 1e-4",
        **worst,
    )


def test_each_map_has_its_rounds() -> None:
    head = PyramidSemanticHead(8, 3)
    assert [len(branch) for branch in head.branches] == [1, 1, 2, 3]
    maps = [torch.randn(1, 8, 32 // 2**k, 48 // 2**k) for k in range(4)]
    assert head(maps).shape == (1, 3, 32, 48)
    assert PyramidSemanticHead(8, 3, combine="concat").features(maps).shape == (1, 512, 32, 48)
    odd = [torch.randn(1, 8, 25, 38), torch.randn(1, 8, 13, 19), torch.randn(1, 8, 7, 10), torch.randn(1, 8, 4, 5)]
    assert head(odd).shape == (1, 3, 25, 38)
    alone = [head.features([m if k == j else torch.zeros_like(m) for j, m in enumerate(maps)]) for k in range(4)]
    silent = head.features([torch.zeros_like(m) for m in maps])
    torch.testing.assert_close(sum(alone) - 3 * silent, head.features(maps))  # the maps are added


def test_the_instance_half_is_torchvisions() -> None:
    net = PanopticFPN(**SMALL).eval()
    for module in (net.roi_heads.box_predictor, net.rpn.head.cls_logits, net.masks.mask_predictor):
        for p in module.parameters():
            nn.init.normal_(p, std=0.3)
    theirs = of_parts(
        MaskRCNN,
        net,
        sizes=SIZES,
        box_head=net.roi_heads.box_head,
        box_predictor=net.roi_heads.box_predictor,
        mask_roi_pool=MultiScaleRoIAlign(LEVELS, 14, 2),
        mask_head=net.masks.mask_head,
        mask_predictor=mask_predictor(net.masks.mask_predictor, 2),
    )
    images = torch.randn(2, 3, 128, 192)
    with torch.no_grad():
        expected, _ = detect(theirs, images)
        raw = net(images)
    assert_same(raw, expected)


def things_on_stuff(count: int, size: int, seed: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Noise: the lower part is textured stuff (category 3), bright shapes are things of two classes."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    images, targets = [], []
    for _ in range(count):
        image = torch.rand(3, size, size, generator=g) * 0.2
        ground = y > float(torch.rand((), generator=g) * 0.4 + 0.4) * size
        image = torch.where(ground & (y.long() // 2 % 2 == 0), image + 0.3, image)
        semantic = torch.where(ground, 3, 0)
        masks: list[Tensor] = []
        labels = []
        for _ in range(2):
            label = int(torch.randint(1, 3, (1,), generator=g))
            cx, cy = (torch.rand(2, generator=g) * 0.6 + 0.2) * size
            a, b = (torch.rand(2, generator=g) * 0.1 + 0.12) * size
            u, v = (x - cx) / a, (y - cy) / b
            shape = (u**2 + v**2 < 1) if label == 1 else (u.abs() < 1) & (v.abs() < 1)
            masks = [m & ~shape for m in masks] + [shape]
            labels.append(label)
            image = torch.where(shape, 0.8 + 0.2 * torch.rand(3, 1, 1, generator=g), image)
            semantic = torch.where(shape, label, semantic)
        kept = [k for k, m in enumerate(masks) if m.sum() > 12]
        stack = torch.stack([masks[k] for k in kept])
        boxes = torchvision.ops.masks_to_boxes(stack) + torch.tensor([0.0, 0.0, 1.0, 1.0])
        target = {"boxes": boxes, "labels": torch.tensor([labels[k] for k in kept]), "masks": stack.to(torch.uint8)}
        images.append(image)
        targets.append({**target, "semantic": semantic})
    return images, targets


@pytest.mark.parametrize(
    "options",
    [
        {"stuff_classes": 1},
        {"stuff_classes": 1, "background": False, "combine": "concat"},
        {"stuff_classes": 1, "separate": "timm/test_resnet", "image_size": 96},
    ],
)
def test_contract(options: dict) -> None:
    net = PanopticFPN(**{**SMALL, **options})
    images, targets = things_on_stuff(2, 64, 0)
    images[1] = images[1][:, :50]
    targets[1] = {**targets[1], "masks": targets[1]["masks"][:, :50], "semantic": targets[1]["semantic"][:50]}
    losses = net.losses(images, targets)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    halved = PanopticFPN(**{**SMALL, **options}, instance_weight=0.5, semantic_weight=2.0)
    halved.load_state_dict(net.state_dict())
    net.eval(), halved.eval()
    torch.manual_seed(0)
    one = net.losses(images, targets)
    torch.manual_seed(0)
    two = halved.losses(images, targets)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value * (4.0 if key == "loss_semantic" else 0.5))
    for image, found in zip(images, net.predict(images, instance_threshold=0.3), strict=True):
        assert found.masks.shape == (len(found), *image.shape[1:])
        assert found.panoptic.ids.shape == image.shape[1:]
        assert set(found.panoptic.ids.unique().tolist()) - {0} == {s.id for s in found.panoptic.segments}
        stuff = {s.category for s in found.panoptic.segments if not s.isthing}
        assert stuff <= ({0, 3} if options.get("background", True) else {3})


def slow_resized(plane: list[list[float]], height: int, width: int, y: int, x: int) -> float:
    """The value of a plane, as it is enlarged bilinearly to (height, width) by the pixels' centres, at a pixel."""

    def near(k: int, new: int, old: int) -> list[tuple[int, float]]:
        place = min(max((k + 0.5) * old / new - 0.5, 0.0), old - 1.0)
        low = min(int(place), old - 1)
        return [(low, 1 - (place - low)), (min(low + 1, old - 1), place - low)]

    rows, columns = near(y, height, len(plane)), near(x, width, len(plane[0]))
    return sum(a * b * plane[i][j] for i, a in rows for j, b in columns)


def test_semantic_loss_equals_a_loop_over_pixels(double) -> None:
    """Two images of odd sizes, padded to 32, with pixels of 255: the logits are enlarged to the batch's pixels."""
    net = PanopticFPN(**SMALL, stuff_classes=1, semantic_weight=0.7).eval()
    nn.init.normal_(net.semantic.logits.weight)
    sizes = [(37, 29), (21, 31)]
    images = [torch.rand(3, *size) for size in sizes]
    targets = []
    for size in sizes:
        semantic = torch.randint(0, 4, size)
        semantic[:5, 3:9] = 255
        none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, *size)}
        targets.append({**none, "semantic": semantic})
    with torch.no_grad():
        found = net.losses(images, targets)["loss_semantic"].item()
        logits = net(images)["semantic_logits"]
    assert logits.shape == (2, 3, 16, 8)
    channel = {0: 1, 1: 0, 2: 0, 3: 2}
    total, count = 0.0, 0
    for planes, target, (height, width) in zip(logits.tolist(), targets, sizes, strict=True):
        for y, x in itertools.product(range(height), range(width)):
            category = int(target["semantic"][y, x])
            if category != 255:
                values = [slow_resized(plane, 64, 32, y, x) for plane in planes]
                total += math.log(sum(math.exp(v) for v in values)) - values[channel[category]]
                count += 1
    assert found == pytest.approx(0.7 * total / count, abs=1e-12)


@pytest.mark.parametrize("resized", [False, True])
def test_given_logits_give_a_known_map(resized: bool) -> None:
    """Stuff that parts at column 21, things from row 33 on, an object over all; half as large with ``image_size``.

    Neither border lies between cells: slopes must be read at the pixels' centres.
    """
    net = PanopticFPN(**{**SMALL, "stuff_area": 1}, stuff_classes=1, image_size=20 if resized else None)
    size, scale = (40, 52), 2 if resized else 1
    cells = 64 // 4 // scale
    logits = torch.zeros(1, 3, cells, cells)  # things, background, stuff of category 3
    place = (torch.arange(cells) + 0.5) * 4 * scale  # of the cells' centres, in pixels of the image
    logits[0, 1], logits[0, 2] = 21 - place, place - 21
    logits[0, 0] = 200 * (place - 33)[:, None]
    raw = {
        "boxes": torch.tensor([[[16.0, 8, 32, 24], [0, 0, 1, 1]]]) / scale,
        "labels": torch.tensor([[2, 1]]),
        "scores": torch.tensor([[0.9, -1.0]]),
        "masks": torch.ones(1, 2, 28, 28),
        "semantic_logits": logits,
        "sizes": torch.tensor([[40.0 / scale, 52.0 / scale]]),
    }
    (found,) = net.decode(raw, [size])
    expected = torch.full(size, 2, dtype=torch.int32)  # background is the second segment, category 3 the third
    expected[:, 21:] = 3
    expected[33:] = 0  # things of the semantic branch are never given out
    expected[8:24, 16:32] = 1
    assert torch.equal(found.panoptic.ids, expected)
    assert [(s.id, s.category, s.isthing) for s in found.panoptic.segments] == [
        (1, 2, True),
        (2, 0, False),
        (3, 3, False),
    ]


@pytest.mark.parametrize(
    ("width", "groups"), [(128, 32), (256, 32), (64, 16), (48, 8), (36, 4), (32, 8), (8, 2), (3, 1)]
)
def test_a_map_of_one_cell_is_normalised(width: int, groups: int) -> None:
    """Groups of four channels at least, the paper's 32 of 128; 32 pixels are one cell of the coarsest map."""
    net = PanopticFPN(**{**SMALL, "width": width})
    norms = [m for m in net.semantic.modules() if isinstance(m, nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {groups}
    if width <= 32:
        assert net.eval()(torch.rand(1, 3, 32, 32))["semantic_logits"].isfinite().all()


def test_classes_of_the_semantic_branch() -> None:
    net = PanopticFPN(**SMALL, stuff_classes=2)
    assert net.semantic.logits.out_channels == 4  # things, background, two kinds of stuff
    found = net._classes(torch.tensor([0, 1, 2, 3, 4, 255]))
    assert found.tolist() == [1, 0, 0, 2, 3, 255]
    assert net.category.tolist() == [255, 0, 3, 4]
    without = PanopticFPN(**SMALL, stuff_classes=2, background=False)
    assert without._classes(torch.tensor([0, 1, 2, 3, 4, 255])).tolist() == [255, 0, 0, 1, 2, 255]
    with pytest.raises(ValueError, match="semantic maps must hold 0 to 4 and 255, got 5"):
        net._classes(torch.tensor([0, 5]))


@pytest.mark.parametrize("count", [0, 600])
def test_empty_and_crowded_images(count: int) -> None:
    net = PanopticFPN(**SMALL)
    corner = torch.rand(count, 2) * 60
    boxes = torch.cat([corner, corner + torch.rand(count, 2) * 3 + 1], 1)  # down to a pixel
    y, x = torch.arange(64).view(1, -1, 1) + 0.5, torch.arange(64).view(1, 1, -1) + 0.5
    x1, y1, x2, y2 = (b.view(-1, 1, 1) for b in boxes.unbind(1))
    masks = ((x > x1) & (x < x2) & (y > y1) & (y < y2)).to(torch.uint8)
    crowd = {"boxes": boxes, "labels": torch.randint(1, 3, (count,)), "masks": masks}
    void = torch.full((64, 48), 255)
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 64, 48)}
    losses = net.losses([torch.rand(3, 64, 64), torch.rand(3, 64, 48)], [crowd, {**none, "semantic": void}])
    assert all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    unknown = net.losses([torch.rand(3, 64, 48)], [{**none, "semantic": void}])
    assert unknown["loss_semantic"].item() == 0


def test_what_is_refused() -> None:
    for options, words in (
        ({"num_classes": 0}, "expected num_classes >= 1.*got 0 and 0"),
        ({"num_classes": 200, "stuff_classes": 80}, "fewer than 255 together, got 200 and 80"),
        ({"background": False}, "without a background there must be stuff_classes, got 0"),
        ({"combine": "mean"}, "combine must be add or concat, got 'mean'"),
    ):
        with pytest.raises(ValueError, match=words):
            PanopticFPN(**{**SMALL, **options})
    with pytest.raises(ValueError, match=r"strides must be powers of two apart, got \[4, 12\]"):
        PyramidSemanticHead(8, 3, strides=(4, 12))


@pytest.mark.slow
def test_one_onnx_file_serves_every_size(tmp_path) -> None:
    """Up to the masks of the chosen detections, suppression and pooling included."""
    net = PanopticFPN(**{**SMALL, "stuff_classes": 1}).eval()
    nn.init.normal_(
        net.rpn.head.cls_logits.weight, std=5.0
    )  # scores that lie apart, so that rounding keeps their order
    for name, p in net.roi_heads.named_parameters():
        if "cls_score" in name:
            nn.init.normal_(p, std=0.5)
    write_onnx(net, torch.randn(2, 3, 64, 64), tmp_path / "whole.onnx")
    exported = OnnxModel(tmp_path / "whole.onnx")
    for size in [(2, 3, 64, 64), (3, 3, 70, 100)]:
        x = torch.randn(size)
        with torch.no_grad():
            raw = net(x)
        for (name, expected), got in zip(raw.items(), exported(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=f"{name} at {size}")
