"""The report of a comparison: one HTML file that loads nothing, made from the raw records alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from torchive.report import figures
from torchive.report.summary import ARMS, CostRow, MetricSummary, Record, Summary, summarise
from torchive.report.units import capitalised, duration, ratio, unit_of

RECORDS = "comparison.json"
REPORT = "report.html"
_TEMPLATES = Path(__file__).with_name("templates")
_TIES = (
    ("method", "Where {title} is furthest ahead"),
    ("baseline", "Where the baseline is furthest ahead"),
    ("both", "Where they are alike"),
)
_GROUPS = (
    ("method", "Only {title} is right", "s-method"),
    ("baseline", "Only the baseline is right", "s-baseline"),
    ("neither", "Both are wrong", "s-neither"),
    ("both", "Both are right", "s-both"),
)
_FALSE = {
    "false/class": "False: an object of another class",
    "false/place": "False: the object is elsewhere",
    "false/duplicate": "False: the object was found before",
    "false/background": "False: nothing is there",
}
_MISSED = {
    "missed/small": "Missed of the small (to 32 × 32 pixels)",
    "missed/medium": "Missed of the medium (to 96 × 96)",
    "missed/large": "Missed of the large",
}


def render_report(folder: Path) -> Path:
    """Write ``report.html`` of a comparison, a dial or two methods together from the folder's records; returns it.

    Raises:
        ValueError: no records are there, or they are not JSON, of another schema, or without a finished pair.
    """
    from torchive.report.dial import DIAL, render_dial
    from torchive.report.together import TOGETHER, render_together

    folder = Path(folder)
    if (folder / DIAL).exists():
        return write_text(folder / REPORT, render_dial(folder))
    if (folder / TOGETHER).exists():
        return write_text(folder / REPORT, render_together(folder))
    return write_text(folder / REPORT, comparison_html(read_records(folder / RECORDS)))


def read_records(path: Path) -> dict[str, Any]:
    """A JSON file of records; ValueError where it is missing or broken."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"{path.parent}: no {path.name}; is it the folder of a comparison?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None


def write_text(path: Path, text: str) -> Path:
    """Write a text file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def comparison_html(record: Record) -> str:
    """The page of one comparison; raises as ``summarise`` does."""
    summary = summarise(record)
    metric, costs = summary.deciding, record.get("costs") or {}
    return (
        environment()
        .get_template("comparison.html")
        .render(
            **page_values(record, summary),
            verdict=summary.verdict,
            sentence=summary.sentence,
            numbers=_numbers(summary),
            paired_figure=Markup(figures.paired_figure(metric, record["plan"]["rule"]["margin"])),
            seed_rows=_seed_rows(metric),
            means=number_rows(metric),
            metric_rows=_metric_rows(summary),
            error_rows=_error_rows(summary),
            curves=[Markup(figure) for figure in _curves(record, metric)],
            costs=[_cost_row(row) for row in summary.costs],
            cost_note=costs.get("note", ""),
            cost_how=costs.get("how", {}),
            examples=_examples(record),
            data={**record["data"], "caption": picture_caption(record["data"])},
            facts=facts(record),
            recipes=_recipes(record["plan"]),
        )
    )


def page_values(record: Record, summary: Summary | None = None) -> dict[str, Any]:
    """What every page needs."""
    from torchive import __version__

    plan = record["plan"]
    return {
        "version": __version__,
        "style": Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8")),
        "plan": plan,
        "baseline_label": plan["baseline_title"],
        "date": record.get("finished") or record.get("started", ""),
        "level": f"{100 * plan['rule']['level']:g} %",
        "metric": (summary or summarise(record)).deciding,
    }


def environment() -> jinja2.Environment:
    """The templates; everything that is not marked as safe is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["capitalised"] = capitalised
    return environment


