"""The statistics of a comparison: paired differences, their interval, the rule that names a winner.

Pure functions of numbers. Below eight pairs the interval is Student's t (exact for normal differences). From eight on
it is a studentised bootstrap whose critical values lie between the equal-tailed ones, which fall short on heavy tails,
and the symmetric ones, which are wide there; the share was set by simulation (``tests/report/test_statistics.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: From this many pairs on the interval is a bootstrap.
BOOTSTRAP_FROM = 8
#: A comparison has at least this many pairs.
LEAST_PAIRS = 3
_RESAMPLES = 9999
_EQUAL_TAILED = 2 / 3  # share of the equal-tailed critical value; the rest is the symmetric one
_EQUAL = 1e-12  # relative spread below which differences are the same number, written in floating point

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Mean paired difference and what is known about it, in the metric's own unit.

    Attributes:
        mean: of the differences, method minus baseline.
        low, high: the interval.
        p: two-sided; below ``1 - level`` exactly where the interval excludes zero.
        pairs: how many.
        level: of the interval, 0.95.
        interval: "t", "bootstrap" or "none" (all differences are the same number; the interval has no width).
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int
    level: float
    interval: str

    @property
    def half_width(self) -> float:
        """Half the interval: the smallest difference that these pairs, so scattered, could have shown."""
        return (self.high - self.low) / 2

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with the half width."""
        return {**asdict(self), "half_width": self.half_width}


@dataclass(frozen=True)
class Rule:
    """How the winner is named; written down before a comparison trains anything.

    Attributes:
        metric: the one that decides.
        higher_is_better: its orientation.
        margin: the smallest difference of interest, in the metric's unit; 0 asks for any difference.
        level: of the interval.
        pairs: planned.
    """

    metric: str
    higher_is_better: bool = True
    margin: float = 0.0
    level: float = 0.95
    pairs: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {self.level}")
        if not self.margin >= 0:
            raise ValueError(f"the smallest difference of interest must be at least 0, got {self.margin}")
        if self.pairs < LEAST_PAIRS:
            raise ValueError(f"a comparison needs at least {LEAST_PAIRS} paired seeds, got {self.pairs}")

    @property
    def text(self) -> str:
        """The rule in words."""
        name = self.metric.replace("_", " ")
        kind = "a t interval" if self.pairs < BOOTSTRAP_FROM else "a studentised bootstrap"
        edge = f"{self.margin:g}" if self.margin else "zero"
        sign = "-" if self.margin else ""
        up, down = ("better", "worse") if self.higher_is_better else ("worse", "better")
        return (
            f"The method is {up} if the {100 * self.level:g} % interval of the mean paired difference in {name} "
            f"({self.pairs} seeds, {kind}) lies wholly above {edge}, {down} if wholly below {sign}{edge}; identical if "
            "every difference is zero; otherwise we cannot tell."
        )

    def decide(self, estimate: Estimate) -> str:
        """ "better", "worse", "cannot tell" or "identical"."""
        if estimate.mean == estimate.low == estimate.high == 0:
            return "identical"
        if estimate.low > self.margin:
            return "better" if self.higher_is_better else "worse"
        if estimate.high < -self.margin:
            return "worse" if self.higher_is_better else "better"
        return "cannot tell"


def paired_estimate(
    baseline: Sequence[float] | ArrayLike, method: Sequence[float] | ArrayLike, *, level: float = 0.95
) -> Estimate:
    """Mean of ``method - baseline`` with its interval; pairs stand at equal positions.

    Raises:
        ValueError: different lengths, fewer than two pairs, or values that are not finite.
    """
    first, second = np.asarray(baseline, dtype=float), np.asarray(method, dtype=float)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"pairs need two lists of one length, got shapes {first.shape} and {second.shape}")
    scale = float(np.abs(np.concatenate([first, second])).max(initial=0.0))
    return estimate(second - first, level=level, scale=scale)


