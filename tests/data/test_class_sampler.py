"""Sampling by class: frequencies against the formula, the two ends, and the order as a function of seed and epoch."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from torchive.data.class_sampler import (
    ClassAwareSampler,
    ClassSampler,
    class_probabilities,
    progressive_probabilities,
)
from torchive.data.drawing import epoch_order

COUNTS = [400, 90, 10]
LABELS = [k for k, n in enumerate(COUNTS) for _ in range(n)]


def sampler(rule, **options):
    return ClassSampler(LABELS, rule, **{"seed": 3, "batch_size": 20, "steps": 1000, **options})


@pytest.mark.parametrize("power", [0.0, 0.5, 2.0])
def test_classes_come_in_proportion_to_a_power_of_their_sizes(power):
    sizes = torch.tensor(COUNTS, dtype=torch.float64)
    expected = sizes**power / (sizes**power).sum()
    torch.testing.assert_close(class_probabilities(COUNTS, power), expected)
    found = sampler(lambda _: expected)
    drawn = torch.tensor([i for epoch in range(40) for i in found.order(epoch)])
    classes = torch.tensor(LABELS)[drawn].bincount(minlength=3)
    assert chisquare(classes.numpy(), (expected * len(drawn)).numpy()).pvalue > 1e-3
    inside = drawn[torch.tensor(LABELS)[drawn] == 1].bincount(minlength=500)[400:490]  # uniform within the class
    assert chisquare(inside.numpy()).pvalue > 1e-3


def test_a_class_without_samples_is_never_drawn():
    assert class_probabilities([5, 0, 5], 0).tolist() == [0.5, 0, 0.5]
    labels = [0] * 5 + [2] * 5
    found = ClassSampler(labels, lambda _: class_probabilities([5, 0, 5], 0), seed=0, batch_size=4, steps=9)
    assert sorted({i for e in range(30) for i in found.order(e)}) == list(range(10))
    with pytest.raises(ValueError, match="got -1"):
        class_probabilities([1], -1)
    with pytest.raises(ValueError, match=r"0\.0"):
        class_probabilities([0, 0], 1)


def test_progressive_goes_from_instances_to_classes():
    start, middle, end = (progressive_probabilities(COUNTS, t) for t in (0.0, 0.5, 1.0))
    torch.testing.assert_close(start, class_probabilities(COUNTS, 1))
    torch.testing.assert_close(end, class_probabilities(COUNTS, 0))
    torch.testing.assert_close(middle, (start + end) / 2)


def test_a_silent_rule_keeps_the_plain_order_and_each_batch_knows_its_progress():
    asked = []

    def rule(progress):
        asked.append(progress)
        return None if progress < 0.5 else class_probabilities(COUNTS, 0)

    found = sampler(rule, steps=50)  # 25 batches an epoch: the second epoch is balanced
    assert found.order(0) == epoch_order(500, 3, 0)
    assert asked == [batch / 50 for batch in range(25)]
    later = found.order(1)
    assert later != epoch_order(500, 3, 1)
    assert later == sampler(rule, steps=50).order(1)
    half = sampler(rule, steps=25).order(0)
    plain = epoch_order(500, 3, 0)
    assert half[: 13 * 20] == plain[: 13 * 20]
    assert half[13 * 20 :] != plain[13 * 20 :]


def test_class_aware_sampling_visits_classes_in_cycles():
    found = ClassAwareSampler(LABELS, samples=4, seed=1)
    order = found.order(0)
    assert len(order) == len(found) == 3 * 400
    classes = torch.tensor(LABELS)[order].view(-1, 4)
    assert (classes == classes[:, :1]).all()  # a visit stays in its class
    assert (classes[:, 0].view(-1, 3).sort(1).values == torch.arange(3)).all()  # a cycle has every class once
    seen = torch.tensor(order).bincount(minlength=500)
    assert (seen[:400] == 1).all()
    assert set(seen[400:490].tolist()) <= {4, 5}
    assert (seen[490:] == 40).all()
    assert order == ClassAwareSampler(LABELS, samples=4, seed=1).order(0) != found.order(1)
