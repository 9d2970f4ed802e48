"""CondInst: the whole released model on given weights; slow float64 references; the laws of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchive.engine.export import OnnxModel, write_onnx
from torchive.methods.segmentation.condinst import CondInst, DynamicMaskHead
from torchive.methods.segmentation.condinst.decode import mask_scores
from torchive.methods.segmentation.condinst.loss import choose, sampled_masks, semantic_loss, semantic_truth
from torchive.methods.segmentation.condinst.upsampling import aligned_bilinear
from torchive.nn.dice import mask_dice
from torchive.nn.fcos import fcos_detections
from torchive.ops.boxes import clip_boxes
from torchive.protocols import Level

REPOSITORY, COMMIT = "aim-uofa/AdelaiDet", "36721221eb572256206e60df6e9095ed00b2e08c"
SMALL = {
    "backbone": "timm/test_efficientnet",
    "num_classes": 3,
    "channels": 16,
    "mask_channels": 8,
    "depth": 1,
    "sizes_of_interest": (8, 16, 24, 32),
}


def wave(shape: Sequence[int], k: int, scale: float) -> Tensor:
    """Numbers that look drawn and are the same everywhere: what the release was given, too."""
    i = torch.arange(int(np.prod(shape)))
    return (((i * i * 7 + i * 131 + k * 977) % 1009).double() / 1009 - 0.5).mul(scale).float().view(*shape)


class Stages(nn.Module):
    """Five convolutions in the place of backbone and pyramid."""

    levels = tuple(Level(32, 8 * 2**k) for k in range(5))

    def __init__(self) -> None:
        super().__init__()
        wide = [nn.Conv2d(3, 32, 8, stride=8), *(nn.Conv2d(32, 32, 2, stride=2) for _ in range(2))]
        self.convs = nn.ModuleList([*wide, *(nn.Conv2d(32, 32, 3, stride=2, padding=1) for _ in range(2))])

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for conv in self.convs:
            x = conv(x).tanh()
            maps.append(x)
        return maps


def released(**options: object) -> tuple[CondInst, list[Tensor]]:
    """The model in the released form and its parameters in the release's order, filled as the release's were."""
    net = CondInst(
        num_classes=3,
        backbone="timm/test_efficientnet",
        channels=32,
        mask_channels=8,
        depth=1,
        sizes_of_interest=(16, 32, 64, 128),
        mask_stride=4,
        semantic=True,
        smooth=1.0,
        **options,
    )
    net.backbone = Stages()
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = 32  # the release's, also for few channels
    head = net.detector
    parts = [net.backbone, head.class_tower, head.box_tower, head.logits, head.distances, head.centerness]
    rest = [p for part in (net.mask_branch, net.semantic, net.controller) for p in part.parameters()]
    before = [p for part in parts for p in part.parameters()]
    with torch.no_grad():
        for k, p in [*enumerate(before), *enumerate(rest, len(before) + 5)]:
            size = (1.0 if p.shape[0] == 169 else 4.0) / p[0].numel() ** 0.5 if p.ndim > 1 else 0.4
            norm = p.ndim == 1 and any(
                p is m.weight for m in net.modules() if isinstance(m, nn.modules.batchnorm._NormBase | nn.GroupNorm)
            )
            p.copy_(wave(p.shape, k, size) + norm)
        head.scales.copy_(0.8 + 0.1 * torch.arange(5))
    return net, [*before, head.scales, *rest]


def ellipses() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of 64 x 160 and 96 x 160 with overlapping ellipses, some cut."""
    images, targets = [], []
    for height, width in ((64, 160), (96, 160)):
        boxes = [[4.0, 6, 30, 26], [20.0, 10, 60, 58], [50.0, 2, 94, 40], [70.0, 44, 82, 60]]
        boxes += [[2.0, 30, 150, 94]] if height == 96 else []
        y, x = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
        masks = []
        for k, (x0, y0, x1, y1) in enumerate(boxes):
            cx, cy, rx, ry = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
            mask = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
            masks.append(mask & (x + y < cx + cy + rx / 2) if k % 2 else mask)
        images.append(torch.stack([wave((height, width), k, 2.0) for k in range(3)]))
        labels = torch.tensor([1, 3, 2, 1, 2][: len(boxes)])
        targets.append({"boxes": torch.tensor(boxes), "labels": labels, "masks": torch.stack(masks).to(torch.uint8)})
    return images, targets


