"""Running the table of checks on a module, a factory or a built method."""

from __future__ import annotations

import copy
import inspect
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchive.catalogue import Card, card_names, get_card
from torchive.testing.checks import Check, checks_of, names
from torchive.testing.construct import construct, resolve
from torchive.testing.report import NotApplicableError, Report, Row
from torchive.testing.subject import Subject


def check(
    module_or_factory: Any,
    kind: str = "block",
    *,
    inputs: Sequence[Sequence[int]] | None = None,
    target: dict[str, Any] | None = None,
    only: Iterable[str] | None = None,
    exempt: dict[str, str] | None = None,
    raises: bool = True,
    **tiny: Any,
) -> Report:
    """Run the conformance suite on a module of your own.

    Args:
        module_or_factory: an instance, or a class or function that makes one without arguments. A factory is better: it
            lets the suite build on the meta device and with other reductions.
        kind: the contract, one of ``torchive.protocols.CONTRACTS``.
        inputs: shapes of ``forward``'s inputs, batch first, such as ``[(2, 8, 9, 13)]``; a loss's prediction.
        target: what the truth is, such as ``{"kind": "classes", "num_classes": 4}``.
        only: names of the checks to run; all of the kind if None.
        exempt: check -> reason. An exempt check is run and must fail.
        raises: False returns the report even where checks failed.
        tiny: further keys of a card's ``[tiny]``, such as ``smallest``, ``divisor`` or ``images``.

    Returns:
        One row per check: passed, exempt or not applicable, with reason and time.

    Raises:
        ConformanceError: a check failed, or an exempt check passed; the message lists them.
        ValueError: an unknown kind or check.
    """
    build, fresh = _builder(module_or_factory)
    described = {"inputs": [list(s) for s in inputs] if inputs else None, "target": target, **tiny}
    name = getattr(module_or_factory, "__name__", type(module_or_factory).__name__)
    subject = Subject(name, kind, build, {key: v for key, v in described.items() if v is not None}, fresh=fresh)
    report = run(subject, only=only, exempt=exempt or {})
    if raises:
        report.raise_failed()
    return report


def check_method(name: str, *, only: Iterable[str] | None = None, costly: bool = True, raises: bool = True) -> Report:
    """Run the suite on a built method, from the ``tiny`` and the ``exemptions`` of its card.

    Args:
        name: the method's name or alias.
        only: names of the checks to run; all of its kind if None.
        costly: whether compilation and export are run too.
        raises: False returns the report even where checks failed.

    Raises:
        ConformanceError: as ``check``. KeyError: no such method. ValueError: it is planned, not built.
    """
    subject = subject_of(name)
    wanted = [c.name for c in checks_of(subject.kind) if costly or not c.costly] if only is None else only
    assert subject.card is not None
    report = run(subject, only=wanted, exempt=subject.card.exemptions)
    if raises:
        report.raise_failed()
    return report


def subject_of(name: str) -> Subject:
    """The subject that a built card describes.

    Raises:
        KeyError: no such method. ValueError: it is planned, not built.
    """
    card = _fresh_card(name)
    if card.state != "built":
        raise ValueError(f"{card.name} is planned, not built")
    cls, tiny = resolve(card.class_path), dict(card.tiny)
    if "same_shape" not in tiny and card.host.get("mode") == "insert":
        tiny["same_shape"] = True

    def build(**options: Any) -> Any:
        return cls(**{**construct(tiny.get("args", {})), **options})

    return Subject(card.name, card.contract, build, tiny, card=card)


def _fresh_card(name: str) -> Card:
    """The card as its file says now, so that a stale index cannot hide a change."""
    from torchive.catalogue.card import CARDS, load_card

    path = Path(CARDS) / f"{name}.toml"
    return load_card(path) if path.exists() else get_card(name)


def built_methods() -> list[str]:
    """Names of the methods whose cards say ``built``."""
    return [name for name in card_names() if get_card(name).state == "built"]


def run(subject: Subject, *, only: Iterable[str] | None = None, exempt: dict[str, str] | None = None) -> Report:
    """Every check of the subject's kind, each timed, none stopping the others.

    Raises:
        ValueError: ``only`` or ``exempt`` names an unknown check.
    """
    exempt = exempt or {}
    chosen = set(names()) if only is None else set(only)
    unknown = (chosen | set(exempt)) - set(names())
    if unknown:
        raise ValueError(f"unknown checks {', '.join(sorted(unknown))}; known: {', '.join(names())}")
    rows = tuple(run_one(subject, one, exempt.get(one.name)) for one in checks_of(subject.kind) if one.name in chosen)
    return Report(subject.name, subject.kind, rows)


def run_one(subject: Subject, one: Check, reason: str | None = None) -> Row:
    """One check's row; ``reason`` is that of an exemption, which must still be needed."""
    start = time.perf_counter()
    fault = None
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            one.function(subject)
    except NotApplicableError as why:
        if reason is None:
            return Row(one.name, "not applicable", str(why), time.perf_counter() - start)
        fault, reason = None, f"{reason} (not applicable: {why})"
    except AssertionError as error:
        fault = " ".join(str(error).split()) or "an assertion without a message"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        fault = (
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({Path(place.filename).name}:{place.lineno})"
        )
    seconds = time.perf_counter() - start
    if reason is not None:
        if fault is None:
            return Row(one.name, "failed", f"exempt ({reason}), yet it does not fail; remove the exemption", seconds)
        return Row(one.name, "exempt", f"{reason} [{fault}]", seconds)
    return Row(one.name, "passed" if fault is None else "failed", fault or "", seconds)


def _builder(given: Any) -> tuple[Callable[..., Any], bool]:
    if inspect.isclass(given) or (callable(given) and not isinstance(given, nn.Module)):
        return given, True

    def copied(**options: Any) -> Any:
        if options:
            raise TypeError(f"an instance takes no {', '.join(options)}")
        try:
            return copy.deepcopy(given)
        except Exception:  # the check deep_copy tells
            return given

    return copied, False
