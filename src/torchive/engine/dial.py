"""A dial: one setting swept over values, a paired comparison at each.

Both arms are turned, or the method's alone, where the setting stands after ``method:``; the baseline is then trained
once for all values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchive.engine.arms import Arm, ComparisonError
from torchive.engine.checkpoint import write_atomically
from torchive.engine.comparison import REPORT, Comparison
from torchive.report.summary import SCHEMA

DIAL = "dial.json"
#: Before a setting that only the method's arm has, or is to be changed in.
METHOD_ONLY = "method:"


@dataclass(frozen=True)
class Sweep:
    """The comparisons of a dial. Printing it shows the table and the report's path.

    Attributes:
        folder: of the whole; each value has a folder below it.
        setting: the dotted name of the swept setting, after ``method:`` where the baseline was left as it is.
        comparisons: value -> comparison, in the order given.
    """

    folder: Path
    setting: str
    comparisons: dict[Any, Comparison]

    @property
    def report(self) -> Path:
        """The HTML file."""
        return self.folder / REPORT

    def __str__(self) -> str:
        from torchive.report.terminal import dial_text

        return dial_text(self.folder, self.report)


def parse_dial(text: str) -> tuple[str, list[str]]:
    """The setting and its values, from "train.micro_batch=2,4,8". Raises ComparisonError."""
    setting, equals, values = text.partition("=")
    parts = [part.strip() for part in values.split(",") if part.strip()]
    if not equals or not setting.strip() or len(parts) < 2 or len(set(parts)) != len(parts):
        raise ComparisonError(
            f"a dial is written like 'train.micro_batch=2,4,8', with two different values or more, got {text!r}"
        )
    return setting.strip(), parts


def sweep(
    method: str,
    arms: tuple[Arm, Arm],
    dial: str,
    command: str,
    *,
    seeds: Sequence[int],
    margin: float,
    out: Path | None,
    resume: bool,
    progress: bool,
    record: bool,
) -> Sweep:
    """Run a comparison at each value of a dial; raises as ``compare`` does."""
    from torchive.engine.compare import run_comparison
    from torchive.report import render_report

    setting, values = parse_dial(dial)
    folder = out or Path("runs") / f"compare-{method}-{_slug(dial)}-{len(seeds)}"
    place = setting.removeprefix(METHOD_ONLY)
    alone = place != setting
    turned = {value: [_turned(arm, f"{place}={value}", alone) for arm in arms] for value in values}
    names = {value: _slug(f"{setting}={value}") for value in values}
    folder.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, "kind": "dial", "setting": setting, "values": values, "folders": list(names.values())}
    write_atomically(folder / DIAL, json.dumps({**content, "command": command}, indent=1).encode())
    comparisons: dict[Any, Comparison] = {}
    for value, (first, second) in turned.items():
        comparisons[value] = run_comparison(
            method,
            (first, second),
            seeds,
            command=command,
            margin=margin,
            out=folder / names[value],
            resume=resume,
            progress=progress,
            record=record,
            setting=f"{setting}={value}",
            known=comparisons[values[0]] if alone and comparisons else None,
        )
        render_report(folder)
    return Sweep(folder, setting, comparisons)


def _turned(arm: Arm, word: str, method_only: bool) -> Arm:
    return arm if method_only and arm.name == "baseline" else replace(arm, recipe=arm.recipe.override([word]))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.=-]+", "-", text)
