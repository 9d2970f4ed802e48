"""Changing a network as a whole: what was put where, what was left alone, and how to undo it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn


@dataclass
class Rewriting:
    """The changes of one network, in place.

    Attributes:
        network: the network.
        changed: dotted name, the module that stood there, the one that stands there now.
        left_alone: dotted name and reason.
    """

    network: nn.Module
    changed: list[tuple[str, nn.Module, nn.Module]] = field(default_factory=list)
    left_alone: list[tuple[str, str]] = field(default_factory=list)
    _undo: list[Callable[[], object]] = field(default_factory=list, repr=False)

    def put(self, name: str, new: nn.Module, *, told: bool = True) -> None:
        """Put a module under a name, wherever the old object stands; it takes over device, dtype and mode.

        ``told`` says whether the change is listed.
        """
        old = self.network.get_submodule(name)
        for like in [*old.parameters(), *self.network.parameters()]:
            if like.is_floating_point():
                new.to(like.device, like.dtype)
                break
        new.train(old.training)
        for other, module in list(self.network.named_modules(remove_duplicate=False)):
            if module is old and other:
                parent, leaf = self.network.get_submodule(other.rpartition(".")[0]), other.rpartition(".")[2]
                parent._modules[leaf] = new
                self._undo.append(lambda p=parent, k=leaf: p._modules.__setitem__(k, old))  # type: ignore[misc]
        if told:
            self.changed.append((name, old, new))

    def on_undo(self, action: Callable[[], object]) -> None:
        """Have something else taken back, too."""
        self._undo.append(action)

    def undo(self) -> None:
        """Restore the network; calling it twice does nothing more."""
        while self._undo:
            self._undo.pop()()
