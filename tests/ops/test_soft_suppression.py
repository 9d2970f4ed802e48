"""Soft suppression against a loop, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import box_iou

from torchive.ops.soft_suppression import soft_detections
from torchive.ops.suppression import best_detections


def slow(boxes, scores, sigma, score_threshold, max_detections):
    found = []
    for k in range(scores.shape[1]):
        own = boxes[:, k if boxes.shape[1] > 1 else 0]
        left = {i: float(s) for i, s in enumerate(scores[:, k]) if s > score_threshold}
        while left:
            best = max(left, key=lambda i: left[i])
            value = left.pop(best)
            if value <= score_threshold:
                break
            found.append((value, k + 1, best))
            for i in left:
                left[i] *= math.exp(-(float(box_iou(own[best][None], own[i][None])) ** 2) / sigma)
    return sorted(found, reverse=True)[:max_detections]


@pytest.mark.parametrize("shared", [True, False])
def test_equals_a_loop(shared: bool) -> None:
    corner = torch.rand(40, 1 if shared else 3, 2, dtype=torch.double) * 30
    boxes = torch.cat([corner, corner + 1 + torch.rand_like(corner) * 20], -1)
    scores = torch.rand(40, 3, dtype=torch.double)
    box, label, score, row = soft_detections(boxes, scores, sigma=0.3, score_threshold=0.2, max_detections=25)
    expected = slow(boxes, scores, 0.3, 0.2, 25)
    assert [(a, b) for a, b in zip(label.tolist(), row.tolist(), strict=True)] == [(b, c) for _, b, c in expected]
    torch.testing.assert_close(score, torch.tensor([a for a, _, _ in expected], dtype=torch.double))
    assert torch.equal(box, boxes[row, torch.zeros_like(label) if shared else label - 1])


def test_boxes_apart_stay_as_they_are_and_nothing_gives_nothing() -> None:
    boxes = torch.tensor([[0.0, 0, 5, 5], [10, 0, 15, 5], [0, 10, 5, 15]])[:, None]
    scores = torch.tensor([[0.5, 0.1], [0.9, 0.3], [0.01, 0.7]])
    for soft, hard in zip(soft_detections(boxes, scores), best_detections(boxes, scores), strict=True):
        assert torch.equal(soft, hard)
    for part in soft_detections(boxes[:0], scores[:0]):
        assert len(part) == 0
    two = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])[:, None]
    score = soft_detections(two, torch.tensor([[0.9], [0.8]]), sigma=0.5)[2]
    torch.testing.assert_close(score, torch.tensor([0.9, 0.8 * math.exp(-2)]))
