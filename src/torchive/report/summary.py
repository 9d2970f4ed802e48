"""From the raw records of a comparison to what is said about it: one place for the table, the report and the evidence.

The record is the content of ``comparison.json``; ``docs/comparison.md`` lists its fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchive.report.statistics import Estimate, Rule, paired_estimate
from torchive.report.units import Unit, megabytes, milliseconds, quantity, unit_of
from torchive.report.units import ratio as written

#: Version of ``comparison.json``.
SCHEMA = 1
ARMS = ("baseline", "method")
Record = Mapping[str, Any]


@dataclass(frozen=True)
class MetricSummary:
    """One metric over all finished pairs, in seed order.

    Attributes:
        unit: how it is shown.
        seeds, baseline, method: per pair.
        estimate: None below two pairs.
        verdict: by the rule; None below two pairs.
        decides: whether this is the metric named before the run.
    """

    unit: Unit
    seeds: tuple[int, ...]
    baseline: tuple[float, ...]
    method: tuple[float, ...]
    estimate: Estimate | None
    verdict: str | None
    decides: bool

    @property
    def differences(self) -> tuple[float, ...]:
        """Method minus baseline, per pair."""
        return tuple(m - b for b, m in zip(self.baseline, self.method, strict=True))

    @property
    def digits(self) -> int:
        """Decimals for its differences."""
        if self.estimate is None:
            return self.unit.digits(max(map(abs, self.differences), default=0.0))
        return self.unit.digits(max(self.estimate.half_width, abs(self.estimate.mean) / 10))


@dataclass(frozen=True)
class CostRow:
    """One line of the cost table; ``ratio`` is method over baseline, None where the baseline's is zero.

    ``notes`` are the 95th percentiles of both arms and their ratio, where the row is a time.
    """

    key: str
    label: str
    baseline: str
    method: str
    ratio: float | None
    notes: tuple[str, str, str] = ("", "", "")


@dataclass(frozen=True)
class Summary:
    """What a comparison says."""

    verdict: str
    sentence: str
    metrics: tuple[MetricSummary, ...]
    costs: tuple[CostRow, ...]

    @property
    def deciding(self) -> MetricSummary:
        """The metric named before the run."""
        return next(m for m in self.metrics if m.decides)


def rule_of(record: Record) -> Rule:
    """The rule as it was written before the run."""
    values = record["plan"]["rule"]
    return Rule(**{key: values[key] for key in ("metric", "higher_is_better", "margin", "level", "pairs")})


def summarise(record: Record) -> Summary:
    """Every metric's paired estimate, the answer in one sentence, and the costs.

    Raises:
        ValueError: the record has another schema, or no pair is finished.
    """
    if record.get("schema") != SCHEMA:
        raise ValueError(f"the record has schema {record.get('schema')!r}; this version reads {SCHEMA}")
    rule = rule_of(record)
    tests: dict[int, dict[str, Mapping[str, float]]] = {}
    for run in record["runs"]:
        tests.setdefault(run["seed"], {})[run["arm"]] = run["test"]
    pairs = {seed: tests[seed] for seed in record["plan"]["seeds"] if len(tests.get(seed, {})) == 2}
    if not pairs:
        raise ValueError("no pair of runs is finished")
    names = [
        n for n in next(iter(pairs.values()))["baseline"] if all(n in arm for p in pairs.values() for arm in p.values())
    ]
    if rule.metric not in names:
        raise ValueError(f"the runs hold no {rule.metric!r}; they hold {', '.join(names)}")
    names.sort(key=lambda name: name != rule.metric)  # the deciding one first
    metrics = tuple(_metric(name, pairs, rule) for name in names)
    deciding = metrics[0]
    verdict = deciding.verdict or "cannot tell"
    return Summary(verdict, _sentence(record, deciding, rule, verdict), metrics, cost_rows(record.get("costs")))


def _metric(name: str, pairs: Mapping[int, Mapping[str, Mapping[str, float]]], rule: Rule) -> MetricSummary:
    decides = name == rule.metric
    values = {arm: tuple(float(pair[arm][name]) for pair in pairs.values()) for arm in ARMS}
    unit = unit_of(name)
    found = paired_estimate(values["baseline"], values["method"], level=rule.level) if len(pairs) > 1 else None
    own = rule if decides else Rule(name, unit.higher_is_better, 0.0, rule.level, rule.pairs)
    verdict = own.decide(found) if found else None
    return MetricSummary(unit, tuple(pairs), values["baseline"], values["method"], found, verdict, decides)


def _sentence(record: Record, metric: MetricSummary, rule: Rule, verdict: str) -> str:
    plan, pairs = record["plan"], len(metric.seeds)
    where = f"On the {record['data']['name']} data"
    what = f"{plan['title']} changed {metric.unit.label}"
    planned = "" if pairs == rule.pairs else f" of {rule.pairs} planned"
    if metric.estimate is None:
        change = metric.unit.difference(metric.differences[0], metric.digits, unit=True)
        return f"{where}, {what} by {change} in one pair{planned}; an interval needs more."
    if verdict == "identical":
        idle = "; both stayed at zero, as with a budget too short to learn" if not any(metric.baseline) else ""
        return f"{where}, {what} by exactly zero in each of {pairs} paired seeds{planned}: identical{idle}."
    digits, value = metric.digits, metric.estimate
    show = metric.unit.difference
    sentence = (
        f"{where}, {what} by {show(value.mean, digits, unit=True)} "
        f"[{show(value.low, digits)}, {show(value.high, digits)}] "
        f"over {pairs} paired seeds{planned}: {verdict}"
    )
    if verdict == "cannot tell":
        least = f"{(value.half_width + rule.margin) * metric.unit.factor:.{digits}f}"
        sentence += f"; {pairs} seeds with this scatter could have shown a difference of {least}"
        sentence += f" {metric.unit.difference_unit}" if metric.unit.difference_unit else ""
    return f"{sentence}."


_COSTS = (
    ("parameters", "Parameters", quantity),
    ("operations", "Operations per image", quantity),
    ("train_step_ms", "Training step", milliseconds),
    ("latency_1_ms", "Latency, batch 1", milliseconds),
    ("latency_16_ms", "Latency, batch 16", milliseconds),
    ("memory_train_mb", "Peak memory, training step", megabytes),
    ("memory_predict_mb", "Peak memory, prediction", megabytes),
)


def cost_rows(costs: Record | None) -> tuple[CostRow, ...]:
    """The cost table; a time's row shows the median, its notes the 95th percentile."""
    if not costs:
        return ()
    rows = []
    first, second = (costs["arms"][arm] for arm in ARMS)
    for key, label, show in _COSTS:
        a, b = first.get(key), second.get(key)
        if a is None or b is None:
            continue
        notes = ("", "", "")
        if isinstance(a, Mapping):
            tail = _over(a["p95"], b["p95"])
            notes = (f"p95 {show(a['p95'])}", f"p95 {show(b['p95'])}", "" if tail is None else written(tail))
            a, b = a["median"], b["median"]
        rows.append(CostRow(key, label, show(a), show(b), _over(a, b), notes))
    return tuple(rows)


def _over(first: float, second: float) -> float | None:
    return second / first if first > 0 else None
