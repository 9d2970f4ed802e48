"""The conformance suite on every built method: one test per method and check, as ``gcnet-batch_independence``."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from torchive import testing
from torchive.testing import Check, Subject

SUBJECTS: dict[str, Subject] = {}


def _cases() -> Iterator[object]:
    """Methods x checks. Compilation and export are marked slow, unless TORCHIVE_CHECKS=all."""
    everything = os.environ.get("TORCHIVE_CHECKS") == "all"
    for name in testing.built_methods():
        for check in testing.checks_of(testing.subject_of(name).kind):
            marks = [pytest.mark.slow] if check.costly and not everything and not FAST_ENOUGH else []
            yield pytest.param(name, check, id=f"{name}-{check.name}", marks=marks)


#: The costly checks of all built methods take well under three minutes; set to False when they no longer do.
FAST_ENOUGH = True


@pytest.mark.parametrize(("name", "check"), list(_cases()))
def test_conformance(name: str, check: Check) -> None:
    subject = SUBJECTS.setdefault(name, testing.subject_of(name))
    assert subject.card is not None
    row = testing.run_one(subject, check, subject.card.exemptions.get(check.name))
    assert row.outcome != "failed", f"{check.demand} {row.reason}"