def _numbers(summary: Summary) -> list[dict[str, str]]:
    metric = summary.deciding
    unit, digits = metric.unit, metric.digits
    show = [unit.value(sum(v) / len(v), digits) for v in (metric.baseline, metric.method)]
    first = {"label": f"Change in {unit.label}", "value": unit.difference(_mean(metric.differences), digits, unit=True)}
    first["note"] = "no interval yet"
    if metric.estimate:
        low, high = (unit.difference(v, digits) for v in (metric.estimate.low, metric.estimate.high))
        first["note"] = f"{100 * metric.estimate.level:g} % interval {low} to {high}"
    numbers = [
        first,
        {"label": capitalised(unit.label), "value": show[1], "note": f"baseline {show[0]}"},
    ]
    by_key = {row.key: row for row in summary.costs}
    for key, label in (("latency_1_ms", "Latency, batch 1"), ("parameters", "Parameters")):
        row = by_key.get(key)
        if row is not None and row.ratio is not None:
            numbers.append(
                {"label": label, "value": ratio(row.ratio), "note": f"{row.method}, baseline {row.baseline}"}
            )
    return numbers


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _seed_rows(metric: MetricSummary) -> list[dict[str, Any]]:
    unit, digits = metric.unit, metric.digits
    return [
        {
            "seed": seed,
            "baseline": unit.value(base, digits),
            "method": unit.value(method, digits),
            "difference": unit.difference(method - base, digits),
        }
        for seed, base, method in zip(metric.seeds, metric.baseline, metric.method, strict=True)
    ]


def number_rows(metric: MetricSummary, beside: Sequence[MetricSummary] = ()) -> dict[str, Any]:
    """One metric as the cells of a row; those ``beside`` it in one unit share the scale of its strip."""
    unit, digits, found = metric.unit, metric.digits, metric.estimate
    interval = f"{unit.difference(found.low, digits)} to {unit.difference(found.high, digits)}" if found else "–"
    word = metric.verdict or "one pair"
    if not metric.decides and word == "cannot tell":
        word = "unclear"
    return {
        "label": capitalised(unit.label),
        "baseline": unit.value(_mean(metric.baseline), digits),
        "method": unit.value(_mean(metric.method), digits),
        "difference": unit.difference(_mean(metric.differences), digits),
        "interval": interval,
        "strip": Markup(figures.strip(metric, beside)),
        "verdict": word,
        "css": word,
        "decides": metric.decides,
    }


def _metric_rows(summary: Summary) -> list[dict[str, Any]]:
    """The rows of all metrics but those on what goes wrong; those in points share a scale."""
    rows = [metric for metric in summary.metrics if metric.unit.name not in _FALSE | _MISSED]
    points = [metric for metric in rows if metric.unit.difference_unit]
    return [number_rows(metric, points if metric in points else ()) for metric in rows]


def _error_rows(summary: Summary) -> list[dict[str, Any]]:
    """The rows on what a detector gets wrong, under labels that can be read alone."""
    by_name = {metric.unit.name: metric for metric in summary.metrics}
    labels = _FALSE | _MISSED
    rows = [by_name[name] for name in labels if name in by_name]
    return [{**number_rows(metric, rows), "label": labels[metric.unit.name]} for metric in rows]


def _cost_row(row: CostRow) -> dict[str, Any]:
    return {
        "label": row.label,
        "baseline": row.baseline,
        "method": row.method,
        "ratio": "–" if row.ratio is None else ratio(row.ratio),
        "notes": row.notes,
        "strip": Markup(figures.ratio_strip(row.ratio)),
    }


