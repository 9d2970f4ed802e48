"""Crops, pasted masks and class maps against slow forms in float64, and against torchvision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from torchive.ops.masks import IGNORED, check_masks, class_map, crop_masks, mask_iou, paste_masks, semantic_targets
from torchive.ops.suppression import best_detections, fixed_detections


def slow_value(mask: list[list[float]], box: list[float], x: int, y: int) -> float:
    """A pasted mask at the centre of a pixel: bilinear between the cells' centres, zero beyond them."""
    cells = len(mask)
    u = (x + 0.5 - box[0]) / (box[2] - box[0]) * cells - 0.5
    v = (y + 0.5 - box[1]) / (box[3] - box[1]) * cells - 0.5
    total = 0.0
    for i in (math.floor(v), math.floor(v) + 1):
        for j in (math.floor(u), math.floor(u) + 1):
            if 0 <= i < cells and 0 <= j < cells:
                total += mask[i][j] * (1 - abs(v - i)) * (1 - abs(u - j))
    return total


def test_pasting_equals_slow_form() -> None:
    masks = torch.rand(3, 5, 5, dtype=torch.double)
    boxes = torch.tensor([[2.3, 1.1, 11.7, 8.2], [-4.0, -3.5, 6.1, 20.3], [3.0, 4.0, 4.0, 5.0]], dtype=torch.double)
    found = paste_masks(masks, boxes, (12, 15), threshold=0.4)
    for mask, box, pasted in zip(masks.tolist(), boxes.tolist(), found.tolist(), strict=True):
        assert pasted == [[slow_value(mask, box, x, y) > 0.4 for x in range(15)] for y in range(12)]


def test_pasting_is_grid_sampling_in_chunks(monkeypatch) -> None:
    masks = torch.rand(20, 28, 28, dtype=torch.double)
    corner = torch.rand(20, 2, dtype=torch.double) * 60 - 10
    boxes = torch.cat([corner, corner + 0.5 + torch.rand(20, 2, dtype=torch.double) * 40], 1)
    y, x = torch.arange(50).double() + 0.5, torch.arange(70).double() + 0.5
    gx = (x - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    gy = (y - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    grid = torch.stack([gx[:, None].expand(20, 50, 70), gy[:, :, None].expand(20, 50, 70)], -1)
    expected = F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] > 0.5
    assert torch.equal(paste_masks(masks, boxes, (50, 70)), expected)
    monkeypatch.setattr("torchive.ops.masks._CHUNK", 10_000)
    assert torch.equal(paste_masks(masks, boxes, (50, 70)), expected)
    assert paste_masks(masks[:0], boxes[:0], (50, 70)).shape == (0, 50, 70)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)  # as a graph and a GPU have it: no windows
    assert torch.equal(paste_masks(masks, boxes, (50, 70)), expected)


def test_pasting_where_a_box_is_outside_large_or_not_a_number() -> None:
    nan, inf = float("nan"), float("inf")
    rows = [
        [-30.0, -30, -20, -20],
        [60, 2, 90, 9],
        [-500, -400, 700, 600],
        [3, 3, 3, 3],
        [nan, 0, 5, 5],
        [0, 0, inf, 4],
    ]
    found = paste_masks(torch.ones(6, 28, 28), torch.tensor(rows), (40, 50))
    assert [int(one.sum()) for one in found[:3]] == [0, 0, 2000]
    assert found.shape == (6, 40, 50)
    everywhere = paste_masks(torch.zeros(1, 28, 28), torch.tensor([[2.0, 2, 9, 9]]), (40, 50), threshold=-1.0)
    assert bool(everywhere.all())


def test_crops() -> None:
    masks = (torch.rand(6, 40, 50) > 0.5).to(torch.uint8)
    corner = torch.rand(9, 2) * 20
    boxes, index = torch.cat([corner, corner + 2 + torch.rand(9, 2) * 18], 1), torch.tensor([4, 4, 0, 2, 4, 0, 2, 2, 4])
    theirs = project_masks_on_boxes(masks, boxes, index, 28)
    assert torch.equal(crop_masks(masks, index, boxes, 28, aligned=False, binary=False), theirs)
    whole = torch.tensor([[10.0, 5, 38, 33]])  # a cell is a pixel
    crop = crop_masks(masks, torch.tensor([3]), whole, 28)
    assert torch.equal(crop[0], masks[3, 5:33, 10:38].float())
    halves = crop_masks(masks, torch.tensor([3]), whole, 14)[0]
    share = masks[3, 5:33, 10:38].float().unflatten(0, (14, 2)).unflatten(2, (14, 2)).mean((1, 3))
    assert torch.equal(halves, (share >= 0.5).float())
    assert crop_masks(masks[:0], index[:0], boxes[:0], 28).shape == (0, 28, 28)


