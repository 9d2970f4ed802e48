"""The system around any network that maps images to logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from torchive.nn.network import build_network
from torchive.structures import Classification


class Classifier(nn.Module):
    """Any image network as a classification system: ``forward``, ``losses`` and ``predict``.

    Args:
        network: ``timm/NAME``, ``torchvision/NAME`` or a module that maps (N, C, H, W) to (N, K).
        num_classes: K; not used where ``network`` is a module.
        in_channels: C; not used where ``network`` is a module.
        loss: a loss of (N, K) logits and (N,) classes; cross-entropy if None.
        options: further arguments of the named network.

    Raises:
        ValueError: the network's name is unknown.
    """

    task = "classification"

    def __init__(
        self,
        network: str | nn.Module = "timm/resnet18",
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        loss: nn.Module | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(network, str):
            network = build_network(network, num_classes=num_classes, in_channels=in_channels, **(options or {}))
        self.network = network
        self.loss = nn.CrossEntropyLoss() if loss is None else loss

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)  # (N, K)

    def losses(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The one loss, ``{"loss": scalar}``, of (N, C, H, W) images and (N,) classes."""
        return {"loss": self.loss(self(inputs), targets)}

    def predict(self, inputs: Tensor) -> Sequence[Classification]:
        """Softmax scores, one ``Classification`` per image."""
        return [Classification(scores) for scores in self(inputs).float().softmax(1)]
