"""What a run shows while it works: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any


class Progress:
    """A bar with loss, speed and time left, on stderr.

    Args:
        total: steps; or None where the budget is in seconds.
        seconds: the budget in seconds, or None.
        shown: False shows nothing.
    """

    def __init__(
        self, title: str, total: int, *, start: int = 0, seconds: float | None = None, shown: bool = True
    ) -> None:
        self.total, self.seconds, self.title = total, seconds, title
        self.bar: Any = None
        self.lines: Any = None
        self.next = 0.0
        if not shown:
            return
        from rich.console import Console

        console = Console(stderr=True)
        if not console.is_terminal:
            self.lines, self.next = console, time.monotonic() + 10
            return
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn(
                "{task.fields[place]}  loss {task.fields[loss]}  {task.fields[speed]} samples/s {task.fields[score]}"
            ),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
            transient=False,
        )
        goal = total if seconds is None else seconds
        self.task = self.bar.add_task(title, total=goal, completed=start, place="", loss="-", speed="-", score="")
        self.bar.start()

    def update(self, step: int, elapsed: float, loss: float, speed: float) -> None:
        """Show where the run is."""
        place = f"{step}/{self.total}" if self.seconds is None else f"{elapsed:.0f}/{self.seconds:.0f} s"
        if self.bar is not None:
            done = step if self.seconds is None else elapsed
            self.bar.update(self.task, completed=done, place=place, loss=f"{loss:.4f}", speed=_rate(speed))
        elif self.lines is not None and time.monotonic() >= self.next:
            self.next = time.monotonic() + 10
            self.lines.print(f"{self.title}  {place}  loss {loss:.4f}  {_rate(speed)} samples/s", highlight=False)

    def scored(self, name: str, value: float) -> None:
        """Show the latest figure on the validation split."""
        if self.bar is not None:
            self.bar.update(self.task, score=f" {name} {value:.4f}")

    def say(self, text: str) -> None:
        """A line of its own."""
        target = self.bar.console if self.bar is not None else self.lines
        if target is not None:
            target.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.stop()


def _rate(speed: float) -> str:
    """Samples a second, with a decimal where there are few."""
    return f"{speed:.0f}" if speed >= 10 else f"{speed:.1f}"