def _curves(record: Record, metric: MetricSummary) -> list[str]:
    names = [f"val/{metric.unit.name}", "loss"]
    found = []
    for name in names:
        arms = {arm: [r["curves"].get(name, []) for r in record["runs"] if r["arm"] == arm] for arm in ARMS}
        unit = unit_of(name.rpartition("/")[2])
        longest = max((len(curve) for curves in arms.values() for curve in curves), default=0)
        title = "Training loss" if name == "loss" else f"Validation {unit.label}"
        shown = "%" if unit.factor == 100 else ""
        found.append(figures.curves_figure(title, arms, unit=shown, factor=unit.factor, smooth=max(1, longest // 40)))
    return [figure for figure in found if figure]


def _examples(record: Record) -> dict[str, Any] | None:
    raw = record.get("examples")
    if not raw or not raw["items"]:
        return None
    title = record["plan"]["title"]
    counts: Mapping[str, int] = raw.get("counts") or {}
    total = sum(counts.values())
    parts = [
        (label.format(title=title), css, counts.get(key, 0), f"{counts.get(key, 0) / total:.0%}")
        for key, label, css in _GROUPS
        if total
    ]
    labels = [(key, label) for key, label, _ in _GROUPS] if raw["task"] == "classification" else _TIES
    groups = [
        {"label": label.format(title=title), "items": items}
        for key, label in labels
        if (items := [i for i in raw["items"] if i["group"] == key])
    ]
    bar = figures.share_bar([part[:3] for part in parts]) if parts else ""
    shares = [dict(zip(("label", "css", "count", "share"), part, strict=True)) for part in parts]
    return {**raw, "parts": shares, "groups": groups, "bar": Markup(bar)}


def picture_caption(data: Mapping[str, Any]) -> str:
    """Where the pictures come from, and what their licence forbids."""
    text = f"Pictures: {data['origin']}; licence {data['licence'] or 'not known'}."
    if data.get("commercial") is False:
        return f"{text} Non-commercial: this page may not be used commercially while it holds them."
    if not data["licence"]:
        return f"{text} Check that you may pass them on before you pass this page on."
    return text


def facts(record: Record) -> list[dict[str, Any]]:
    """What was done, as labelled lines."""
    plan, data, machine = record["plan"], record["data"], record.get("environment", {})
    seconds = sum(run["seconds"] for run in record["runs"])
    sizes = ", ".join(f"{size:,} {split}" for split, size in data["sizes"].items())
    lines_of = [
        ("Rule", [plan["rule"]["text"], "Written down before the first run."]),
        ("Budget", [f"{plan['budget']} for each run; {len(record['runs'])} runs took {duration(seconds)} together"]),
        ("Seeds", [", ".join(map(str, plan["seeds"]))]),
        ("Equal start", _pairing(record)),
        ("Data", [f"{data['name']} ({data['task']}, {len(data['classes'])} classes): {sizes} samples", data["origin"]]),
        ("Licence of the data", [data["licence"] or "not known"]),
        ("Left out", _left_out(data)),
        ("Environment", [f"{key}: {value}" for key, value in machine.items() if value not in (None, "", [])]),
    ]
    if plan.get("citation"):
        lines_of.insert(
            0, ("Method", [plan["citation"], *([f"The paper's claim: {plan['claim']}"] if plan.get("claim") else [])])
        )
    return [{"label": label, "lines": lines} for label, lines in lines_of if lines]


def _pairing(record: Record) -> list[str]:
    pairs = record.get("pairs", [])
    if not pairs:
        return []
    shared, new = pairs[0]["shared"], pairs[0]["new"]
    lines = [
        f"{shared['tensors']} tensors with {shared['values']:,} values are in both arms; they were checked by hash to "
        f"start equal in each of {len(pairs)} pairs"
    ]
    lines += [
        f"only in the {arm}: {new[arm]['tensors']} tensors with {new[arm]['values']:,} values, drawn by the arm "
        "from the seed of its pair"
        for arm in ARMS
        if new[arm]["tensors"]
    ]
    return lines


def _left_out(data: Mapping[str, Any]) -> list[str]:
    faults = data.get("left_out", [])
    if not faults:
        return ["nothing: every sample that was read took part"]
    shown = [f"{fault['id']}: {fault['reason']}" for fault in faults[:20]]
    more = [f"and {len(faults) - 20} more; all stand in {RECORDS}"] if len(faults) > 20 else []
    return [f"{len(faults)} faulty samples, as asked for", *shown, *more]


def _recipes(plan: Mapping[str, Any]) -> str:
    parts = [f"# {arm}\n{yaml.safe_dump(plan['arms'][arm]['recipe'], sort_keys=False)}" for arm in ARMS]
    return "\n".join(parts)
