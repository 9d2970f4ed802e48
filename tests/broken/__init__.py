"""Deliberately broken modules, each with the set of checks that must catch it, and the sound twin they differ from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A module, its kind, its test-sized arguments and exactly the checks that must fail on it."""

    module: Any
    kind: str
    caught_by: frozenset[str]
    tiny: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The class's name."""
        return str(self.module.__name__)


def case(module: Any, kind: str, caught_by: str, **tiny: Any) -> Case:
    """A case whose checks are given as one string of names."""
    return Case(module, kind, frozenset(caught_by.split()), tiny)
