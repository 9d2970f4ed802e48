"""Which modules of a network a conversion means: patterns over dotted names, the card's places, residual branches."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from torchive.catalogue import get_card
from torchive.engine.conversion import ConversionError, ConversionReport
from torchive.engine.residuals import trace_residuals

#: Places that several cards mean, by the name that they give for them: patterns, of which the first that matches holds.
NAMED_PLACES: dict[str, tuple[str, ...]] = {
    "last stage": (
        r"re:(.*\.)?layer4",
        "*stages.3",
        "*stages_3",
        "neck",
        "*encoder.blocks.3",
        r"re:blocks\.6",
        r"re:blocks\.5",
        "s4",
        "features",
    )
}


def places_of(where: str | list[str | list[str]]) -> list[list[str]]:
    """A card's ``where`` as lists of patterns, tried one after the other: a named place, or the list itself."""
    choices = NAMED_PLACES[where] if isinstance(where, str) else where
    return [[choice] if isinstance(choice, str) else list(choice) for choice in choices]


def matches(name: str, patterns: list[str] | None) -> bool:
    """Whether a dotted name, or a module around it, fits one of the patterns; None takes everything."""
    if patterns is None:
        return True
    for pattern in patterns:
        if pattern.startswith("re:"):
            if re.fullmatch(pattern[3:], name):
                return True
        elif fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*"):
            return True
    return False


def insertion_places(
    model: nn.Module,
    method: str | type[nn.Module],
    patterns: list[str] | None,
    places: list[list[str]],
    example: Any,
    report: ConversionReport,
) -> list[str]:
    """Where a block is inserted: as asked, else as the card says; at ends of residual branches if the card says so."""
    if not isinstance(method, str) or get_card(method).host.get("at") != "residual":
        choices = [patterns] if patterns is not None else places
        return next((found for choice in choices if (found := _outermost(model, choice))), [])
    residuals = trace_residuals(model, example)
    report.left_alone += [(name, why) for name, why in residuals.others if matches(name, patterns)]
    ends = [name for name in residuals.ends if matches(name, patterns)]
    if not ends and not report.left_alone:
        more = f"; they are {a_few(residuals.ends)}" if residuals.ends else ""
        inside = "" if patterns is None else f" in {', '.join(map(repr, patterns))}"
        raise ConversionError(f"{method}: {type(model).__name__} has no residual branch{inside}{more}")
    return ends


def _outermost(model: nn.Module, patterns: list[str]) -> list[str]:
    found: list[str] = []
    for name, _module in model.named_modules():
        exact = any(re.fullmatch(p[3:], name) if p.startswith("re:") else fnmatchcase(name, p) for p in patterns)
        if name and exact and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def a_few(names: list[str]) -> str:
    """A few of the names, the outer ones if there are any, for a message."""
    stages = [n for n in names if n.count(".") <= 1][:4] or names[:4]
    return ", ".join(repr(n) for n in stages) or "(no modules)"
