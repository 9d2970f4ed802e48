"""Pooling of regions in plain tensor operations: the operators where nothing moves, slopes and loops where it does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import ps_roi_align, roi_align

from torchive.ops.roi import (
    pool_moved_regions,
    pool_position_sensitive,
    pool_regions,
    position_sensitive_plain,
    pyramid_level,
)

STRIDES = (4, 8, 16)


def pyramid(images: int, channels: int, *, dtype: torch.dtype = torch.double) -> list[Tensor]:
    return [torch.randn(images, channels, 128 // s, 160 // s, dtype=dtype) for s in STRIDES]


def some_boxes(count: int, *, largest: float = 200) -> tuple[Tensor, Tensor]:
    """Boxes that also leave the image, and some of less than a cell."""
    corner = torch.rand(count, 2, dtype=torch.double) * 150 - 10
    side = 1 + torch.rand(count, 2, dtype=torch.double) ** 2 * largest
    return torch.cat([corner, corner + side], 1), torch.arange(count) % 2


def operator(
    maps: list[Tensor], boxes: Tensor, image: Tensor, *, samples: int = 2, level_of: Tensor | None = None
) -> Tensor:
    """torchvision's RoIAlign of each box on its own level, or on that of the box in ``level_of``."""
    regions = torch.cat([image[:, None].to(boxes), boxes], 1)
    level = (
        pyramid_level(boxes if level_of is None else level_of, STRIDES[: len(maps)])
        if len(maps) > 1
        else torch.zeros_like(image)
    )
    one_by_one = [roi_align(maps[k], regions[r : r + 1], 7, 1 / STRIDES[k], samples) for r, k in enumerate(level)]
    return torch.cat(one_by_one)


