"""The system around any network that maps images to per-pixel logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from torchive.nn.pixel_cross_entropy import PixelCrossEntropy
from torchive.structures import Segmentation


class Segmenter(nn.Module):
    """Any dense network as a segmentation system: ``forward``, ``losses`` and ``predict``.

    Args:
        network: maps (N, C, H, W) to (N, K, H, W) logits.
        loss: a loss of (N, K, H, W) logits and (N, H, W) classes; cross-entropy that ignores 255 if None.
    """

    task = "segmentation"

    def __init__(self, network: nn.Module, *, loss: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        self.loss = PixelCrossEntropy() if loss is None else loss

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)  # (N, K, H, W)

    def losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The one loss, ``{"loss": scalar}``, of (N, C, H, W) images and (N, H, W) classes."""
        return {"loss": self.loss(self(inputs), targets)}

    def predict(self, inputs: Tensor) -> Sequence[Segmentation]:
        """The class of each pixel with its scores, one ``Segmentation`` per image."""
        scores = self(inputs).float().softmax(1)  # (N, K, H, W)
        return [Segmentation(labels, s) for labels, s in zip(scores.argmax(1), scores, strict=True)]