def estimate(differences: Sequence[float] | ArrayLike, *, level: float = 0.95, scale: float = 0.0) -> Estimate:
    """Mean of differences with its interval and p-value.

    Args:
        differences: one for each pair.
        level: of the interval.
        scale: size of the values whose differences these are; spread below 1e-12 of it is rounding and counts as none.

    Raises:
        ValueError: fewer than two differences, or one that is not finite.
    """
    values = np.asarray(differences, dtype=float)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"an interval needs at least two differences, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"differences must be finite, got {values.tolist()}")
    pairs = len(values)
    tolerance = _EQUAL * max(scale, float(np.abs(values).max()))
    if np.ptp(values) <= tolerance:
        same = float(values[0]) if abs(values[0]) > tolerance else 0.0
        return Estimate(same, same, same, 0.0 if same else 1.0, pairs, level, "none")
    low, high = intervals(values[None], level=level)
    ratio = values.mean() / (values.std(ddof=1) / math.sqrt(pairs))
    kind = "t" if pairs < BOOTSTRAP_FROM else "bootstrap"
    p = _t_p(ratio, pairs) if kind == "t" else _bootstrap_p(values, ratio)
    return Estimate(float(values.mean()), float(low[0]), float(high[0]), p, pairs, level, kind)


def intervals(differences: ArrayLike, *, level: float = 0.95, resamples: int = _RESAMPLES) -> tuple[Array, Array]:
    """Lower and upper ends for many samples at once: (S, n) differences to two arrays (S,)."""
    values = np.asarray(differences, dtype=float)
    pairs = values.shape[1]
    mean = values.mean(1)
    error = values.std(1, ddof=1) / math.sqrt(pairs)
    if pairs < BOOTSTRAP_FROM:
        reach = _t_quantile(level, pairs) * error
        return mean - reach, mean + reach
    below, above = _quantiles(_studentised(values, resamples), 1 - level, pairs)
    return mean - above * error, mean - below * error


def _studentised(values: Array, resamples: int) -> Array:
    """The resamples' t ratios in ascending order: (S, n) to (S, B)."""
    pairs = values.shape[1]
    spread = values.std(1, ddof=1, keepdims=True)
    standard = (values - values.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    counts = _counts(pairs, resamples)  # (n, B): how often each pair was drawn
    mean = standard @ counts / pairs
    variance = (np.square(standard) @ counts / pairs - np.square(mean)) / (pairs - 1)
    flat = variance < 1e-12
    infinite = np.where(np.abs(mean) < 1e-12, 0.0, np.copysign(np.inf, mean))
    ratios = np.where(flat, infinite, mean / np.sqrt(np.where(flat, 1.0, variance)))
    ratios.sort(axis=1)
    return ratios


@lru_cache(maxsize=8)
def _counts(pairs: int, resamples: int) -> Array:
    """Drawn once with a fixed seed, so that a result is a function of the differences alone."""
    generator = np.random.default_rng([20201, pairs, resamples])
    counts = generator.multinomial(pairs, [1 / pairs] * pairs, size=resamples).T.astype(float)
    return np.ascontiguousarray(counts)


def _quantiles(ratios: Array, alpha: float, pairs: int) -> tuple[Array, Array]:
    """Lower and upper critical ratio, between the equal-tailed and the symmetric one.

    Where resamples without spread fill a tail (many tied differences), that tail takes Student's value.
    """
    student = _t_quantile(1 - alpha, pairs)
    count = ratios.shape[1]
    tail = min(max(math.ceil(alpha / 2 * (count + 1)), 1), count // 2)
    low, high = ratios[:, tail - 1], ratios[:, count - tail]
    rank = min(max(math.ceil((1 - alpha) * (count + 1)), 1), count) - 1
    both = np.partition(np.abs(ratios), rank, axis=1)[:, rank]
    low, high, both = (np.where(np.isfinite(v), v, np.copysign(student, v)) for v in (low, high, both))
    share = _EQUAL_TAILED
    return share * low - (1 - share) * both, share * high + (1 - share) * both


def _bootstrap_p(values: Array, ratio: float) -> float:
    """The largest alpha whose interval still holds zero, by halving."""
    ratios = _studentised(values[None], _RESAMPLES)
    inside, outside = 0.0, 1.0
    for _ in range(20):
        alpha = (inside + outside) / 2
        below, above = _quantiles(ratios, alpha, len(values))
        if below[0] <= ratio <= above[0]:
            inside = alpha
        else:
            outside = alpha
    return max(outside, 1 / (_RESAMPLES + 1))


def _t_quantile(level: float, pairs: int) -> float:
    from scipy import stats

    return float(stats.t.ppf((1 + level) / 2, pairs - 1))


def _t_p(ratio: float, pairs: int) -> float:
    from scipy import stats

    return float(2 * stats.t.sf(abs(ratio), pairs - 1))


def scaled(value: Estimate, factor: float) -> Estimate:
    """The estimate in another unit, such as points of a share (factor 100)."""
    return replace(value, mean=value.mean * factor, low=value.low * factor, high=value.high * factor)
