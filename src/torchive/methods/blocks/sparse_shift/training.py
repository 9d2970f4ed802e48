"""Shifts in the place of depthwise convolutions, their sparsity, and when they stand still."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torchive.methods.blocks.sparse_shift.shift import SparseShift
from torchive.nn.classifier import Classifier
from torchive.nn.rewriting import Rewriting


def shift_layers(network: nn.Module) -> Iterator[SparseShift]:
    """The network's shift layers, in order."""
    return (part for part in network.modules() if isinstance(part, SparseShift))


def moved_share(network: nn.Module) -> float:
    """Share of the shift layers' channels that move at all; the others need no copy.

    Raises:
        ValueError: a network without shift layers.
    """
    moved = [layer.offsets().ne(0).any(1) for layer in shift_layers(network)]
    if not moved:
        raise ValueError(f"{type(network).__name__} has no shift layer")
    return float(torch.cat(moved).double().mean())


def displacements(network: nn.Module) -> Tensor:
    """sum (|a| + |b|) over all learnt displacements, in pixels; zero where there is none."""
    learnt = [layer.shift.abs().sum() for layer in shift_layers(network) if layer.variant != "grouped"]
    return torch.stack(learnt).sum() if learnt else torch.zeros(())


def shift_depthwise(
    network: nn.Module,
    *,
    example: Any = None,
    matches: Callable[[str], bool] | None = None,
    variant: Literal["sparse", "active", "grouped"] = "sparse",
    start: Literal["grid", "uniform", "zero"] = "grid",
    rate: float = 1.0,
    decay: float = 0.0,
) -> Rewriting:
    """Put shifts in the place of a network's depthwise convolutions, whose weights and biases go; in place.

    Args:
        network: any network; train it, or train it again.
        example: not needed.
        matches: which convolutions, by their dotted name; None is all.
        variant, start, rate, decay: of ``SparseShift``; the window of its start is the convolution's.

    Returns:
        What was changed, with ``undo()``.

    Raises:
        ValueError: no depthwise convolution, or an unknown ``variant`` or ``start``.
    """
    options: dict[str, Any] = {"variant": variant, "start": start, "rate": rate, "decay": decay}
    SparseShift(1, **options)  # refuses bad options before anything is changed
    result = Rewriting(network)
    for name, old in list(network.named_modules()):
        if not isinstance(old, nn.Conv2d) or not 1 < old.groups == old.in_channels == old.out_channels:
            continue
        if matches is not None and not matches(name):
            continue
        if type(old).forward is not nn.Conv2d.forward:
            result.left_alone.append((name, f"{type(old).__name__} computes more than a convolution"))
            continue
        try:
            new = SparseShift.from_module(old, **options)
        except ValueError as error:
            result.left_alone.append((name, str(error)))
            continue
        result.put(name, new)
    if not result.changed and not result.left_alone:
        raise ValueError(f"{type(network).__name__} has no depthwise convolution whose place a shift can take")
    return result


class ShiftClassifier(Classifier):
    """A classification system whose loss also counts how far its shift layers move channels, and that freezes them.

    Args:
        network: images (N, C, H, W) to logits (N, K): a name or a module, with or without shift layers.
        num_classes, in_channels, loss, options: as of ``torchive.nn.Classifier``.
        penalty: lambda, the weight of sum (|a| + |b|) in the loss.
        freeze_after: share of a run after which displacements stand still.

    Raises:
        ValueError: a negative ``penalty``, or ``freeze_after`` outside [0, 1].
    """

    def __init__(
        self,
        network: str | nn.Module = "timm/mobilenetv2_050",
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        loss: nn.Module | None = None,
        options: dict[str, Any] | None = None,
        penalty: float = 5e-4,
        freeze_after: float = 0.5,
    ) -> None:
        super().__init__(network, num_classes=num_classes, in_channels=in_channels, loss=loss, options=options)
        if penalty < 0 or not 0 <= freeze_after <= 1:
            raise ValueError(f"penalty must be >= 0 and freeze_after in [0, 1], got {penalty} and {freeze_after}")
        self.penalty, self.freeze_after = penalty, freeze_after

    def before_step(self, progress: float) -> None:
        """Tell the shift layers whether they stand still by now; called with the share of the run that is done."""
        for layer in shift_layers(self):
            layer.frozen = progress >= self.freeze_after

    def losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """``loss``, and ``sparsity`` where there are displacements that learn."""
        found = super().losses(inputs, targets)
        if self.penalty and any(layer.variant != "grouped" and not layer.frozen for layer in shift_layers(self)):
            found["sparsity"] = self.penalty * displacements(self)
        return found
