"""The procedure around any network that gives embeddings: trained with class labels, kept without the classes."""

from __future__ import annotations

from torch import Tensor, nn

from torchive.nn.network import build_network
from torchive.structures import Batch


class Embedder(nn.Module):
    """Trains a network of embeddings with a loss of embeddings and classes; ``deployable`` is the network alone.

    Args:
        network: ``timm/NAME`` or ``torchvision/NAME``, built with ``embedding_dim`` outputs, or a module that gives
            (N, D).
        loss: of embeddings (N, D) and classes (N,); its parameters, such as class vectors, are trained too.
        embedding_dim: D; not used where ``network`` is a module.
        in_channels: C; not used where ``network`` is a module.

    Raises:
        ValueError: the network's name is unknown.
    """

    def __init__(
        self, network: str | nn.Module, loss: nn.Module, *, embedding_dim: int = 64, in_channels: int = 3
    ) -> None:
        super().__init__()
        if isinstance(network, str):
            network = build_network(network, num_classes=embedding_dim, in_channels=in_channels)
        self.network, self.loss = network, loss

    def forward(self, inputs: Tensor) -> Tensor:
        """Embeddings (N, D) of images (N, C, H, W)."""
        return self.network(inputs)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The one loss, ``{"loss": scalar}``."""
        return {"loss": self.loss(self(batch.inputs), batch.targets)}

    def deployable(self) -> nn.Module:
        """The network, images (N, C, H, W) to embeddings (N, D)."""
        return self.network
