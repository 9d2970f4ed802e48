"""Depth layering: round trips of encoding and decoding, slow float64 references, bounds, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchive.engine.export import OnnxModel, write_onnx
from torchive.methods.segmentation.instance_depth_direction import (
    Encoding,
    InstanceDecoder,
    InstanceDepthDirection,
    VGGTrunk,
    mean_aspects,
)
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


def draw_ellipses(seed: int, count: int, *, gap: int, largest: float, size: tuple[int, int] = (112, 144)) -> Tensor:
    """Masks (L, H, W) of random ellipses that do not overlap, at least ``gap`` pixels apart."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    taken, masks = np.zeros(size, dtype=bool), []
    for _ in range(300):
        a = draw.uniform(4, largest)
        b, turn = a * draw.uniform(0.5, 1), draw.uniform(0, math.pi)
        cx, cy = draw.uniform(a, size[1] - a), draw.uniform(a, size[0] - a)
        u = (x - cx) * math.cos(turn) + (y - cy) * math.sin(turn)
        v = (y - cy) * math.cos(turn) - (x - cx) * math.sin(turn)
        mask = (u / a) ** 2 + (v / b) ** 2 <= 1
        wide = F.max_pool2d(torch.from_numpy(mask)[None].float(), 2 * gap + 1, 1, gap)[0].numpy() > 0
        if not (wide & taken).any():
            masks.append(mask)
            taken |= mask
        if len(masks) == count:
            break
    return torch.from_numpy(np.stack(masks)).to(torch.uint8)


def target_of(masks: Tensor, **more: Tensor) -> dict[str, Tensor]:
    return {"masks": masks, "labels": torch.ones(len(masks), dtype=torch.int64), **more}


def perfect_logits(truth: dict[str, Tensor], encoding: Encoding, classes: int, sure: float = 20.0) -> dict[str, Tensor]:
    channels = {"semantic": classes + 1, "depth": encoding.depths + 1, "direction": encoding.directions + 1}
    kept = {name: count for name, count in channels.items() if name in truth}
    return {name: sure * F.one_hot(truth[name], count).movedim(-1, 0).float() for name, count in kept.items()}


def rand_index(first: Tensor, second: Tensor) -> float:
    """The adjusted one (Hubert and Arabie, 1985), the background being a cluster."""
    pairs = Counter(zip(first.flatten().tolist(), second.flatten().tolist(), strict=True))
    rows, columns = Counter(first.flatten().tolist()), Counter(second.flatten().tolist())
    both, a, b = (sum(math.comb(n, 2) for n in counts.values()) for counts in (pairs, rows, columns))
    chance = a * b / math.comb(first.numel(), 2)
    return (both - chance) / ((a + b) / 2 - chance)


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


def slow_encoding(target: dict[str, Tensor], encoding: Encoding) -> dict[str, np.ndarray]:
    """Pixel by pixel, from the words of the paper."""
    masks, labels = target["masks"].numpy(), target["labels"].numpy()
    crowd = target["iscrowd"].numpy().astype(bool)
    height, width = masks.shape[1:]
    edges = encoding.edges
    owner = np.full((height, width), -1)
    for y, x, k in itertools.product(range(height), range(width), range(len(masks))):
        if masks[k, y, x] and not crowd[k]:
            owner[y, x] = k
    maps = {name: np.zeros((height, width), dtype=np.int64) for name in ("semantic", "depth", "direction")}
    maps["vectors"] = np.zeros((2, height, width))
    for k in range(len(masks)):
        places = [(y, x) for y in range(height) for x in range(width) if owner[y, x] == k]
        if not places:
            continue
        cy, cx = (sum(p[i] for p in places) / len(places) for i in (0, 1))
        depth = encoding.object_size / math.sqrt(len(places))
        for y, x in places:
            angle = math.degrees(math.atan2(cy - y, cx - x))
            maps["direction"][y, x] = int(((angle + 22.5) % 360) // 45) + 1
            maps["depth"][y, x] = sum(depth >= edge for edge in edges) + 1
            length = math.hypot(cy - y, cx - x)
            maps["vectors"][:, y, x] = ((cx - x) / length, (cy - y) / length) if length > 1e-6 else (0, 0)
            maps["semantic"][y, x] = labels[k]
    for y, x in itertools.product(range(height), range(width)):
        if owner[y, x] < 0 and any(masks[k, y, x] for k in range(len(masks)) if crowd[k]):
            for name in ("semantic", "depth", "direction"):
                maps[name][y, x] = 255
    return maps


def slow_score(field: np.ndarray, kind: np.ndarray, depth: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Normalised cross-correlation, window by window."""
    height, width = kind.shape
    score = np.full((height, width), -1.0)
    for y, x in itertools.product(range(height), range(width)):
        if kind[y, x] == 0:
            continue
        ry, rx = half[kind[y, x] - 1, depth[y, x]]
        product = energy = cells = 0.0
        for i, j in itertools.product(range(max(y - ry, 0), min(y + ry + 1, height)), range(max(x - rx, 0), width)):
            if j > x + rx or (i, j) == (y, x):
                energy += (i, j) == (y, x) and float((field[:, i, j] ** 2).sum())
                continue
            cells += 1
            if kind[i, j] == kind[y, x]:
                length = math.hypot(i - y, j - x)
                product += (field[0, i, j] * (x - j) + field[1, i, j] * (y - i)) / length
                energy += float((field[:, i, j] ** 2).sum())
        score[y, x] = product / math.sqrt(max(energy * cells, 1e-6))
    return score.clip(-1, 1)


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
    assert gap < 1e-6, gap  # templates are kept in float32
    record(
        "instance_depth_direction",
        "referenced",
        largest_difference=gap,
        dtype="float64",
        what="maps of classes, template scores, centres, votes, leftovers, fusion and losses",
    )
    record("instance_depth_direction", "matched", impossible="no code of the authors or of others was found")