def test_a_mask_comes_back() -> None:
    y, x = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    disc = (((x - 30) / 17) ** 2 + ((y - 25) / 13) ** 2 < 1)[None]
    box = torch.tensor([[13.0, 12, 47, 38]])
    back = paste_masks(crop_masks(disc, torch.tensor([0]), box, 28), box, (64, 64))
    assert (back & disc).sum() / (back | disc).sum() > 0.95
    shifted = paste_masks(crop_masks(disc, torch.tensor([0]), box, 28, aligned=False), box, (64, 64))
    assert (shifted & disc).sum() / (shifted | disc).sum() < (back & disc).sum() / (back | disc).sum()


def test_class_map_has_the_later_on_top() -> None:
    masks = torch.zeros(3, 4, 5, dtype=torch.uint8)
    masks[0, :, :3], masks[1, :2], masks[2, 3, 4] = 1, 1, 1
    found = class_map({"masks": masks, "labels": torch.tensor([2, 7, 1])}, (4, 5))
    assert found.tolist() == [[7] * 5, [7] * 5, [2, 2, 2, 0, 0], [2, 2, 2, 0, 1]]
    assert class_map({"masks": masks[:0], "labels": torch.zeros(0)}, (4, 5)).tolist() == [[0] * 5] * 4


def slow_semantic(classes: Tensor, size: tuple[float, float], grid: tuple[int, int], stride: int) -> list[list[int]]:
    height, width = classes.shape
    out = [[IGNORED] * grid[1] for _ in range(grid[0])]
    for i in range(grid[0]):
        for j in range(grid[1]):
            y, x = (i + 0.5) * stride, (j + 0.5) * stride
            if y < size[0] and x < size[1]:
                out[i][j] = int(classes[int(y * height / size[0]), int(x * width / size[1])])
    return out


@pytest.mark.parametrize("stride", [1, 8])
def test_semantic_targets_equal_slow_form(stride: int) -> None:
    originals = [(30, 41), (64, 64)]
    sizes = torch.tensor([[45.0, 61.0], [64.0, 64.0]])
    grid = (64 // stride, 80 // stride)
    maps = [torch.randint(0, 9, size) for size in originals]
    found = semantic_targets([{"semantic": m} for m in maps], sizes, originals, grid, stride)
    for k in range(2):
        assert found[k].tolist() == slow_semantic(maps[k], tuple(sizes[k].tolist()), grid, stride)
    masks = (maps[1] == 4)[None]
    target = {"masks": masks, "labels": torch.tensor([4])}
    derived = semantic_targets([target], sizes[1:], originals[1:], (64, 64), 1)
    assert torch.equal(derived[0], torch.where(maps[1] == 4, 4, 0))


def test_faulty_masks_are_named() -> None:
    good = {"boxes": torch.zeros(2, 4), "masks": torch.zeros(2, 8, 9)}
    check_masks([good], [(8, 9)])
    for bad, words in (
        ({"boxes": good["boxes"]}, "target 0: expected masks beside the boxes, got boxes"),
        ({**good, "masks": torch.zeros(2, 9, 8)}, r"expected masks \(2, 8, 9\), got \(2, 9, 8\)"),
        ({**good, "semantic": torch.zeros(8, 8)}, r"expected a semantic map \(8, 9\), got \(8, 8\)"),
    ):
        with pytest.raises(ValueError, match=words):
            check_masks([bad], [(8, 9)])


@pytest.mark.parametrize("shared", [False, True])
def test_fixed_detections_are_the_best_ones(shared: bool, monkeypatch) -> None:
    """Also in the form that is exported."""
    corner = torch.rand(2, 60, 1 if shared else 4, 2) * 50
    boxes = torch.cat([corner, corner + 5 + torch.rand_like(corner) * 30], -1)
    boxes[0, :3] = 7.0  # without area
    scores = torch.rand(2, 60, 4)
    options = {"score_threshold": 0.6, "nms_threshold": 0.4, "max_detections": 40}
    for _ in range(2):
        box, label, score, row = fixed_detections(boxes, scores, **options)
        assert box.shape == (2, 40, 4)
        for k in range(2):
            expected = best_detections(boxes[k], scores[k], **options)
            there = score[k] >= 0
            assert there.sum() == len(expected[0])
            found = (box[k][there], label[k][there], score[k][there], row[k][there])
            for mine, theirs in zip(found, expected, strict=True):
                assert torch.equal(mine, theirs)
            assert not box[k][~there].any()
            assert not label[k][~there].any()
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def test_overlap_of_masks_equals_counting() -> None:
    first, second = torch.rand(3, 7, 9) < 0.4, torch.rand(4, 7, 9) < 0.6
    first[1] = False
    second[2] = False
    found = mask_iou(first, second.to(torch.uint8))
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            both, either = int((a & b).sum()), int((a | b).sum())
            assert float(found[i, j]) == pytest.approx(both / either if either else 0.0)
    assert mask_iou(first[:0], second).shape == (0, 4)
