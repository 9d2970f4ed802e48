"""One protocol per contract. Nothing inherits from these: a class that has the methods fulfils the contract.

``forward`` is pure and returns one type in training and in evaluation; losses never come out of ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from torchive.structures import Batch, Prediction, Target

#: The contracts' names as cards and ``torchive.testing.check(kind=...)`` spell them.
CONTRACTS = ("block", "backbone", "loss", "system", "two_players", "procedure", "search", "explanation", "metric")


@runtime_checkable
class Block(Protocol):
    """A tensor in, a tensor out: NCHW, NCTHW or NLC as the card says.

    A part that replaces a standard layer also has a class method ``from_module(old, *, channels, **options)`` that
    takes over its shape and, where it makes sense, its weights. A part that is inserted has
    ``from_channels(channels, **options)``.
    """

    def forward(self, x: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Level:
    """One feature map's promise: channels, and input pixels per cell."""

    channels: int
    stride: int


@runtime_checkable
class Backbone(Protocol):
    """Images (N, C, H, W) to feature maps, finest first."""

    levels: tuple[Level, ...]

    def forward(self, x: Tensor, /) -> list[Tensor]: ...


@runtime_checkable
class Loss(Protocol):
    """Prediction and target to a scalar, or to one value per sample with ``reduction="none"``."""

    reduction: str

    def forward(self, prediction: Tensor, target: Tensor, /) -> Tensor: ...


@runtime_checkable
class System(Protocol):
    """A complete model in three verbs: ``forward`` to raw outputs (exportable), ``losses``, and ``predict``.

    ``task`` names the batch's type: classification, detection, segmentation.
    """

    task: str

    def forward(self, inputs: Any, /) -> Any: ...

    def losses(self, inputs: Any, targets: Target) -> dict[str, Tensor]: ...

    def predict(self, inputs: Any) -> Sequence[Prediction]: ...


@runtime_checkable
class TwoPlayers(Protocol):
    """Two groups of parameters with a loss each, stepped in turn."""

    def players(self) -> dict[str, Iterable[nn.Parameter]]: ...

    def losses(self, inputs: Any, targets: Target, player: str) -> dict[str, Tensor]: ...


@runtime_checkable
class Procedure(Protocol):
    """Training around a model. ``deployable`` returns the model to keep.

    Optional: ``before_step(progress)`` and ``after_step()``, called around each optimiser step, ``progress`` being the
    share of the run that is done; ``views(image_size, **options)``, the transform that makes the views of one image;
    ``sampling(progress)``, the power of ``data.sampling`` at a share of the run. Any part of any model may have
    ``before_step`` too.
    """

    def losses(self, batch: Batch, /) -> dict[str, Tensor]: ...

    def deployable(self) -> nn.Module: ...


@runtime_checkable
class Search(Protocol):
    """A seeded, resumable search over architectures."""

    def ask(self) -> Any: ...

    def tell(self, architecture: Any, score: float) -> None: ...


@runtime_checkable
class Explanation(Protocol):
    """Maps that say where a model looked: (N, 1, H, W) in input pixels."""

    def explain(
        self, model: nn.Module, inputs: Tensor, target: int | Tensor | Callable[[Any], Tensor] | None
    ) -> Any: ...