def test_matches_the_released_code(record, parity) -> None:
    """Losses, gradients, one step and predictions of the whole model, and its mask head alone."""
    stored = parity("condinst")
    images, targets = ellipses()
    names = ("classification", "localisation", "centerness", "mask", "semantic")
    worst = {}
    net, _ = released(max_masks=None, masks_per_image=8)
    losses = net.losses(images, targets)
    found = torch.stack([losses[name] for name in names])
    worst["loss, best locations"] = (found / stored["loss.8"] - 1).abs().max().item()

    net, parameters = released()
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    losses = net.losses(images, targets)
    found = torch.stack([losses[name] for name in names])
    worst["loss"] = (found / stored["loss.-1"] - 1).abs().max().item()
    sum(losses.values()).backward()

    scales = next(k for k, p in enumerate(parameters) if p is net.detector.scales)

    def stacked(values: list[Tensor]) -> Tensor:
        parts = [*values[:scales], *values[scales].unbind(), *values[scales + 1 :]]
        return torch.cat([t.flatten()[::9] for t in parts])

    gradient = stacked([p.grad for p in parameters])
    worst["gradient"] = ((gradient - stored["gradient"]).abs().max() / stored["gradient"].abs().max()).item()
    optimiser.step()
    worst["optimiser_step"] = (stacked([p.detach() for p in parameters]) - stored["step"]).abs().max().item()

    net, _ = released()
    with torch.no_grad():
        for _ in range(3):
            net.losses(images, targets)  # moves the running statistics
    net.eval()
    for k, image in enumerate(images):
        size = (image.shape[1], image.shape[2])
        with torch.no_grad():
            raw = net([image])
            # the release suppresses boxes first and cuts them to the image afterwards: here nothing is cut
            far = fcos_detections(raw | {"points": raw["points"] + 1000}, [(3000, 3000)], max_detections=1000)
            masks = torch.cat(list(mask_scores(raw, 0, far[0][1], net.mask_head, stride=8, mask_stride=4, size=size)))
        boxes = clip_boxes((far[0][0].boxes - 1000)[None], torch.tensor([size]))[0]
        left = (boxes[:, 2:] > boxes[:, :2]).all(1)
        assert torch.equal(far[0][0].labels[left], stored[f"labels{k}"].long())
        worst[f"boxes, image {k}"] = ((boxes[left] - stored[f"boxes{k}"]).abs().max() / 160).item()
        worst[f"scores, image {k}"] = (far[0][0].scores[left] - stored[f"scores{k}"]).abs().max().item()
        bits = np.unpackbits(stored[f"masks{k}"].numpy())[: 6 * size[0] * size[1]].reshape(6, *size)
        assert torch.equal(masks[left][:6] > 0.5, torch.from_numpy(bits).bool())

    head = {key: stored[f"head.{key}"] for key in ("features", "parameters", "image", "points", "levels", "weight")}
    features, filters = head["features"].requires_grad_(), head["parameters"].requires_grad_()
    out = torch.empty_like(stored["head.out"])
    for k in range(2):
        mine = head["image"] == k
        logits = net.mask_head(features[k], filters[mine], head["points"][mine], net.reach[head["levels"][mine]], 8)
        logits = aligned_bilinear(logits, 2)
        (logits * head["weight"][mine]).sum().backward()
        out[mine] = logits.detach()
    worst["head"] = ((out - stored["head.out"]).abs().max() / stored["head.out"].abs().max()).item()
    worst["head, gradient"] = max(
        ((found - wanted).abs().max() / wanted.abs().max()).item()
        for found, wanted in ((features.grad, stored["head.gfeatures"]), (filters.grad, stored["head.gparameters"]))
    )
    assert max(worst.values()) < 1e-5, worst  # float32: 1e-6 to 3e-6 by the vector units that the CPU has
    record(
        "condinst",
        "matched",
        repository=REPOSITORY,
        commit=COMMIT,
        largest_difference=max(worst.values()),
        note="float32, a stack of convolutions in the place of the backbone; losses and gradients relative",
        **{key.replace(", ", "_").replace(" ", "_"): value for key, value in worst.items()},
    )


