"""Rows of raw outputs that stand in the order of a score, and so may change places by rounding alone."""

from __future__ import annotations

import torch
from torch import Tensor

#: Boxes that are sorted by a score, and what stands in their rows; (N, rows, ...), of stages (N, T, rows, ...).
RANKED = {
    "proposals": ("proposal_scores", "class_logits", "box_deltas", "stage_logits", "stage_boxes"),
    "boxes": ("labels", "scores", "masks", "landmarks", "features"),
}


def rows_in_order(expected: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, Tensor]:
    """``got`` with rows that have only changed places put where ``expected`` has them.

    Two proposals whose scores are equal up to rounding may come in either order; what is made of them is the same.
    Rows are known by their boxes. Where those that differ are not the same boxes in another order, nothing is moved.
    """
    result = dict(got)
    for key, followers in RANKED.items():
        if key not in expected or expected[key].shape != got[key].shape:
            continue
        for image, (one, other) in enumerate(zip(expected[key], got[key], strict=True)):
            rows = torch.nonzero(~torch.isclose(one, other, rtol=1e-4, atol=1e-3).all(1))[:, 0]
            if not len(rows):
                continue
            order = torch.cdist(one[rows].double(), other[rows].double()).argmin(1)
            if not torch.equal(order.sort().values, torch.arange(len(rows))):
                continue
            for name in (key, *followers):
                if name in got:
                    axis = 1 if name.startswith("stage") else 0
                    moved = result[name].clone()
                    moved[image] = moved[image].index_copy(axis, rows, moved[image].index_select(axis, rows[order]))
                    result[name] = moved
    return result
