"""Connected pieces against a flood fill in SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from torchive.ops.components import connected_components, neighbours


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("shape", "values"), [((40, 57), 2), ((31, 30), 4), ((1, 9), 2), ((9, 1), 3), ((1, 1), 2)])
def test_pieces_are_those_of_a_flood_fill(shape: tuple[int, int], values: int, diagonal: bool) -> None:
    segments = torch.randint(0, values, shape)
    found = connected_components(segments, diagonal=diagonal)
    assert torch.equal(found == 0, segments == 0)
    expected = np.zeros(shape, dtype=np.int64)
    place = np.arange(1, segments.numel() + 1).reshape(shape)
    for value in range(1, values):
        pieces, count = ndimage.label(segments.numpy() == value, np.ones((3, 3)) if diagonal else None)
        for k in range(1, count + 1):
            expected[pieces == k] = place[pieces == k].min()
    assert torch.equal(found, torch.from_numpy(expected))


def test_a_long_winding_piece_is_one() -> None:
    segments = torch.zeros(81, 80, dtype=torch.int64)
    segments[::2], segments[1::4, -1], segments[3::4, 0] = 1, 1, 1
    assert connected_components(segments).unique().tolist() == [0, 1]


def test_neighbours_stay_in_their_segment() -> None:
    segments = torch.tensor([[1, 1, 2], [2, 1, 2]])
    beside = neighbours(segments)
    assert beside.shape == (4, 6)
    assert sorted(set(beside[:, 1].tolist())) == [0, 1, 4]  # left, itself for above and right, below
    assert sorted(set(beside[:, 3].tolist())) == [3]
    assert sorted(set(neighbours(segments, diagonal=True)[:, 0].tolist())) == [0, 1, 4]
    assert neighbours(segments, diagonal=True)[:, 2].tolist().count(5) == 1  # nothing comes back over the border
