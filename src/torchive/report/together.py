"""The report of two methods apart and together: three differences from one baseline, and whether the gains add."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from torchive.report import figures
from torchive.report.html import RECORDS, REPORT, environment, facts, number_rows, page_values, read_records
from torchive.report.statistics import Estimate, estimate
from torchive.report.summary import Record, Summary, rule_of, summarise

TOGETHER = "together.json"
SIDES = ("first", "second", "both")


@dataclass(frozen=True)
class TogetherSummary:
    """What three comparisons say.

    Attributes:
        records, summaries: by "first", "second" and "both".
        interaction: per seed, the difference of both minus the sum of the differences apart; above zero the metric
            rises by more than the sum. None below two common seeds.
        verdict: "more than the sum", "less than the sum" or "cannot tell".
        sentence: the answer.
    """

    records: dict[str, Record]
    summaries: dict[str, Summary]
    interaction: Estimate | None
    verdict: str
    sentence: str


def summarise_together(folder: Path) -> TogetherSummary:
    """Read the three comparisons.

    Raises:
        ValueError: one of them has no records, or no finished pair.
    """
    records: dict[str, Record] = {side: read_records(Path(folder) / side / RECORDS) for side in SIDES}
    summaries = {side: summarise(record) for side, record in records.items()}
    deciding = {side: summary.deciding for side, summary in summaries.items()}
    by_seed = {side: dict(zip(m.seeds, m.differences, strict=True)) for side, m in deciding.items()}
    seeds = [seed for seed in by_seed["both"] if all(seed in values for values in by_seed.values())]
    apart = [by_seed["first"][seed] + by_seed["second"][seed] for seed in seeds]
    values = [by_seed["both"][seed] - total for seed, total in zip(seeds, apart, strict=True)]
    scale = max((abs(v) for m in deciding.values() for v in (*m.baseline, *m.method)), default=0.0)
    rule = rule_of(records["both"])
    found = estimate(values, level=rule.level, scale=scale) if len(values) > 1 else None
    verdict = _verdict(found, higher=rule.higher_is_better)
    return TogetherSummary(records, summaries, found, verdict, _sentence(records, summaries, found, verdict))


def _verdict(found: Estimate | None, *, higher: bool) -> str:
    if found is None or found.low <= 0 <= found.high:
        return "cannot tell"
    return "more than the sum" if (found.low > 0) == higher else "less than the sum"


def _sentence(records: dict[str, Record], summaries: dict[str, Summary], found: Estimate | None, verdict: str) -> str:
    metric = summaries["both"].deciding
    unit, digits = metric.unit, metric.digits

    def shown(value: Estimate | None) -> str:
        if value is None:
            return "by an amount that one pair cannot tell"
        low, high = unit.difference(value.low, digits), unit.difference(value.high, digits)
        return f"{unit.difference(value.mean, digits, unit=True)} [{low}, {high}]"

    changes = ", ".join(f"{records[s]['plan']['title']} by {shown(summaries[s].deciding.estimate)}" for s in SIDES)
    where = f"On the {records['both']['data']['name']} data, {unit.label} changed with {changes}"
    words = {
        "more than the sum": "together they give more than the sum",
        "less than the sum": "together they give less than the sum",
    }.get(verdict, "the gains add up as far as we can tell")
    return f"{where}. Both minus the sum of each: {shown(found)} over {len(metric.seeds)} paired seeds: {words}."


def render_together(folder: Path) -> str:
    """The page as HTML."""
    found = summarise_together(folder)
    record = found.records["both"]
    return (
        environment()
        .get_template("together.html")
        .render(
            **page_values(record),
            together=found,
            titles=[found.records[side]["plan"]["title"] for side in SIDES[:2]],
            css={"more than the sum": "better", "less than the sum": "worse"}.get(found.verdict, "cannot-tell"),
            figure=Markup(_figure(found)),
            rows=[_row(found, side) for side in SIDES],
            interaction=interaction_cells(found),
            facts=facts(record),
        )
    )


def _figure(found: TogetherSummary) -> str:
    unit = found.summaries["both"].deciding.unit
    rows = [*((side, found.summaries[side].deciding.estimate) for side in SIDES), ("both − sum", found.interaction)]
    scale = unit.factor
    drawn = [(label, e.mean * scale, e.low * scale, e.high * scale) for label, e in rows if e is not None]
    title = f"Difference in {unit.label}"
    return figures.interval_figure(title, drawn, unit=unit.difference_unit) if drawn else ""


def _row(found: TogetherSummary, side: str) -> dict[str, Any]:
    title = found.records[side]["plan"]["title"]
    return {
        **number_rows(found.summaries[side].deciding),
        "title": title,
        "side": side,
        "link": f"{quote(side)}/{REPORT}",
    }


def interaction_cells(found: TogetherSummary) -> tuple[str, str, str]:
    """Difference, interval and verdict of both minus the sum."""
    metric = found.summaries["both"].deciding
    unit, digits, value = metric.unit, metric.digits, found.interaction
    if value is None:
        return "–", "–", "one pair"
    interval = f"{unit.difference(value.low, digits)} to {unit.difference(value.high, digits)}"
    return unit.difference(value.mean, digits), interval, found.verdict
