"""The verdict, computed from evidence alone: ship, build or watch, and at which scale that was measured.

``ship``: a gain on real data whose interval lies above zero and that survives the control of the false discovery rate,
exported to ONNX and run there with a gap below 1e-4, latency at most 1.25 times the baseline's, nothing restricted.
The latency is that of the exported files; where these leave a detector's decoding out, that of ``predict`` counts, too.
``build``: referenced or matched, and no ship: the gain is unclear, or it costs more, or it is a part of a system.
``watch``: the rest. Among many intervals some exclude zero by luck, so a gain counts only if it is a discovery of
Benjamini and Hochberg (1995) at 5 % over all measured intervals of the archive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchive.catalogue.card import Card
from torchive.catalogue.evidence import evidence_of, record_evidence, steps_reached
from torchive.catalogue.index import card_names, get_card

LEVEL = 0.05
LARGEST_GAP = 1e-4
LARGEST_LATENCY = 1.25
COMMAND = "torchive verdict"

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What is said of one method.

    Attributes:
        name: the method.
        verdict: "ship", "build" or "watch".
        why: the reasons, one short clause each; for build and watch, what is missing.
        scale: at which it was measured, in words; empty where it was not.
        entry: the measurement that decided; None where there is none.
        adjusted: its p-value adjusted over the archive.
    """

    name: str
    verdict: str
    why: tuple[str, ...]
    scale: str = ""
    entry: Entry | None = None
    adjusted: float | None = None


def adjusted_p(values: Sequence[float]) -> list[float]:
    """Benjamini-Hochberg: a p-value below the level after adjustment is a discovery at that false discovery rate."""
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
    result, smallest = [0.0] * len(values), 1.0
    for place, index in enumerate(order):
        rank = len(values) - place
        smallest = min(smallest, values[index] * len(values) / rank)
        result[index] = smallest
    return result


def verdicts(*, folder: Path | None = None) -> list[Verdict]:
    """The verdict of every built method and of every other that was measured, in alphabetical order."""
    records = {name: evidence_of(name, folder=folder) for name in card_names()}
    measured = [
        (name, entry)
        for name, record in records.items()
        for entry in record.get("measured", [])
        if "difference" in entry  # a measurement without a paired difference has no verdict to give
    ]
    corrected = adjusted_p([float(entry["difference"]["p"]) for _, entry in measured])
    by_name: dict[str, list[tuple[Entry, float]]] = {}
    for (name, entry), value in zip(measured, corrected, strict=True):
        by_name.setdefault(name, []).append((entry, value))
    cards = [get_card(name) for name in records]
    return [
        judge(card, records[card.name], by_name.get(card.name, []))
        for card in cards
        if card.state == "built" or card.name in by_name
    ]


def judge(card: Card, record: Mapping[str, Any], measured: Sequence[tuple[Entry, float]]) -> Verdict:
    """One method's verdict from its record and its measurements with their adjusted p-values."""
    proved = [step for step in steps_reached(dict(record)) if step in ("referenced", "matched")]
    best: Verdict | None = None
    for entry, adjusted in sorted(measured, key=lambda pair: (-_gain(pair[0]), pair[1])):
        missing = _missing(entry, adjusted)
        scale = scale_text(entry)
        if not missing:
            return Verdict(card.name, "ship", _gains(entry), scale, entry, adjusted)
        state = "build" if proved else "watch"
        if best is None or len(missing) < len(best.why):
            best = Verdict(card.name, state, tuple(missing), scale, entry, adjusted)
    if best is not None:
        return best
    if proved:
        return Verdict(card.name, "build", (f"{' and '.join(proved)}", "no comparison recorded"))
    return Verdict(card.name, "watch", ("neither referenced nor matched",))


def _gain(entry: Entry) -> float:
    """The lower end of the interval in the direction of better; the lowest of all where the arms were identical."""
    difference = entry["difference"]
    if difference["low"] == difference["high"] == 0:
        return -float("inf")  # the method did nothing there, which says nothing about it
    return float(difference["low"]) if entry.get("higher_is_better", True) else -float(difference["high"])


def _gains(entry: Entry) -> tuple[str, ...]:
    return (f"{entry['metric']} {difference_text(entry)}", f"latency x {_latency(entry)[1]}")


