"""What stays of scored boxes, against a loop, with shared boxes and with boxes of each class."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou

from torchive.ops.suppression import best_detections


def slow(boxes, scores, score_threshold, nms_threshold, max_detections):
    found = []
    for k in range(scores.shape[1]):
        own = boxes[:, k if boxes.shape[1] > 1 else 0]
        left = [
            i
            for i in scores[:, k].argsort(descending=True).tolist()
            if scores[i, k] > score_threshold and bool((own[i, 2:] - own[i, :2] >= 1e-2).all())
        ]
        while left:
            best = left.pop(0)
            found.append((float(scores[best, k]), k + 1, best))
            left = [i for i in left if float(box_iou(own[best][None], own[i][None])) <= nms_threshold]
    return sorted(found, reverse=True)[:max_detections]


@pytest.mark.parametrize("shared", [True, False])
def test_equals_greedy_suppression_in_a_loop(shared: bool) -> None:
    corner = torch.rand(40, 1 if shared else 3, 2, dtype=torch.double) * 30
    boxes = torch.cat([corner, corner + torch.rand_like(corner) * 20], -1)
    boxes[3] = boxes[3, :, [0, 1, 0, 1]]  # without area
    scores = torch.rand(40, 3, dtype=torch.double)
    box, label, score, row = best_detections(boxes, scores, score_threshold=0.2, nms_threshold=0.4, max_detections=25)
    expected = slow(boxes, scores, 0.2, 0.4, 25)
    assert list(zip(score.tolist(), label.tolist(), row.tolist(), strict=True)) == expected
    assert len(expected) == 25
    assert 3 not in row
    column = torch.zeros_like(label) if shared else label - 1
    assert torch.equal(box, boxes[row, column])


def test_nothing_sure_gives_nothing() -> None:
    found = best_detections(torch.rand(5, 1, 4), torch.zeros(5, 2))
    assert [len(part) for part in found] == [0, 0, 0, 0]
    found = best_detections(torch.rand(0, 1, 4), torch.zeros(0, 2))
    assert [len(part) for part in found] == [0, 0, 0, 0]
