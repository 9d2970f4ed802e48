"""Retrieval and landmarks among the figures of a detection run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from torchive.engine.metrics import METRICS, metrics_of, record_of
from torchive.engine.search_figures import search_figures
from torchive.engine.views import space_of
from torchive.structures import Detections
from torchive.structures.landmarks import DEEPFASHION2, LandmarkSpace


class Nearest(nn.Module):
    """Finds the gallery's vectors that lie nearest."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def retrieve(self, query: Tensor, gallery: Tensor, *, k: int = 20) -> tuple[Tensor, Tensor]:
        found = (-torch.cdist(query, gallery) * self.scale).topk(min(k, len(gallery)), 1)
        return found.values, found.indices


BOX = torch.tensor([[0.0, 0.0, 10.0, 10.0]])


def record(pair: int, source: int, vector: float, **more: Tensor) -> tuple[dict, dict]:
    found = Detections(BOX, torch.tensor([1]), torch.tensor([0.9]), features=torch.tensor([[vector, 0.0]]))
    one = torch.ones(1, dtype=torch.int64)
    target = {"boxes": BOX, "labels": one, "pair_id": one * pair, "style": one, "source": one * source, **more}
    return record_of("detection", found, target, 1)


def test_retrieval_of_a_run() -> None:
    """Three users' items among three shops': one is nearest to its own, one is second, one is not shown."""
    scale = torch.tensor([3])
    records = [
        record(1, 1, 0.1, scale=scale),
        record(2, 1, 0.9, scale=scale - 2),
        record(9, 1, 0.0, scale=scale),
        record(1, 0, 0.0, scale=scale),
        record(2, 0, 2.0, scale=scale),
        record(3, 0, 1.0, scale=scale),
    ]
    figures = search_figures(Nearest(), records)
    assert figures["top_1"] == 0.5
    assert figures["top_5"] == figures["top_20"] == 1
    assert figures["missed"] == 0
    assert figures["top_1/scale/large"] == 1
    assert figures["top_1/scale/small"] == 0
    assert {"top_1", "top_5", "top_10", "top_20"} <= set(METRICS)


def test_where_there_is_nothing_to_seek() -> None:
    records = [record(1, 1, 0.1), record(1, 0, 0.0)]
    assert search_figures(nn.Linear(1, 1), records) == {}
    assert search_figures(Nearest(), records[:1]) == {}
    assert search_figures(Nearest(), [record(1, 1, 0.1), record(2, 0, 0.0)]) == {}
    assert search_figures(Nearest(), []) == {}
    del records[0][1]["style"]
    assert search_figures(Nearest(), records) == {}


def test_landmarks_of_a_run() -> None:
    """Found where they are, or off by half of the box; only hidden ones off."""
    points = torch.zeros(1, 294, 3)
    run = DEEPFASHION2.span(7)
    points[0, run, :2] = torch.rand(10, 2) * 10
    points[0, run, 2] = torch.tensor([2.0, 1.0]).repeat(5)
    target = {"boxes": BOX, "labels": torch.tensor([7]), "keypoints": points, "scale": torch.tensor([2])}
    right = points[..., :2].clone()
    hidden = right + 5 * (points[..., 2:] == 1)
    for keypoints, visible, marked in ((right, 1.0, 1.0), (right + 5, 0.0, 0.0), (hidden, 1.0, 0.1)):
        found = Detections(BOX, torch.tensor([7]), torch.tensor([0.9]), keypoints=keypoints)
        figures = metrics_of("detection", [record_of("detection", found, target, 13)], DEEPFASHION2.names)
        assert figures["visible_map"] == pytest.approx(visible)
        assert figures["landmark_map"] == pytest.approx(marked)
        assert figures["landmark_map/scale/moderate"] == pytest.approx(marked)
        assert figures["map/scale/moderate"] == pytest.approx(figures["map"])
        assert "landmark_map/scale/small" not in figures


def test_landmarks_of_other_sets_need_a_space_of_their_own() -> None:
    points = torch.tensor([[[2.0, 3, 2], [7, 8, 2]]])
    target = {"boxes": BOX, "labels": torch.tensor([1]), "keypoints": points}
    found = Detections(BOX, torch.tensor([1]), torch.tensor([0.9]), keypoints=points[..., :2])
    records = [record_of("detection", found, target, 1)]
    with pytest.warns(UserWarning, match="the 2 landmarks of the targets are not scored"):
        assert "landmark_map" not in metrics_of("detection", records, ["face"])
    known = LandmarkSpace((2,), sigmas=(0.05, 0.05))
    assert metrics_of("detection", records, ["face"], (), known)["landmark_map"] == pytest.approx(1)

    whole = SimpleNamespace(samples=SimpleNamespace(landmark_space=known))  # as a view of a set
    assert space_of(whole) is known  # type: ignore[arg-type]
    assert space_of(SimpleNamespace()) is None  # type: ignore[arg-type]
