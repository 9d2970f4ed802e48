"""How a metric is written: its words, its unit, which way is better. And how numbers are written."""

from __future__ import annotations

import math
from dataclasses import dataclass

_LOWER = ("loss", "error", "nll", "brier", "ece", "rmse", "mae", "mse", "perplexity", "distance", "time")
_SHARES = ("accuracy", "precision", "recall", "f1", "dice", "iou", "map", "mar", "ap", "ap50", "ap75", "auc", "auroc")
_MORE_SHARES = ("top1", "top5", "kappa", "mcc", "sensitivity", "specificity", "pq", "sq", "rq")
_FAULTS = ("false", "missed")
_WORDS = {
    "map": "mAP",
    "mar": "mAR",
    "ap": "AP",
    "ap50": "AP at 0.5",
    "ap75": "AP at 0.75",
    "iou": "IoU",
    "pq": "PQ",
    "sq": "SQ",
    "rq": "RQ",
    "f1": "F1",
    "auc": "AUC",
    "auroc": "AUROC",
    "nll": "NLL",
    "ece": "ECE",
    "top1": "top-1",
    "top5": "top-5",
    "mcc": "MCC",
}


@dataclass(frozen=True)
class Unit:
    """A metric's presentation.

    Attributes:
        name: as recorded.
        label: in words.
        factor: from the recorded value to the shown one: 100 for shares, which are shown in per cent.
        difference_unit: of a difference: "points" or nothing.
        higher_is_better: orientation.
    """

    name: str
    label: str
    factor: float
    difference_unit: str
    higher_is_better: bool

    def value(self, value: float, digits: int = 1) -> str:
        """A value: "81.3 %" or "0.412"."""
        if self.factor == 100:
            return f"{value * 100:.{digits}f} %"
        return f"{value:.{digits}f}"

    def digits(self, scale: float) -> int:
        """Decimals that show a difference of about ``scale`` (recorded unit) with two figures: one to four."""
        shown = abs(scale) * self.factor
        if not math.isfinite(shown) or shown == 0:
            return 1 if self.factor == 100 else 3
        return min(max(1 - math.floor(math.log10(shown)), 1), 4)

    def difference(self, value: float, digits: int = 1, *, unit: bool = False) -> str:
        """A difference with its sign: "+1.2", or "+1.2 points"."""
        text = signed(value * self.factor, digits)
        return f"{text} {self.difference_unit}" if unit and self.difference_unit else text


def unit_of(metric: str) -> Unit:
    """The presentation of a metric by its recorded name; a name that is not known is shown as it is, higher better.

    What follows a slash is a class or a cause: it stays as it is, and says nothing about what is better.
    """
    kind, _, of = metric.partition("/")
    words = kind.lower().split("_")
    fault = kind in _FAULTS
    lower = fault or any(word in _LOWER for word in words)
    share = fault or (not lower and any(word in (*_SHARES, *_MORE_SHARES) for word in words))
    label = " ".join([*(_WORDS.get(word, word) for word in words), *([of] if of else [])])
    return Unit(metric, label, 100.0 if share else 1.0, "points" if share else "", not lower)


def capitalised(label: str) -> str:
    """A label at the start of a line; words such as mAP stay as they are."""
    return label[:1].upper() + label[1:] if label.partition(" ")[0].islower() else label


def signed(value: float, digits: int) -> str:
    """A number with + or a true minus sign; zero has none."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{'+' if value > 0 else '−'}{text}"


def quantity(value: float) -> str:
    """A count in three figures: 11.2 M, 1.82 G."""
    for edge, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= edge:
            return f"{_figures(value / edge)} {letter}"
    return f"{value:,.0f}"


def _figures(value: float) -> str:
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"


def milliseconds(value: float) -> str:
    """A time in three figures: "0.42 ms", "12.3 ms", "1.24 s"."""
    return f"{_figures(value / 1000)} s" if value >= 1000 else f"{_figures(value)} ms"


def megabytes(value: float) -> str:
    """A size in megabytes, in three figures."""
    return f"{_figures(value / 1024)} GB" if value >= 1024 else f"{_figures(value)} MB"


def ratio(value: float) -> str:
    """A ratio: "× 1.05"."""
    return f"× {value:.2f}"


def duration(seconds: float) -> str:
    """A time for people: "42 s", "3 min 10 s", "1 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
