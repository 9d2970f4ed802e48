"""Does the interval cover the truth as often as it says, and does the rule follow from it?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from torchive.report.statistics import Rule, estimate, intervals, paired_estimate, scaled

SAMPLES = 4000
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
#: Differences with a known mean: as they come from two arms (differences of two noisy scores), and worse.
SHAPES: dict[str, tuple[Draw, float]] = {
    "normal": (lambda g, s: g.normal(0.3, 2.0, s), 0.3),
    "uniform": (lambda g, s: g.uniform(-1, 1, s), 0.0),
    "heavy tails, t3": (lambda g, s: g.standard_t(3, s), 0.0),
    "difference of exponentials": (lambda g, s: g.exponential(size=s) - g.exponential(size=s), 0.0),
    "contaminated": (lambda g, s: np.where(g.random(s) < 0.1, 5, 1) * g.normal(size=s), 0.0),
    "mildly skewed, gamma 4": (lambda g, s: g.gamma(4, size=s), 4.0),
    "skewed, exponential": (lambda g, s: g.exponential(size=s), 1.0),
    "rounded": (lambda g, s: np.round(g.normal(0, 1.5, s)), 0.0),
}


def coverage(shape: str, pairs: int, seed: int = 1) -> float:
    draw, truth = SHAPES[shape]
    low, high = intervals(draw(np.random.default_rng(seed), (SAMPLES, pairs)), resamples=1999)
    return float(np.mean((low <= truth) & (truth <= high)))


@pytest.mark.parametrize("shape", SHAPES)
def test_ten_pairs_cover_the_truth(shape: str) -> None:
    most = 0.975 if shape in ("uniform",) else 0.97  # bounded tails: a little wide
    assert 0.93 <= coverage(shape, 10) <= most


@pytest.mark.parametrize("pairs", [3, 5, 8, 20])
def test_normal_differences_are_covered_at_any_number_of_pairs(pairs: int) -> None:
    assert 0.93 <= coverage("normal", pairs) <= 0.97


@pytest.mark.parametrize("shape", ["heavy tails, t3", "difference of exponentials", "contaminated"])
def test_three_pairs_never_fall_short_for_symmetric_tails(shape: str) -> None:
    assert 0.94 <= coverage(shape, 3) <= 0.975


def test_three_pairs_equal_the_paired_t_test_of_scipy() -> None:
    first, second = np.array([0.71, 0.74, 0.70]), np.array([0.73, 0.75, 0.735])
    found = paired_estimate(first, second)
    wanted = stats.ttest_rel(second, first)
    interval = wanted.confidence_interval(0.95)
    assert found.p == pytest.approx(wanted.pvalue, rel=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert found.half_width == pytest.approx((interval.high - interval.low) / 2)


@pytest.mark.parametrize("pairs", [3, 7, 8, 12])
def test_p_agrees_with_the_interval(pairs: int) -> None:
    generator = np.random.default_rng(5)
    for _ in range(60):
        found = estimate(generator.normal(0.6, 1.0, pairs))
        assert (found.p < 0.05) == (not found.low <= 0 <= found.high)


def test_p_is_uniform_without_a_difference() -> None:
    generator = np.random.default_rng(2)
    p = np.array([estimate(generator.normal(size=9)).p for _ in range(200)])
    assert 0.40 <= np.mean(p < 0.5) <= 0.60
    assert np.mean(p < 0.05) <= 0.10


def test_the_same_differences_give_the_same_interval_in_any_unit() -> None:
    values = np.random.default_rng(3).normal(0.01, 0.02, 10)
    once, again, points = estimate(values), estimate(values), estimate(100 * values)
    assert once == again
    assert points.low == pytest.approx(100 * once.low)
    assert scaled(once, 100).high == pytest.approx(points.high)
    assert points.p == once.p


def test_swapped_arms_mirror_the_estimate() -> None:
    values = np.random.default_rng(4).normal(0.5, 1.0, 5)
    ahead, behind = estimate(values), estimate(-values)
    assert (behind.low, behind.high, behind.p) == pytest.approx((-ahead.high, -ahead.low, ahead.p))


def test_no_difference_at_all_is_identical() -> None:
    found = paired_estimate([0.7, 0.8, 0.9], [0.7, 0.8, 0.9])
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert Rule("accuracy", pairs=3).decide(found) == "identical"


def test_one_difference_in_every_pair_has_no_width_even_after_rounding() -> None:
    baseline = np.array([0.7, 0.8, 0.9, 0.3])
    found = paired_estimate(baseline, baseline + 0.1)
    assert found.low == found.high == pytest.approx(0.1)
    assert Rule("accuracy").decide(found) == "better"


def test_tied_differences_keep_a_finite_interval() -> None:
    found = estimate([0.0] * 9 + [1.0])
    assert np.isfinite([found.low, found.high]).all()
    assert found.low < 0 < found.high


@pytest.mark.parametrize(
    ("differences", "higher", "margin", "verdict"),
    [
        ([1.0, 1.1, 0.9], True, 0.0, "better"),
        ([1.0, 1.1, 0.9], False, 0.0, "worse"),
        ([-1.0, -1.1, -0.9], True, 0.0, "worse"),
        ([-1.0, -1.1, -0.9], False, 0.0, "better"),
        ([1.0, 1.1, 0.9], True, 0.9, "cannot tell"),
        ([1.0, -1.1, 0.9], True, 0.0, "cannot tell"),
    ],
)
def test_the_rule(differences: list[float], higher: bool, margin: float, verdict: str) -> None:
    rule = Rule("m", higher_is_better=higher, margin=margin, pairs=3)
    assert rule.decide(estimate(differences)) == verdict


@pytest.mark.parametrize("values", [[1.0], [1.0, float("nan")], [[1.0, 2.0]]])
def test_bad_differences_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"differences"):
        estimate(values)


@pytest.mark.parametrize("wrong", [{"pairs": 2}, {"margin": -1.0}, {"level": 95}])
def test_bad_rules_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"got"):
        Rule("accuracy", **wrong)  # type: ignore[arg-type]


def test_pairs_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        paired_estimate([1.0, 2.0], [1.0, 2.0, 3.0])
