"""Depth layering: round trips of encoding and decoding, slow float64 references, bounds, and what is refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.methods.segmentation.depth_layers import (
    draw_ellipses,
    draw_leaning_discs,
    rand_index,
    slow_encoding,
    slow_grouping,
    slow_score,
    target_of,
)
from torch import Tensor
from torch.utils._pytree import tree_structure

from torchive.engine.detector_file import DetectorWithDecoding, decodes
from torchive.engine.export import OnnxModel, export_model, gap_to_torch
from torchive.engine.metrics import metrics_of, record_of
from torchive.methods.segmentation.instance_depth_direction import (
    Encoding,
    InstanceDecoder,
    InstanceDepthDirection,
    VGGTrunk,
    mean_aspects,
)
from torchive.methods.segmentation.instance_depth_direction.decoding import group_by_centres, read_fields
from torchive.methods.segmentation.instance_depth_direction.encoding import (
    depth_classes,
    direction_classes,
    direction_vectors,
    encode,
    visible_ids,
)
from torchive.methods.segmentation.instance_depth_direction.grouping import Fields, fuse, roots
from torchive.methods.segmentation.instance_depth_direction.loss import encoding_loss
from torchive.methods.segmentation.instance_depth_direction.templates import Centres, match_templates

SMALL = {
    "num_classes": 3,
    "backbone": "timm/test_efficientnet",
    "width": 16,
    "depths": 5,
    "depth_range": (4.0, 16.0),
    "object_size": 128.0,
}


def perfect_logits(truth: dict[str, Tensor], encoding: Encoding, classes: int, sure: float = 20.0) -> dict[str, Tensor]:
    channels = {"semantic": classes + 1, "depth": encoding.depths + 1, "direction": encoding.directions + 1}
    kept = {name: count for name, count in channels.items() if name in truth}
    return {name: sure * F.one_hot(truth[name], count).movedim(-1, 0).float() for name, count in kept.items()}


@pytest.mark.parametrize(("seed", "count", "largest"), [(0, 8, 24.0), (1, 20, 16.0), (2, 45, 11.0)])
def test_ellipses_come_back(seed: int, count: int, largest: float) -> None:
    """Encoded and decoded, ellipses that do not touch are the same objects: the adjusted Rand index is one."""
    encoding = Encoding()
    masks = draw_ellipses(seed, count, gap=1, largest=largest)
    truth = encode(target_of(masks), tuple(masks.shape[1:]), encoding)
    found = InstanceDecoder(encoding, num_classes=1).instances(perfect_logits(truth, encoding, 1))
    assert rand_index(found.ids, visible_ids(masks)) == 1.0
    assert len(found.labels) == len(masks) > count // 2
    assert bool((found.scores.diff() <= 0).all())
    assert bool((found.labels == 1).all())


@pytest.mark.parametrize("seed", range(3))
def test_touching_ellipses_at_different_depths_come_back(seed: int) -> None:
    """A pair at a distance of its own each, the nearer one lying over the other; distances are given, not sizes."""
    encoding = Encoding(depths=19, depth_range=(1.0, 32.0), object_size=256.0)
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :128]
    for _ in range(6):
        near, far = draw.uniform(14, 20), draw.uniform(6, 9)
        turn = draw.uniform(0, 2 * math.pi)
        cx, cy, way = 64 + draw.uniform(-8, 8), 48 + draw.uniform(-6, 6), near + 0.7 * far
        back = ((x - cx - way * math.cos(turn)) / far) ** 2 + ((y - cy - way * math.sin(turn)) / (0.8 * far)) ** 2 <= 1
        front = ((x - cx) / near) ** 2 + ((y - cy) / (0.8 * near)) ** 2 <= 1
        masks = torch.from_numpy(np.stack([back, front])).to(torch.uint8)
        ids = visible_ids(masks)
        area = torch.stack([(ids == k).sum() for k in (1, 2)]).float()
        depth = 256 / area.sqrt() * torch.tensor([0.95, 1.05])
        truth = encode(target_of(masks, depth=depth), (96, 128), encoding)
        bins = [int(truth["depth"][ids == k].unique()) for k in (1, 2)]
        assert bins[0] > bins[1] + 1
        found = InstanceDecoder(encoding, num_classes=1).instances(perfect_logits(truth, encoding, 1))
        assert rand_index(found.ids, ids) == 1.0
        for k in (1, 2):
            row = int(found.ids[ids == k][0]) - 1
            assert float(found.depths[row]) == pytest.approx(encoding.middles[bins[k - 1] - 1], rel=1e-5)


def test_directions_by_the_formula_their_bound_and_a_turn(double) -> None:
    """floor(((angle + 22.5) mod 360) / 45); a turn by 45 degrees moves each class by one; 22.5 degrees at most."""
    offsets = torch.randn(5000, 2)
    angle = torch.rad2deg(torch.atan2(offsets[:, 1], offsets[:, 0]))
    classes = direction_classes(offsets)
    assert torch.equal(classes, torch.floor(((angle + 22.5) % 360) / 45).long())
    turn = math.radians(45)
    turned = torch.stack(
        [
            offsets[:, 0] * math.cos(turn) - offsets[:, 1] * math.sin(turn),
            offsets[:, 0] * math.sin(turn) + offsets[:, 1] * math.cos(turn),
        ],
        1,
    )
    assert torch.equal(direction_classes(turned), (classes + 1) % 8)
    units = F.normalize(offsets, dim=1)
    error = torch.rad2deg((units * direction_vectors(8, offsets)[classes]).sum(1).clamp(-1, 1).arccos())
    assert 22.4 < float(error.max()) <= 22.5 + 1e-9


def test_a_turned_image_has_shifted_directions() -> None:
    """A whole image turned by 90 degrees, where pixels fall on pixels: each class moves by two."""
    encoding = Encoding()
    masks = draw_ellipses(5, 6, gap=1, largest=18.0, size=(96, 96))
    first = encode(target_of(masks), (96, 96), encoding)
    second = encode(target_of(masks.rot90(-1, (1, 2))), (96, 96), encoding)
    turned = first["direction"].rot90(-1, (0, 1))
    wanted = torch.where(turned > 0, (turned - 1 + 2) % 8 + 1, 0)
    sure = (first["vectors"].abs().amin(0) > 1e-3).rot90(-1, (0, 1))  # on an axis, rounding decides at a centre
    angle = torch.atan2(first["vectors"][1], first["vectors"][0]) / (math.pi / 4) + 0.5
    sure &= ((angle - angle.round()).abs() > 1e-3).rot90(-1, (0, 1))
    assert float(sure[turned > 0].float().mean()) > 0.8
    assert torch.equal(second["direction"][sure], wanted[sure])


def test_the_template_peaks_at_the_centroid() -> None:
    """Alone on the image, at every size: the best pixel is within one of the mean pixel, along each axis."""
    encoding = Encoding()
    decoder = InstanceDecoder(encoding, num_classes=1)
    for seed, largest in itertools.product(range(4), (6.0, 12.0, 25.0)):
        masks = draw_ellipses(seed, 1, gap=0, largest=largest)
        truth = encode(target_of(masks), (112, 144), encoding)
        vectors = direction_vectors(8, torch.zeros(1))
        there = truth["direction"] > 0
        field = torch.where(there, vectors[(truth["direction"] - 1).clamp(min=0)].movedim(-1, 0), 0)
        score = match_templates(field, there.long(), (truth["depth"] - 1).clamp(min=0), decoder.extent, decoder.largest)
        y, x = divmod(int(score.argmax()), 144)
        rows, columns = torch.nonzero(masks[0], as_tuple=True)
        assert abs(y - float(rows.float().mean())) <= 1.0
        assert abs(x - float(columns.float().mean())) <= 1.0
        assert float(score.max()) > 0.7


def test_encoding_scores_and_losses_equal_slow_references(double, record) -> None:
    gap = 0.0
    encoding = Encoding(depths=6, depth_range=(4.0, 40.0), object_size=64.0)
    masks = torch.zeros(5, 22, 27, dtype=torch.uint8)
    masks[0, 2:9, 3:12], masks[1, 5:15, 8:19], masks[2, 17, 20], masks[3, 12:20, 1:6], masks[4, 1:4, 15:26] = (
        1,
        1,
        1,
        1,
        1,
    )
    target = target_of(masks, iscrowd=torch.tensor([0, 0, 0, 1, 0])) | {"labels": torch.tensor([1, 2, 1, 2, 1])}
    semantic = torch.zeros(22, 27, dtype=torch.int64)
    truth, slow = encode(target, (22, 27), encoding), slow_encoding(target, encoding)
    for name in ("semantic", "depth", "direction"):
        assert torch.equal(truth[name], torch.from_numpy(slow[name])), name
    gap = max(gap, float((truth["vectors"] - torch.from_numpy(slow["vectors"])).abs().max()))
    assert torch.equal(
        encode({**target, "semantic": semantic}, (22, 27), encoding)["semantic"] == 255, truth["semantic"] == 255
    )

    kind, depth = torch.randint(0, 3, (22, 27)), torch.randint(0, 4, (22, 27))
    field = torch.randn(2, 22, 27) * (kind > 0)
    field = field / field.norm(dim=0).clamp(min=1)
    half = torch.tensor([[[1, 1], [2, 3], [5, 4], [30, 9]], [[1, 2], [4, 1], [3, 3], [6, 40]]])
    found = match_templates(field, kind, depth, half, (30, 40))
    wanted = slow_score(field.numpy(), kind.numpy(), depth.numpy(), half.numpy())
    gap = max(gap, float((found - torch.from_numpy(wanted)).abs().max()))

    raw = {
        "semantic": torch.randn(1, 3, 22, 27),
        "depth": torch.randn(1, 7, 22, 27),
        "direction": torch.randn(1, 9, 22, 27),
    }
    losses = encoding_loss(raw, {name: value[None] for name, value in truth.items()})
    for name, logits in raw.items():
        total, count = 0.0, 0
        for y, x in itertools.product(range(22), range(27)):
            label = int(slow[name][y, x])
            if label != 255:
                values = logits[0, :, y, x].numpy()
                total += math.log(np.exp(values).sum()) - values[label]
                count += 1
        gap = max(gap, abs(float(losses[name]) - total / count))
    numbers = {"direction": torch.randn(1, 2, 22, 27)}
    there = np.abs(slow["vectors"]).sum(0) > 0
    wanted_distance = np.abs(numbers["direction"][0].numpy() - slow["vectors"])[:, there].mean()
    regression = encode(target, (22, 27), Encoding(directions=0, depths=0))
    found_distance = encoding_loss(numbers, {name: value[None] for name, value in regression.items()})["direction"]
    gap = max(gap, abs(float(found_distance) - float(wanted_distance)))
    assert gap < 1e-10, gap
    record(
        "instance_depth_direction",
        "referenced",
        largest_difference=gap,
        dtype="float64",
        what="maps of classes, template scores and losses; in a test of its own the grouping gives equal ids",
    )
    record("instance_depth_direction", "matched", impossible="no code of the authors or of others was found")


@pytest.mark.parametrize("seed", range(4))
def test_grouping_equals_a_slow_reference(double, seed: int) -> None:
    """Ellipses with wrong directions, depths and categories here and there, so that every step has work."""
    encoding = Encoding(depths=9, depth_range=(4.0, 32.0), object_size=128.0)
    draw = torch.Generator().manual_seed(seed)
    masks = draw_ellipses(seed, 7, gap=0, largest=10.0, size=(36, 44))
    truth = encode(target_of(masks), (36, 44), encoding)
    kind = (truth["direction"] > 0).long()
    depth = (truth["depth"] - 1).clamp(min=0)
    noisy = torch.rand(36, 44, generator=draw)
    depth = torch.where(noisy < 0.1, torch.randint(0, 9, (36, 44), generator=draw), depth)
    depth[:, 20:26] = (depth[:, 20:26] + 3).clamp(max=8)  # smaller templates: parts to fuse
    kind = torch.where((noisy > 0.9) & (kind > 0), 2, kind)
    field = torch.where(
        truth["direction"] > 0, direction_vectors(8, noisy.double())[truth["direction"] - 1].movedim(-1, 0), 0
    )
    field = (field + 0.5 * torch.randn(2, 36, 44, generator=draw)) * (kind > 0)
    field = field / field.norm(dim=0).clamp(min=1)
    decoder = InstanceDecoder(encoding, num_classes=2)
    half, sides = decoder.extent, decoder.sides.double()
    score = match_templates(field, kind, depth, half, decoder.largest)
    found, _ = group_by_centres(Fields(field, kind, depth), half, sides, decoder.largest)
    wanted = slow_grouping(field.numpy(), kind.numpy(), depth.numpy(), score.numpy(), half.numpy(), sides.tolist())
    assert torch.equal(found, torch.from_numpy(wanted))
    assert len(found.unique()) > 4


def test_parts_that_point_across_their_border_become_one() -> None:
    """A disc cut in two, each half pointing to the common centre; two whole neighbours stay two."""
    y, x = torch.meshgrid(torch.arange(21.0), torch.arange(41.0), indexing="ij")
    left, right = (x - 10) ** 2 + (y - 10) ** 2 <= 81, (x - 30) ** 2 + (y - 10) ** 2 <= 121
    ids = torch.where(left & (x < 10), 1, 0) + torch.where(left & (x >= 10), 2, 0) + torch.where(right & ~left, 3, 0)
    centre = torch.where(left, 10.0, 30.0)
    field = F.normalize(torch.stack([centre - x, 10 - y]), dim=0) * (ids > 0)
    fields = Fields(field, (ids > 0).long(), torch.zeros_like(ids))
    points = torch.tensor([[5.0, 10.0], [14.0, 10.0], [30.0, 10.0]])
    one = torch.ones(3, dtype=torch.int64)
    centres = Centres(points, torch.tensor([0.9, 0.8, 0.7]), one, 0 * one, one > 0)
    assert fuse(ids, fields, centres, bias=0.4, depth_gap=3).unique().tolist() == [0, 1, 3]
    assert torch.equal(fuse(ids, fields, centres, bias=1.0, depth_gap=3), ids)
    other = Centres(points, centres.score, one, torch.tensor([0, 5, 5]), one > 0)
    assert fuse(ids, fields, other, bias=0.4, depth_gap=3).unique().tolist() == [0, 1, 2, 3]


def test_chains_and_circles_of_parts_have_one_root() -> None:
    assert roots(torch.tensor([1, 2, 0, 2, 3, 5, 5])).tolist() == [0, 0, 0, 0, 0, 5, 5]
    long = torch.arange(1, 1001).clamp(max=999)
    assert roots(long).tolist() == [999] * 1000
    assert roots(long[:0]).tolist() == []


def test_bins_of_depth_are_narrow_where_it_is_near() -> None:
    city = Encoding(depth_range=(6.0, 100.0), object_size=3600.0)  # the paper: class 1 to 6 m, class 19 from 100 m
    widths = [b - a for a, b in itertools.pairwise(city.edges)]
    assert len(city.edges) == 18
    assert widths == sorted(widths)
    assert (city.edges[0], city.edges[-1]) == pytest.approx((6.0, 100.0))
    assert depth_classes(torch.tensor([1.0, 6.1, 99.0, 101.0]), city.edges).tolist() == [0, 1, 17, 18]
    assert depth_classes(torch.tensor(city.middles), city.edges).tolist() == list(range(19))
    ratios = [a / b for a, b in itertools.pairwise(city.sides)]
    assert max(ratios) == pytest.approx(min(ratios))  # objects of one class have a like size in the image
    size = 256 / torch.tensor([40.0, 10.0]) ** 2
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, :40, :40], masks[1, 50:60, 50:60] = 1, 1
    truth = encode(target_of(masks), (64, 64), Encoding())
    by_size = depth_classes(256 / torch.tensor([40.0, 10.0]), Encoding().edges) + 1
    assert [int(truth["depth"][masks[k] > 0].unique()) for k in (0, 1)] == by_size.tolist()
    given = encode(target_of(masks, depth=size), (64, 64), Encoding())
    assert int(given["depth"][0, 0]) == int(depth_classes(size[:1], Encoding().edges)) + 1


def test_continuous_direction_is_the_mean_of_the_classes(double) -> None:
    decoder = InstanceDecoder(Encoding(depths=0, depth_range=(16.0, 16.0)), num_classes=1)
    logits = torch.randn(9, 4, 5)
    semantic = torch.stack([torch.zeros(4, 5), torch.ones(4, 5)])
    fields, *_ = read_fields({"semantic": semantic, "direction": logits}, decoder.categories)
    share = logits.exp() / logits.exp().sum(0)
    for axis, wave in enumerate((math.cos, math.sin)):
        wanted = sum(share[k + 1] * wave(k * math.pi / 4) for k in range(8))
        assert torch.allclose(fields.directions[axis], wanted)
    pair = torch.randn(2, 4, 5)
    numbers, *_ = read_fields({"semantic": semantic, "direction": 9 * pair}, decoder.categories)
    assert torch.allclose(numbers.directions.norm(dim=0), (9 * pair).norm(dim=0).clamp(max=1))


def test_classes_of_one_category_share_their_centres() -> None:
    """Half of an object is taken for a like class: merged it is one object with the more frequent label."""
    encoding = Encoding()
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij")
    mask = ((x - 20) ** 2 + (y - 20) ** 2 <= 100).to(torch.uint8)[None]
    truth = encode(target_of(mask), (40, 40), encoding)
    truth["semantic"] = torch.where((truth["semantic"] > 0) & (y < 19), 2, truth["semantic"])
    raw = perfect_logits(truth, encoding, 3)
    merged = InstanceDecoder(encoding, num_classes=3, categories=[1, 1, 2], template_aspects=[1.0, 0.5])
    found = merged.instances(raw)
    assert torch.equal(found.ids > 0, mask[0] > 0)
    assert found.labels.tolist() == [1]
    assert bool((found.semantic[mask[0] > 0] == 1).all())
    apart = InstanceDecoder(encoding, num_classes=3).instances(raw)
    assert sorted(apart.labels.unique().tolist()) in ([1], [2], [1, 2])
    assert not torch.equal(apart.ids > 0, mask[0] > 0) or len(apart.labels) > 1


def test_connected_pieces_are_the_baseline() -> None:
    masks = torch.zeros(3, 20, 30, dtype=torch.uint8)
    masks[0, 2:9, 2:9], masks[1, 2:9, 9:14], masks[2, 12:18, 20:28] = 1, 1, 1
    encoding = Encoding()
    truth = encode(target_of(masks), (20, 30), encoding)
    pieces = InstanceDecoder(encoding, num_classes=1, grouping="components")
    found = pieces.instances(perfect_logits(truth, encoding, 1))
    assert sorted((found.ids == k).sum().item() for k in (1, 2)) == [48, 84]  # the two that touch are one
    assert len(pieces.instances(perfect_logits(truth, encoding, 1), min_area=50).labels) == 1
    with pytest.raises(ValueError, match=r"take min_area and max_detections alone, got \['bias'\]"):
        pieces.instances(perfect_logits(truth, encoding, 1), bias=1.0)


def test_an_objects_depth_is_the_median_of_its_visible_pixels() -> None:
    """From a map of depth, with holes of 0 and NaN; where an object has no measured pixel its size stands in."""
    encoding = Encoding(depths=9, depth_range=(2.0, 40.0), object_size=64.0)
    masks = torch.zeros(5, 24, 30, dtype=torch.uint8)
    masks[0, 2:12, 2:14], masks[1, 6:20, 10:22], masks[2, 20:24, 0:6], masks[3, 1:4, 20:28] = 1, 1, 1, 1
    masks[4, 12:18, 0:6] = 1
    draw = torch.Generator().manual_seed(0)
    depth = 1 + 50 * torch.rand(24, 30, generator=draw) ** 2
    depth *= torch.tensor([1.0, 0.2, 0.6, 1.0, 0.05, 1.0])[visible_ids(masks)]  # objects at distances of their own
    depth[torch.rand(24, 30, generator=draw) < 0.3] = 0
    depth[1, 20:24] = math.nan
    depth[20:24, 0:6] = 0  # the third object was not measured
    target = target_of(masks, iscrowd=torch.tensor([0, 0, 0, 0, 1]))
    found = encode({**target, "depth": depth}, (24, 30), encoding)["depth"]
    ids = visible_ids(masks)
    wanted = []
    for k in range(1, 5):
        values = sorted(v for v in depth[ids == k].tolist() if v > 0)
        own = encoding.object_size / math.sqrt(int((ids == k).sum()))
        wanted.append(values[(len(values) - 1) // 2] if values else own)
        bins = int(depth_classes(torch.tensor(wanted[-1]), encoding.edges)) + 1
        assert found[ids == k].unique().tolist() == [bins]
    assert found[ids == 5].unique().tolist() == [255]
    given = encode({**target, "depth": torch.tensor([*wanted, 1.0])}, (24, 30), encoding)["depth"]
    assert torch.equal(found, given)
    assert len(given.unique()) > 4
    nothing = encode({**target_of(masks[:0]), "depth": depth}, (24, 30), encoding)["depth"]
    assert not nothing.any()


@pytest.mark.parametrize("options", [{}, {"directions": 0}])
def test_losses_of_padded_images_are_those_of_their_pixels(options: dict[str, int], objects) -> None:
    """Two sizes in one batch: what is padded counts nowhere, each pixel of the images once."""
    net = InstanceDepthDirection(**{**SMALL, **options}).eval()
    sizes = [(40, 70), (64, 33)]
    images = [torch.rand(3, *size) for size in sizes]
    targets = [objects(3, size, 8, 25) for size in sizes]
    targets[1]["depth"] = torch.rand(64, 33) * 20
    with torch.no_grad():
        raw, found = net(images), net.losses(images, targets)
    assert raw["semantic"].shape[2:] == (64, 96)
    sums = dict.fromkeys(raw, 0.0)
    counts = dict.fromkeys(raw, 0)
    for k, (target, (height, width)) in enumerate(zip(targets, sizes, strict=True)):
        truth = encode(target, (height, width), net.encoding)
        for name, value in raw.items():
            logits = value[k, :, :height, :width].double()
            if name in truth:
                sums[name] += F.cross_entropy(logits[None], truth[name][None], reduction="sum").item()
                counts[name] += height * width
            else:
                there = truth["vectors"].abs().sum(0) > 0
                sums[name] += (logits - truth["vectors"])[:, there].abs().sum().item()
                counts[name] += 2 * int(there.sum())
    for name, value in found.items():
        assert value.item() == pytest.approx(sums[name] / counts[name], rel=1e-5)


def test_template_aspects_are_the_class_means() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 20], [0, 0, 10, 5], [5, 5, 9, 21]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 1, 3])}
    assert mean_aspects(
        [target, {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.int64)}], 3
    ) == pytest.approx([1.0, 1.0, 4.0])
    decoder = InstanceDecoder(Encoding(), num_classes=3, template_aspects=[1.0, 1.0, 4.0])
    high, wide = decoder.extent[2, 9].tolist()
    assert high / wide == pytest.approx(4.0, rel=0.15)


@pytest.mark.parametrize(("count", "most"), [(0, 1.0), (1, 1.0), (1000, 1.0), (1000, 40.0)])
@pytest.mark.parametrize("options", [{}, {"directions": 0, "depths": 0}])
def test_empty_and_crowded_images(count: int, most: float, options: dict[str, int], objects) -> None:
    """No object, objects of a pixel or less, a thousand of them; images of two sizes."""
    net = InstanceDepthDirection(**{**SMALL, **options})
    crowd, none = objects(count, (64, 96), 0.5, most), objects(0, (80, 50), 1, 1)
    losses = net.losses([torch.rand(3, 64, 96), torch.rand(3, 80, 50)], [crowd, none])
    assert all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)
    found = net.eval().predict([torch.rand(3, 64, 96), torch.rand(3, 50, 33)], score_threshold=0.0)
    assert [tuple(d.masks.shape[1:]) for d in found] == [(64, 96), (50, 33)]
    assert all(int(d.masks.sum(0).max() if len(d) else 0) <= 1 for d in found)


@pytest.mark.parametrize("grouping", ["centres", "components"])
def test_an_image_of_background_has_no_objects(grouping: str) -> None:
    encoding = Encoding()
    truth = encode(target_of(torch.zeros(0, 20, 24, dtype=torch.uint8)), (20, 24), encoding)
    decoder = InstanceDecoder(encoding, num_classes=1, grouping=grouping)
    for threshold in ({}, {"score_threshold": -2.0}) if grouping == "centres" else ({},):
        found = decoder.instances(perfect_logits(truth, encoding, 1), **threshold)
        assert len(found.labels) == len(found.scores) == len(found.depths) == 0
        assert not found.ids.any()
        assert not found.semantic.any()


def test_a_thousand_objects_come_back() -> None:
    """Discs of nine pixels' width on a grid: all are found in one pass, each with its own mask and box."""
    side, pitch = 320, 10
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    inside = (x % pitch - 4) ** 2 + (y % pitch - 4) ** 2 <= 16
    ids = torch.where(inside, y // pitch * (side // pitch) + x // pitch + 1, 0)
    masks = (ids == torch.arange(1, 1025)[:, None, None]).to(torch.uint8)
    encoding = Encoding()
    truth = encode(target_of(masks), (side, side), encoding)
    net = InstanceDepthDirection(
        **{**SMALL, "num_classes": 1, "depths": 19, "depth_range": (1.0, 32.0), "object_size": 256.0}
    )
    raw = {name: value[None] for name, value in perfect_logits(truth, encoding, 1).items()}
    found = net.decode(raw, [(side, side)], candidates=2000, max_detections=2000)[0]
    assert len(found) == 1024
    assert bool((found.masks.flatten(1).sum(1) == 49).all())
    assert bool((found.boxes[:, 2:] - found.boxes[:, :2] == 9).all())


def test_crowds_count_nowhere_and_background_without_objects_does() -> None:
    encoding = Encoding()
    masks = torch.zeros(2, 16, 16, dtype=torch.uint8)
    masks[0, :8], masks[1, 2:6, 2:6] = 1, 1
    truth = encode(target_of(masks, iscrowd=torch.tensor([1, 0])), (16, 16), encoding)
    for name in ("semantic", "depth", "direction"):
        assert (truth[name] == 255).sum() == 8 * 16 - 16
        assert bool((truth[name][8:] == 0).all())
    channels = {"semantic": 2, "depth": 20, "direction": 9}
    raw = {name: torch.randn(1, count, 16, 16, requires_grad=True) for name, count in channels.items()}
    losses = encoding_loss(raw, {name: value[None] for name, value in truth.items()})
    sum(losses.values()).backward()
    for logits in raw.values():
        assert logits.grad[..., 0, :].abs().sum() == 0
        assert logits.grad[..., 9, :].abs().sum() > 0
    numbers = torch.randn(1, 2, 16, 16, requires_grad=True)  # two numbers: the background has no direction to learn
    rest = {name: value[None] for name, value in truth.items() if name != "direction"}
    encoding_loss({"direction": numbers}, rest)["direction"].backward()
    assert numbers.grad[..., 9, :].abs().sum() == 0
    assert numbers.grad[..., 3, 2:6].abs().sum() > 0


def test_fcn8s_over_vgg16_and_other_backbones() -> None:
    with torch.device("meta"):
        net = InstanceDepthDirection(num_classes=8, stuff_classes=10)
        trunk = VGGTrunk()
    assert sum(p.numel() for p in trunk.parameters()) == 134260544  # VGG-16 without its last layer
    assert net.network.stride == 8
    raw = InstanceDepthDirection(num_classes=2, backbone="torchvision/resnet18", width=8, finest=4)(
        torch.rand(1, 3, 40, 70)
    )
    assert {name: tuple(value.shape) for name, value in raw.items()} == {
        "semantic": (1, 3, 64, 96),
        "depth": (1, 20, 64, 96),
        "direction": (1, 9, 64, 96),
    }
    other = InstanceDepthDirection(
        num_classes=2, backbone="timm/mobilenetv3_small_100", width=8, depths=0, directions=0
    )
    assert {name: value.shape[1] for name, value in other.eval()(torch.rand(1, 3, 32, 32)).items()} == {
        "semantic": 3,
        "direction": 2,
    }


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"directions": 0}, {"depths": 0, "depth_range": (16.0, 16.0)}])
def test_directions_part_discs_that_touch(options: dict[str, object]) -> None:
    """A small FCN on discs that lie over each other: as classes, as two numbers and without depth, directions part what
    the connected pieces of the very same semantic map cannot."""
    learnt = {"num_classes": 1, "backbone": "timm/resnet18", "width": 32, "finest": 2, "depths": 8}
    net = InstanceDepthDirection(**{**learnt, "depth_range": (8.0, 32.0), **options})
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, 240)
    for step in range(240):
        optimiser.zero_grad()
        sum(net.losses(*draw_leaning_discs(4, step)).values()).backward()
        optimiser.step()
        schedule.step()
    images, targets = draw_leaning_discs(48, 999_999)
    with torch.no_grad():
        raw = net.eval()(torch.stack(images))
    scores = {}
    for grouping in ("centres", "components"):
        net.decoder.grouping = grouping
        found = net.decode(raw, [(64, 64)] * 48)
        rows = [record_of("detection", one, truth, 1) for one, truth in zip(found, targets, strict=True)]
        scores[grouping] = metrics_of("detection", rows, ["disc"])["mask_map"]
    assert scores["centres"] > scores["components"] + 0.3, scores


