"""Repeat-factor sampling against its formula: the factors of each image, and how often it is taken."""

from __future__ import annotations

import pytest
import torch

from torchive.data.drawing import epoch_order
from torchive.data.repeat_factor import RepeatFactorSampler, repeat_factors

#: 100 images: all show class 0, ten class 1, one class 2; class 2 appears three times in its image. One is empty.
IMAGES = [[0] if k >= 11 else [0, 1, 1] if k >= 1 else [0, 2, 2, 2] for k in range(99)] + [[]]


def test_factors_are_the_formula() -> None:
    found = repeat_factors(IMAGES, 0.4)
    assert found[0].item() == pytest.approx((0.4 / 0.01) ** 0.5)  # one image of a hundred, whatever its objects
    assert found[1:11].tolist() == pytest.approx([2.0] * 10)  # sqrt(0.4 / 0.1)
    assert found[11:].tolist() == [1.0] * 89
    assert repeat_factors(IMAGES, 0.0).tolist() == [1.0] * 100
    for images, threshold in (([], 0.5), (IMAGES, 1.5), (IMAGES, -1)):
        with pytest.raises(ValueError, match=f"got {len(images)} and {threshold}"):
            repeat_factors(images, threshold)


def test_images_come_in_proportion_to_their_factors() -> None:
    factors = repeat_factors(IMAGES, 0.4)
    sampler = RepeatFactorSampler(factors, seed=3)
    expected = factors / factors.sum() * 100
    orders = [torch.tensor(sampler.order(epoch)) for epoch in range(600)]
    counts = torch.stack([order.bincount(minlength=100) for order in orders]).double()
    assert all(len(order) == 100 for order in orders)
    assert torch.all((counts - expected).abs() < 1)  # rounded up or down
    assert (counts.mean(0) - expected).abs().max() < 0.1
    assert orders[0].tolist() == sampler.order(0)
    assert orders[0].tolist() != orders[1].tolist()
    assert orders[0].tolist() != RepeatFactorSampler(factors, seed=4).order(0)


def test_without_rare_classes_the_order_is_the_plain_one() -> None:
    sampler = RepeatFactorSampler(torch.ones(37), seed=5)
    for epoch in range(50):
        assert sampler.order(epoch) == epoch_order(37, 5, epoch)
