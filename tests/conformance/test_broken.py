"""The tester tested: exactly the right checks catch each broken module, and its sound twin passes them all."""

from __future__ import annotations

import pytest

from broken import Case, blocks, detectors, others
from torchive import testing

SOUND = (*blocks.SOUND, *detectors.SOUND, *others.SOUND)
BROKEN = (*blocks.BROKEN, *detectors.BROKEN, *others.BROKEN)
COSTLY = frozenset(c.name for c in testing.CHECKS if c.costly)


def _failed(case: Case, *, costly: bool) -> dict[str, str]:
    wanted = [c.name for c in testing.checks_of(case.kind) if costly or not c.costly]
    report = testing.check(case.module, case.kind, only=wanted, raises=False, **case.tiny)
    return {row.check: row.reason for row in report.failed}


@pytest.mark.parametrize("case", SOUND, ids=lambda c: c.id)
def test_a_sound_module_passes_every_check(case: Case) -> None:
    assert _failed(case, costly=True) == {}


@pytest.mark.parametrize("case", BROKEN, ids=lambda c: c.id)
def test_exactly_the_right_checks_catch_a_broken_module(case: Case) -> None:
    """Compilation and export are run where they are what is broken; all of them would cost minutes here."""
    failed = _failed(case, costly=bool(case.caught_by & COSTLY))
    assert set(failed) == case.caught_by, failed


def test_every_check_of_behaviour_catches_something() -> None:
    caught = frozenset().union(*(case.caught_by for case in BROKEN))
    assert {c.name for c in testing.CHECKS} - caught == {
        "builds",
        "card",
        "docstring",
        "variants",
    }  # tested below and beside