def decisive() -> InstanceDepthDirection:
    """A network of random weights whose pixels are sure of something."""
    torch.manual_seed(0)
    net = InstanceDepthDirection(**{**SMALL, "num_classes": 2, "depths": 4, "depth_range": (8.0, 16.0)}).eval()
    for name in ("direction", "semantic"):
        net.network.heads[name].weight.data.mul_(30)
    return net


def test_the_decoding_in_fixed_shapes_gives_what_predict_gives() -> None:
    """Rows of -1 and zeros come after the objects; cut or too small ones leave no pixels."""
    net, x = decisive(), torch.rand(1, 3, 50, 70)
    for options in ({}, {"min_area": 30}, {"max_detections": 3}):
        with torch.no_grad():
            found = net.decoded(net(x), (50, 70), **options)
            wanted = net.predict(x, **options)[0]
        count = len(wanted)
        assert count > 2
        rows = options.get("max_detections", net.decoder.max_candidates)
        assert found["boxes"].shape == (1, rows, 4)
        assert int((found["scores"] >= 0).sum()) == count
        torch.testing.assert_close(found["scores"][0, :count], wanted.scores)
        assert torch.equal(found["boxes"][0, :count], wanted.boxes)
        assert torch.equal(found["labels"][0, :count], wanted.labels)
        assert not found["boxes"][0, count:].any()
        assert not found["labels"][0, count:].any()
        numbers = torch.arange(1, count + 1)[:, None, None]
        assert torch.equal(found["ids"] == numbers, wanted.masks)
        assert int(found["ids"].max()) == count
    with pytest.raises(ValueError, match="expected grouping by centres and one image, got centres and 2"):
        net.decoder(net(torch.rand(2, 3, 64, 64)))
    assert decodes(net)
    net.decoder.grouping = "components"
    assert not decodes(net)


