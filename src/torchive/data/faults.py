"""What can be wrong with data: one error for the user, one record per fault, one report per check."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

#: Every kind of fault, and what it means.
KINDS = {
    "missing": "the file is not there",
    "zero-byte": "the file is empty",
    "truncated": "the image ends too early",
    "unreadable": "the file is not an image that can be read",
    "bomb": "the image has more pixels than can be loaded safely",
    "box-outside": "a box reaches outside its image",
    "box-empty": "a box has no area",
    "label": "a label is not in the class list",
    "mask-size": "a mask has another size than its image",
    "size": "an annotation states another size than its image has",
    "empty-class": "a class has no sample",
    "duplicate": "two samples have one id",
    "broken": "an annotation cannot be parsed",
}


class DataError(ValueError):
    """The user's data cannot be used as they are: one clear line with file and reason."""


def printable(text: str) -> str:
    """One line that any terminal takes: line breaks, control characters and broken Unicode of file names escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Fault:
    """One fault. ``line`` counts from 1, None where a line says nothing; ``sample`` is an id, None where the set is
    meant.
    """

    file: str
    line: int | None
    kind: str
    message: str
    sample: str | None = None

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return printable(f"{where}: {self.kind}: {self.message}")


@dataclass(frozen=True)
class CheckReport:
    """The result of reading every sample once."""

    source: str
    task: str
    classes: tuple[str, ...]
    samples: int
    faults: tuple[Fault, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """True where nothing is wrong."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {**asdict(self), "classes": list(self.classes), "faults": [asdict(fault) for fault in self.faults]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> CheckReport:
        """The inverse of ``to_json``."""
        faults = tuple(Fault(**fault) for fault in values["faults"])
        return cls(values["source"], values["task"], tuple(values["classes"]), values["samples"], faults)

    def render(self, limit: int | None = None) -> str:
        """One line per fault, the first ``limit`` of them, and a last line that sums up."""
        shown = self.faults if limit is None else self.faults[:limit]
        lines = [str(fault) for fault in shown]
        if len(shown) < len(self.faults):
            lines.append(f"... and {len(self.faults) - len(shown)} more")
        lines.append(self.summary())
        return "\n".join(lines)

    def summary(self) -> str:
        """One line: how many samples were read, and how many faults of each kind there are."""
        head = f"{self.source}: {self.samples} samples, {len(self.classes)} classes ({self.task})"
        if self.ok:
            return f"{head}: no faults"
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(f.kind for f in self.faults).items()))
        return f"{head}: {len(self.faults)} fault{'s' if len(self.faults) > 1 else ''} ({counts})"
