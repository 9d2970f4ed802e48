"""Parts that change the maps between layers: the function that a card names rewrites the network as a whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from torchive.engine.callsites import Trace
from torchive.engine.conversion import Change, ConversionError, ConversionReport


def rewrite(
    model: nn.Module,
    function: Callable[..., Any],
    matches: Callable[[str], bool],
    trace: Trace,
    options: dict[str, Any],
    report: ConversionReport,
) -> None:
    """Call ``function(model, example=, matches=, **options)``, which gives a ``torchive.nn.Rewriting``, and report it.

    Raises:
        ConversionError: an option that it does not take, a network that it refuses, or nothing to rewrite.
    """
    known = [name for name in inspect.signature(function).parameters if name not in ("example", "matches")][1:]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ConversionError(f"{report.method} takes no {', '.join(unknown)}; it takes {', '.join(known)}")
    try:
        made = function(model, example=trace.example, matches=matches, **options)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"{report.method}: {error}") from error
    if not made.changed:
        listed = "; ".join(f"{place}: {reason}" for place, reason in made.left_alone[:5])
        raise ConversionError(f"{report.method}: nothing in {type(model).__name__} can be rewritten. {listed}".strip())
    report._undo.append(made.undo)
    report.left_alone.extend(made.left_alone)
    for name, old, new in made.changed:
        calls = trace.calls.get(id(old), [])
        report.changes.append(Change(name, type(old).__name__, type(new).__name__, calls[0].channels if calls else 0))
