"""Drawing inline SVG: a linear axis with round ticks, and a list of elements.

Colours are the page's variables, so that a figure follows the light or dark theme; text stays text. Every figure
carries a title and a description for those who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from html import escape


@dataclass(frozen=True)
class Axis:
    """A linear map from values to pixels, with round ticks."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values inside the range: steps of 1, 2, 2.5 or 5 times a power of ten."""
        step = _step((self.high - self.low) / wanted)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(n * step, 12) for n in range(first, last + 1)]


def _step(rough: float) -> float:
    power = 10 ** math.floor(math.log10(rough))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * (1 - 1e-9))


def axis_over(
    values: Sequence[float], start: float, end: float, *, pad: float = 0.06, include: float | None = None
) -> Axis:
    """An axis that holds the values with a margin."""
    kept = [*values, *([] if include is None else [include])]
    low, high = min(kept), max(kept)
    if low == high:
        low, high = low - 1, high + 1
    spread = high - low
    return Axis(low - pad * spread, high + pad * spread, start, end)


def tick_text(value: float, step: float) -> str:
    """A tick with as many decimals as the step needs, and a true minus sign."""
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else 0
    if abs(step * 10**digits - round(step * 10**digits)) > 1e-9:
        digits += 1
    text = f"{abs(value):,.{digits}f}"
    return f"−{text}" if value < 0 and float(text.replace(",", "")) != 0 else text


class Drawing:
    """Elements of one figure, in the order of painting."""

    def __init__(self, width: float, height: float, title: str, description: str, classes: str = "") -> None:
        self.width, self.height, self.title, self.description, self.classes = width, height, title, description, classes
        self.parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        self.parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" class="{css}"/>')

    def circle(self, x: float, y: float, radius: float, css: str, tip: str = "") -> None:
        inner = f"<title>{escape(tip)}</title>" if tip else ""
        self.parts.append(f'<circle cx="{x}" cy="{y}" r="{radius}" class="{css}">{inner}</circle>')

    def rect(self, x: float, y: float, width: float, height: float, css: str, radius: float = 0) -> None:
        round_ = f' rx="{radius}"' if radius else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{max(width, 0):.2f}" height="{max(height, 0):.2f}"{round_} class="{css}"/>'
        )

    def path(self, points: Sequence[tuple[float, float]], css: str, *, closed: bool = False) -> None:
        steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path d="M{steps}{"Z" if closed else ""}" class="{css}"/>')

    def text(self, x: float, y: float, text: str, css: str = "", anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{css}">{escape(text)}</text>')

    def __str__(self) -> str:
        body = "".join(self.parts)
        key = "f" + blake2b(f"{self.title}{self.description}{body}".encode(), digest_size=6).hexdigest()
        stretch = ' preserveAspectRatio="none"' if self.classes == "bar" else ""
        return (
            f'<svg class="fig {self.classes}" viewBox="0 0 {self.width:g} {self.height:g}"{stretch} role="img" '
            f'aria-labelledby="{key}t {key}d"><title id="{key}t">{escape(self.title)}</title>'
            f'<desc id="{key}d">{escape(self.description)}</desc>{body}</svg>'
        )
