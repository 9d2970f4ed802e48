"""Pictures of a report: masks are drawn and counted where both arms give them."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from tests.engine.toys import ToySet, toy_recipe
from torch import Tensor

from torchive.engine.evaluate import Evaluation
from torchive.engine.examples import side_by_side
from torchive.structures import Detections


def drawn(uri: str) -> Any:
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    return np.asarray(picture.convert("RGBA"))


def evaluation(samples: ToySet, *, right: bool, masked: bool = True) -> Evaluation:
    """Every box is the true one; the masks are true or empty."""
    targets, found = [], []
    for index in range(len(samples)):
        target = samples[index].target
        mask: Tensor = target["masks"].bool() if right else torch.zeros_like(target["masks"]).bool()
        targets.append(target)
        found.append(Detections(target["boxes"], target["labels"], torch.ones(1), mask if masked else None))
    return Evaluation({}, samples.ids, tuple(found), tuple(targets))


def test_objects_are_found_by_their_masks_and_drawn_as_such() -> None:
    samples = ToySet("detection", 6)
    shown = side_by_side(
        evaluation(samples, right=False), evaluation(samples, right=True), samples, toy_recipe("detection"), seed=0
    )
    assert shown is not None
    assert {item["group"] for item in shown["items"]} == {"method", "both"}
    for item in shown["items"]:
        mask = samples.masks[samples.ids.index(item["id"])].numpy() > 0
        assert item["method"]["score_text"] == "1 found, 0 missed, 0 wrong"
        assert item["baseline"]["score_text"] == "0 found, 1 missed, 1 wrong"
        assert (drawn(item["truth"]["mask"])[..., 3] > 0).tolist() == mask.tolist()
        assert (drawn(item["method"]["mask"])[..., 3] > 0).tolist() == mask.tolist()
        assert not drawn(item["baseline"]["mask"])[..., 3].any()


def test_without_masks_of_both_arms_boxes_are_compared() -> None:
    samples = ToySet("detection", 4)
    boxes = evaluation(samples, right=False, masked=False)
    shown = side_by_side(boxes, evaluation(samples, right=False), samples, toy_recipe("detection"), seed=0)
    assert shown is not None
    assert {item["group"] for item in shown["items"]} == {"both"}
    for item in shown["items"]:
        assert item["method"]["score_text"] == item["baseline"]["score_text"] == "1 found, 0 missed, 0 wrong"
        assert "mask" not in item["method"]
