"""The committed record of what was proved and measured: ``evidence/NAME.json``.

Keys: ``built``, ``referenced``, ``matched``, ``measured`` (a list) and ``verdict``; a step not reached is absent.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

EVIDENCE = Path(__file__).with_name("evidence")
STEPS = ("built", "referenced", "matched", "measured", "verdict")


def evidence_of(name: str, *, folder: Path | None = None) -> dict[str, Any]:
    """The record of a method; empty where nothing was recorded."""
    path = (folder or EVIDENCE) / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def steps_reached(record: dict[str, Any]) -> list[str]:
    """The steps of proof that a record holds; an impossible match does not count as matched."""
    return [s for s in STEPS[:4] if record.get(s) and "impossible" not in record[s]]


def record_evidence(name: str, step: str, command: str, *, folder: Path | None = None, **figures: Any) -> None:
    """Write one step's figures with the date, the version and the command that repeats it.

    ``measured`` appends, or replaces the entry of the same command; the other steps replace.

    Raises:
        ValueError: an unknown step.
    """
    from torchive import __version__

    if step not in STEPS:
        raise ValueError(f"step must be one of {', '.join(STEPS)}, got {step!r}")
    path = (folder or EVIDENCE) / f"{name}.json"
    record = evidence_of(name, folder=folder)
    entry = {**figures, "date": datetime.now(UTC).date().isoformat(), "version": __version__, "command": command}
    if step == "measured":
        kept = [m for m in record.get("measured", []) if m["command"] != command]
        record["measured"] = [*kept, entry]
    else:
        record[step] = entry
    ordered = {key: record[key] for key in STEPS if key in record}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