def slow_masks(
    features: Tensor, filters: Tensor, points: Tensor, reach: Tensor, stride: int, *, places: bool
) -> Tensor:
    """Section 3.2 for one object after the other, pixel by pixel, with explicit linear layers."""
    height, width = features.shape[1:]
    c = 10 if places else 8
    masks = []
    for vector, (x, y), size in zip(filters, points.tolist(), reach.tolist(), strict=True):
        first, second, third, b1, b2, b3 = vector.split([8 * c, 64, 8, 8, 8, 1])
        mask = torch.zeros(height, width)
        for row in range(height):
            for column in range(width):
                at = (stride * column + stride // 2, stride * row + stride // 2)
                near = [torch.tensor([(x - at[0]) / size, (y - at[1]) / size])] if places else []
                v = torch.cat([*near, features[:, row, column]])
                v = F.relu(F.linear(v, first.view(8, c), b1))
                v = F.relu(F.linear(v, second.view(8, 8), b2))
                mask[row, column] = F.linear(v, third.view(1, 8), b3)
        masks.append(mask)
    return torch.stack(masks)[:, None]


@pytest.mark.parametrize("places", [True, False])
def test_masks_equal_linear_layers_and_the_grouped_convolution(double, record, places: bool) -> None:
    head = DynamicMaskHead(coordinates=places)
    length = 169 if places else 153
    assert head.parameters_per_object == length
    features, filters = torch.randn(8, 5, 7), torch.randn(4, length)
    points, reach = torch.rand(4, 2) * 60, torch.tensor([64.0, 128.0, 64.0, 256.0])
    found = head(features, filters, points, reach, 8)
    gap = (found - slow_masks(features, filters, points, reach, 8, places=places)).abs().max().item()

    weights, biases = head.split(filters)
    y, x = torch.arange(5) * 8 + 4, torch.arange(7) * 8 + 4
    grid = torch.stack([x.expand(5, 7), y[:, None].expand(5, 7)])
    near = (points[:, :, None, None] - grid) / reach[:, None, None, None]
    stack = features.expand(4, -1, -1, -1)
    stack = (torch.cat([near, stack], 1) if places else stack).reshape(1, -1, 5, 7)
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        stack = F.conv2d(stack.relu() if k else stack, weight.flatten(0, 1)[..., None, None], bias.flatten(), groups=4)
    gap = max(gap, (found - stack.view_as(found)).abs().max().item())
    assert gap < 1e-12
    if places:
        record("condinst", "referenced", largest_difference=gap, dtype="float64", what="masks of four objects")
    with pytest.raises(ValueError, match=rf"expected \(n, {length}\) parameters, got \(4, 9\)"):
        head.split(torch.zeros(4, 9))


def test_a_shifted_object_has_a_shifted_mask(double) -> None:
    head, features, filters = DynamicMaskHead(), torch.randn(8, 6, 9), torch.randn(1, 169)
    point, reach = torch.tensor([[20.0, 28.0]]), torch.tensor([64.0])
    mask = head(features, filters, point, reach, 8)
    moved = head(features.roll((1, 2), (1, 2)), filters, point + torch.tensor([16.0, 8.0]), reach, 8)
    assert torch.allclose(moved[..., 1:, 2:], mask[..., :-1, :-2])
    stayed = head(features.roll((1, 2), (1, 2)), filters, point, reach, 8)
    assert not torch.allclose(stayed[..., 1:, 2:], mask[..., :-1, :-2])


def test_dice_of_known_masks(double) -> None:
    truth = torch.zeros(2, 1, 6, 6)
    truth[:, :, 1:4, 1:5] = 1
    assert (mask_dice(truth, truth) < 1e-5).all()
    assert torch.equal(mask_dice(1 - truth, truth), torch.ones(2))
    scores = torch.full((1, 1, 6, 6), 0.5, requires_grad=True)
    value = mask_dice(scores, truth[:1])
    assert value.item() == pytest.approx(1 - 2 * 6 / (36 / 4 + 12 + 1e-5), abs=1e-12)
    value.backward()
    assert bool((scores.grad[truth[:1] == 1] < 0).all())  # more of the object costs less
    assert bool((scores.grad[truth[:1] == 0] > 0).all())


def test_upsampling_keeps_a_ramp_and_its_places(double) -> None:
    y, x = torch.arange(5)[:, None], torch.arange(7)
    small = (3 * x - 2 * y + 1).double().expand(5, 7)[None, None]
    for factor in (1, 2, 4, 8):
        large = aligned_bilinear(small, factor)[0, 0]
        start = factor // 2
        rows, columns = torch.arange(5 * factor)[:, None], torch.arange(7 * factor)
        ramp = 3 * (columns - start) / factor - 2 * (rows - start) / factor + 1
        inside = (slice(start, start + 4 * factor + 1), slice(start, start + 6 * factor + 1))
        assert torch.allclose(large[inside], ramp[inside], atol=1e-12)
        assert torch.equal(large[start::factor, start::factor], small[0, 0])
    with pytest.raises(ValueError, match="factor must be >= 1, got 0"):
        aligned_bilinear(small, 0)


def test_true_masks_are_read_at_the_centres_of_cells() -> None:
    masks = torch.randint(0, 3, (4, 10, 13))
    expected = F.pad(masks, (0, 3, 0, 6))[:, 2::4, 2::4] > 0
    assert 3 < expected.sum() < 30
    assert torch.equal(sampled_masks(masks, None, 4, (16, 16)), expected)
    for rows in (torch.tensor([2]), torch.tensor([3, 0, 0, 1, 2, 3])):
        assert torch.equal(sampled_masks(masks, rows, 4, (16, 16)), expected[rows])


def test_locations_are_spread_over_theobjects() -> None:
    image = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    row = torch.tensor([0, 0, 0, 1, 1, 5, 5, 5])
    score = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.2, 0.1, 0.7, 0.4])
    assert choose(image, row, score, per_image=4).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert choose(image, row, score, per_image=2).tolist() == [1, 3, 6, 7]
    assert choose(image, row, score, per_image=1).tolist() == [1, 3, 6]  # one each at least
    assert choose(image, row, score, most=8).tolist() == list(range(8))
    drawn = {tuple(choose(image, row, score, most=3).tolist()) for _ in range(30)}
    assert len(drawn) > 5
    assert all(len(set(d)) == 3 for d in drawn)
    none = row[:0]
    assert choose(none, none, score[:0], per_image=4).tolist() == choose(none, none, score[:0]).tolist() == []


