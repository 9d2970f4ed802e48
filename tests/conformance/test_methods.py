"""The conformance suite on every built method: one test per method and check, as ``gcnet-batch_independence``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from torchive import testing
from torchive.testing import Check, Subject

SUBJECTS: dict[str, Subject] = {}
#: The example of CONTRIBUTING, which keeps the checks of compilers and exports among the fast tests.
EXAMPLE = "dynamic_relu"


def _cases() -> Iterator[object]:
    """Methods x checks. Compiling and exporting is slow: a detector takes a minute of one core, a block seconds."""
    for name in testing.built_methods():
        kind = testing.subject_of(name).kind
        for check in testing.checks_of(kind):
            marks = [pytest.mark.slow] if check.costly and name != EXAMPLE else []
            yield pytest.param(name, check, id=f"{name}-{check.name}", marks=marks)


@pytest.mark.parametrize(("name", "check"), list(_cases()))
def test_conformance(name: str, check: Check) -> None:
    subject = SUBJECTS.setdefault(name, testing.subject_of(name))
    assert subject.card is not None
    row = testing.run_one(subject, check, subject.card.exemptions.get(check.name))
    assert row.outcome != "failed", f"{check.demand} {row.reason}"