def _latency(entry: Entry) -> tuple[float | None, str]:
    """The largest ratio of batch 1 and 16, and in words: of the exported files, which are what is shipped, else of
    PyTorch; of both where the files lack what detection still has to do, which may be all that differs."""
    export = entry.get("export") or {}
    file, predict = (
        max((v for k in ("latency_1", "latency_16") if (v := ratios.get(k)) is not None), default=None)
        for ratios in (export.get("latency_ratios") or {}, entry.get("ratios") or {})
    )
    if file is None:
        return predict, f"{predict or 0:.2f}"
    detection = "map" in (entry["metric"], *entry.get("others", ()))
    if detection and not export.get("decoded") and predict is not None and predict > file:
        return predict, f"{predict:.2f} of predict, {file:.2f} of the files, which leave decoding out"
    return file, f"{file:.2f}"


def _missing(entry: Entry, adjusted: float) -> list[str]:
    """What keeps a measurement from ``ship``."""
    missing = []
    if _gain(entry) <= 0:
        best_case = entry["difference"]["high"] if entry.get("higher_is_better", True) else -entry["difference"]["low"]
        what = "loss" if best_case < 0 else "gain unclear"
        missing.append(f"{what}: {entry['metric']} {difference_text(entry)}")
    elif adjusted > LEVEL:
        missing.append(f"gain may be luck among all that was measured (adjusted p {adjusted:.3f})")
    export = entry.get("export") or {}
    if "gap" not in export:
        missing.append(export.get("impossible") or "not exported")
    elif not export["gap"] < LARGEST_GAP:
        missing.append(f"the export differs by {export['gap']:.1e}")
    latency, words = _latency(entry)
    if latency is None:
        missing.append("latency not measured")
    elif latency > LARGEST_LATENCY:
        missing.append(f"latency x {words}")
    if entry.get("restricted"):
        missing.append(str(entry["restricted"]))
    return missing


def difference_text(entry: Entry) -> str:
    """ "+1.2 [-0.3, +2.7] points" of a measurement; shares are given in points."""
    factor, unit = (100, " points") if entry.get("unit") == "points" else (1, "")
    mean, low, high = (entry["difference"][key] * factor for key in ("mean", "low", "high"))
    digits = 1 if unit else 3
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]{unit}"


def scale_text(entry: Entry) -> str:
    """Data, image size, network, steps and seeds of a measurement, in one line."""
    scale = entry.get("scale", {})
    parts = [str(scale["data"])] if scale.get("data") else []
    parts += [f"{scale['train_samples']:,} samples"] if scale.get("train_samples") else []
    parts += [f"{scale['image_size']} px"] if scale.get("image_size") else []
    parts += [str(scale["network"])] if scale.get("network") else []
    parts += [str(scale["budget"])] if scale.get("budget") else []
    parts += [str(scale["setting"])] if scale.get("setting") else []
    return ", ".join([*parts, f"{len(entry['seeds'])} seeds"])


def verdict_rows(*, folder: Path | None = None) -> list[dict[str, Any]]:
    """Plain values for ``torchive verdict --json``; ship first, then build, then watch."""
    order = ("ship", "build", "watch")
    rows = []
    for found in sorted(verdicts(folder=folder), key=lambda v: (order.index(v.verdict), v.name)):
        entry = found.entry
        rows.append(
            {
                "name": found.name,
                "title": get_card(found.name).title,
                "verdict": found.verdict,
                "why": list(found.why),
                "scale": found.scale,
                "metric": entry["metric"] if entry else None,
                "difference": dict(entry["difference"]) if entry else None,
                "difference_text": difference_text(entry) if entry else "",
                "adjusted_p": found.adjusted,
            }
        )
    return rows


def update_verdicts(*, folder: Path | None = None) -> list[Verdict]:
    """Compute all verdicts and write those that changed into the evidence; returns what was written."""
    written = []
    for found in verdicts(folder=folder):
        figures: dict[str, Any] = {"verdict": found.verdict, "why": list(found.why), "scale": found.scale}
        if found.adjusted is not None:
            figures["adjusted_p"] = round(found.adjusted, 6)
        old = evidence_of(found.name, folder=folder).get("verdict", {})
        if any(old.get(key) != value for key, value in figures.items()):
            record_evidence(found.name, "verdict", COMMAND, folder=folder, **figures)
            written.append(found)
    return written


def render_verdicts(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text: a line for the verdict, the reasons and the scale below."""
    if not rows:
        return "Nothing is built or measured yet."
    width = max(len(row["name"]) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row['verdict']:<5}  {row['name']:<{width}}  {'; '.join(row['why'])}")
        if row["scale"]:
            lines.append(f"{'':<{width + 9}}at {row['scale']}")
    intervals = sum(row["difference"] is not None for row in rows)
    note = f"False discovery rate {LEVEL:.0%} over all measured intervals (Benjamini-Hochberg)."
    return "\n".join([*lines, "", f"{len(rows)} methods, {intervals} measured. {note}"])
