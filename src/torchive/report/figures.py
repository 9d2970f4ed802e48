"""The figures of a report, as inline SVG: paired differences, curves with bands, intervals, small strips for tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from torchive.report.summary import MetricSummary
from torchive.report.svg import Axis, Drawing, axis_over, tick_text
from torchive.report.units import ratio, signed

Curve = Sequence[tuple[float, float]]


def _grid_x(drawing: Drawing, axis: Axis, top: float, bottom: float, *, wanted: int = 5, zero: bool = False) -> None:
    ticks = axis.ticks(wanted)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    for tick in ticks:
        x = axis(tick)
        drawing.line(x, top, x, bottom, "zero" if zero and abs(tick) < 1e-12 else "grid")
        drawing.text(x, bottom + 16, tick_text(tick, step), "tick", "middle")


def paired_figure(metric: MetricSummary, margin: float = 0.0) -> str:
    """Per-seed differences as dots, and above them their mean with its interval, against zero."""
    factor, digits = metric.unit.factor, metric.digits
    shown = [d * factor for d in metric.differences]
    ends = [metric.estimate.low * factor, metric.estimate.high * factor] if metric.estimate else []
    rows, left, width = len(shown), 66, 480
    row_height: float = 24 if rows <= 8 else max(10, 192 / rows)
    top, first = 10, 66
    bottom = first + rows * row_height
    pad = margin * factor
    axis = axis_over([*shown, *ends, pad, -pad], left, width - 58, include=0.0)
    unit = f" ({metric.unit.difference_unit})" if metric.unit.difference_unit else ""
    described = ", ".join(f"seed {s}: {signed(d, digits)}" for s, d in zip(metric.seeds, shown, strict=True))
    drawing = Drawing(
        width, bottom + 44, f"Paired differences in {metric.unit.label}{unit}", f"Method minus baseline. {described}."
    )
    if pad:
        drawing.rect(axis(-pad), top, axis(pad) - axis(-pad), bottom - top, "margin")
    _grid_x(drawing, axis, top, bottom, zero=True)
    if metric.estimate:
        y, mean = 34.0, metric.estimate.mean * factor
        drawing.line(axis(ends[0]), y, axis(ends[1]), y, "interval")
        for end in ends:
            drawing.line(axis(end), y - 7, axis(end), y + 7, "whisker")
        drawing.circle(axis(mean), y, 6.5, "mean", f"mean {signed(mean, digits)}")
        drawing.text(0, y + 4.5, "mean", "strong")
        drawing.text(width, y + 4.5, signed(mean, digits), "strong num", "end")
    for index, (seed, value) in enumerate(zip(metric.seeds, shown, strict=True)):
        y = first + (index + 0.5) * row_height
        drawing.line(axis(0), y, axis(value), y, "stem")
        drawing.circle(axis(value), y, 4, "dot", f"seed {seed}: {signed(value, digits)}")
        if row_height >= 14:
            drawing.text(0, y + 4, f"seed {seed}", "label")
            drawing.text(width, y + 4, signed(value, digits), "label num", "end")
    worse, better = ("← worse", "better →") if metric.unit.higher_is_better else ("← better", "worse →")
    drawing.text(left, bottom + 38, worse, "tick")
    drawing.text(width - 58, bottom + 38, better, "tick", "end")
    drawing.text((left + width - 58) / 2, bottom + 38, f"difference{unit}", "tick", "middle")
    return str(drawing)


def strip(metric: MetricSummary, beside: Sequence[MetricSummary] = ()) -> str:
    """A small interval against zero, for a row of a table; on one scale with those of the rows ``beside`` it."""
    if metric.estimate is None:
        return ""
    low, high = metric.estimate.low, metric.estimate.high
    ends = [v for m in (metric, *beside) if m.estimate for v in (m.estimate.low, m.estimate.high, *m.differences)]
    axis = axis_over(ends, 4, 116, include=0.0, pad=0.08)
    drawing = Drawing(120, 20, f"Interval of {metric.unit.label}", "the interval against zero", "strip")
    drawing.line(axis(0), 1, axis(0), 19, "zero")
    drawing.line(axis(low), 10, axis(high), 10, "interval thin")
    for value in metric.differences:
        drawing.circle(axis(value), 10, 2, "dot faint")
    drawing.circle(axis(metric.estimate.mean), 10, 3.6, "mean")
    return str(drawing)


def ratio_strip(value: float | None) -> str:
    """Where a cost ratio lies between a half and two, on a logarithmic axis; beyond them, at the edge."""
    if value is None or value <= 0:
        return ""
    axis = Axis(-1, 1, 6, 114)
    at = axis(min(max(math.log2(value), -1), 1))
    drawing = Drawing(120, 20, "Ratio", f"{ratio(value)} on a logarithmic axis from a half to two", "strip")
    for edge in (-1, 1):
        drawing.line(axis(edge), 6, axis(edge), 14, "grid")
    drawing.line(axis(0), 1, axis(0), 19, "zero")
    drawing.line(axis(0), 10, at, 10, "stem thick")
    drawing.circle(at, 10, 4, "dot")
    return str(drawing)


def curves_figure(
    title: str,
    arms: Mapping[str, Sequence[Curve]],
    *,
    unit: str = "",
    factor: float = 1.0,
    x_label: str = "step",
    at: Mapping[float, str] | None = None,
    logarithmic_x: bool = False,
    smooth: int = 1,
) -> str:
    """Each arm's runs as thin lines, their mean as a thick one, and the band from the least to the greatest.

    Args:
        arms: arm -> one curve for each seed, as (x, y) pairs.
        at: x -> its tick's text; the points are then marked.
        smooth: points averaged into one, for noisy curves.
    """
    prepared = {arm: [_smoothed(curve, smooth) for curve in curves if curve] for arm, curves in arms.items()}
    every = [point for curves in prepared.values() for curve in curves for point in curve]
    if len({x for x, _ in every}) < 2:
        return ""
    warp = math.log2 if logarithmic_x else float
    width, height, left, right, top, bottom = 480, 300, 50, 10, 30, 262
    x_axis = Axis(warp(min(x for x, _ in every)), warp(max(x for x, _ in every)), left, width - right)
    y_axis = axis_over([y * factor for _, y in every], bottom, top)
    finals = "; ".join(f"{arm} ends at {_last_mean(curves) * factor:.4g}" for arm, curves in prepared.items() if curves)
    drawing = Drawing(width, height, title, f"{title} against {x_label}, one line for each seed. {finals}.")
    drawing.text(0, 14, title + (f" ({unit})" if unit else ""), "strong")
    ticks = y_axis.ticks()
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    for tick in ticks:
        drawing.line(left, y_axis(tick), width - right, y_axis(tick), "grid")
        drawing.text(left - 8, y_axis(tick) + 4, tick_text(tick, step), "tick num", "end")
    for tick, text in (at or {t: f"{t:,.0f}" for t in x_axis.ticks() if t == round(t)}).items():
        drawing.text(x_axis(warp(tick)), bottom + 17, text, "tick", "middle")
    drawing.text(width - right, bottom + 34, x_label, "tick", "end")
    for arm, curves in prepared.items():
        shared = [(x_axis(warp(x)), [y_axis(y * factor) for y in ys]) for x, ys in _columns(curves)]
        if len(shared) > 1:
            band = [(x, min(ys)) for x, ys in shared] + [(x, max(ys)) for x, ys in reversed(shared)]
            drawing.path(band, f"band {arm}", closed=True)
        for curve in curves:
            drawing.path([(x_axis(warp(x)), y_axis(y * factor)) for x, y in curve], f"run {arm}")
        if len(shared) > 1:
            drawing.path([(x, sum(ys) / len(ys)) for x, ys in shared], f"average {arm}")
        if at:
            for x, ys in shared:
                drawing.circle(x, round(sum(ys) / len(ys), 2), 3.5, f"point {arm}")
    return str(drawing)


def _smoothed(curve: Curve, size: int) -> list[tuple[float, float]]:
    points = [(float(x), float(y)) for x, y in curve if math.isfinite(y)]
    if size <= 1 or len(points) < 3 * size:
        return points
    ys = np.convolve([y for _, y in points], np.ones(size) / size, "valid")
    return [(points[i + size - 1][0], float(y)) for i, y in enumerate(ys)][:: max(1, size // 3)]


def _columns(curves: Sequence[Curve]) -> Iterator[tuple[float, list[float]]]:
    """The x values that all curves share, with all their y values."""
    maps = [dict(curve) for curve in curves]
    if maps:
        for x in sorted(set.intersection(*(set(m) for m in maps))):
            yield x, [m[x] for m in maps]


def _last_mean(curves: Sequence[Curve]) -> float:
    return sum(curve[-1][1] for curve in curves) / len(curves)


def interval_figure(title: str, rows: Sequence[tuple[str, float, float, float]], *, unit: str = "") -> str:
    """One interval for each row (label, mean, low, high) against zero."""
    left, width, row_height, top = 66, 480, 30, 26
    bottom = top + len(rows) * row_height
    axis = axis_over([v for row in rows for v in row[1:]], left, width - 58, include=0.0)
    told = "; ".join(f"{r[0]}: {signed(r[1], 2)}, from {signed(r[2], 2)} to {signed(r[3], 2)}" for r in rows)
    drawing = Drawing(width, bottom + 24, title, told)
    drawing.text(0, 14, title + (f" ({unit})" if unit else ""), "strong")
    _grid_x(drawing, axis, top, bottom, zero=True)
    digits = 1 if max(abs(v) for row in rows for v in row[1:]) >= 1 else 2
    for index, (label, mean, low, high) in enumerate(rows):
        y = top + (index + 0.5) * row_height
        drawing.line(axis(low), y, axis(high), y, "interval")
        drawing.circle(axis(mean), y, 5, "mean")
        drawing.text(0, y + 4, label, "label")
        drawing.text(width, y + 4, signed(mean, digits), "label num", "end")
    return str(drawing)


def share_bar(parts: Sequence[tuple[str, str, int]]) -> str:
    """Counts (label, class, count) as one bar."""
    total = sum(number for _, _, number in parts) or 1
    told = ", ".join(f"{label}: {number}" for label, _, number in parts)
    drawing = Drawing(480, 14, "Shares", told, "bar")
    x = 0.0
    for _, css, number in parts:
        width = 480 * number / total
        drawing.rect(round(x, 2), 0, width - (1.5 if width > 3 else 0), 14, css)
        x += width
    return str(drawing)
