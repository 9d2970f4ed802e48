"""Causes of false detections and missed objects: one case of each, crowds, empty images, and every share by a count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torchive.engine.detection_errors import CAUSES, detection_errors, score_overlap
from torchive.report.units import unit_of


def found(*rows: tuple[float, float, float, float, int, float]) -> dict[str, torch.Tensor]:
    values = torch.tensor(rows).reshape(-1, 6)
    return {"boxes": values[:, :4], "labels": values[:, 4].long(), "scores": values[:, 5]}


def target(*rows: tuple[float, float, float, float, int]) -> dict[str, torch.Tensor]:
    values = torch.tensor(rows).reshape(-1, 5)
    return {"boxes": values[:, :4], "labels": values[:, 4].long()}


def test_each_cause_and_each_size() -> None:
    objects = target(
        (0, 0, 10, 10, 1), (100, 100, 140, 140, 1), (200, 0, 400, 200, 2), (500, 500, 510, 510, 2), (0, 300, 20, 320, 1)
    )
    hits = found(
        (0, 0, 10, 10, 1, 0.9),  # right
        (0, 0, 10, 9, 1, 0.8),  # again
        (100, 100, 140, 140, 2, 0.7),  # the other class
        (210, 100, 420, 300, 2, 0.6),  # overlaps by a quarter
        (600, 600, 610, 610, 1, 0.5),  # nothing there
        (500, 500, 510, 510, 2, 0.1),  # right, but no longer among the five best
    )
    errors = detection_errors([(hits, objects)])
    assert [errors[f"false/{cause}"] for cause in CAUSES] == pytest.approx([0.2, 0.2, 0.2, 0.2])
    assert errors["missed/small"] == pytest.approx(2 / 3)
    assert errors["missed/medium"] == errors["missed/large"] == 1


def test_the_best_are_chosen_over_all_images_and_scores_decide_who_is_the_duplicate() -> None:
    objects = target((0, 0, 40, 40, 1))
    first = found((0, 0, 40, 30, 1, 0.6), (0, 0, 40, 40, 1, 0.5))
    second = found((0, 0, 40, 40, 1, 0.55))
    errors = detection_errors([(first, objects), (second, objects)])
    assert errors["missed/medium"] == 0
    assert sum(errors[f"false/{cause}"] for cause in CAUSES) == 0
    three = detection_errors([(first, objects), (second, target((0, 0, 40, 40, 1), (300, 0, 340, 40, 1)))])
    assert three["false/duplicate"] == pytest.approx(1 / 3)
    assert three["missed/medium"] == pytest.approx(1 / 3)


def test_crowds_empty_images_and_no_detections() -> None:
    crowd = target((0, 0, 100, 100, 1), (200, 200, 240, 240, 1)) | {"iscrowd": torch.tensor([1, 0])}
    errors = detection_errors([(found((0, 0, 100, 90, 1, 0.9)), crowd)])
    assert sum(errors[f"false/{cause}"] for cause in CAUSES) == 0
    assert errors["missed/medium"] == 1
    nothing = detection_errors([(found(), target())])
    assert set(nothing) == {f"false/{cause}" for cause in CAUSES}
    assert not any(nothing.values())
    stray = detection_errors([(found((0, 0, 5, 5, 1, 0.9)), target()), (found(), target((0, 0, 5, 5, 1)))])
    assert stray["false/background"] == 1
    assert stray["missed/small"] == 1


class Operations(TorchDispatchMode):
    """Counts what torch is called for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_operations_do_not_grow_with_the_detections() -> None:
    """A tensor operation for each of them takes longer than all the rest of an evaluation."""
    objects = target(*((30 * k, 0, 30 * k + 20, 20, 1 + k % 2) for k in range(40)))
    counts = []
    for detections in (4, 40):
        hits = found(*((30 * k, k % 7, 30 * k + 20, 20, 1 + k % 3 % 2, 0.9 - k / 100) for k in range(detections)))
        with Operations() as operations:
            detection_errors([(hits, objects)])
        counts.append(operations.count)
    assert counts[0] == counts[1]


def test_shares_are_shown_in_per_cent_and_less_is_better() -> None:
    for name in ("false/place", "missed/small"):
        unit = unit_of(name)
        assert (unit.factor, unit.higher_is_better) == (100.0, False)


def test_scores_that_follow_the_overlap() -> None:
    objects = target((0, 0, 10, 10, 1), (100, 0, 110, 10, 2))
    boxes = [(0, 0, 10, 10, 1), (0, 0, 10, 9, 1), (100, 0, 110, 8, 2), (100, 0, 110, 7, 2)]
    rows = [(*box, score) for box, score in zip(boxes, (0.9, 0.8, 0.3, 0.1), strict=True)]
    other = [(0, 0, 10, 10, 2, 0.01), (0, 0, 10, 3, 1, 0.95), (300, 0, 310, 7, 1, 0.99)]  # none overlaps by a half
    assert score_overlap([(found(*rows, *other), objects)]) == pytest.approx(1)
    turned = [(*box, score) for box, score in zip(boxes, (0.1, 0.3, 0.8, 0.9), strict=True)]
    assert score_overlap([(found(*turned[:2]), objects), (found(*turned[2:]), objects)]) == pytest.approx(-1)
    assert score_overlap([(found(*rows[:2]), objects)]) == 0  # too few
    assert score_overlap([(found(), objects), (found(*rows), target())]) == 0
    alike = [(*box, 0.5) for box in boxes]
    assert score_overlap([(found(*alike), objects)]) == 0
