"""An image network from a backbone: its coarsest map, averaged, and a linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from torchive.nn.network import build_features


class PooledNetwork(nn.Module):
    """A backbone as an image network: (N, C, H, W) to logits (N, K).

    Args:
        backbone: ``timm/NAME``, ``torchvision/NAME`` or a module with ``levels``; its coarsest map is averaged.
        num_classes: K.
        in_channels: C, for a named backbone.
        drop: share of the averaged features that is dropped in training.

    Raises:
        ValueError: an unknown backbone, ``num_classes`` below one, or ``drop`` outside [0, 1).
    """

    def __init__(
        self, backbone: str | nn.Module, *, num_classes: int = 1000, in_channels: int = 3, drop: float = 0.0
    ) -> None:
        super().__init__()
        if num_classes < 1 or not 0 <= drop < 1:
            raise ValueError(f"expected num_classes >= 1 and drop in [0, 1), got {num_classes} and {drop}")
        self.backbone = build_features(backbone, in_channels=in_channels)
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(self.backbone.levels[-1].channels, num_classes)  # type: ignore[index,union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.backbone(x)[-1].mean((2, 3))))  # (N, K)
