"""The report of a dial: a setting swept over values, a paired comparison at each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from torchive.report import figures
from torchive.report.html import RECORDS, REPORT, environment, facts, number_rows, page_values, read_records
from torchive.report.summary import ARMS, MetricSummary, Record, Summary, summarise

DIAL = "dial.json"


@dataclass(frozen=True)
class DialPoint:
    """One value of the setting: its folder, records and what they say."""

    value: Any
    folder: str
    record: Record
    summary: Summary


@dataclass(frozen=True)
class DialSummary:
    """A swept setting. ``sentence`` names the values at which the method is better, worse, or neither can be told."""

    setting: str
    sentence: str
    points: tuple[DialPoint, ...]

    @property
    def label(self) -> str:
        """The setting's own name, without the path to it."""
        return _label(self.setting)


def _label(setting: str) -> str:
    return setting.rpartition(".")[2]


def summarise_dial(folder: Path) -> DialSummary:
    """Read a dial's folder; values without a finished pair are left out.

    Raises:
        ValueError: no records, or none with a finished pair.
    """
    dial = read_records(Path(folder) / DIAL)
    points = []
    for value, name in zip(dial["values"], dial["folders"], strict=True):
        path = Path(folder) / name / RECORDS
        if path.exists():
            record = read_records(path)
            if record["runs"]:
                points.append(DialPoint(value, name, record, summarise(record)))
    if not points:
        raise ValueError(f"{folder}: no value of {dial['setting']} has a finished pair")
    return DialSummary(dial["setting"], _sentence(dial["setting"], points), tuple(points))


def _sentence(setting: str, points: Sequence[DialPoint]) -> str:
    plan, metric = points[0].record["plan"], points[0].summary.deciding
    said: dict[str, list[str]] = {}
    for point in points:
        said.setdefault(point.summary.verdict, []).append(str(point.value))
    words = {
        "cannot tell": "we cannot tell",
        "better": f"{plan['title']} is better",
        "worse": f"{plan['title']} is worse",
    }
    parts = [f"{words.get(verdict, 'the arms are identical')} at {_listed(values)}" for verdict, values in said.items()]
    name = points[0].record["data"]["name"]
    return f"On the {name} data, by {metric.unit.label}, as {_label(setting)} changes: {'; '.join(parts)}."


def _listed(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"


def render_dial(folder: Path) -> str:
    """The page of a dial as HTML."""
    summary = summarise_dial(folder)
    record = summary.points[0].record
    verdicts = {point.summary.verdict for point in summary.points}
    return (
        environment()
        .get_template("dial.html")
        .render(
            **page_values(record),
            dial=summary,
            verdict=verdicts.pop() if len(verdicts) == 1 else "it depends",
            levels=Markup(_level_figure(summary)),
            differences=Markup(_difference_figure(summary)),
            rows=[_row(folder, point, [p.summary.deciding for p in summary.points]) for point in summary.points],
            facts=facts(record),
        )
    )


def _numbers(points: Sequence[DialPoint]) -> list[float] | None:
    try:
        return [float(point.value) for point in points]
    except (TypeError, ValueError):
        return None


def _level_figure(dial: DialSummary) -> str:
    """The metric against the setting, an arm a line, with the band over the seeds."""
    points, numbers = dial.points, _numbers(dial.points)
    metric = points[0].summary.deciding
    xs = numbers or [float(i) for i in range(len(points))]
    arms: dict[str, list[list[tuple[float, float]]]] = {}
    for arm in ARMS:
        seeds = metric.seeds
        columns = [dict(zip(p.summary.deciding.seeds, getattr(p.summary.deciding, arm), strict=True)) for p in points]
        arms[arm] = [[(x, c[seed]) for x, c in zip(xs, columns, strict=True) if seed in c] for seed in seeds]
    logarithmic = numbers is not None and min(numbers) > 0 and max(numbers) >= 4 * min(numbers)
    unit = metric.unit
    return figures.curves_figure(
        f"Test {unit.label}",
        arms,
        unit="%" if unit.factor == 100 else "",
        factor=unit.factor,
        x_label=dial.label,
        at=dict(zip(xs, (str(p.value) for p in points), strict=True)),
        logarithmic_x=logarithmic,
    )


def _difference_figure(dial: DialSummary) -> str:
    unit = dial.points[0].summary.deciding.unit
    rows: list[tuple[str, float, float, float]] = []
    for point in dial.points:
        found = point.summary.deciding.estimate
        if found:
            mean, low, high = (v * unit.factor for v in (found.mean, found.low, found.high))
            rows.append((str(point.value), mean, low, high))
    title = f"Difference in {unit.label}"
    return figures.interval_figure(title, rows, unit=unit.difference_unit) if rows else ""


def _row(folder: Path, point: DialPoint, beside: Sequence[MetricSummary]) -> Mapping[str, Any]:
    link = f"{quote(point.folder, safe='=')}/{REPORT}" if (Path(folder) / point.folder / REPORT).exists() else ""
    return {**number_rows(point.summary.deciding, beside), "value": point.value, "link": link}