def test_semantic_truth_and_loss(double) -> None:
    masks = torch.zeros(3, 16, 24, dtype=torch.uint8)
    masks[0, :12], masks[1, 2:8, 2:14], masks[2, 4:6, 4:6] = 1, 1, 1
    target = {"masks": masks, "labels": torch.tensor([3, 1, 2])}
    truth = semantic_truth(target, 4, (32, 32))
    expected = torch.zeros(8, 8, dtype=torch.int64)
    for i in range(4):
        for j in range(6):
            sizes = [
                (int(m.sum()), int(c)) for m, c in zip(masks, target["labels"], strict=True) if m[4 * i + 2, 4 * j + 2]
            ]
            expected[i, j] = min(sizes)[1] if sizes else 0
    assert torch.equal(truth, expected)
    none = {"masks": masks[:0], "labels": target["labels"][:0]}
    logits = torch.randn(2, 3, 8, 8)
    loss = 0.0
    for k, want in enumerate((truth, torch.zeros_like(truth))):
        for c in range(3):
            p = logits[k, c].sigmoid()
            hit = want == c + 1
            loss += torch.where(hit, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()).sum()
    found = semantic_loss(logits, [target, none], 4)
    assert float(found) == pytest.approx(float(loss) / int((truth > 0).sum()), rel=1e-12)


def test_pixels_of_crowds_cost_the_semantic_branch_nothing(double) -> None:
    """A crowd over the corner, an object that reaches into it: the object's pixels count, the others of it do not."""
    masks = torch.zeros(1, 16, 24, dtype=torch.uint8)
    masks[0, :6, :6] = 1
    ignored = torch.zeros(16, 24, dtype=torch.bool)
    ignored[:8, :12] = True
    target = {"masks": masks, "labels": torch.tensor([2]), "ignored": ignored}
    truth = semantic_truth(target, 4, (16, 32))
    expected = torch.zeros(4, 8, dtype=torch.int64)
    expected[:2, :3], expected[0, 0] = 255, 2
    assert torch.equal(truth, expected)
    alone = {**target, "masks": masks[:0], "labels": target["labels"][:0]}
    assert (semantic_truth(alone, 4, (16, 32)) == 255).sum() == 6
    logits = torch.randn(1, 3, 4, 8, requires_grad=True)
    found = semantic_loss(logits, [target], 4)
    found.backward()
    assert torch.equal(logits.grad[0].abs().sum(0) == 0, expected == 255)
    p = logits.detach()[0].sigmoid()
    costs = -0.75 * p**2 * (1 - p).log()
    costs[1, 0, 0] = -0.25 * (1 - p[1, 0, 0]) ** 2 * p[1, 0, 0].log()
    assert found.item() == pytest.approx(costs[:, expected != 255].sum().item(), rel=1e-12)


