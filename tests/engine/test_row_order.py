"""Rows that rounding swaps are no difference between a file and its model; anything else is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchive.engine.export import gap_to_torch
from torchive.engine.row_order import rows_in_order


def outputs() -> dict[str, Tensor]:
    return {
        "objectness": torch.rand(2, 30),
        "proposals": torch.rand(2, 6, 4) * 90,
        "proposal_scores": torch.rand(2, 6).sort(1, descending=True).values,
        "stage_logits": torch.randn(2, 3, 6, 5),
        "boxes": torch.rand(2, 4, 4) * 90,
        "masks": torch.rand(2, 4, 7, 7),
    }


class Fixed(nn.Module):
    def __init__(self, raw: dict[str, Tensor]) -> None:
        super().__init__()
        self.raw = raw

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.raw


def gap(expected: dict[str, Tensor], got: dict[str, Tensor]) -> float:
    return gap_to_torch(Fixed(expected), Fixed(got), torch.zeros(2, 3, 8, 8))  # type: ignore[arg-type]


def test_swapped_rows_are_put_back_with_all_that_stands_in_them() -> None:
    expected, order = outputs(), [0, 1, 3, 2, 5, 4]
    got = {name: value.clone() for name, value in expected.items()}
    for name in ("proposals", "proposal_scores"):
        got[name][1] = expected[name][1, order]
    got["stage_logits"][1] = expected["stage_logits"][1][:, order]
    for name in ("boxes", "masks"):
        got[name][0] = expected[name][0, [1, 0, 2, 3]]
    assert (got["proposals"] - expected["proposals"]).abs().max() > 1
    assert gap(expected, got) == 0
    got["proposals"] += 1e-5
    assert 1e-6 < gap(expected, got) < 1e-4


def test_other_boxes_stay_a_difference() -> None:
    expected = outputs()
    got = {name: value.clone() for name, value in expected.items()}
    got["proposals"][1, 3] += 2
    assert abs(gap(expected, got) - 2) < 1e-4
    got["proposals"][1, 3] = got["proposals"][1, 2]  # the same box twice
    assert gap(expected, got) > 1
    got = {name: value.clone() for name, value in expected.items()}
    got["proposals"][1, [2, 3]] = expected["proposals"][1, [3, 2]]  # without their logits
    assert gap(expected, got) > 0.1
    assert rows_in_order({"logits": expected["boxes"]}, {"logits": got["boxes"]})["logits"] is got["boxes"]
