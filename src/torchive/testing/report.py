"""What a run of the suite returns: one row per check, a table, and the error that lists what failed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["passed", "failed", "exempt", "not applicable"]


class ConformanceError(AssertionError):
    """A module breaks its contract; the message has one line per failed check. ``report`` holds every row."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


class NotApplicableError(Exception):
    """Raised by a check that has nothing to ask of this subject; the text is the reason."""


@dataclass(frozen=True)
class Row:
    """One check's answer. ``reason`` says why it failed, is exempt or does not apply; ``seconds`` is wall time."""

    check: str
    outcome: Outcome
    reason: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """Every row of one subject, in the order of the table of checks."""

    name: str
    kind: str
    rows: tuple[Row, ...]

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row.outcome == "failed")

    @property
    def seconds(self) -> float:
        """Wall time of all checks together."""
        return sum(row.seconds for row in self.rows)

    def counts(self) -> dict[str, int]:
        """Number of rows by outcome."""
        found = Counter(row.outcome for row in self.rows)
        return {outcome: found[outcome] for outcome in ("passed", "failed", "exempt", "not applicable")}

    def row(self, check: str) -> Row:
        """The row of one check.

        Raises:
            KeyError: that check was not run.
        """
        for row in self.rows:
            if row.check == check:
                return row
        raise KeyError(f"{check!r} was not run on {self.name}")

    def table(self) -> str:
        """A plain table: check, outcome, seconds, reason."""
        width = max((len(row.check) for row in self.rows), default=5)
        lines = [f"{self.name} as {self.kind}: " + ", ".join(f"{n} {o}" for o, n in self.counts().items() if n)]
        rows = (f"  {r.check:<{width}}  {r.outcome:<14}  {r.seconds:6.2f} s  {r.reason}" for r in self.rows)
        return "\n".join([*lines, *map(str.rstrip, rows)])

    def raise_failed(self) -> None:
        """Raise if any row failed.

        Raises:
            ConformanceError: one line per failed check.
        """
        if self.failed:
            lines = "\n".join(f"  {row.check}: {row.reason}" for row in self.failed)
            raise ConformanceError(f"{self.name} breaks the contract of a {self.kind}:\n{lines}", self)
