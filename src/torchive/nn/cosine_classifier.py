"""The last layer of class-level similarity losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchive.nn.network import build_network


class CosineClassifier(nn.Module):
    """(N, D) features to (N, K) cosines with K learnt class vectors, in float32 or better.

    Args:
        in_channels: D.
        num_classes: K.

    Raises:
        ValueError: ``in_channels`` or ``num_classes`` below one; in ``forward``, an input that is not (N, D).
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        if min(in_channels, num_classes) < 1:
            raise ValueError(f"in_channels and num_classes must be >= 1, got {in_channels} and {num_classes}")
        self.weight = nn.Parameter(torch.empty(num_classes, in_channels))
        nn.init.normal_(self.weight, std=in_channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.weight.shape[1]:
            raise ValueError(f"expected (N, {self.weight.shape[1]}), got shape {tuple(x.shape)}")
        kind = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.normalize(x.to(kind), dim=1), F.normalize(self.weight.to(kind), dim=1))  # (N, K)


class CosineNetwork(nn.Module):
    """An image network whose outputs are cosines to class vectors: (N, C, H, W) to (N, K).

    Args:
        network: ``timm/NAME`` or ``torchvision/NAME``, built with ``features`` outputs; or a module that gives (N, D).
        features: D, the length of the embedding.
        num_classes: K.
        in_channels: C; not used where ``network`` is a module.

    Raises:
        ValueError: the network's name is unknown, or a number is below one.
    """

    def __init__(
        self,
        network: str | nn.Module = "timm/resnet10t",
        *,
        features: int = 64,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if isinstance(network, str):
            network = build_network(network, num_classes=features, in_channels=in_channels)
        self.network = network
        self.head = CosineClassifier(features, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.network(x))  # (N, K)
