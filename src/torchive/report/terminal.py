"""The answer as text for a terminal: one table of metrics, one of costs, one sentence, one path."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from torchive.report.summary import MetricSummary, Record, Summary, summarise
from torchive.report.units import ratio

_COLOURS = {"better": "green", "worse": "red", "identical": "dim", "cannot tell": "yellow", "unclear": "dim"}


def comparison_text(record: Record, report: Path) -> str:
    """Tables, sentence and path of a comparison."""
    summary = summarise(record)
    parts: list[object] = ["", _metrics(summary)]
    if summary.costs:
        parts.append(_costs(summary))
    colour = _COLOURS.get(summary.verdict, "yellow")
    return _text(
        [*parts, f"[bold {colour}]{summary.verdict}[/]  {_plain(summary.sentence)}", f"report: {_plain(str(report))}"]
    )


def dial_text(folder: Path, report: Path) -> str:
    """One row for each value of a dial."""
    from torchive.report.dial import summarise_dial

    dial = summarise_dial(folder)
    table = _table(dial.label, "baseline", "method", "difference", "interval", "verdict")
    for point in dial.points:
        table.add_row(str(point.value), *_cells(point.summary.deciding, decides=True))
    return _text(["", table, _plain(dial.sentence), f"report: {_plain(str(report))}"])


def together_text(folder: Path, report: Path) -> str:
    """A row for each method, for both, and for both minus the sum."""
    from torchive.report.together import interaction_cells, summarise_together

    found = summarise_together(folder)
    table = _table("", "baseline", "method", "difference", "interval", "verdict")
    for side, summary in found.summaries.items():
        table.add_row(found.records[side]["plan"]["title"], *_cells(summary.deciding, decides=True))
    change, interval, verdict = interaction_cells(found)
    table.add_row("both minus the sum", "", "", change, interval, verdict)
    return _text(["", table, _plain(found.sentence), f"report: {_plain(str(report))}"])


def _metrics(summary: Summary) -> Table:
    table = _table("metric", "baseline", "method", "difference", "interval", "verdict")
    for metric in summary.metrics:
        if "/" not in metric.unit.name:
            style = "bold" if metric.decides else "dim"
            table.add_row(metric.unit.label, *_cells(metric, decides=metric.decides), style=style)
    return table


def _cells(metric: MetricSummary, *, decides: bool) -> list[str]:
    unit, digits, found = metric.unit, metric.digits, metric.estimate
    means = [unit.value(sum(v) / len(v), digits) for v in (metric.baseline, metric.method)]
    change = unit.difference(sum(metric.differences) / len(metric.differences), digits)
    interval = f"{unit.difference(found.low, digits)} to {unit.difference(found.high, digits)}" if found else "–"
    word = metric.verdict or "one pair"
    word = "unclear" if word == "cannot tell" and not decides else word
    return [*means, change, interval, f"[{_COLOURS.get(word, 'dim')}]{word}[/]"]


def _costs(summary: Summary) -> Table:
    table = _table("cost", "baseline", "method", "ratio")
    for row in summary.costs:
        table.add_row(row.label, row.baseline, row.method, "–" if row.ratio is None else ratio(row.ratio))
        if row.notes[0]:
            table.add_row("", *row.notes, style="dim")
    return table


def _table(first: str, *heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True)
    for head in heads:
        table.add_column(head, justify="left" if head == "verdict" else "right", no_wrap=True)
    return table


def _plain(text: str) -> str:
    return text.replace("[", "\\[")


def _text(parts: list[object]) -> str:
    """Rendered with colours on a terminal and without them elsewhere."""
    on_terminal = sys.stdout.isatty()
    target = io.StringIO()
    console = Console(file=target, force_terminal=on_terminal, width=None if on_terminal else 110, highlight=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
    return target.getvalue().rstrip("\n")