def test_masks_are_compared_where_they_are_read(objects) -> None:
    """A step looks at few of the pixels of large masks; any value but zero is the object's."""

    class Compared(TorchDispatchMode):
        pixels = 0

        def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.ne.Scalar:
                self.pixels += args[0].numel()
            return func(*args, **(kwargs or {}))

    net = CondInst(**SMALL, semantic=True)
    target, image = objects(12, (128, 160), 10, 30), [torch.rand(3, 128, 160)]
    torch.manual_seed(0)
    with torch.no_grad(), Compared() as seen:
        plain = net.losses(image, [target])
    assert 0 < seen.pixels < target["masks"].numel()
    rows = torch.arange(1, 13, dtype=torch.uint8).view(-1, 1, 1)
    torch.manual_seed(0)
    numbered = net.losses(image, [{**target, "masks": target["masks"] * 20 * rows}])
    for key, value in plain.items():
        torch.testing.assert_close(numbered[key], value)


@pytest.mark.parametrize(("count", "most"), [(0, 1.0), (1, 1.0), (1000, 1.0), (1000, 40.0)])
def test_empty_and_crowded_images(count: int, most: float, objects) -> None:
    """No object, objects of a pixel or less, a thousand of them; images of two sizes."""
    net = CondInst(**SMALL, semantic=True)
    crowd, none = objects(count, (64, 96), 0.5, most), objects(0, (96, 64), 1, 1)
    losses = net.losses([torch.rand(3, 64, 96), torch.rand(3, 96, 64)], [crowd, none])
    assert all(v.isfinite() for v in losses.values())
    assert losses["mask"].item() > 0 if most > 1 else count > 0 or losses["mask"].item() == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    net.eval()
    found = net.predict([torch.rand(3, 64, 96), torch.rand(3, 50, 33)], score_threshold=0.0)
    assert [tuple(d.masks.shape[1:]) for d in found] == [(64, 96), (50, 33)]


@pytest.mark.slow
def test_coordinates_part_overlapping_equal_shapes(discs, score_after) -> None:
    """Equal discs that overlap: with relative coordinates the masks are right, without they are not."""
    scores = {}
    for coordinates in (True, False):
        torch.manual_seed(1)
        options = {"num_classes": 1, "finest": 4, "channels": 32, "depth": 2, "sizes_of_interest": None}
        net = CondInst(**{**SMALL, **options}, coordinates=coordinates, max_masks=60)
        scores[coordinates] = score_after(net, discs(16, 0), discs(8, 1), steps=240, rate=3e-3)
    assert scores[True]["mask_map"] > scores[False]["mask_map"] + 0.4, scores
    assert abs(scores[True]["map"] - scores[False]["map"]) < 0.1, scores  # the boxes are as good


def test_one_head_for_all_and_no_coordinates(objects) -> None:
    shared = CondInst(**{**SMALL, "sizes_of_interest": None}, conditional=False)
    target = objects(3, (64, 64), 20, 40)
    losses = shared.losses([torch.rand(3, 64, 64)], [target])
    sum(losses.values()).backward()
    assert shared.filters.grad.abs().sum() > 0
    assert shared.controller is None
    plain = CondInst(**SMALL, coordinates=False)
    assert plain.controller.out_channels == 153


@pytest.mark.slow
def test_exported_filters_give_the_same_boxes_and_masks(tmp_path) -> None:
    """The file's outputs decoded at two sizes; and the mask head on its own with any number of objects."""
    torch.manual_seed(2)
    net = CondInst(**SMALL).eval()
    with torch.no_grad():
        net.detector.logits.bias.zero_()
        net.detector.distances.bias.fill_(1.5)
    structure = write_onnx(net, torch.rand(2, 3, 128, 160), tmp_path / "c.onnx")
    file = OnnxModel(tmp_path / "c.onnx", structure)
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
        ({"num_classes": 0}, "num_classes must be >= 1 and depth >= 0, got 0 and 1"),
        ({"mask_stride": 3}, "mask_stride must divide the finest stride 8, got 3"),
        ({"max_masks": 0}, "max_masks and masks_per_image must be >= 1, got 0 and None"),
        ({"sizes_of_interest": (8, 16)}, "expected 4 growing sizes of interest, one fewer than maps, got"),
    ):
        with pytest.raises(ValueError, match=words):
            CondInst(**{**SMALL, **options})
    net = CondInst(**SMALL)
    target = objects(2, (64, 64), 20, 40)
    with pytest.raises(ValueError, match="target 0: expected masks beside the boxes, got boxes, labels"):
        net.losses([torch.rand(3, 64, 64)], [{k: v for k, v in target.items() if k != "masks"}])
    with pytest.raises(ValueError, match=r"got \(1, 64, 64\)"):
        net.losses([torch.rand(3, 64, 64)], [{**target, "masks": target["masks"][:1]}])
