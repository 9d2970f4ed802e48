"""Box codes, anchors, matching and mining against slow references and torchvision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher, SSDMatcher
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, box_iou

from torchive.ops.anchors import cell_anchors, default_boxes, default_scales, default_shapes, grid_anchors
from torchive.ops.boxes import LOG_CLAMP, clip_boxes, decode_boxes, encode_boxes, keep_after_nms, paired_iou
from torchive.ops.images import check_images, pad_batch, stack_resized, training_targets
from torchive.ops.matching import hard_negatives, match_anchors, match_default_boxes


def random_boxes(count: int, size: float = 100.0) -> Tensor:
    corner = torch.rand(count, 2, dtype=torch.double) * size
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, dtype=torch.double) * size], 1)


def test_overlap_of_pairs_is_the_diagonal_of_all() -> None:
    boxes, others = random_boxes(40), random_boxes(40)
    torch.testing.assert_close(paired_iou(boxes, others), box_iou(boxes, others).diagonal())
    flat = torch.tensor([[3.0, 3.0, 3.0, 9.0]])
    assert paired_iou(flat, flat).tolist() == [0.0]
    with pytest.raises(ValueError, match=r"expected two tensors \(..., 4\), got \(1, 4\) and \(40, 4\)"):
        paired_iou(flat, boxes)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_code_is_inverted_and_equals_slow_reference_and_torchvision(weights) -> None:
    boxes, anchors = random_boxes(50), random_boxes(50)
    code = encode_boxes(boxes, anchors, weights)
    for box, anchor, row in zip(boxes.tolist(), anchors.tolist(), code.tolist(), strict=True):
        w, h, wa, ha = box[2] - box[0], box[3] - box[1], anchor[2] - anchor[0], anchor[3] - anchor[1]
        x, y, xa, ya = box[0] + w / 2, box[1] + h / 2, anchor[0] + wa / 2, anchor[1] + ha / 2
        slow = [(x - xa) / wa, (y - ya) / ha, math.log(w / wa), math.log(h / ha)]
        assert row == pytest.approx([a * b for a, b in zip(slow, weights, strict=True)], rel=1e-10, abs=1e-12)
    torch.testing.assert_close(decode_boxes(code, anchors, weights), boxes, rtol=0, atol=1e-10)
    coder = BoxCoder(weights)
    torch.testing.assert_close(code, coder.encode_single(boxes, anchors), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(decode_boxes(3 * code, anchors, weights), coder.decode_single(3 * code, anchors))


def test_code_is_free_of_translation_and_scale() -> None:
    boxes, anchors = random_boxes(20), random_boxes(20)
    code = encode_boxes(boxes, anchors)
    torch.testing.assert_close(encode_boxes(boxes + 37.0, anchors + 37.0), code, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(encode_boxes(boxes * 2.5, anchors * 2.5), code, rtol=1e-9, atol=1e-10)


def test_decoding_cuts_the_log_ratio() -> None:
    anchor = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    wide = decode_boxes(torch.tensor([[0.0, 0.0, 50.0, LOG_CLAMP]]), anchor)
    torch.testing.assert_close(wide[:, 2:] - wide[:, :2], torch.tensor([[625.0, 625.0]]))


def test_clipping_and_suppression() -> None:
    boxes = random_boxes(40).float().view(2, 20, 4) - 20
    clipped = clip_boxes(boxes, torch.tensor([[50, 80], [90, 60]]))
    assert clipped.min() >= 0
    assert clipped[0, :, 0::2].max() <= 80
    assert clipped[1, :, 1::2].max() <= 90
    flat, scores, groups = boxes.flatten(0, 1), torch.rand(40), torch.arange(40) % 3
    expected = torch.zeros(40, dtype=torch.bool)
    expected[batched_nms(flat, scores, groups, 0.3)] = True
    assert torch.equal(keep_after_nms(flat, scores, groups, 0.3), expected)
    assert keep_after_nms(flat[:0], scores[:0], groups[:0], 0.3).shape == (0,)


GRIDS = [(38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)]
RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]


def test_default_boxes_of_the_paper() -> None:
    scales = default_scales(6)
    assert scales == pytest.approx([0.1, 0.2, 0.375, 0.55, 0.725, 0.9, 1.075])
    shapes = [torch.tensor(default_shapes(scales[k], scales[k + 1], RATIOS[k])) for k in range(6)]
    boxes = default_boxes(GRIDS, shapes)
    assert boxes.shape == (8732, 4)
    row = 0
    for (height, width), shape in zip(GRIDS, shapes, strict=True):
        for i in (0, height - 1):
            for j in (0, width // 2):
                for b, (w, h) in enumerate(shape.tolist()):
                    x, y = (j + 0.5) / width, (i + 0.5) / height
                    got = boxes[row + (i * width + j) * len(shape) + b].tolist()
                    assert got == pytest.approx([x - w / 2, y - h / 2, x + w / 2, y + h / 2], abs=1e-6)
        row += height * width * len(shape)
    for shape, scale, ratios in zip(shapes, scales, RATIOS, strict=False):
        area = shape.prod(1)
        torch.testing.assert_close(area[[0, *range(2, len(area))]], torch.full((1 + 2 * len(ratios),), scale**2))


def test_default_boxes_equal_torchvisions_generator_for_equal_settings() -> None:
    images = ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)])
    maps = [torch.zeros(1, 1, *grid) for grid in GRIDS]
    scales = default_scales(6)
    shapes = [torch.tensor(default_shapes(scales[k], scales[k + 1], RATIOS[k])) for k in range(6)]
    theirs = DefaultBoxGenerator(RATIOS, scales=scales, clip=False)(images, maps)[0] / 300
    torch.testing.assert_close(default_boxes(GRIDS, shapes), theirs, rtol=0, atol=1e-6)
    ssd300 = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
    steps = [8, 16, 32, 64, 100, 300]
    theirs = DefaultBoxGenerator(RATIOS, scales=ssd300, steps=steps)(images, maps)[0] / 300
    shapes = [torch.tensor(default_shapes(ssd300[k], ssd300[k + 1], RATIOS[k])).clamp(max=1) for k in range(6)]
    torch.testing.assert_close(default_boxes(GRIDS, shapes, [s / 300 for s in steps]), theirs, rtol=0, atol=1e-6)


def test_grid_anchors_equal_torchvisions() -> None:
    sizes, ratios = ((16.0, 32.0), (64.0, 128.0)), (0.5, 1.0, 2.0)
    generator = AnchorGenerator(sizes, (ratios,) * 2)
    maps = [torch.zeros(1, 1, 8, 12), torch.zeros(1, 1, 4, 6)]
    theirs = generator(ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)]), maps)[0]
    ours = torch.cat(
        [grid_anchors(m.shape[2:], s, cell_anchors(z, ratios)) for m, s, z in zip(maps, (8, 16), sizes, strict=True)]
    )
    assert torch.equal(ours, theirs)


def slow_match(iou: Tensor, threshold: float) -> list[int]:
    """Greedy: the largest overlap left joins its object and its box, until each object has one; then the rest."""
    objects, boxes = iou.shape
    match = [-1] * boxes
    free_objects, free_boxes = set(range(objects)), set(range(boxes))
    while free_objects and free_boxes:
        value, g, a = max((float(iou[g, a]), -g, -a) for g in free_objects for a in free_boxes)
        if value <= 0:
            break
        match[-a] = -g
        free_objects.remove(-g)
        free_boxes.remove(-a)
    for a in free_boxes:
        g = max(range(objects), key=lambda g: float(iou[g, a]))
        if iou[g, a] > threshold:
            match[a] = g
    return match


def test_matching_equals_slow_greedy_reference() -> None:
    for _ in range(30):
        iou = torch.rand(6, 9, dtype=torch.double)
        iou[torch.rand(6, 9) < 0.5] = 0
        iou[:, :2] += 0.5  # objects fight for the first two
        assert match_default_boxes(iou, 0.8).tolist() == slow_match(iou, 0.8)
    for _ in range(5):  # so many want the same that their wishes are sorted; of equals the first has it
        iou = (torch.rand(60, 30, dtype=torch.double) * 20).round() / 20 * (torch.arange(30) < 20)
        iou = iou * (torch.rand(60, 1) < 0.95)
        assert match_default_boxes(iou, 0.8).tolist() == slow_match(iou, 0.8)
    crowded = torch.rand(5, 3) + 0.1
    assert sorted(set(match_default_boxes(crowded).tolist()) - {-1}) == sorted(set(slow_match(crowded, 0.5)) - {-1})
    assert match_default_boxes(torch.zeros(0, 4)).tolist() == [-1] * 4
    assert match_default_boxes(torch.zeros(2, 4)).tolist() == [-1] * 4


def test_matching_equals_torchvision_where_no_objects_compete() -> None:
    compared = 0
    for _ in range(30):
        objects, anchors = random_boxes(4), random_boxes(200)
        iou = box_iou(objects, anchors)
        if len(iou.argmax(1).unique()) == 4:
            assert torch.equal(match_default_boxes(iou, 0.5), SSDMatcher(0.5)(iou))
            compared += 1
    assert compared > 10


def test_torchvision_loses_an_object_where_two_compete() -> None:
    """Why matching is written here: with one best default box for two objects, theirs leaves one object without any."""
    iou = torch.tensor([[0.45, 0.40, 0.0], [0.48, 0.10, 0.0]])
    assert sorted(set(SSDMatcher(0.5)(iou).tolist())) == [-1, 1]
    assert match_default_boxes(iou, 0.5).tolist() == [1, 0, -1]


def test_each_object_owns_an_anchor_and_labels_partition() -> None:
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    for _ in range(20):
        iou = box_iou(random_boxes(5), random_boxes(300))
        match = matcher(iou)
        positive, negative, ignored = match >= 0, match == -1, match == -2
        assert bool((positive.int() + negative.int() + ignored.int() == 1).all())
        for overlaps in iou:
            assert positive[overlaps == overlaps.max()].all()
        assert (iou.amax(0)[negative] < 0.3).all()


def test_mining_keeps_exactly_the_hardest() -> None:
    loss = torch.rand(4, 50)
    positive = torch.zeros(4, 50, dtype=torch.bool)
    for row, count in enumerate((0, 2, 13, 40)):
        positive[row, torch.randperm(50)[:count]] = True
    chosen = hard_negatives(loss, positive, 3.0)
    for row in range(4):
        wanted = min(3 * int(positive[row].sum()), int((~positive[row]).sum()))
        assert int(chosen[row].sum()) == wanted
        assert not (chosen[row] & positive[row]).any()
        left = ~chosen[row] & ~positive[row]
        if wanted and left.any():
            assert loss[row][chosen[row]].min() >= loss[row][left].max()


def test_batches_of_images() -> None:
    images = [torch.rand(3, 30, 50), torch.rand(3, 40, 20)]
    batch = pad_batch(images, 32)
    assert batch.shape == (2, 3, 64, 64)
    assert torch.equal(batch[0, :, :30, :50], images[0])
    assert batch[0, :, 30:].abs().sum() == 0
    assert stack_resized(images, (32, 32)).shape == (2, 3, 32, 32)
    whole = torch.rand(2, 3, 32, 32)
    assert stack_resized(whole, (32, 32)) is whole
    assert pad_batch(whole, 32) is whole
    with pytest.raises(ValueError, match="4, 30, 50"):
        check_images([torch.rand(4, 30, 50)], 3)
    with pytest.raises(TypeError, match="uint8"):
        check_images([torch.zeros(3, 8, 8, dtype=torch.uint8)], 3)
    with pytest.raises(ValueError, match="0, 3, 8, 8"):
        check_images(torch.zeros(0, 3, 8, 8), 3)


def test_targets_are_checked_in_one_look() -> None:
    good = {"boxes": torch.tensor([[5.0, 5, 8, 9]]), "labels": torch.tensor([3], dtype=torch.int32)}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.tensor([])}
    assert [t["labels"].dtype for t in training_targets([good, empty], 2, 3)] == [torch.int64] * 2
    for bad, words in (
        ({"boxes": torch.tensor([[5.0, 5, 5, 9]]), "labels": torch.tensor([1])}, "target 1.*width and height"),
        ({"boxes": torch.tensor([[5.0, 5, torch.nan, 9]]), "labels": torch.tensor([1])}, "target 1.*width and height"),
        ({"boxes": torch.tensor([[5.0, 5, 8, 9]]), "labels": torch.tensor([0])}, "target 1.*1 to 3"),
        ({"boxes": torch.tensor([[5.0, 5, 8, 9]]), "labels": torch.tensor([1.0])}, "target 1.*int64.*float32"),
        ({"boxes": torch.zeros(2, 4), "labels": torch.tensor([1])}, "target 1.*boxes"),
        ({"boxes": torch.zeros(2, 4), "masks": torch.zeros(2, 8, 8)}, "target 1.*got boxes, masks"),
    ):
        with pytest.raises(ValueError, match=words):
            training_targets([good, bad], 2, 3)
    with pytest.raises(ValueError, match="expected 1 targets"):
        training_targets([good, good], 1, 3)


def test_crowds_are_left_out_of_training() -> None:
    boxes, masks = torch.rand(3, 4).cumsum(1), torch.zeros(3, 6, 7, dtype=torch.uint8)
    masks[1, 2:4], masks[2, 5] = 1, 1
    target = {
        "boxes": boxes,
        "labels": torch.tensor([1, 2, 3]),
        "masks": masks,
        "iscrowd": torch.tensor([0, 1, 0]),
        "semantic": torch.zeros(6, 7),
        "image_labels": torch.ones(3),
    }
    (found,) = training_targets([target], 1, 3)
    assert torch.equal(found["boxes"], boxes[[0, 2]])
    assert found["labels"].tolist() == [1, 3]
    assert torch.equal(found["masks"], masks[[0, 2]])
    assert torch.equal(found["ignored"], masks[1] != 0)
    assert (found["semantic"].shape, found["image_labels"].shape) == ((6, 7), (3,))
    assert len(target["boxes"]) == len(training_targets([target], 1, 3, crowds=True)[0]["boxes"]) == 3
    (none,) = training_targets([{**target, "iscrowd": torch.ones(3)}], 1, 3)
    assert (len(none["boxes"]), len(none["masks"])) == (0, 0)


def test_an_object_that_no_anchor_reaches_has_none() -> None:
    """Its best overlap is zero, which all anchors share: none of them may become positive by that."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [8, 8, 24, 24]])
    near, far = torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([[90.0, 90, 95, 95]])
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    assert (matcher(box_iou(torch.cat([far, near]), anchors)) >= 0).all()  # torchvision's
    assert match_anchors(anchors, torch.cat([far, near]), matcher).tolist() == [1, -1, -1]
    assert match_anchors(anchors, far, matcher).tolist() == [-1, -1, -1]
    assert match_anchors(anchors, near, matcher).tolist() == [0, -1, -1]
