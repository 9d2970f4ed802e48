"""One protocol per contract. Nothing inherits from these: a class that has the methods fulfils the contract.

``forward`` is pure and returns one type in training and in evaluation; losses never come out of ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from torchive.structures import Batch, Detections, Prediction, Target

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


class FileDetector(Protocol):
    """A detection system that ``engine.detector_file.DetectorWithDecoding`` puts into one file with its decoding.

    N images, K classes, D detections of an image, ``size`` the (height, width) of the images that go in. Of
    ``scored_boxes``, ``detect`` and ``decoded`` it has one. All must export: shapes do not depend on the data.

    ``detect(inputs, *, score_threshold, nms_threshold, max_detections, candidates) -> raw`` in place of
    ``scored_boxes``, where branches after the suppression read its result: raw outputs with ``boxes`` (N, D, 4) in
    pixels of the network's batch, ``labels`` and ``scores`` (N, D), -1 in empty rows, perhaps ``masks`` (N, D, S, S),
    and ``sizes`` (N, 2), height and width of the images in that batch. Where options are not given, those of
    ``forward``. ``torchive.nn.two_stage.DetectsInForward`` has it.

    ``decoded(raw, size, **thresholds) -> dict`` in place of both, where boxes are not suppressed: ``boxes`` (N, D, 4)
    in pixels of the images, ``labels``, ``scores`` and whatever else the file shall give. It gets ``score_threshold``
    and ``max_detections`` as far as ``predict`` has them.

    Optional:

    - ``thresholds``: a dict of the defaults of ``predict`` that depend on how the detector was built, for what the
      signature has as None;
    - ``score_cut(threshold) -> float``: what scores of ``scored_boxes`` are compared with, where ``score_threshold``
      is of another quantity, as of a product whose root is the score; the threshold itself by default;
    - ``masks_of(raw, rows) -> dict``: what the file gives beside boxes, from the rows (N, D) of P that were kept, as
      ``masks`` (N, D, h, w); empty rows are 0;
    - ``decodes_batches_of``: the images that ``decoded`` takes at a time; None is any, 0 says that this instance has
      no form for a file;
    - ``least_side``: height and width that an example must have at least, so that no map is one cell, which an exporter
      would take for constant; by default twice the largest stride of a ``backbone`` that is a ``nn.pyramid.Pyramid``.

    Not of the file, but of the evaluation: ``retrieve(query, gallery, *, k) -> (probabilities, rows)``, from the
    ``features`` of predictions, (Q, E) and (G, E), to (Q, k) each, best first.
    """

    def forward(self, inputs: Tensor, /) -> dict[str, Tensor]: ...

    def predict(self, inputs: Any, /) -> Sequence[Detections]:
        """Takes ``score_threshold``, ``nms_threshold`` and ``max_detections``; their defaults are the file's."""
        ...

    def scored_boxes(self, raw: dict[str, Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What ``predict`` suppresses, each class on its own: boxes (N, P, K, 4), or (N, P, 1, 4) where the classes
        share them, xyxy in pixels of the images, and scores (N, P, K), -1 where a row is empty."""
        ...


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
