"""The record of a method as lines for people: each step of proof with its figures, a comparison as a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchive.catalogue.evidence import STEPS

#: What every entry of the record carries beside its figures.
STAMP = ("date", "version", "command")
_SCALE = {"train_samples": "{} samples", "image_size": "{} px", "batch_size": "batch {}"}
_COSTS = {
    "parameters": "parameters",
    "train_step": "training step",
    "latency_1": "latency",
    "memory_train": "memory in training",
}


def proof_lines(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(step, text) for each entry of the record, the step's name only on its first line."""
    lines = []
    for step in STEPS[:4]:
        entries = record.get(step) or []
        for entry in entries if isinstance(entries, list) else [entries]:
            told = _comparison(entry) if step == "measured" and "difference" in entry else [_figures(entry)]
            dated = f" ({entry['date']}, version {entry['version']})" if "date" in entry else ""
            lines += [(step, told[0] + dated), *(("", line) for line in told[1:])]
            lines += [("", entry["command"])] if "command" in entry else []
        lines += [] if entries else [(step, "not yet")]
    return lines


def _figures(entry: Mapping[str, Any]) -> str:
    """Every figure with its name, without empty tables and lists, which say nothing."""
    told = [(key, value) for key, value in entry.items() if key not in STAMP and value not in ({}, [], ())]
    return ", ".join(f"{key.replace('_', ' ')} {_figure(value)}" for key, value in told) or "yes"


def _comparison(entry: Mapping[str, Any]) -> list[str]:
    """What changed by how much, at which scale; then what it costs and whether it exports."""
    change = entry["difference"]
    if not isinstance(change, Mapping) or not all(k in change for k in ("mean", "low", "high")):
        return [_figures(entry)]
    factor, unit = (100, " points") if entry.get("unit") == "points" else (1, "")
    mean, low, high = (f"{change[key] * factor:+.3g}" for key in ("mean", "low", "high"))
    sides = [f"{_mean(entry[side]) * factor:.4g}" for side in ("baseline", "method") if entry.get(side)]
    told = f"{entry['metric'].replace('_', ' ')} {mean}{unit} [{low}, {high}]"
    told += f", from {sides[0]} to {sides[1]}" if len(sides) == 2 else ""
    told += f", over {len(entry['seeds'])} seeds" if entry.get("seeds") else ""
    told += f": {entry['outcome']}" if "outcome" in entry else ""
    scale = entry.get("scale", {})
    at = ", ".join(_SCALE.get(key, "{}").format(_figure(v)) for key, v in scale.items() if key != "test_samples")
    lines = [told, f"against {entry['baseline_title']}; {at}" if "baseline_title" in entry else at]
    costs = [f"{word} × {entry['ratios'][key]:.2f}" for key, word in _COSTS.items() if key in entry.get("ratios", {})]
    export = entry.get("export") or {}
    if "gap" in export:
        costs.append(f"ONNX gap {export['gap']:.1g}")
    if "latency_ratios" in export:
        costs.append(f"ONNX latency × {export['latency_ratios']['latency_1']:.2f}")
    if "impossible" in export:
        costs.append(f"no ONNX: {export['impossible']}")
    return [line for line in (*lines, ", ".join(costs)) if line]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_figure(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_figure, value)) + "]"
    return str(value)
