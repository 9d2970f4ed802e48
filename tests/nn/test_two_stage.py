"""What two-stage detectors share: who is suppressed after ``forward``, and proposals without a second stage."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from torchive.nn.regions import class_boxes, decode_regions
from torchive.nn.two_stage import DetectsInForward, DetectsRegions

RAW = {
    "proposals": torch.tensor([[[0.0, 0, 8, 8], [4, 4, 16, 16], [0, 0, 0, 0]]]),
    "proposal_scores": torch.tensor([[0.9, 0.4, -1.0]]),
    "sizes": torch.tensor([[16, 16]]),
}


class Detecting(DetectsInForward):
    detected: ClassVar[dict[str, Any]] = {"score_threshold": 0.1, "max_detections": 5}

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"by": torch.tensor([0.0])}

    def _raw(self, inputs: torch.Tensor, **options: float) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"by": torch.tensor([options["score_threshold"], options["max_detections"]])}


def test_what_detects_in_forward_has_no_regions_left_to_suppress() -> None:
    """Its proposals would pass for detections of the first class."""
    assert not hasattr(DetectsInForward, "scored_boxes")
    assert hasattr(DetectsRegions, "scored_boxes")


def test_thresholds_that_are_not_given_are_those_of_forward() -> None:
    model, images = Detecting(), torch.zeros(1, 3, 8, 8)
    assert model.detect(images)["by"].tolist() == [0]
    assert model.detect(images, max_detections=5)["by"].tolist() == [0]
    assert model.detect(images, max_detections=3)["by"].tolist() == pytest.approx([0.1, 3])


def test_proposals_are_detections_only_where_that_is_said() -> None:
    with pytest.raises(KeyError, match="class_logits"):
        class_boxes(RAW)
    boxes, scores = class_boxes(RAW, proposals_only=True)
    assert boxes.shape == (1, 3, 1, 4)
    assert scores[0, :, 0].tolist() == pytest.approx([0.9, 0.4, -1])
    found = decode_regions(RAW, [(32, 32)], proposals_only=True)[0]
    assert found.boxes.tolist() == [[0, 0, 16, 16], [8, 8, 32, 32]]


@pytest.mark.parametrize("only", [True, False])
def test_a_detector_without_second_stage_says_so(only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DetectsRegions()
    monkeypatch.setattr(model, "_coding", lambda: {"proposals_only": only})
    if only:
        assert len(model.decode(RAW, [(16, 16)])[0]) == 2
        assert model.scored_boxes(RAW, (16, 16))[1].shape == (1, 3, 1)
    else:
        with pytest.raises(KeyError, match="class_logits"):
            model.decode(RAW, [(16, 16)])
