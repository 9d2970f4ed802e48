"""What a conversion returns, what it raises, and the wrapper of an inserted part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn


class ConversionError(ValueError):
    """Nothing matched, or a match cannot be converted; the network is as it was."""


@dataclass(frozen=True)
class Change:
    """One place in the network: its dotted name, what stood there, what stands there now, and its channels."""

    name: str
    old: str
    new: str
    channels: int


@dataclass
class ConversionReport:
    """What a conversion changed. ``undo()`` puts the network back as it was; printing the report shows a table.

    Attributes:
        method: the method's or the class's name.
        changes: every place that was changed.
        left_alone: matched places that were not converted: dotted name and reason.
        parameters: parameters of the network before and after.
    """

    method: str
    changes: list[Change]
    left_alone: list[tuple[str, str]]
    parameters: tuple[int, int]
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Restore the network; calling it twice does nothing more."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        before, after = self.parameters
        lines = [f"{self.method}: {len(self.changes)} places changed, {before:,} -> {after:,} parameters"]
        width = max((len(c.name) for c in self.changes), default=0)
        lines += [f"  {c.name:<{width}}  {c.old} -> {c.new} ({c.channels} channels)" for c in self.changes]
        lines += [f"  left alone: {name}: {reason}" for name, reason in self.left_alone]
        return "\n".join(lines)


class Followed(nn.Module):
    """A host module and the part inserted after it. Weights saved before the insertion still load.

    ``changed`` names parameters of the host that the part gave another start.
    """

    def __init__(self, host: nn.Module, part: nn.Module, *, changed: Sequence[str] = ()) -> None:
        super().__init__()
        self.host, self.part, self.changed = host, part, tuple(changed)
        self.register_load_state_dict_pre_hook(_accept_plain_keys)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.part(self.host(*args, **kwargs))


def _accept_plain_keys(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own = (f"{prefix}host.", f"{prefix}part.")
    plain = [key for key in state if key.startswith(prefix) and not key.startswith(own)]
    for key in plain:
        state[f"{prefix}host.{key[len(prefix) :]}"] = state.pop(key)
    if plain:  # weights from before the insertion: the part keeps its own
        for key, value in module.state_dict(prefix=prefix).items():
            if key.startswith(own[1]):
                state.setdefault(key, value)