@pytest.mark.slow
def test_the_whole_decoding_exports(tmp_path) -> None:
    """One file from image to objects, at three sizes the same as PyTorch's; written by the export of any detector."""
    net = decisive()
    report = export_model(net, tmp_path, torch.rand(2, 3, 64, 96))
    assert report.detector.gap < 1e-3
    whole = DetectorWithDecoding(net)
    file = OnnxModel(tmp_path / "model.detector.onnx", tree_structure(whole(torch.rand(1, 3, 64, 96))))
    for size in ((64, 96), (96, 64), (50, 70)):
        x = torch.rand(1, 3, *size)
        assert len(whole(x)["ids"].unique()) > 2
        assert gap_to_torch(whole, file, x) < 1e-3


def test_what_is_refused(objects) -> None:
    for options, words in (
        ({"num_classes": 0}, "num_classes and width must be >= 1, stuff_classes >= 0, got 0, 16, 0"),
        ({"num_classes": 255}, "expected fewer than 255 classes, got 255 and 0"),
        ({"directions": 2}, "directions must be 0 or >= 3 and depths 0 or >= 2, got 2 and 5"),
        ({"depth_range": (8.0, 8.0)}, r"expected 0 < near < far and object_size > 0, got \(8.0, 8.0\)"),
        ({"categories": [1, 3, 3]}, r"expected a category from 1 on for each of 3 classes, got \[1, 3, 3\]"),
        ({"template_aspects": [1.0]}, r"expected 3 template_aspects above zero, got \[1.0\]"),
        ({"grouping": "boxes"}, "grouping must be centres or components and nms_radius above zero, got 'boxes'"),
        ({"finest": 64}, "expected a map of stride 64 or more"),
    ):
        with pytest.raises(ValueError, match=words):
            InstanceDepthDirection(**{**SMALL, **options})
    net = InstanceDepthDirection(**SMALL)
    target = objects(2, (64, 64), 20, 40)
    with pytest.raises(ValueError, match="target 0: expected masks beside the boxes, got boxes, labels"):
        net.losses([torch.rand(3, 64, 64)], [{k: v for k, v in target.items() if k != "masks"}])
    wanted = r"target 0: expected depth \(2,\) of the objects, all above zero, or \(64, 64\) of the pixels, got "
    for depth, words in (
        (torch.tensor([1.0, 0.0]), "1 of 2 that are not"),
        (torch.tensor([math.nan, 0.0]), "2 of 2 that are not"),
        (torch.ones(3), r"\(3,\)"),
        (torch.ones(64, 60), r"\(64, 60\)"),
    ):
        with pytest.raises(ValueError, match=f"{wanted}{words}$"):
            net.losses([torch.rand(3, 64, 64)], [{**target, "depth": depth}])