@pytest.mark.parametrize("samples", [1, 2, 4])
@pytest.mark.parametrize("levels", [1, 3])
def test_bins_that_stay_give_roi_align(samples: int, levels: int) -> None:
    maps, (boxes, image) = pyramid(2, 5)[:levels], some_boxes(40)
    expected = operator(maps, boxes, image, samples=samples)
    for shape in ((40, 2, 7, 7), (40, 2, 1, 1)):
        got = pool_moved_regions(maps, STRIDES[:levels], boxes, image, boxes.new_zeros(shape), samples=samples)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_and_its_gradients_are_the_operators(levels: int, layout: torch.memory_format) -> None:
    """No gradient reaches the boxes, as none does through the operator."""
    maps, (boxes, image) = pyramid(2, 5)[:levels], some_boxes(40, largest=500)
    maps = [m.contiguous(memory_format=layout).requires_grad_() for m in maps]
    got = pool_regions(maps, STRIDES[:levels], boxes.requires_grad_(), image)
    expected = operator(maps, boxes.detach(), image)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(expected)
    *ours, none = torch.autograd.grad((got * weight).sum(), [*maps, boxes], allow_unused=True)
    theirs = torch.autograd.grad((expected * weight).sum(), maps)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert none is None
    half = pool_regions([m.detach().bfloat16() for m in maps], STRIDES[:levels], boxes.detach(), image)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected.detach(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("levels", [1, 3])
def test_half_precision_does_not_move_boxes(levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between 512 and 1024 a bfloat16 holds every fourth pixel only; the operator's own branch, as in an export."""
    maps, image = [torch.rand(2, 3, 1200 // s, 1200 // s).bfloat16() for s in STRIDES[:levels]], torch.arange(20) % 2
    corner = 601.3 + torch.rand(20, 2) * 300
    boxes = torch.cat([corner, corner + 20 + torch.rand(20, 2) * 200], 1)
    wide = pool_regions([m.float() for m in maps], STRIDES[:levels], boxes, image)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    got = pool_regions(maps, STRIDES[:levels], boxes, image)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wide, rtol=0.005, atol=0.005)


def test_a_moved_box_is_the_box_at_its_new_place() -> None:
    maps, (boxes, image) = pyramid(2, 5), some_boxes(40)
    shift = torch.randn(40, 2, dtype=torch.double) * 20
    got = pool_moved_regions(maps, STRIDES, boxes, image, shift[..., None, None])
    moved = boxes + shift.repeat(1, 2)
    expected = operator(maps, moved, image, level_of=boxes)
    torch.testing.assert_close(
        pool_regions(maps, STRIDES, moved, image, level_of=boxes), expected, rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_constant_and_ramp() -> None:
    """Any offset leaves a constant as it is; on a ramp the pooled value moves by the offset times the slope."""
    column = torch.arange(40, dtype=torch.double).expand(1, 1, 32, 40) * 3
    row = torch.arange(32, dtype=torch.double)[:, None].expand(1, 1, 32, 40) * -2
    boxes, image = torch.tensor([[40.0, 40, 90, 70]], dtype=torch.double), torch.tensor([0])
    offsets = torch.randn(1, 2, 7, 7, dtype=torch.double) * 6
    constant = pool_moved_regions([torch.full_like(column, 2.5)], [4], boxes, image, offsets)
    torch.testing.assert_close(constant, torch.full_like(constant, 2.5))
    for ramp, axis, slope in ((column, 0, 3 / 4), (row, 1, -2 / 4)):
        still = pool_moved_regions([ramp], [4], boxes, image, torch.zeros_like(offsets))
        moved = pool_moved_regions([ramp], [4], boxes, image, offsets)
        torch.testing.assert_close((moved - still)[:, 0], offsets[:, axis] * slope)


def test_gradients() -> None:
    maps = [m.requires_grad_() for m in (torch.randn(2, 2, 6, 7).double(), torch.randn(2, 2, 3, 4).double())]
    boxes = torch.tensor([[3.3, 2.2, 20.1, 19.7], [1.2, 3.1, 200.4, 190.9]]).double()
    offsets = (torch.randn(2, 2, 3, 3).double() * 2).requires_grad_()

    def pool(offsets: Tensor, *maps: Tensor) -> Tensor:
        return pool_moved_regions(maps, (4, 128), boxes, torch.tensor([0, 1]), offsets, size=3)

    assert torch.autograd.gradcheck(pool, (offsets, *maps))


@pytest.mark.parametrize("size", [7, 3])
def test_position_sensitive_pooling_equals_the_operator(size: int, monkeypatch) -> None:
    x = torch.randn(2, 4 * size**2, 20, 25, dtype=torch.double, requires_grad=True)
    boxes, image = some_boxes(50, largest=500)
    regions = torch.cat([image[:, None].double(), boxes], 1)
    expected = ps_roi_align(x, regions, size, 1 / 16, 2)
    weight = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), x)
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        got = pool_position_sensitive(x, boxes, image, stride=16, size=size)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(torch.autograd.grad((got * weight).sum(), x)[0], wanted, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="channels, got 5"):
        pool_position_sensitive(torch.zeros(1, 5, 4, 4), boxes, image, stride=16)


def test_position_sensitive_pooling_by_hand() -> None:
    """Each bin reads its own map: maps that are constant give their own numbers, channel by channel."""
    x = torch.arange(2 * 9, dtype=torch.double)[None, :, None, None].expand(1, 18, 8, 8)
    got = position_sensitive_plain(
        x, torch.tensor([[16.0, 16, 100, 100]]).double(), torch.tensor([0]), stride=16, size=3
    )
    torch.testing.assert_close(got, torch.arange(18, dtype=torch.double).view(1, 2, 3, 3))


def test_no_boxes() -> None:
    maps, nothing = pyramid(1, 3, dtype=torch.float32), torch.zeros(0, 4)
    image = torch.zeros(0, dtype=torch.int64)
    assert pool_moved_regions(maps, STRIDES, nothing, image, torch.zeros(0, 2, 7, 7)).shape == (0, 3, 7, 7)
    x = torch.randn(1, 98, 5, 5, requires_grad=True)
    pooled = position_sensitive_plain(x, nothing, image, stride=16)
    assert pooled.shape == (0, 2, 7, 7)
    pooled.sum().backward()


def test_boxes_that_are_not_numbers_do_no_harm() -> None:
    """The operators read outside of the map for them; the other boxes are pooled as without them."""
    maps, (boxes, image) = pyramid(2, 98, dtype=torch.float32), some_boxes(6)
    boxes = boxes.float()
    bad = boxes.clone()
    bad[1], bad[4, 2] = float("nan"), float("inf")
    kept = [0, 2, 3, 5]
    for pool in (
        lambda b: pool_regions(maps, STRIDES, b, image),
        lambda b: pool_regions(maps[:1], STRIDES[:1], b, image),
        lambda b: pool_moved_regions(maps, STRIDES, b, image, torch.zeros(6, 2, 7, 7)),
        lambda b: pool_position_sensitive(maps[0], b, image, stride=4),
        lambda b: position_sensitive_plain(maps[0], b, image, stride=4),
    ):
        assert torch.equal(pool(bad)[kept], pool(boxes)[kept])
