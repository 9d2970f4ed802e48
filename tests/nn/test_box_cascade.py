"""The cascade of box stages and the mask branch: against slow float64 forms, torchvision, and their laws."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import maskrcnn_loss
from torchvision.ops import box_iou

from torchive.nn.box_cascade import CODES, THRESHOLDS, BoxCascade, kept_proposals
from torchive.nn.mask_head import MaskHead, mask_loss, mask_targets, positive_regions
from torchive.nn.regions import Regions, sample_regions
from torchive.ops.boxes import encode_boxes
from torchive.ops.roi import pool_regions

SIZES = torch.tensor([[64.0, 64.0], [48.0, 64.0]])
TARGETS = [
    {"boxes": torch.tensor([[5.0, 6, 41, 33], [20, 30, 62, 60]]), "labels": torch.tensor([1, 3])},
    {"boxes": torch.tensor([[11.0, 3, 33, 40]]), "labels": torch.tensor([2])},
]


def around(boxes: Tensor, count: int, noise: float) -> Tensor:
    return (boxes.repeat(count, 1) + torch.randn(count * len(boxes), 4) * noise).clamp(0, 64)


def pooled_from(maps: list[Tensor]) -> partial:
    return partial(pool_regions, maps, (4, 8))


def test_each_stage_moves_by_its_own_code(double) -> None:
    cascade = BoxCascade(4, 3, hidden=8)
    proposals = around(TARGETS[0]["boxes"].double(), 10, 4.0)
    truth = TARGETS[0]["boxes"].double().repeat(10, 1)
    image = torch.zeros(20, dtype=torch.int64)
    for stage, weights in enumerate(CODES):
        delta = encode_boxes(truth, proposals, weights)
        landed = cascade.refine(stage, proposals, delta, image, SIZES.double())
        torch.testing.assert_close(landed, truth)
        row = proposals[3].tolist()
        x, y, w, h = (row[0] + row[2]) / 2, (row[1] + row[3]) / 2, row[2] - row[0], row[3] - row[1]
        d = [value / weight for value, weight in zip((delta[3] / 2).tolist(), weights, strict=True)]
        cx, cy, bw, bh = x + d[0] * w, y + d[1] * h, w * math.exp(d[2]), h * math.exp(d[3])
        expected = [cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2]
        half = cascade.refine(stage, proposals, delta / 2, image, SIZES.double())[3]
        torch.testing.assert_close(half, torch.tensor(expected).clamp(0, 64))


class Knowing(nn.Module):
    """A box stage's layers that see the boxes and answer with a share of the way to the truth."""

    def __init__(self, truth: Tensor, weights: tuple[float, ...], share: float) -> None:
        super().__init__()
        self.truth, self.weights, self.share = truth, weights, share

    def forward(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        return boxes.new_zeros(len(boxes), 4), encode_boxes(self.truth, boxes, self.weights) * self.share


def test_overlap_rises_stage_by_stage() -> None:
    truth = TARGETS[0]["boxes"].repeat(12, 1)
    proposals = around(TARGETS[0]["boxes"], 12, 5.0)
    cascade = BoxCascade(4, 3, hidden=8)
    for stage, weights in zip(cascade.stages, CODES, strict=True):
        stage.box_head, stage.box_predictor = nn.Identity(), Knowing(truth, weights, 0.5)
    found = cascade(lambda boxes, _image: boxes, proposals[None], SIZES[:1])
    overlaps = [box_iou(boxes, truth).diagonal().mean() for boxes in (proposals, *found["stage_boxes"][0])]
    assert all(b > a + 0.02 for a, b in pairwise(overlaps))
    assert torch.equal(found["boxes"], found["stage_boxes"][:, -1])
    for stage, weights in zip(cascade.stages, CODES, strict=True):
        stage.box_predictor = Knowing(truth, weights, 1.0)
    torch.testing.assert_close(cascade(lambda boxes, _: boxes, proposals[None], SIZES[:1])["boxes"][0], truth)


def slow_stage(
    proposals: list[Tensor], logits_of, deltas_of, stage: int
) -> tuple[float, float, list[list[list[float]]]]:
    """One stage in plain Python: every proposal and every object's own box is assigned and drawn."""
    rows, classification, offsets = 0, 0.0, 0.0
    refined: list[list[list[float]]] = []
    for k, (proposal, target) in enumerate(zip(proposals, TARGETS, strict=True)):
        own = target["boxes"].double().tolist()
        refined.append([])
        for number, box in enumerate(proposal.tolist() + own):
            overlap = [float(box_iou(torch.tensor([box]), torch.tensor([o]))) for o in own]
            best = max(range(len(own)), key=lambda n: overlap[n])
            label = int(target["labels"][best]) if overlap[best] >= THRESHOLDS[stage] else 0
            score = logits_of(torch.tensor(box)).tolist()
            delta = deltas_of(torch.tensor(box)).tolist()
            classification += math.log(sum(math.exp(v) for v in score)) - score[label]
            rows += 1
            w, h = box[2] - box[0], box[3] - box[1]
            x, y = box[0] + w / 2, box[1] + h / 2
            if label:
                t = own[best]
                tw, th = t[2] - t[0], t[3] - t[1]
                code = ((t[0] + tw / 2 - x) / w, (t[1] + th / 2 - y) / h, math.log(tw / w), math.log(th / h))
                for value, wanted, weight in zip(delta, code, CODES[stage], strict=True):
                    gap = abs(value - wanted * weight)
                    offsets += 0.5 * gap * gap if gap < 1 else gap - 0.5
            d = [value / weight for value, weight in zip(delta, CODES[stage], strict=True)]
            cx, cy, bw, bh = x + d[0] * w, y + d[1] * h, w * math.exp(d[2]), h * math.exp(d[3])
            height, width = SIZES[k].tolist()
            moved = [cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2]
            moved = [min(max(v, 0.0), limit) for v, limit in zip(moved, (width, height, width, height), strict=True)]
            if number < len(proposal):  # the objects' own boxes join again by themselves
                refined[-1].append(moved)
    return classification / rows, offsets / rows, refined


def test_losses_equal_slow_form_with_reassignment(double) -> None:
    cascade = BoxCascade(1, 3, hidden=4, size=1, rois_per_image=512)
    heads = [(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)]
    for stage, (score, delta) in zip(cascade.stages, heads, strict=True):
        stage.box_head = nn.Identity()
        stage.box_predictor.cls_score, stage.box_predictor.bbox_pred = score, delta
    proposals = [around(t["boxes"].double(), 6, 4.0) for t in TARGETS]
    targets = [{**t, "boxes": t["boxes"].double()} for t in TARGETS]
    found = cascade.losses(lambda boxes, _image: boxes / 64, proposals, targets, SIZES.double())
    current = proposals
    for stage, (score, delta) in enumerate(heads):
        expected = slow_stage(current, lambda b, m=score: m(b / 64), lambda b, m=delta: m(b / 64), stage)
        weight = (1, 0.5, 0.25)[stage]
        assert found[f"stage{stage}.loss_classifier"].item() == pytest.approx(weight * expected[0], abs=1e-10)
        assert found[f"stage{stage}.loss_box_reg"].item() == pytest.approx(weight * expected[1], abs=1e-10)
        current = [torch.tensor(rows) for rows in expected[2]]
    assert len(found) == 6


def test_own_boxes_are_not_refined_twice() -> None:
    regions = sample_regions([around(t["boxes"], 5, 3.0) for t in TARGETS], TARGETS)
    kept = kept_proposals(regions, regions.boxes, 2)
    assert [len(boxes) for boxes in kept] == [10, 5]
    for boxes, target in zip(kept, TARGETS, strict=True):
        assert box_iou(boxes, target["boxes"]).max() < 1


def test_no_gradient_flows_through_refined_places() -> None:
    maps = [torch.randn(2, 4, 16, 16), torch.randn(2, 4, 8, 8)]
    cascade = BoxCascade(4, 3, hidden=8)
    losses = cascade.losses(pooled_from(maps), [around(t["boxes"], 5, 3.0) for t in TARGETS], TARGETS, SIZES)
    (losses["stage2.loss_classifier"] + losses["stage2.loss_box_reg"]).backward()
    assert all(p.grad is None for p in cascade.stages[:2].parameters())
    assert all(p.grad is not None for p in cascade.stages[2].parameters())
    for stages in (0, 4):
        with pytest.raises(ValueError, match=rf"stages must lie in 1 to 3.*got {stages}"):
            BoxCascade(4, 3, stages=stages)


def masks_of(target: dict[str, Tensor], height: int, width: int) -> Tensor:
    y, x = torch.arange(height).view(1, -1, 1) + 0.5, torch.arange(width).view(1, 1, -1) + 0.5
    x1, y1, x2, y2 = (b.view(-1, 1, 1) for b in target["boxes"].unbind(1))
    u, v = (x - (x1 + x2) / 2) / (x2 - x1) * 2, (y - (y1 + y2) / 2) / (y2 - y1) * 2
    return (u**2 + v**2 < 1).to(torch.uint8)


def test_mask_loss_is_torchvisions() -> None:
    originals = [(64, 64), (96, 128)]  # the second image was halved
    masks = [masks_of(TARGETS[0], 64, 64), masks_of({"boxes": TARGETS[1]["boxes"] * 2}, 96, 128)]
    targets = [{**t, "masks": m} for t, m in zip(TARGETS, masks, strict=True)]
    regions = positive_regions(sample_regions([around(t["boxes"], 5, 3.0) for t in TARGETS], TARGETS))
    assert (regions.labels > 0).all()
    assert len(regions.labels) > 8
    maps = [torch.randn(2, 4, 16, 16), torch.randn(2, 4, 8, 8)]
    logits = MaskHead(4, 3, width=4)(maps, (4, 8), regions.boxes, regions.image)
    assert logits.shape == (len(regions.labels), 3, 28, 28)
    truth = mask_targets(regions, targets, SIZES, originals, 28, aligned=False, binary=False)
    rows = [regions.image == k for k in range(2)]
    theirs = maskrcnn_loss(
        nn.functional.pad(logits, (0, 0, 0, 0, 1, 0)),
        [regions.boxes[rows[0]], regions.boxes[rows[1]] * 2],
        masks,
        [t["labels"] for t in TARGETS],
        [regions.matched[r] for r in rows],
    )
    torch.testing.assert_close(mask_loss(logits, regions.labels, truth), theirs)


def test_mask_loss_equals_slow_form(double) -> None:
    logits, labels = torch.randn(3, 2, 4, 4), torch.tensor([2, 1, 2])
    truth = (torch.rand(3, 4, 4) > 0.5).double()
    total = 0.0
    for r in range(3):
        for value, wanted in zip(logits[r, labels[r] - 1].flatten().tolist(), truth[r].flatten().tolist(), strict=True):
            p = 1 / (1 + math.exp(-value))
            total -= math.log(p if wanted else 1 - p) / 48
    assert mask_loss(logits, labels, truth).item() == pytest.approx(total, abs=1e-12)
    one = mask_loss(logits[:, :1], torch.ones_like(labels), truth)
    assert mask_loss(logits[:, :1], labels, truth) == one  # a mask that the classes share
    nothing = mask_loss(logits[:0].requires_grad_(), labels[:0], truth[:0])
    assert nothing.item() == 0
    nothing.backward()


def test_no_region_has_no_mask() -> None:
    empty = Regions(torch.zeros(0, 4), *(torch.zeros(0, dtype=torch.int64) for _ in range(3)), torch.zeros(0, 4))
    target = {"masks": torch.zeros(0, 64, 64)}
    assert mask_targets(empty, [target, target], SIZES, [(64, 64)] * 2, 28).shape == (0, 28, 28)
    maps = [torch.randn(2, 4, 16, 16), torch.randn(2, 4, 8, 8)]
    assert MaskHead(4, 3, width=4)(maps, (4, 8), empty.boxes, empty.image).shape == (0, 3, 28, 28)
