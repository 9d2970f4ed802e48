"""The head: one or two maps to class scores."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchive.methods.blocks.bilinear_cnn.pooling import BilinearPooling, CompactBilinearPool


class BilinearHead(nn.Module):
    """Maps (N, C, *S), and for two streams (N, D, *S), to (N, K) scores: bilinear pooling and a linear classifier.

    The classifier has C D K weights without an option: 52 million for 512 channels and 200 classes.

    Args:
        in_channels: C.
        num_classes: K.
        second_channels: D, for two streams; None for one that is shared.
        projection: channels to which a 1 x 1 convolution brings each map first; 0 takes the maps as they are.
        compact: "none", "triangle" or "sketch", see ``BilinearPooling``.
        out_channels: d of the sketch.
        root_iterations: Newton-Schulz iterations of the matrix square root; 0 takes none, the improved form 5.
        ridge: what is added to the diagonal before the matrix root.
        eps: what keeps the root's gradient finite.
        rate: multiple of the learning rate for the classifier (``parameter_rules``); 100 in the release.

    Raises:
        ValueError: a number out of range, or options that do not go together; in ``forward``, other shapes.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        second_channels: int | None = None,
        projection: int = 0,
        compact: str = "none",
        out_channels: int = 8192,
        root_iterations: int = 0,
        ridge: float = 1e-5,
        eps: float = 1e-5,
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        self.rate = rate
        if min(in_channels, num_classes) < 1 or projection < 0:
            given = f"{in_channels}, {num_classes} and {projection}"
            raise ValueError(f"expected in_channels and num_classes >= 1 and projection >= 0, got {given}")
        self.in_channels, self.second_channels = in_channels, second_channels
        second = None if second_channels is None else projection or second_channels
        self.pooling = BilinearPooling(
            projection or in_channels,
            second_channels=second,
            compact=compact,
            out_channels=out_channels,
            root_iterations=root_iterations,
            ridge=ridge,
            eps=eps,
        )
        sizes = [size for size in (in_channels, second_channels) if size is not None and projection]
        self.projections = nn.ModuleList(nn.Conv1d(size, projection, 1, bias=False) for size in sizes)
        self.classifier = nn.Linear(self.pooling.out_channels, num_classes)

    @staticmethod
    def from_module(old: nn.Module, *, channels: int, **options: Any) -> CompactBilinearPool:
        """The layer that takes a global mean's place; the network's own linear layer stays as the classifier."""
        return CompactBilinearPool.from_module(old, channels=channels, **options)

    def parameter_rules(self) -> dict[str, dict[str, float]]:
        """The classifier sees numbers of length one in all, and may learn at a rate of its own."""
        rule = {"lr": self.rate}
        return {"classifier.weight": rule, "classifier.bias": rule} if self.rate != 1 else {}

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.classifier(self.descriptor(x, y))  # (N, K)

    def descriptor(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """What the classifier sees, (N, F), of length one; the paper trains an SVM on it, see ``fit_svm``."""
        maps = [x] if y is None else [x, y]
        if len(maps) == 2 and self.second_channels is None:
            raise ValueError("expected 1 map, got 2")
        for place, part in enumerate(self.projections[: len(maps)]):
            maps[place] = self._projected(maps[place], part)
        return self.pooling(*maps)

    @staticmethod
    def _projected(x: Tensor, part: nn.Module) -> Tensor:
        channels = part.in_channels
        if x.ndim < 3 or x.shape[1] != channels:
            raise ValueError(f"expected (N, {channels}, *S), got shape {tuple(x.shape)}")
        return part(x.flatten(2)).unflatten(2, x.shape[2:])
